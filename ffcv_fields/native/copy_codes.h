// Copying the codes of a JPEG that is one Huffman-coded scan, with restart markers of our own between its MCUs.
//
// Codes of AC coefficients do not depend on what came before: they are read to find where the block ends, and written
// as they are. A DC coefficient is coded by its difference to the one before, or to 0 behind a marker. The file's own
// tables are kept; only where one for DC has no code for a difference that now occurs is the standard one put in its
// place. Every fault in the data, also those that libjpeg passes over in silence, is a refusal.

#ifndef COPY_CODES_H
#define COPY_CODES_H

#include "bits.h"

enum { KEPT = 0, DAMAGED = 1, OTHER_KIND = 2, TOO_LARGE = 3 };

// The fields of a request, as Python lays them out (ffcv_fields/jpeg.py, REQUEST). Addresses are integers.
typedef struct {
  int64_t source, bytes;   // the JPEG
  int64_t every, longest;  // restart markers every so many 16 pixels, 0: none; the greatest side that is kept, 0: any
  int64_t out, room;       // memory for the result
  int64_t written, height, width;  // answers
} KeepRequest;

#define MOST_OF_A_BLOCK 1024  // bytes, stuffed: 64 codes of 16 bits, values of 15
#define MOST_OF_A_HEADER 8192
#define GREATEST_DC 2047  // that a baseline table has a code for, as a difference to 0
#define CATEGORIES 12     // of such differences

static int ceil_of(int a, int b) { return (a + b - 1) / b; }

// MCUs between markers: the same distance in pixels whatever the size of an MCU.
static int64_t restart_interval(const KeepRequest *r, j_decompress_ptr info) {
  const int64_t width = info->num_components > 1 ? 8 * info->max_h_samp_factor : 8;
  const int64_t interval = 16 * r->every / width;
  return r->every == 0 ? 0 : interval < 1 ? 1 : interval > 65535 ? 65535 : interval;
}

// What the decoders of a `.beton` read, and PIL: gray or three components, of which each pixel has whole samples.
static int can_be_kept(j_decompress_ptr info) {
  const J_COLOR_SPACE space = info->jpeg_color_space;
  if (info->arith_code || info->data_precision != 8 || info->err->num_warnings) return 0;
  if (!(info->num_components == 1 && space == JCS_GRAYSCALE) &&
      !(info->num_components == 3 && (space == JCS_YCbCr || space == JCS_RGB)))
    return 0;
  for (int i = 0; i < info->num_components; ++i) {
    const jpeg_component_info *c = &info->comp_info[i];
    if (info->max_h_samp_factor % c->h_samp_factor || info->max_v_samp_factor % c->v_samp_factor) return 0;
    for (int j = 0; j < i; ++j)
      if (info->comp_info[j].component_id == c->component_id) return 0;
    const JQUANT_TBL *table = c->quant_tbl_no >= 0 && c->quant_tbl_no < NUM_QUANT_TBLS
                                  ? info->quant_tbl_ptrs[c->quant_tbl_no] : NULL;
    for (int k = 0; k < DCTSIZE2; ++k)
      if (table == NULL || table->quantval[k] < 1 || table->quantval[k] > 255) return 0;
  }
  return 1;
}

static int has_one_scan(j_decompress_ptr info) {
  if (info->progressive_mode || jpeg_has_multiple_scans(info) || info->comps_in_scan != info->num_components) return 0;
  if (info->Ss != 0 || info->Se != 63 || info->Ah != 0 || info->Al != 0) return 0;
  int blocks = 0;
  for (int i = 0; i < info->num_components; ++i) {
    const jpeg_component_info *c = &info->comp_info[i];
    const int dc = c->dc_tbl_no, ac = c->ac_tbl_no;
    if (dc < 0 || dc >= NUM_HUFF_TBLS || ac < 0 || ac >= NUM_HUFF_TBLS) return 0;
    if (!info->dc_huff_tbl_ptrs[dc] || !info->ac_huff_tbl_ptrs[ac]) return 0;
    blocks += c->h_samp_factor * c->v_samp_factor;
  }
  return info->num_components == 1 || blocks <= C_MAX_BLOCKS_IN_MCU;
}

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
  uint64_t word = w.buffer << (64 - w.count);
  const int bytes = w.count >> 3;
  // A byte of 0xFF, or what looks like one beside it: both in the slow way.
  if (__builtin_expect(((~word - 0x0101010101010101u) & word & 0x8080808080808080u) == 0, 1)) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    memcpy(w.next, &word, 8);
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

// --- copying -----------------------------------------------------------------------------------------------------------

typedef struct {
  Bits bits;
  Source source;
  Writer writer;
} Copy;

// What the next LOOK_BITS of the stream begin with: the code of a coefficient, of which the value need not be among
// them, and if it fits too the code of the next. `step` leads from the coefficient before to the last one here.
typedef struct {
  uint8_t bits, step;              // of both, values included; a step of NOT_HERE: the code is longer
  uint8_t first_bits, first_step;  // of the first alone
} Skip;

typedef struct {
  JHUFF_TBL from;  // what it was made of
  int made;
  Skip skips[1 << LOOK_BITS];
} SkipTable;

// `table` made of `from`, of which `make_table` has found that it is a code.
static void make_skips(SkipTable *table, const JHUFF_TBL *from) {
  if (table->made && memcmp(&table->from, from, sizeof *from) == 0) return;
  static _Thread_local uint8_t lengths[1 << LOOK_BITS];  // of the first code alone
  table->from = *from, table->made = 1;
  for (int i = 0; i < 1 << LOOK_BITS; ++i) table->skips[i] = (Skip){0, NOT_HERE, 0, NOT_HERE}, lengths[i] = LOOK_BITS;
  for (int length = 1, code = 0, at = 0; length <= LOOK_BITS; ++length, code <<= 1)
    for (int i = 0; i < from->bits[length]; ++i, ++code, ++at) {
      const int symbol = from->huffval[at];
      const uint8_t bits = (uint8_t)(length + (symbol & 15)), step = (uint8_t)step_of(symbol, 0);
      for (int rest = 0; rest < 1 << (LOOK_BITS - length); ++rest) {
        table->skips[code << (LOOK_BITS - length) | rest] = (Skip){bits, step, bits, step};
        lengths[code << (LOOK_BITS - length) | rest] = (uint8_t)length;
      }
    }
  for (int i = 0; i < 1 << LOOK_BITS; ++i) {
    Skip *skip = &table->skips[i];
    if (skip->first_step == NOT_HERE || skip->first_step == END_OF_BLOCK || skip->first_bits >= LOOK_BITS) continue;
    const int next = (i << skip->first_bits) & ((1 << LOOK_BITS) - 1);
    const Skip second = table->skips[next];
    if (second.first_step == NOT_HERE || skip->first_bits + lengths[next] > LOOK_BITS) continue;
    skip->bits = (uint8_t)(skip->first_bits + second.first_bits);
    skip->step = (uint8_t)(skip->first_step + second.first_step);
  }
}

// What a thread keeps from file to file.
typedef struct {
  Tables tables;
  SkipTable skips[NUM_HUFF_TBLS];
} CopyTables;

// The AC codes of a block. Returns 0, or 1 if they are damaged.
static inline __attribute__((always_inline)) int copy_ac(Copy *copy, const HuffmanTable *table, const Skip *skips) {
  Bits b = copy->bits;
  Writer w = copy->writer;
  for (int k = 0; k < 63;) {
    b = refill(b, &copy->source);
    w = flush(w);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {  // of at most LOOK_BITS + 15 each
      const Skip skip = skips[b.buffer >> (64 - LOOK_BITS)];
      const int next = k + skip.step;
      int count = skip.bits;
      if (__builtin_expect(next >= 63, 0)) {
        const int first = k + skip.first_step;
        if (skip.first_step == NOT_HERE) {
          b = refill(b, &copy->source);
          w = flush(w);
          const Bits before = b;
          int value;
          const int step = long_code(&b, table, table->look[b.buffer >> (64 - LOOK_BITS)], 0, &value);
          if (step < 0) return 1;
          count = before.left - b.left;
          w = put(w, before.buffer >> (64 - count), count);
          k += step;
          if (k > 63 && step != END_OF_BLOCK) return 1;
          break;
        }
        if (first >= 63) {  // the block is full, or ends here: a second code would be the next one's
          if (first > 63 && skip.first_step != END_OF_BLOCK) return 1;
          count = skip.first_bits;
        } else if (next > 63 && skip.step - skip.first_step != END_OF_BLOCK) {
          return 1;
        }
        w = put(w, b.buffer >> (64 - count), count);
        b = drop(b, count);
        k = 64;
        break;
      }
      w = put(w, b.buffer >> (64 - count), count);
      b = drop(b, count);
      k = next;
    }
  }
  copy->bits = b, copy->writer = flush(w);
  return 0;
}

// The difference that a DC code stands for. Returns 0, or 1 if it is damaged.
static inline __attribute__((always_inline)) int read_dc(Copy *copy, const HuffmanTable *table, int *difference) {
  Bits b = refill(copy->bits, &copy->source);
  const Look look = table->look[b.buffer >> (64 - LOOK_BITS)];
  *difference = look.value;
  if (__builtin_expect(look.bits != 0, 1)) b = drop(b, look.bits);
  else if (long_code(&b, table, look, 1, difference) < 0) return 1;
  copy->bits = b;
  return 0;
}

static inline __attribute__((always_inline)) int write_dc(Writer *writer, const DcCodes *codes, int difference) {
  const int size = difference ? 32 - __builtin_clz((unsigned)(difference < 0 ? -difference : difference)) : 0;
  if (size > 15 || codes->length[size] == 0) return 1;
  const unsigned value = (unsigned)(difference < 0 ? difference - 1 : difference) & ((1u << size) - 1);
  *writer = flush(put(*writer, (uint64_t)codes->code[size] << size | value, codes->length[size] + size));
  return 0;
}

// The source's stretch must end here: less than a byte is left before a marker, which is returned, or -1.
static int end_of_stretch(Copy *copy) {
  const int left = copy->bits.left - copy->source.invented;
  const uint8_t *at = copy->bits.next, *const end = copy->source.end;
  if (left < 0 || left >= 8) return -1;
  while (end - at >= 2 && at[0] == 0xFF && at[1] == 0xFF) ++at;
  if (end - at < 2 || at[0] != 0xFF || at[1] == 0) return -1;
  copy->bits = (Bits){0, at + 2, 0}, copy->source.invented = 0;
  return at[1];
}

// The JPEG whose header `info` has read, written again. Returns its bytes, or 0: refused.
static int64_t copy_codes(const KeepRequest *r, j_decompress_ptr info, CopyTables *all) {
  Tables *tables = &all->tables;
  if (r->room < MOST_OF_A_HEADER) return 0;
  const int components = info->num_components;
  const HuffmanTable *dc[C_MAX_BLOCKS_IN_MCU + 16], *ac[C_MAX_BLOCKS_IN_MCU + 16];
  const DcCodes *codes[C_MAX_BLOCKS_IN_MCU + 16];
  const Skip *skips[C_MAX_BLOCKS_IN_MCU + 16];
  int component[C_MAX_BLOCKS_IN_MCU + 16], blocks = 0;
  DcCodes all_codes[NUM_HUFF_TBLS] = {0};
  for (int i = 0; i < components; ++i) {  // in the order of the scan
    const jpeg_component_info *c = info->cur_comp_info[i];
    HuffmanTable *of_dc = &tables->dc[c->dc_tbl_no], *of_ac = &tables->ac[c->ac_tbl_no];
    if (!make_table(of_dc, info->dc_huff_tbl_ptrs[c->dc_tbl_no], 1)) return 0;
    if (!make_table(of_ac, info->ac_huff_tbl_ptrs[c->ac_tbl_no], 0)) return 0;
    make_skips(&all->skips[c->ac_tbl_no], &of_ac->from);
    make_dc_codes(&all_codes[c->dc_tbl_no], &of_dc->from, c->dc_tbl_no);
    for (int j = 0; j < (components > 1 ? c->h_samp_factor * c->v_samp_factor : 1); ++j, ++blocks) {
      dc[blocks] = of_dc, ac[blocks] = of_ac, skips[blocks] = all->skips[c->ac_tbl_no].skips;
      codes[blocks] = &all_codes[c->dc_tbl_no], component[blocks] = i;
    }
  }
  const int64_t across = ceil_of((int)info->image_width, 8 * (components > 1 ? info->max_h_samp_factor : 1));
  const int64_t down = ceil_of((int)info->image_height, 8 * (components > 1 ? info->max_v_samp_factor : 1));
  const int64_t mcus = across * down, theirs = info->restart_interval, ours = restart_interval(r, info);
  uint8_t *const out = (uint8_t *)r->out, *const end = out + r->room;
  Copy copy = {.bits.next = info->src->next_input_byte,
               .source.end = info->src->next_input_byte + info->src->bytes_in_buffer,
               .writer.next = put_header(out, info, ours, all_codes)};
  int last[MAX_COMPONENTS] = {0}, last_written[MAX_COMPONENTS] = {0};
  int64_t their_next = theirs ? theirs : mcus, our_next = ours ? ours : mcus;
  int their_marker = 0, our_marker = 0;
  for (int64_t mcu = 0; mcu < mcus; ++mcu) {
    if (mcu == their_next) {
      if (end_of_stretch(&copy) != JPEG_RST0 + their_marker) return 0;
      their_marker = (their_marker + 1) & 7, their_next += theirs;
      memset(last, 0, sizeof last);
    }
    if (mcu == our_next) {
      copy.writer = end_stretch(copy.writer);
      *copy.writer.next++ = 0xFF, *copy.writer.next++ = (uint8_t)(JPEG_RST0 + our_marker);
      our_marker = (our_marker + 1) & 7, our_next += ours;
      memset(last_written, 0, sizeof last_written);
    }
    for (int i = 0; i < blocks; ++i) {
      if (end - copy.writer.next < MOST_OF_A_BLOCK) return 0;
      int difference, *const value = &last[component[i]], *const written = &last_written[component[i]];
      if (read_dc(&copy, dc[i], &difference)) return 0;
      *value += difference;
      if (*value < -GREATEST_DC || *value > GREATEST_DC) return 0;  // the next marker could not be
      if (write_dc(&copy.writer, codes[i], *value - *written)) return 0;
      *written = *value;
      if (copy_ac(&copy, ac[i], skips[i])) return 0;
    }
    if (copy.bits.left < copy.source.invented) return 0;  // the data ended before
  }
  if (end_of_stretch(&copy) != JPEG_EOI) return 0;
  Writer last_byte = end_stretch(copy.writer);
  *last_byte.next++ = 0xFF, *last_byte.next++ = JPEG_EOI;
  return last_byte.next - out;
}

#endif
