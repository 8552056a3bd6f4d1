// Making an image smaller by the area filter: a pixel of the result is the mean of the rectangle that it covers.
//
// The same as OpenCV's INTER_AREA but for the last bit of sums, in a third of the time or less. Called through ctypes.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CHANNELS 3

#if defined(__x86_64__) && !defined(PORTABLE)
#define FOR_AVX2_TOO __attribute__((target_clones("avx2", "default")))
#else
#define FOR_AVX2_TOO
#endif

// The fields of a request, as Python lays them out (ffcv_fields/jpeg.py). Addresses are integers.
typedef struct {
  int64_t source, height, width;          // uint8 [height, width, 3]
  int64_t out, smaller_height, smaller_width;  // uint8 [smaller_height, smaller_width, 3]
  int64_t sums, taps;                     // float [3 * width + 1], Tap [smaller_width]
} AreaRequest;

// The samples along a row that become one: the first and the last of them in part.
typedef struct {
  int32_t first, last;
  float of_first, of_last;
} Tap;

// How much of sample `at` lies between `from` and `to`, which are lengths in samples.
static inline float overlap(int64_t at, double from, double to) {
  const double low = at > from ? (double)at : from, high = at + 1 < to ? (double)(at + 1) : to;
  return (float)(high - low);
}

FOR_AVX2_TOO static void add_row(float *restrict sums, const uint8_t *restrict row, float weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * (float)row[i];
}

// Three channels, and what stands behind them.
typedef float Pixel __attribute__((vector_size(16)));
typedef uint32_t Bytes __attribute__((vector_size(16)));

static inline Pixel pixel_at(const float *sum) {
  Pixel pixel;
  memcpy(&pixel, sum, sizeof pixel);
  return pixel;
}

// Rounded, halves to even: added to 1.5 * 2^23 a float's lowest bits are the number.
static inline void write_bytes(uint8_t *out, Pixel pixel) {
  const Bytes above = (Bytes)(pixel > 255);  // by the last bit of a sum
  const Bytes bytes = ((Bytes)(pixel + 12582912) & ~above) | (255 & above);
  for (int c = 0; c < CHANNELS; ++c) out[c] = (uint8_t)bytes[c];
}

// Returns 0, or 1: not smaller.
int64_t area_resize(int64_t request) {
  const AreaRequest *r = (const AreaRequest *)request;
  if (r->smaller_height < 1 || r->smaller_width < 1) return 1;
  if (r->smaller_height > r->height || r->smaller_width > r->width) return 1;
  const double step_y = (double)r->height / (double)r->smaller_height;
  const double step_x = (double)r->width / (double)r->smaller_width;
  const float share = (float)(1 / (step_x * step_y));
  const uint8_t *source = (const uint8_t *)r->source;
  uint8_t *out = (uint8_t *)r->out;
  float *sums = (float *)r->sums;
  Tap *taps = (Tap *)r->taps;
  for (int64_t x = 0; x < r->smaller_width; ++x) {
    const double left = (double)x * step_x, right = x + 1 < r->smaller_width ? left + step_x : (double)r->width;
    const int64_t first = (int64_t)left;
    int64_t last = (int64_t)ceil(right) - 1;
    if (last >= r->width) last = r->width - 1;
    taps[x] = (Tap){(int32_t)first, (int32_t)last, overlap(first, left, right),
                    last > first ? overlap(last, left, right) : 0};
  }
  for (int64_t y = 0; y < r->smaller_height; ++y) {
    const double top = (double)y * step_y, bottom = y + 1 < r->smaller_height ? top + step_y : (double)r->height;
    memset(sums, 0, sizeof(float) * CHANNELS * (size_t)r->width);
    for (int64_t i = (int64_t)top; i < r->height && (double)i < bottom; ++i)
      add_row(sums, source + i * r->width * CHANNELS, overlap(i, top, bottom), r->width * CHANNELS);
    for (int64_t x = 0; x < r->smaller_width; ++x, out += CHANNELS) {
      const Tap tap = taps[x];
      const float *first = sums + (ptrdiff_t)tap.first * CHANNELS, *last = sums + (ptrdiff_t)tap.last * CHANNELS;
      Pixel mean = tap.of_first * pixel_at(first) + tap.of_last * pixel_at(last);
      for (const float *sum = first + CHANNELS; sum < last; sum += CHANNELS) mean += pixel_at(sum);
      write_bytes(out, mean * share);
    }
  }
  return 0;
}
