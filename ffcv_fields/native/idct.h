// Step 3: blocks of coefficients become samples, by libjpeg's accurate inverse DCT ("islow"), bit for bit.
//
// Samples are stored column by column: the transform's second pass has a block's columns at hand, and the filter, which
// comes next, reduces the width first.

#ifndef IDCT_H
#define IDCT_H

#include "crop.h"

#if defined(WITH_AVX2)
#include <immintrin.h>
#endif

// A block and where its samples go: `to[x * stride + y]`.
typedef struct {
  const int16_t *block;
  uint8_t *to;
} Transform;

// 13-bit fixed point, as in libjpeg's jidctint.c (after Loeffler, Ligtenberg and Moschytz). There the odd part's
// products are shared between sums; here they are multiplied out, which gives the same integers.
#define CONST_BITS 13
#define PASS1_BITS 2
enum {
  F0298 = 2446, F0390 = 3196, F0541 = 4433, F0765 = 6270, F0899 = 7373, F1175 = 9633,
  F1501 = 12299, F1847 = 15137, F1961 = 16069, F2053 = 16819, F2562 = 20995, F3072 = 25172,
};
// Of in[1], in[3], in[5], in[7], for the sum and difference of outputs 0 and 7, 1 and 6, 2 and 5, 3 and 4.
static const int16_t ODD[4][4] = {
    {F1501 - F0899 - F0390 + F1175, F1175, F1175 - F0390, F1175 - F0899},
    {F1175, F3072 - F2562 - F1961 + F1175, F1175 - F2562, F1175 - F1961},
    {F1175 - F0390, F1175 - F2562, F2053 - F2562 - F0390 + F1175, F1175},
    {F1175 - F0899, F1175 - F1961, F1175, F0298 - F0899 - F1961 + F1175},
};

#if defined(WITH_AVX2)

static inline __m256i two(int first, int second) {
  return _mm256_set1_epi32((int)((unsigned)second << 16 | (unsigned)(first & 0xFFFF)));
}

// One pass along the vectors of `v`, for 16 columns: 8 of one block, 8 of another. Results are shifted by `shift` bits.
static inline __attribute__((always_inline)) void islow_pass(__m256i *v, int shift) {
  const __m256i rounding = _mm256_set1_epi32(1 << (shift - 1));
  __m256i out[8][2];
  for (int half = 0; half < 2; ++half) {
#define PAIR(a, b) (half ? _mm256_unpackhi_epi16(v[a], v[b]) : _mm256_unpacklo_epi16(v[a], v[b]))
#define DOT(a, x, b, y) _mm256_add_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, y))
    const __m256i in04 = PAIR(0, 4), in26 = PAIR(2, 6), in13 = PAIR(1, 3), in57 = PAIR(5, 7);
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(in04, two(8192, 8192)), rounding);
    const __m256i difference = _mm256_add_epi32(_mm256_madd_epi16(in04, two(8192, -8192)), rounding);
    const __m256i wide = _mm256_madd_epi16(in26, two(F0541 + F0765, F0541));
    const __m256i narrow = _mm256_madd_epi16(in26, two(F0541, F0541 - F1847));
    const __m256i even[4] = {_mm256_add_epi32(sum, wide), _mm256_add_epi32(difference, narrow),
                             _mm256_sub_epi32(difference, narrow), _mm256_sub_epi32(sum, wide)};
    for (int i = 0; i < 4; ++i) {
      const __m256i odd = DOT(in13, two(ODD[i][0], ODD[i][1]), in57, two(ODD[i][2], ODD[i][3]));
      out[i][half] = _mm256_srai_epi32(_mm256_add_epi32(even[i], odd), shift);
      out[7 - i][half] = _mm256_srai_epi32(_mm256_sub_epi32(even[i], odd), shift);
    }
#undef PAIR
#undef DOT
  }
  for (int i = 0; i < 8; ++i) v[i] = _mm256_packs_epi32(out[i][0], out[i][1]);
}

// Rows become columns in both blocks.
static inline __attribute__((always_inline)) void transpose_two(__m256i *v) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(v[i], v[i + 4]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm256_unpacklo_epi16(b[i], b[i + 4]);
    v[2 * i + 1] = _mm256_unpackhi_epi16(b[i], b[i + 4]);
  }
}

// Both blocks' samples less 128: v[x], of 8 rows of `a` and 8 of `b`.
static inline __attribute__((always_inline)) void islow_two(__m256i *v, const Transform *a, const Transform *b,
                                                            const int16_t *quantizers) {
  for (int i = 0; i < 8; ++i) {
    const __m128i quantizer = _mm_loadu_si128((const __m128i *)quantizers + i);
    const __m256i rows = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a->block + i)),
        _mm_loadu_si128((const __m128i *)b->block + i), 1);
    v[i] = _mm256_mullo_epi16(rows, _mm256_broadcastsi128_si256(quantizer));
  }
  islow_pass(v, CONST_BITS - PASS1_BITS);
  transpose_two(v);
  islow_pass(v, CONST_BITS + PASS1_BITS + 3);
}

static void store_two(const __m256i *v, const Transform *a, const Transform *b, ptrdiff_t stride) {
  for (int i = 0; i < 8; i += 2) {
    const __m256i samples =
        _mm256_xor_si256(_mm256_packs_epi16(v[i], v[i + 1]), _mm256_set1_epi8((char)128));  // + 128
    const __m128i of_a = _mm256_castsi256_si128(samples), of_b = _mm256_extracti128_si256(samples, 1);
    _mm_storel_epi64((__m128i *)(a->to + i * stride), of_a);
    _mm_storeh_pd((double *)(a->to + (i + 1) * stride), _mm_castsi128_pd(of_a));
    _mm_storel_epi64((__m128i *)(b->to + i * stride), of_b);
    _mm_storeh_pd((double *)(b->to + (i + 1) * stride), _mm_castsi128_pd(of_b));
  }
}

// Means of 2^x by 2^y samples. Every second column rounds a half down, so that the mean color stays.
static void store_two_reduced(__m256i *v, const Transform *a, const Transform *b, ptrdiff_t stride, int x, int y) {
  const __m256i least = _mm256_set1_epi16(-128), most = _mm256_set1_epi16(127);
  for (int i = 0; i < 8; ++i) v[i] = _mm256_min_epi16(_mm256_max_epi16(v[i], least), most);
  for (int n = 4; n >= 8 >> x; n >>= 1)
    for (int i = 0; i < n; ++i) v[i] = _mm256_add_epi16(v[2 * i], v[2 * i + 1]);
  const int half = 1 << (x + y) >> 1;
  const __m128i shift = _mm_cvtsi32_si128(x + y);
  for (int i = 0; i < 8 >> x; ++i) {
    for (int n = 0; n < y; ++n) v[i] = _mm256_hadd_epi16(v[i], v[i]);
    const __m256i rounding = _mm256_set1_epi16((short)((128 << (x + y)) + half - i % 2));
    const __m256i means = _mm256_srl_epi16(_mm256_add_epi16(v[i], rounding), shift);
    const __m256i samples = _mm256_packus_epi16(means, means);
    const uint64_t of_a = (uint64_t)_mm256_extract_epi64(samples, 0), of_b = (uint64_t)_mm256_extract_epi64(samples, 2);
    memcpy(a->to + i * stride, &of_a, (size_t)(8 >> y));
    memcpy(b->to + i * stride, &of_b, (size_t)(8 >> y));
  }
}

#else

static inline int16_t saturated(int value) {
  return (int16_t)(value < -32768 ? -32768 : value > 32767 ? 32767 : value);
}

// One pass along the columns of 8 x 8; every one alike, so that compilers make vectors of them.
static inline void islow_pass(const int16_t *restrict in, int16_t *restrict out, int shift) {
  const int rounding = 1 << (shift - 1);
  for (int x = 0; x < 8; ++x) {
    const int16_t in0 = in[x], in1 = in[8 + x], in2 = in[16 + x], in3 = in[24 + x];
    const int16_t in4 = in[32 + x], in5 = in[40 + x], in6 = in[48 + x], in7 = in[56 + x];
    const int sum = in0 * 8192 + in4 * 8192 + rounding, difference = in0 * 8192 - in4 * 8192 + rounding;
    const int wide = in2 * (F0541 + F0765) + in6 * F0541, narrow = in2 * F0541 + in6 * (F0541 - F1847);
#define PUT(i, even)                                                                              \
  {                                                                                               \
    const int odd = in1 * ODD[i][0] + in3 * ODD[i][1] + in5 * ODD[i][2] + in7 * ODD[i][3];        \
    out[8 * i + x] = saturated((even + odd) >> shift);                                            \
    out[8 * (7 - i) + x] = saturated((even - odd) >> shift);                                      \
  }
    PUT(0, (sum + wide))
    PUT(1, (difference + narrow))
    PUT(2, (difference - narrow))
    PUT(3, (sum - wide))
#undef PUT
  }
}

static void islow_one(const Transform *t, const int16_t *quantizers, ptrdiff_t stride, int x, int y) {
  int16_t v[64], turned[64];
  uint8_t samples[64];
  for (int i = 0; i < 64; ++i) v[i] = (int16_t)(t->block[i] * quantizers[i]);
  islow_pass(v, turned, CONST_BITS - PASS1_BITS);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) v[8 * i + j] = turned[8 * j + i];
  islow_pass(v, turned, CONST_BITS + PASS1_BITS + 3);
  for (int i = 0; i < 64; ++i)
    samples[i] = (uint8_t)((turned[i] < -128 ? -128 : turned[i] > 127 ? 127 : turned[i]) + 128);
  for (int column = 0; column < 8 >> x; ++column)
    if (x == 0 && y == 0)
      memcpy(t->to + column * stride, samples + 8 * column, 8);
    else
      for (int row = 0; row < 8 >> y; ++row) {
        int sum = (1 << (x + y) >> 1) - column % 2;
        for (int i = 0; i < 1 << x; ++i)
          for (int j = 0; j < 1 << y; ++j) sum += samples[8 * ((column << x) + i) + (row << y) + j];
        t->to[column * stride + row] = (uint8_t)(sum >> (x + y));
      }
}

#endif

// Samples of blocks of one component; or means of 2^x by 2^y of them, of 8 >> x by 8 >> y.
static void islow(const Transform *blocks, int count, const int16_t *quantizers, ptrdiff_t stride, int x, int y) {
#if defined(WITH_AVX2)
  for (int i = 0; i < count; i += 2) {
    const Transform *a = &blocks[i], *b = &blocks[i + 1 < count ? i + 1 : i];
    __m256i v[8];
    islow_two(v, a, b, quantizers);
    if (x || y)
      store_two_reduced(v, a, b, stride, x, y);
    else
      store_two(v, a, b, stride);
  }
#else
  for (int i = 0; i < count; ++i) islow_one(&blocks[i], quantizers, stride, x, y);
#endif
}

#endif
