// Step 5: pixels, of three channels of 15 bits: RGB, or YCbCr to be converted; as bytes or as normalized floats.

#ifndef OUTPUT_H
#define OUTPUT_H

#include "filter.h"

#define COLOR_BITS 6  // fraction of 16-bit colors, which leaves room for what is below 0 and above 255

// JFIF's conversion, in parts of 2^15: red 1.402 Cr, green -0.344136 Cb - 0.714136 Cr, blue 1.772 Cb.
enum { CR_IN_RED = 13173 /* and 1 */, CB_IN_GREEN = 11277, CR_IN_GREEN = 23401, CB_IN_BLUE = 7471 /* less than 2 */ };

typedef struct {
  uint8_t *out;     // [size, size, 3], or float32
  int size, ycc;
  int is_float;
  float scale[3], bias[3];
} Output;

static Output make_output(const Request *r, int ycc) {
  Output o = {(uint8_t *)r->out, (int)r->size, ycc, r->normalize != 0, {0}, {0}};
  for (int c = 0; c < 3 && r->normalize; ++c) {
    o.scale[c] = ((const float *)r->normalize)[c] / (1 << COLOR_BITS);
    o.bias[c] = ((const float *)r->normalize)[3 + c];
  }
  return o;
}

#if defined(WITH_AVX2)

// Three vectors of 8 floats, one a channel, as 8 pixels. `past`: into memory, past the caches: a batch does not fit them.
static inline void write_floats(__m256 red, __m256 green, __m256 blue, float *to, int past) {
  const __m256 rg = _mm256_unpacklo_ps(red, green), gr = _mm256_unpackhi_ps(red, green);
  const __m256 br = _mm256_shuffle_ps(blue, red, 0x50), br_3 = _mm256_shuffle_ps(blue, red, 0xFA);      // b0 b0 r1 r1
  const __m256 gb = _mm256_shuffle_ps(green, blue, 0x55), gb_3 = _mm256_shuffle_ps(green, blue, 0xFF);  // g1 g1 b1 b1
  const __m256 first = _mm256_shuffle_ps(rg, br, 0x84);                                  // r0 g0 b0 r1
  const __m256 second = _mm256_shuffle_ps(gb, gr, 0x48);                                 // g1 b1 r2 g2
  const __m256 third = _mm256_shuffle_ps(br_3, gb_3, 0x88);                              // b2 r3 g3 b3
  const __m256 a = _mm256_permute2f128_ps(first, second, 0x20), b = _mm256_permute2f128_ps(third, first, 0x30),
               c = _mm256_permute2f128_ps(second, third, 0x31);
  if (past) {
    _mm256_stream_ps(to, a), _mm256_stream_ps(to + 8, b), _mm256_stream_ps(to + 16, c);
  } else {
    _mm256_storeu_ps(to, a), _mm256_storeu_ps(to + 8, b), _mm256_storeu_ps(to + 16, c);
  }
}

// Where in the channels' 16 bytes the bytes of 16 pixels are: those of a channel for each third; -1: another channel's.
static const int8_t BYTES_OF[3][3][16] = {
    {{0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5},
     {-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1},
     {-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1}},
    {{-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1},
     {5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10},
     {-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1}},
    {{-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1},
     {-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1},
     {10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15}},
};

// Three vectors of 16 bytes, one a channel, as 16 pixels.
static inline void write_bytes(const __m128i *colors, uint8_t *to) {
  for (int third = 0; third < 3; ++third) {
    __m128i bytes = _mm_setzero_si128();
    for (int c = 0; c < 3; ++c)
      bytes = _mm_or_si128(bytes, _mm_shuffle_epi8(colors[c], _mm_loadu_si128((const __m128i *)BYTES_OF[third][c])));
    _mm_storeu_si128((__m128i *)(to + 16 * third), bytes);
  }
}

// TILE pixels, to `out` [TILE, 3].
static inline void write_tile(const Output *o, const int16_t *const channels[3], void *out) {
  __m256i v[3];
  for (int c = 0; c < 3; ++c) {
    const __m256i words = _mm256_loadu_si256((const __m256i *)channels[c]);
    v[c] = _mm256_srai_epi16(_mm256_add_epi16(words, _mm256_set1_epi16(1)), 1);
  }
  if (o->ycc) {
    const __m256i middle = _mm256_set1_epi16(128 << COLOR_BITS);
    const __m256i cb = _mm256_sub_epi16(v[1], middle), cr = _mm256_sub_epi16(v[2], middle), y = v[0];
#define TIMES(a, b) _mm256_mulhrs_epi16(a, _mm256_set1_epi16(b))
    v[0] = _mm256_add_epi16(_mm256_add_epi16(y, cr), TIMES(cr, CR_IN_RED));
    v[1] = _mm256_sub_epi16(_mm256_sub_epi16(y, TIMES(cb, CB_IN_GREEN)), TIMES(cr, CR_IN_GREEN));
    v[2] = _mm256_sub_epi16(_mm256_add_epi16(y, _mm256_add_epi16(cb, cb)), TIMES(cb, CB_IN_BLUE));
#undef TIMES
  }
  const __m256i least = _mm256_setzero_si256(), most = _mm256_set1_epi16(255 << COLOR_BITS);
  for (int c = 0; c < 3; ++c) v[c] = _mm256_min_epi16(_mm256_max_epi16(v[c], least), most);
  if (o->is_float) {
    const int past = (uintptr_t)out % 64 == 0;  // whole cache lines
    for (int half = 0; half < 2; ++half) {
      __m256 f[3];
      for (int c = 0; c < 3; ++c) {
        const __m128i words = half ? _mm256_extracti128_si256(v[c], 1) : _mm256_castsi256_si128(v[c]);
        const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words));
        f[c] = _mm256_add_ps(_mm256_mul_ps(value, _mm256_set1_ps(o->scale[c])), _mm256_set1_ps(o->bias[c]));
      }
      write_floats(f[0], f[1], f[2], (float *)out + 24 * half, past);
    }
  } else {
    __m128i bytes[3];
    for (int c = 0; c < 3; ++c) {
      const __m256i sums = _mm256_add_epi16(v[c], _mm256_set1_epi16(1 << (COLOR_BITS - 1)));
      const __m256i rounded = _mm256_srai_epi16(sums, COLOR_BITS);
      bytes[c] = _mm_packus_epi16(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    write_bytes(bytes, out);
  }
}

#else

// a * b / 2^15, rounded.
static inline int times(int a, int b) { return (a * b + (1 << 14)) >> 15; }

// TILE pixels, to `out` [TILE, 3].
static inline void write_tile(const Output *o, const int16_t *const channels[3], void *out) {
  int16_t v[3][TILE];
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < TILE; ++i) v[c][i] = (int16_t)((channels[c][i] + 1) >> 1);
  for (int i = 0; o->ycc && i < TILE; ++i) {
    const int cb = v[1][i] - (128 << COLOR_BITS), cr = v[2][i] - (128 << COLOR_BITS), y = v[0][i];
    v[0][i] = (int16_t)(y + cr + times(cr, CR_IN_RED));
    v[1][i] = (int16_t)(y - times(cb, CB_IN_GREEN) - times(cr, CR_IN_GREEN));
    v[2][i] = (int16_t)(y + 2 * cb - times(cb, CB_IN_BLUE));
  }
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < TILE; ++i)
      v[c][i] = (int16_t)(v[c][i] < 0 ? 0 : v[c][i] > 255 << COLOR_BITS ? 255 << COLOR_BITS : v[c][i]);
  if (o->is_float)
    for (int i = 0; i < TILE; ++i)
      for (int c = 0; c < 3; ++c) ((float *)out)[3 * i + c] = (float)v[c][i] * o->scale[c] + o->bias[c];
  else
    for (int i = 0; i < TILE; ++i)
      for (int c = 0; c < 3; ++c)
        ((uint8_t *)out)[3 * i + c] = (uint8_t)((v[c][i] + (1 << (COLOR_BITS - 1))) >> COLOR_BITS);
}

#endif

// Pixels x..x+count-1 of row y, count <= TILE.
static inline void write_pixels(const Output *o, const int16_t *const channels[3], int y, int x, int count) {
  const size_t bytes = 3 * (o->is_float ? sizeof(float) : 1);
  uint8_t *to = o->out + bytes * ((size_t)y * (size_t)o->size + (size_t)x);
  if (count == TILE) {
    write_tile(o, channels, to);
  } else {
    float whole[3 * TILE];
    write_tile(o, channels, whole);
    memcpy(to, whole, bytes * (size_t)count);
  }
}

// All pixels are written: for other threads too.
static inline void end_output(void) {
#if defined(WITH_AVX2)
  _mm_sfence();
#endif
}

#endif
