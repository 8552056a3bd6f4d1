// Step 4: the filter. Of a training crop, each output pixel is the mean of the rectangle of the image that it covers;
// enlarging is bilinear. Of a center crop it is PIL's bilinear filter: a tent, twice as wide as that.
//
// The filter takes a component as it is stored. Where the file has every second sample of it, libjpeg would first set
// pixels between them (3/4 of the nearer, 1/4 of the other); here those weights are in the filter's own, so that the
// result is that of the whole image, and no such pixel is ever made.

#ifndef FILTER_H
#define FILTER_H

#include "crop.h"

#if defined(WITH_AVX2)
#include <immintrin.h>
#endif

#define TILE 16          // output columns (of raw pixels: rows) made at once
#define WEIGHT_BITS 15   // weights of an output pixel sum to 2^15
#define SUM_BITS 7       // fixed-point fraction of what the passes make: 15 bits with the sample's 8
#define GREATEST_COUNT 192  // samples of an output pixel: their rounding errors never leave 16 bits

// One axis: which samples of a component make which output pixels.
typedef struct {
  int start, length, size;  // the crop's pixels start..start+length-1 become `size`
  int samples;              // of the component, along the whole image
  int pixels;               // that one of them covers
  int triangle, flip;       // whether pixels between samples are interpolated; whether the output is mirrored
  int resized, from;        // 0, or by PIL's filter: the crop becomes so many, the output is `size` of them from here on
} Axis;

// An output pixel: samples first..first+count-1 times their weights.
typedef struct {
  int first, count;
  const int16_t *weights;
} Tap;

typedef struct {
  Tap *taps;          // [size]
  int first, behind;  // the samples that they need
} Taps;

static inline size_t weights_of(int64_t length, int64_t size) { return (size_t)(2 * length + 8 * size); }

// Shares of `count` samples, which sum to `sum`, as weights (one alone is at most 2^15 - 1).
static inline void make_weights(const int *shares, int count, int sum, int16_t *weights) {
  const float scale = (float)(1 << WEIGHT_BITS) / (float)sum;
  for (int i = 0, yet = 0, before = 0; i < count; ++i) {
    yet += shares[i];
    const int now = (int)((float)yet * scale + 0.5f), weight = now - before;  // rounding errors do not add up
    weights[i] = (int16_t)(weight > 32767 ? 32767 : weight), before = now;
  }
}

// Shares of what covers low..high-1, if one after the other covers `unit`. Returns how many, and the first.
static inline int covering(uint32_t low, uint32_t high, uint32_t unit, int *first, int *shares) {
  const uint32_t begin = low / unit, last = (high - 1) / unit;
  *first = (int)begin;
  shares[0] = (int)(unit - (low - begin * unit));
  for (uint32_t i = 1; i <= last - begin; ++i) shares[i] = (int)unit;
  shares[last - begin] -= (int)((last + 1 - begin) * unit - (high - begin * unit));
  return (int)(last - begin) + 1;
}

// Shares of the pixels, at most two, between whose centers the center of output pixel `at` is.
static inline int bilinear(const Axis *a, int at, int *first, int *shares) {
  const int unit = 2 * a->size;
  int64_t center = (2 * (int64_t)at + 1) * a->length - a->size;
  if (center < 0) center = 0;
  const int pixel = (int)(center / unit), second = (int)(center % unit);
  *first = a->start + pixel;
  if (pixel >= a->length - 1 || second == 0) {
    shares[0] = unit;
    return 1;
  }
  shares[0] = unit - second, shares[1] = second;
  return 2;
}

// Shares of the samples, which stand for `pixels` pixels each, that a tent around output pixel `at` covers, as PIL does.
static inline int tent(const Axis *a, int at, int pixels, int *first, int *shares, int *sum) {
  const double scale = (double)a->length / a->resized, half = scale > 1 ? scale : 1;  // half the width of the tent
  const double middle = (a->from + at + 0.5) * scale;                                 // in pixels of the crop
  const double low = middle - half + 0.5, high = middle + half + 0.5;
  const int begin = low > 0 ? (int)low : 0, behind = high < a->length ? (int)high : a->length;
  int count = 0;
  *first = (a->start + begin) / pixels, *sum = 0;
  for (int i = begin; i < behind; ++i) {
    const double distance = (i + 0.5 - middle) / half, height = 1 - (distance < 0 ? -distance : distance);
    const int sample = (a->start + i) / pixels - *first, share = height > 0 ? (int)(height * (1 << 14) + 0.5) : 0;
    while (count <= sample) shares[count++] = 0;
    shares[sample] += share, *sum += share;
  }
  return count;
}

// Shares of pixels become those of the samples that they are made from, in quarters.
static inline int interpolated(const Axis *a, const int *of_pixels, int pixels, int *first, int *shares) {
  const int begin = *first, end = begin + pixels;  // a pixel is 3/4 of its own sample, 1/4 of the one on its side
  int sample = (begin + 1) / 2 - 1, last = end / 2;
  if (sample < 0) sample = 0;
  if (last >= a->samples) last = a->samples - 1;
  *first = sample;
  for (int i = sample; i <= last; ++i) {
#define SHARE(pixel) ((pixel) < begin || (pixel) >= end ? 0 : of_pixels[(pixel)-begin])
    const int left = SHARE(2 * i), right = SHARE(2 * i + 1);
    shares[i - sample] = 3 * (left + right) + (i == 0 ? left : SHARE(2 * i - 1)) +
                         (i == a->samples - 1 ? right : SHARE(2 * i + 2));
#undef SHARE
  }
  return last - sample + 1;
}

static int make_taps(const Axis *a, Taps *to, uint8_t **memory) {
  // Reducing, places are counted in parts of a pixel: `size` to a pixel, so that an output pixel covers `length`.
  const uint32_t size = (uint32_t)a->size, length = (uint32_t)a->length;
  const int reducing = length >= size;
  const int widest = a->resized ? 2 * (a->length / a->resized + 1) : a->length / a->size;
  if (widest / a->pixels + 3 > GREATEST_COUNT) return BAD_SIZE;
  to->taps = take(memory, sizeof(Tap) * size);
  int16_t *weights = take(memory, 2 * weights_of(a->length, a->size));
  to->first = a->samples, to->behind = 0;
  for (int at = 0; at < a->size; ++at) {
    int shares[GREATEST_COUNT], of_pixels[2 * GREATEST_COUNT], first, count, sum = a->length;
    of_pixels[1] = 0;
    const uint32_t low = (uint32_t)a->start * size + (uint32_t)at * length;
    if (a->resized) {
      count = tent(a, at, a->triangle ? 1 : a->pixels, &first, a->triangle ? of_pixels : shares, &sum);
      if (a->triangle) count = interpolated(a, of_pixels, count, &first, shares), sum *= 4;
    } else if (reducing && !a->triangle) {
      count = covering(low, low + length, size * (uint32_t)a->pixels, &first, shares);
    } else {
      count = reducing ? covering(low, low + length, size, &first, of_pixels) : bilinear(a, at, &first, of_pixels);
      if (!reducing) sum = 2 * a->size;
      if (a->triangle) {
        count = interpolated(a, of_pixels, count, &first, shares), sum *= 4;
      } else {
        const int both = first / a->pixels == (first + count - 1) / a->pixels;  // pixels of one sample
        shares[0] = both ? sum : of_pixels[0];
        if (!both) shares[1] = of_pixels[1];
        count = both ? 1 : count, first /= a->pixels;
      }
    }
    make_weights(shares, count, sum, weights);
    to->taps[a->flip ? a->size - 1 - at : at] = (Tap){first, count, weights};
    weights += count;
    if (first < to->first) to->first = first;
    if (first + count > to->behind) to->behind = first + count;
  }
  return OK;
}

// --- the two passes ------------------------------------------------------------------------------------------------

// sample * weight / 2^WEIGHT_BITS, rounded.
static inline int weighted(int sample, int weight) {
  return (sample * weight + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS;
}

// to[i] = sum of weights[j] * rows[j * stride + i], for i < count; SUM_BITS of it are fraction. Reads nothing else.
static void mix_bytes(const uint8_t *rows, ptrdiff_t stride, Tap tap, int count, int16_t *to) {
  for (int i = 0; count >= 32 && i < count; i += 32) {
    if (i + 32 > count) i = count - 32;  // some once more
#if defined(WITH_AVX2)
    __m256i low = _mm256_setzero_si256(), high = low;
    const uint8_t *row = rows + i;
    for (int j = 0; j < tap.count; ++j, row += stride) {
      const __m256i weight = _mm256_set1_epi16(tap.weights[j]);
      const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)row));
      const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(row + 16)));
      low = _mm256_add_epi16(low, _mm256_mulhrs_epi16(_mm256_slli_epi16(a, SUM_BITS), weight));
      high = _mm256_add_epi16(high, _mm256_mulhrs_epi16(_mm256_slli_epi16(b, SUM_BITS), weight));
    }
    _mm256_storeu_si256((__m256i *)(to + i), low);
    _mm256_storeu_si256((__m256i *)(to + i + 16), high);
#else
    int16_t sums[32] = {0};
    for (int j = 0; j < tap.count; ++j)
      for (int l = 0; l < 32; ++l)
        sums[l] = (int16_t)(sums[l] + weighted(rows[j * stride + i + l] << SUM_BITS, tap.weights[j]));
    memcpy(to + i, sums, sizeof sums);
#endif
  }
  for (int i = 0; count < 32 && i < count; ++i) {
    int sum = 0;
    for (int j = 0; j < tap.count; ++j) sum += weighted(rows[j * stride + i] << SUM_BITS, tap.weights[j]);
    to[i] = (int16_t)sum;
  }
}

// 8 rows of 8 become columns.
static inline void transpose(const int16_t *from, ptrdiff_t from_stride, int16_t *to, ptrdiff_t to_stride) {
#if defined(WITH_AVX2)
  __m128i v[8], a[8];
  for (int j = 0; j < 8; ++j) v[j] = _mm_loadu_si128((const __m128i *)(from + j * from_stride));
  for (int j = 0; j < 4; ++j)
    a[2 * j] = _mm_unpacklo_epi16(v[j], v[j + 4]), a[2 * j + 1] = _mm_unpackhi_epi16(v[j], v[j + 4]);
  for (int j = 0; j < 4; ++j)
    v[2 * j] = _mm_unpacklo_epi16(a[j], a[j + 4]), v[2 * j + 1] = _mm_unpackhi_epi16(a[j], a[j + 4]);
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_si128((__m128i *)(to + 2 * j * to_stride), _mm_unpacklo_epi16(v[j], v[j + 4]));
    _mm_storeu_si128((__m128i *)(to + (2 * j + 1) * to_stride), _mm_unpackhi_epi16(v[j], v[j + 4]));
  }
#else
  for (int j = 0; j < 8; ++j)
    for (int l = 0; l < 8; ++l) to[j * to_stride + l] = from[l * from_stride + j];
#endif
}

// to[i] = sum of weights[j] * rows[j * stride + i], of TILE columns of such sums.
static inline void mix_words(const int16_t *rows, ptrdiff_t stride, Tap tap, int16_t *to) {
#if defined(WITH_AVX2)
  __m256i sum = _mm256_setzero_si256();
  for (int j = 0; j < tap.count; ++j) {
    const __m256i row = _mm256_load_si256((const __m256i *)(rows + j * stride));
    sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(row, _mm256_set1_epi16(tap.weights[j])));
  }
  _mm256_store_si256((__m256i *)to, sum);
#else
  int16_t sum[TILE] = {0};
  for (int j = 0; j < tap.count; ++j)
    for (int i = 0; i < TILE; ++i)
      sum[i] = (int16_t)(sum[i] + weighted(rows[j * stride + i], tap.weights[j]));
  memcpy(to, sum, sizeof sum);
#endif
}

#endif
