// Writing a JPEG: its header, and bits with what must be stuffed between them.

#ifndef JPEG_OUT_H
#define JPEG_OUT_H

#include "bits.h"

#define CATEGORIES 12  // of DC differences that a baseline table has codes for

// --- tables that DC differences are written by ----------------------------------------------------------------------

typedef struct {
  const uint8_t *bits, *values;  // bits[1..16]: codes of each length
  uint16_t code[16];
  uint8_t length[16];  // 0: none
} DcCodes;

static const uint8_t STANDARD_BITS[2][17] = {{0, 0, 1, 5, 1, 1, 1, 1, 1, 1}, {0, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
static const uint8_t STANDARD_VALUES[CATEGORIES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

static void fill_dc_codes(DcCodes *codes) {
  memset(codes->length, 0, sizeof codes->length);
  for (int length = 1, code = 0, at = 0; length <= 16; ++length, code <<= 1)
    for (int i = 0; i < codes->bits[length]; ++i, ++code, ++at)
      codes->code[codes->values[at]] = (uint16_t)code, codes->length[codes->values[at]] = (uint8_t)length;
}

// The file's table if it has all differences, else the standard one. (make_table has found its values below 16.)
static void make_dc_codes(DcCodes *codes, const JHUFF_TBL *table, int number) {
  codes->bits = table->bits, codes->values = table->huffval;
  fill_dc_codes(codes);
  int all = 1;
  for (int i = 0; i < CATEGORIES; ++i) all &= codes->length[i] > 0;
  if (all) return;
  codes->bits = STANDARD_BITS[number > 0], codes->values = STANDARD_VALUES;
  fill_dc_codes(codes);
}

// --- writing -----------------------------------------------------------------------------------------------------------

// Bits to be written: the lowest `count` of `buffer`; at most 7 after `flush`.
typedef struct {
  uint64_t buffer;
  int count;
  uint8_t *next;
} Writer;

static inline __attribute__((always_inline)) Writer put(Writer w, uint64_t bits, int count) {
  return (Writer){w.buffer << count | bits, w.count + count, w.next};
}

static __attribute__((noinline, cold)) uint8_t *flush_stuffed(uint8_t *next, uint64_t word, int bytes) {
  for (; bytes > 0; --bytes, word <<= 8) {
    *next++ = (uint8_t)(word >> 56);
    if (word >> 56 == 0xFF) *next++ = 0;
  }
  return next;
}

// Whole bytes to memory, where 8 more bytes are free.
static inline __attribute__((always_inline)) Writer flush(Writer w) {
  if (w.count < 8) return w;
  const uint64_t word = w.buffer << (64 - w.count);
  const int bytes = w.count >> 3;
  if (__builtin_expect(!may_have_ff(word), 1)) {
    const uint64_t out = big_endian(word);
    memcpy(w.next, &out, 8);
    w.next += bytes;
  } else {
    w.next = flush_stuffed(w.next, word, bytes);
  }
  w.count &= 7;
  w.buffer &= (1u << w.count) - 1;
  return w;
}

// The last byte of a stretch, filled with ones.
static Writer end_stretch(Writer w) {
  const int missing = -w.count & 7;
  return flush(put(w, (1u << missing) - 1, missing));
}

static uint8_t *put_segment(uint8_t *next, int marker, int length) {
  *next++ = 0xFF, *next++ = (uint8_t)marker;
  *next++ = (uint8_t)((length + 2) >> 8), *next++ = (uint8_t)(length + 2);
  return next;
}

static uint8_t *put_table(uint8_t *next, int number, const uint8_t *bits, const uint8_t *values) {
  int count = 0;
  for (int i = 1; i <= 16; ++i) count += bits[i];
  next = put_segment(next, 0xC4, 17 + count);
  *next++ = (uint8_t)number;
  memcpy(next, bits + 1, 16);
  memcpy(next + 16, values, (size_t)count);
  return next + 16 + count;
}

// All that stands before the codes. EXIF and other segments of applications are left out, but for what says the colors.
static uint8_t *put_header(uint8_t *next, j_decompress_ptr info, int64_t interval, const DcCodes *dc) {
  static const uint8_t ZIGZAG[64] = {
      0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
      41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
      30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
  int quantizers = 0, dc_tables = 0, ac_tables = 0;  // bits: those that are written
  *next++ = 0xFF, *next++ = 0xD8;
  if (info->saw_JFIF_marker) {
    next = put_segment(next, 0xE0, 14);
    memcpy(next, "JFIF\0\1\1\0\0\1\0\1\0\0", 14);
    next += 14;
  }
  if (info->saw_Adobe_marker) {
    next = put_segment(next, 0xEE, 12);
    memcpy(next, "Adobe\0\144\0\0\0\0", 11);
    next[11] = info->Adobe_transform;
    next += 12;
  }
  for (int i = 0; i < info->num_components; ++i) {
    const int number = info->comp_info[i].quant_tbl_no;
    if (quantizers & 1 << number) continue;
    quantizers |= 1 << number;
    next = put_segment(next, 0xDB, 65);
    *next++ = (uint8_t)number;
    for (int k = 0; k < 64; ++k) *next++ = (uint8_t)info->quant_tbl_ptrs[number]->quantval[ZIGZAG[k]];
  }
  for (int i = 0; i < info->num_components; ++i)
    dc_tables |= 1 << info->comp_info[i].dc_tbl_no, ac_tables |= 1 << info->comp_info[i].ac_tbl_no;
  next = put_segment(next, (dc_tables | ac_tables) > 3 ? 0xC1 : 0xC0, 6 + 3 * info->num_components);  // 0xC0: baseline
  *next++ = 8;
  *next++ = (uint8_t)(info->image_height >> 8), *next++ = (uint8_t)info->image_height;
  *next++ = (uint8_t)(info->image_width >> 8), *next++ = (uint8_t)info->image_width;
  *next++ = (uint8_t)info->num_components;
  for (int i = 0; i < info->num_components; ++i) {
    const jpeg_component_info *c = &info->comp_info[i];
    *next++ = (uint8_t)c->component_id;
    *next++ = (uint8_t)(c->h_samp_factor << 4 | c->v_samp_factor);
    *next++ = (uint8_t)c->quant_tbl_no;
  }
  for (int i = 0; i < NUM_HUFF_TBLS; ++i) {
    if (dc_tables & 1 << i) next = put_table(next, i, dc[i].bits, dc[i].values);
    const JHUFF_TBL *ac = info->ac_huff_tbl_ptrs[i];
    if (ac_tables & 1 << i) next = put_table(next, 16 + i, ac->bits, ac->huffval);
  }
  if (interval) {
    next = put_segment(next, 0xDD, 2);
    *next++ = (uint8_t)(interval >> 8), *next++ = (uint8_t)interval;
  }
  next = put_segment(next, 0xDA, 4 + 2 * info->num_components);
  *next++ = (uint8_t)info->num_components;
  for (int i = 0; i < info->num_components; ++i) {
    const jpeg_component_info *c = info->cur_comp_info[i];
    *next++ = (uint8_t)c->component_id;
    *next++ = (uint8_t)(c->dc_tbl_no << 4 | c->ac_tbl_no);
  }
  *next++ = 0, *next++ = 63, *next++ = 0;
  return next;
}

#endif
