// Replaces libjpeg's entropy decoder: sequential Huffman-coded JPEGs of one scan (ITU-T T.81, annex F).
//
// - One table lookup gives a complete coefficient (its run of zeros, value and all its bits), and often the next one.
// - MCUs outside the crop's columns, and above its rows, are skipped: from restart marker to restart marker where
//   the file has them (ours do, cfg.restart_interval), else decoded and discarded.
//
// Everything else, from inverse DCT to colors, stays libjpeg's. Truncated or damaged data go to its
// error_exit.

#include "huffman.h"

#include <string.h>

#include <jerror.h>

// libjpeg's own declaration (jpegint.h), which not every installation brings; the same since version 6.
struct jpeg_entropy_decoder {
  void (*start_pass)(j_decompress_ptr info);
  boolean (*decode_mcu)(j_decompress_ptr info, JBLOCKROW *blocks);
  boolean insufficient_data;
};

#define END_OF_BLOCK 64  // a step past the end of the block

static const uint8_t NATURAL_ORDER[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static inline int extended(int value, int size) { return value < 1 << (size - 1) ? value - (1 << size) + 1 : value; }

static int step_of(int symbol, int is_dc) {
  if (is_dc) return 0;
  return symbol == 0 || (symbol < 0xF0 && (symbol & 15) == 0) ? END_OF_BLOCK : (symbol >> 4) + 1;
}

static const HuffmanTable *table_for(j_decompress_ptr info, HuffmanTable *table, const JHUFF_TBL *from, int is_dc) {
  if (table->made && memcmp(table->from.bits, from->bits, sizeof from->bits) == 0 &&
      memcmp(table->from.huffval, from->huffval, sizeof from->huffval) == 0)
    return table;
  table->from = *from, table->made = 0;
  memset(table->look, 0, sizeof table->look);
  int code = 0, at = 0;  // libjpeg has seen that the code is one (jpeg_make_d_derived_tbl)
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    table->offset[length] = at - code;
    for (int i = 0; i < from->bits[length]; ++i, ++code, ++at) {
      if (at > 255 || code >= 1 << length) ERREXIT(info, JERR_BAD_HUFF_TABLE);
      const int symbol = from->huffval[at], size = symbol & 15, spare = LOOK_BITS - length - size;
      const uint8_t bits = (uint8_t)(length + size), step = (uint8_t)step_of(symbol, is_dc);
      if (spare < 0) continue;
      for (int rest = 0; rest < 1 << (size + spare); ++rest) {
        const int16_t value = (int16_t)(size ? extended(rest >> spare, size) : 0);
        table->look[code << (size + spare) | rest] = (Look){bits, bits, step, 0, value, value};
      }
    }
    table->greatest[length] = (code << (16 - length)) - 1;
  }
  table->greatest[17] = 0xFFFF;
  for (int i = (1 << LOOK_BITS) - 1; i >= 0 && !is_dc; --i) {  // the coefficient that follows, if it fits
    Look *first = &table->look[i];
    const Look second = table->look[(i << first->bits) & ((1 << LOOK_BITS) - 1)];
    if (first->bits == 0 || first->step == END_OF_BLOCK || second.first_bits == 0) continue;
    if (first->bits + second.first_bits > LOOK_BITS) continue;
    first->bits += second.first_bits, first->second_step = second.step, first->second_value = second.value;
  }
  table->made = 1;
  return table;
}

// At least 32 bits, as many as fit: a code and its value have at most 31.
static inline void refill(Bits *b) {
  if (b->left >= 32) return;
  if (b->end - b->next >= 8) {
    uint64_t bytes;
    memcpy(&bytes, b->next, 8);
    // Without a byte of 0xFF, a stuffed one or a marker, all eight are taken as they are.
    if (((~bytes - 0x0101010101010101u) & bytes & 0x8080808080808080u) == 0) {
      b->buffer |= __builtin_bswap64(bytes) >> b->left;
      b->next += (63 - b->left) >> 3;
      b->left |= 56;
      return;
    }
  }
  for (; b->left < 56; b->left += 8) {
    uint64_t byte = 0;
    if (b->next == b->end || (*b->next == 0xFF && (b->next + 1 == b->end || b->next[1] != 0)))
      b->invented += 8;
    else
      byte = *b->next, b->next += byte == 0xFF ? 2 : 1;
    b->buffer |= byte << (56 - b->left);
  }
}

static inline void drop(Bits *b, int bits) { b->buffer <<= bits, b->left -= bits; }

// The next code and its value, which `look` does not hold. Returns the step, and the value.
static int long_code(j_decompress_ptr info, Bits *b, const HuffmanTable *table, int is_dc, int *value) {
  const int32_t bits = (int32_t)(b->buffer >> 48);
  int length = 1;
  while (bits > table->greatest[length]) ++length;
  if (length > 16) ERREXIT(info, JERR_BAD_HUFF_TABLE);
  const int symbol = table->from.huffval[(table->offset[length] + (bits >> (16 - length))) & 0xFF], size = symbol & 15;
  drop(b, length);
  *value = size ? extended((int)(b->buffer >> (64 - size)), size) : 0;
  drop(b, size);
  return step_of(symbol, is_dc);
}

static void decode_block(j_decompress_ptr info, Huffman *h, int which, JCOEF *block) {
  Bits bits = h->bits;  // in registers; `h->bits` is where long_code finds them
  int value;
  refill(&bits);
  Look look = h->dc_of[which]->look[bits.buffer >> (64 - LOOK_BITS)];
  if (look.bits) {
    drop(&bits, look.bits), value = look.value;
  } else {
    h->bits = bits;
    long_code(info, &h->bits, h->dc_of[which], 1, &value);
    bits = h->bits;
  }
  int *last = &h->last_dc[h->component[which]];
  *last = (int)((unsigned)*last + (unsigned)value);
  block[0] = (JCOEF)*last;
  const HuffmanTable *table = h->ac_of[which];
  for (int k = 0; k < 63;) {
    refill(&bits);
    look = table->look[bits.buffer >> (64 - LOOK_BITS)];
    if (__builtin_expect(look.bits == 0, 0)) {
      h->bits = bits;
      look.step = (uint8_t)long_code(info, &h->bits, table, 0, &value);
      bits = h->bits;
      look.first_bits = look.second_step = 0, look.value = look.second_value = (int16_t)value;
    }
    k += look.step;
    if (k >= 63) {  // the block is full, or ends here: a second coefficient would be the next one's
      drop(&bits, look.first_bits);
      if (k == 63) block[63] = look.value;
      break;
    }
    drop(&bits, look.bits);
    block[NATURAL_ORDER[k]] = look.value;
    k += look.second_step;
    if (k > 63) break;
    block[NATURAL_ORDER[k]] = look.second_value;
  }
  h->bits = bits;
}

static void begin_segment(Huffman *h) {
  h->bits.buffer = 0, h->bits.left = h->bits.invented = 0;
  memset(h->last_dc, 0, sizeof h->last_dc);
  h->at = h->segment * h->interval;
}

// Advance to the restart marker before `segment`. Marker n of a file is RST(n modulo 8).
static void find_segment(j_decompress_ptr info, Huffman *h, int64_t segment) {
  const uint8_t *at = h->bits.next, *const end = h->bits.end;
  while (h->segment < segment) {
    at = at < end ? memchr(at, 0xFF, (size_t)(end - at)) : NULL;
    if (at == NULL || at + 1 == end) ERREXIT(info, JERR_INPUT_EOF);
    if (at[1] == JPEG_RST0 + (h->segment & 7))
      ++h->segment, at += 2;
    else if (at[1] == 0 || at[1] == 0xFF)
      at += at[1] == 0 ? 2 : 1;
    else
      ERREXIT(info, JERR_INPUT_EOF);
  }
  h->bits.next = at;
  begin_segment(h);
}

static boolean decode_mcu(j_decompress_ptr info, JBLOCKROW *blocks) {
  Huffman *h = info->client_data;
  const int64_t wanted = h->asked++;
  const int column = (int)(wanted % h->per_row);
  if (blocks == NULL || column < h->first_column || column > h->last_column) return TRUE;
  if (wanted / h->interval != h->segment) find_segment(info, h, wanted / h->interval);
  JBLOCK dropped;
  for (; h->at < wanted; ++h->at)
    for (int i = 0; i < h->blocks; ++i) decode_block(info, h, i, dropped);
  for (int i = 0; i < h->blocks; ++i) decode_block(info, h, i, *blocks[i]);
  ++h->at;
  if (h->bits.left < h->bits.invented) ERREXIT(info, JERR_INPUT_EOF);
  return TRUE;
}

void huffman_take_over(j_decompress_ptr info, Huffman *h, int first_column, int last_column) {
  if (info->progressive_mode || info->arith_code || info->data_precision != 8 || jpeg_has_multiple_scans(info)) return;
  h->blocks = info->blocks_in_MCU;
  for (int i = 0; i < h->blocks; ++i) {
    const jpeg_component_info *component = info->cur_comp_info[info->MCU_membership[i]];
    const int dc = component->dc_tbl_no, ac = component->ac_tbl_no;
    h->component[i] = info->MCU_membership[i];
    h->dc_of[i] = table_for(info, &h->dc[dc], info->dc_huff_tbl_ptrs[dc], 1);
    h->ac_of[i] = table_for(info, &h->ac[ac], info->ac_huff_tbl_ptrs[ac], 0);
  }
  h->bits.next = info->src->next_input_byte, h->bits.end = h->bits.next + info->src->bytes_in_buffer;
  h->per_row = (int)info->MCUs_per_row, h->first_column = first_column, h->last_column = last_column;
  h->interval = info->restart_interval ? (int64_t)info->restart_interval : INT64_MAX;
  h->asked = h->segment = 0;
  begin_segment(h);
  info->client_data = h;
  info->entropy->decode_mcu = decode_mcu;
}
