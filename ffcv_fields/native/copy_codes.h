// Copying the codes of a JPEG that is one Huffman-coded scan, with restart markers of our own between its MCUs.
//
// Only the DC coefficients behind a marker change: each is coded by its difference to the one before, or to 0 behind a
// marker. The codes between are read to find where blocks end, and their bits copied in one piece. The file's own tables
// are kept; only where one for DC has no code for a difference that may now occur is the standard one put in its place.
// Every fault in the data, also those that libjpeg passes over in silence, is a refusal.

#ifndef COPY_CODES_H
#define COPY_CODES_H

#include "jpeg_out.h"

enum { KEPT = 0, DAMAGED = 1, OTHER_KIND = 2, TOO_LARGE = 3 };

// The fields of a request, as Python lays them out (ffcv_fields/jpeg.py, REQUEST). Addresses are integers.
typedef struct {
  int64_t source, bytes;   // the JPEG
  int64_t every, longest;  // restart markers every so many 16 pixels, 0: none; the greatest side that is kept, 0: any
  int64_t out, room;       // memory for the result
  int64_t plain;           // as much, for bits of the source
  int64_t written, height, width;  // answers
} KeepRequest;

#define MOST_OF_A_CODE 64    // bytes: more than any code, a marker, and what is written at once
#define MOST_OF_AN_MCU 4096  // bytes: 16 blocks of 64 codes of 16 bits, values of 15
#define MOST_OF_A_HEADER 8192
#define BYTES_AT_ONCE 4096
#define GREATEST_DC 2047  // that a baseline table has a code for, as a difference to 0

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

// --- reading -----------------------------------------------------------------------------------------------------------

// What lies between two markers of the source, without the zeros that are stuffed behind bytes of 0xFF.
typedef struct {
  Bits bits;
  const uint8_t *begin, *end;
} Stretch;

// The stretch from `*source` on, put into `memory` with MOST_OF_AN_MCU zeros behind it; `*source` is then behind the marker
// that ends it. Returns this marker, or -1: there is none, or no room.
static int begin_stretch(Stretch *stretch, const uint8_t **source, const uint8_t *end, uint8_t *memory, int64_t room) {
  const uint8_t *at = *source;
  uint8_t *to = memory;
  if (end - at > room - MOST_OF_AN_MCU) return -1;
  for (;;) {
    const uint8_t *found = memchr(at, 0xFF, (size_t)(end - at));
    if (found == NULL || end - found < 2) return -1;
    const size_t bytes = (size_t)(found - at) + (found[1] == 0);
    memcpy(to, at, bytes);
    to += bytes, at = found + 2;
    if (found[1] != 0) break;
  }
  for (--at; end - at >= 2 && *at == 0xFF; ++at) {}  // as many as there are may stand before a marker
  if (*at == 0xFF || *at == 0) return -1;
  memset(to, 0, MOST_OF_AN_MCU);
  *stretch = (Stretch){{0, memory, 0}, memory, to};
  *source = at + 1;
  return *at;
}

static inline __attribute__((always_inline)) uint64_t eight_bytes(const uint8_t *at) {
  uint64_t bytes;
  memcpy(&bytes, at, 8);
  return big_endian(bytes);
}

// At least REFILLED bits, of a stretch.
static inline __attribute__((always_inline)) Bits more(Bits b) {
  return (Bits){b.buffer | eight_bytes(b.next) >> b.left, b.next + ((63 - b.left) >> 3), b.left | 56};
}

// Bits of the stretch that have been read.
static inline int64_t position(const Stretch *s) { return 8 * (s->bits.next - s->begin) - s->bits.left; }

#define SKIP_BITS 12  // of the stream that index a table

// What the next SKIP_BITS begin with: codes of coefficients, as many as are whole, where the last one's value need not be
// among them. The lowest byte: their bits, all values included; the next: the step from the coefficient before to the
// last one, END_OF_BLOCK more where this is the end, or NOT_HERE: the first code is longer.
typedef uint16_t Skip;

typedef struct {
  JHUFF_TBL from;  // what it was made of
  int made;
  Skip all[1 << SKIP_BITS], first[1 << SKIP_BITS];  // `first`: of the first code alone
} SkipTable;

static inline int step_by(Skip skip) { return skip >> 8; }

// `table` made of `from`, of which `make_table` has found that it is a code.
static void make_skips(SkipTable *table, const JHUFF_TBL *from) {
  if (table->made && memcmp(&table->from, from, sizeof *from) == 0) return;
  static _Thread_local uint8_t lengths[1 << SKIP_BITS];  // of the first code without its value
  table->from = *from, table->made = 1;
  for (int i = 0; i < 1 << SKIP_BITS; ++i) table->first[i] = NOT_HERE << 8, lengths[i] = SKIP_BITS + 1;
  for (int length = 1, code = 0, at = 0; length <= SKIP_BITS; ++length, code <<= 1)
    for (int i = 0; i < from->bits[length]; ++i, ++code, ++at)
      for (int rest = 0; rest < 1 << (SKIP_BITS - length); ++rest) {
        const int symbol = from->huffval[at], index = code << (SKIP_BITS - length) | rest;
        table->first[index] = (Skip)(step_of(symbol, 0) << 8 | (length + (symbol & 15)));
        lengths[index] = (uint8_t)length;
      }
  for (int i = 0; i < 1 << SKIP_BITS; ++i) {
    int bits = table->first[i] & 63, step = step_by(table->first[i]);
    while (step < END_OF_BLOCK && bits < SKIP_BITS) {
      const int next = i << bits & ((1 << SKIP_BITS) - 1), further = step_by(table->first[next]);
      if (bits + lengths[next] > SKIP_BITS || (further != END_OF_BLOCK && step + further >= END_OF_BLOCK)) break;
      step += further, bits += table->first[next] & 63;
    }
    table->all[i] = (Skip)(step << 8 | bits);
  }
}

// What a thread keeps from file to file.
typedef struct {
  Tables tables;
  SkipTable skips[NUM_HUFF_TBLS];
} CopyTables;

// The AC codes of a block. Returns 0, or 1 if they are damaged.
static inline __attribute__((always_inline)) int skip_ac(Stretch *s, const HuffmanTable *table, const SkipTable *skips) {
  Bits b = s->bits;
  for (int k = 0; k < 63;) {
    b = more(b);
    Skip skip = skips->all[b.buffer >> (64 - SKIP_BITS)];
    if (__builtin_expect(k + step_by(skip) < 63, 1)) {
      b.buffer <<= skip & 63, b.left -= skip & 63;
      k += step_by(skip);
      skip = skips->all[b.buffer >> (64 - SKIP_BITS)];
      if (__builtin_expect(k + step_by(skip) < 63, 1)) {  // two, of at most SKIP_BITS + 15 each
        b.buffer <<= skip & 63, b.left -= skip & 63;
        k += step_by(skip);
        continue;
      }
    }
    if (step_by(skip) >= END_OF_BLOCK && step_by(skip) != NOT_HERE && k + step_by(skip) - END_OF_BLOCK < 63) {
      b = drop(b, skip & 63);
      break;
    }
    // The block may be full before these are at their end: one code alone.
    skip = skips->first[b.buffer >> (64 - SKIP_BITS)];
    int step = step_by(skip), value;
    if (step == NOT_HERE) {
      b = more(b);
      step = long_code(&b, table, table->look[b.buffer >> (64 - LOOK_BITS)], 0, &value);
      if (step < 0) return 1;
    } else {
      b = drop(b, skip & 63);
    }
    k += step;
    if (k > 63 && step != END_OF_BLOCK) return 1;
  }
  s->bits = b;
  return 0;
}

// The difference that a DC code stands for. Returns 0, or 1 if it is damaged.
static inline __attribute__((always_inline)) int read_dc(Stretch *s, const HuffmanTable *table, int *difference) {
  Bits b = more(s->bits);
  const Look look = table->look[b.buffer >> (64 - LOOK_BITS)];
  *difference = look.value;
  if (__builtin_expect(look.bits != 0, 1)) b = drop(b, look.bits);
  else if (long_code(&b, table, look, 1, difference) < 0) return 1;
  s->bits = b;
  return 0;
}

// --- copying -----------------------------------------------------------------------------------------------------------

// Write the stretch's bits from `from` to `to`. Returns 0, or 1: no room.
static int copy_bits(Writer *writer, const uint8_t *end, const Stretch *s, int64_t from, int64_t to) {
  Writer w = *writer;
  while (to - from >= 56) {
    if (end - w.next < 2 * BYTES_AT_ONCE + MOST_OF_A_CODE) return 1;  // every byte may need another one behind it
    const int64_t until = to - from < 8 * BYTES_AT_ONCE ? to : from + 8 * BYTES_AT_ONCE;
    for (; until - from >= 56; from += 56)
      w = flush(put(w, eight_bytes(s->begin + from / 8) << (from & 7) >> 8, 56));
  }
  if (end - w.next < MOST_OF_A_CODE) return 1;
  if (to > from) w = flush(put(w, eight_bytes(s->begin + from / 8) << (from & 7) >> (64 - (to - from)), (int)(to - from)));
  *writer = w;
  return 0;
}

static inline __attribute__((always_inline)) int write_dc(Writer *writer, const DcCodes *codes, int difference) {
  const int size = difference ? 32 - __builtin_clz((unsigned)(difference < 0 ? -difference : difference)) : 0;
  if (size > 15 || codes->length[size] == 0) return 1;
  const unsigned value = (unsigned)(difference < 0 ? difference - 1 : difference) & ((1u << size) - 1);
  *writer = flush(put(*writer, (uint64_t)codes->code[size] << size | value, codes->length[size] + size));
  return 0;
}

// A block of the scan's MCUs.
typedef struct {
  const HuffmanTable *dc, *ac;
  const SkipTable *skips;
  const DcCodes *codes;
  int component;
} Block;

// The JPEG whose header `info` has read, written again. Returns its bytes, or 0: refused.
static int64_t copy_codes(const KeepRequest *r, j_decompress_ptr info, CopyTables *all) {
  Tables *tables = &all->tables;
  if (r->room < MOST_OF_A_HEADER) return 0;
  const int components = info->num_components;
  Block layout[C_MAX_BLOCKS_IN_MCU + 16];
  DcCodes codes[NUM_HUFF_TBLS] = {0};
  // Whether a component's next DC coefficient is to be coded anew, and whether all of them are: the table is another.
  int anew[MAX_COMPONENTS], all_anew[MAX_COMPONENTS], blocks = 0;
  for (int i = 0; i < components; ++i) {  // in the order of the scan
    const jpeg_component_info *c = info->cur_comp_info[i];
    HuffmanTable *dc = &tables->dc[c->dc_tbl_no], *ac = &tables->ac[c->ac_tbl_no];
    if (!make_table(dc, info->dc_huff_tbl_ptrs[c->dc_tbl_no], 1)) return 0;
    if (!make_table(ac, info->ac_huff_tbl_ptrs[c->ac_tbl_no], 0)) return 0;
    make_skips(&all->skips[c->ac_tbl_no], &ac->from);
    make_dc_codes(&codes[c->dc_tbl_no], &dc->from, c->dc_tbl_no);
    anew[i] = all_anew[i] = codes[c->dc_tbl_no].bits != dc->from.bits;
    for (int j = 0; j < (components > 1 ? c->h_samp_factor * c->v_samp_factor : 1); ++j)
      layout[blocks++] = (Block){dc, ac, &all->skips[c->ac_tbl_no], &codes[c->dc_tbl_no], i};
  }
  const int64_t across = ceil_of((int)info->image_width, 8 * (components > 1 ? info->max_h_samp_factor : 1));
  const int64_t down = ceil_of((int)info->image_height, 8 * (components > 1 ? info->max_v_samp_factor : 1));
  const int64_t mcus = across * down, theirs = info->restart_interval, ours = restart_interval(r, info);
  uint8_t *const out = (uint8_t *)r->out, *const end = out + r->room;
  const uint8_t *source = info->src->next_input_byte, *const source_end = source + info->src->bytes_in_buffer;
  Writer writer = {.next = put_header(out, info, ours, codes)};
  int last[MAX_COMPONENTS] = {0}, last_written[MAX_COMPONENTS] = {0};
  int64_t their_next = 0, our_next = ours ? ours : mcus, copied = 0;  // bits of the stretch
  int their_markers = 0, our_markers = 0, marker = 0;
  Stretch s = {0};
  for (int64_t mcu = 0; mcu <= mcus; ++mcu) {
    if (mcu == their_next || mcu == mcus) {
      if (mcu > 0) {
        const int64_t at = position(&s), left = 8 * (s.end - s.begin) - at;
        if (left < 0 || left >= 8) return 0;  // less than a byte
        if (marker != (mcu < mcus ? JPEG_RST0 + (their_markers++ & 7) : JPEG_EOI)) return 0;
        if (copy_bits(&writer, end, &s, copied, at)) return 0;
      }
      if (mcu == mcus) break;
      marker = begin_stretch(&s, &source, source_end, (uint8_t *)r->plain, r->room);
      if (marker < 0) return 0;
      their_next = theirs ? mcu + theirs : mcus, copied = 0;
      for (int i = 0; i < components; ++i) last[i] = 0, anew[i] = 1;
    }
    if (mcu == our_next) {
      if (copy_bits(&writer, end, &s, copied, position(&s))) return 0;
      copied = position(&s);
      writer = end_stretch(writer);
      *writer.next++ = 0xFF, *writer.next++ = (uint8_t)(JPEG_RST0 + (our_markers++ & 7));
      our_next += ours;
      for (int i = 0; i < components; ++i) last_written[i] = 0, anew[i] = 1;
    }
    for (int i = 0; i < blocks; ++i) {
      const Block *block = &layout[i];
      const int c = block->component;
      const int64_t before = position(&s);
      int difference;
      if (read_dc(&s, block->dc, &difference)) return 0;
      last[c] += difference;
      if (last[c] < -GREATEST_DC || last[c] > GREATEST_DC) return 0;  // the next marker could not be
      if (__builtin_expect(anew[c], 0)) {
        if (copy_bits(&writer, end, &s, copied, before)) return 0;
        if (write_dc(&writer, block->codes, last[c] - last_written[c])) return 0;
        copied = position(&s), anew[c] = all_anew[c];
      }
      last_written[c] = last[c];
      if (skip_ac(&s, block->ac, block->skips)) return 0;
    }
    if (position(&s) > 8 * (s.end - s.begin)) return 0;  // the data ended before
  }
  if (end - writer.next < MOST_OF_A_CODE) return 0;
  writer = end_stretch(writer);
  *writer.next++ = 0xFF, *writer.next++ = JPEG_EOI;
  return writer.next - out;
}

#endif
