// Step 1 of decoding a plain JPEG: bits of the stream, and what they mean by the file's Huffman tables.

#ifndef BITS_H
#define BITS_H

#include "tables.h"

// Eight bytes of memory as a number of which the first is the highest, and back.
static inline __attribute__((always_inline)) uint64_t big_endian(uint64_t bytes) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return __builtin_bswap64(bytes);
#else
  return bytes;
#endif
}

// Whether one of the eight bytes is 0xFF; also 1 for some that have none, of which one looks like it beside another.
static inline __attribute__((always_inline)) int may_have_ff(uint64_t bytes) {
  return ((~bytes - 0x0101010101010101u) & bytes & 0x8080808080808080u) != 0;
}

#define REFILLED 56  // bits at hand after a refill, at least

// A place in the stream. Bits of `buffer` below the `left` highest are the stream's next ones, or 0.
typedef struct {
  uint64_t buffer;
  const uint8_t *next;
  int left;
} Bits;

// What is left to read, and how many bits were read behind its end: zeros.
typedef struct {
  const uint8_t *end;
  int invented;
  Bits bits;  // for refill_slowly
} Source;

// Where there is a byte of 0xFF: at least REFILLED bits, without the 0 that is stuffed behind it; zeros behind a marker
// or the end.
static __attribute__((noinline, cold)) void refill_slowly(Source *s) {
  Bits b = s->bits;
  while (b.left < REFILLED) {
    if (b.next == s->end || (*b.next == 0xFF && (b.next + 1 == s->end || b.next[1] != 0))) {
      s->invented += (63 - b.left) / 8 * 8;
      b.left |= 56;
    } else {
      const uint64_t byte = *b.next;
      b.next += byte == 0xFF ? 2 : 1;
      b.buffer |= byte << (56 - b.left);
      b.left += 8;
    }
  }
  s->bits = b;
}

static inline __attribute__((always_inline)) Bits refill(Bits b, Source *s) {
  if (__builtin_expect(s->end - b.next >= 8, 1)) {
    uint64_t bytes;
    memcpy(&bytes, b.next, 8);
    // Without a byte of 0xFF, a stuffed one or a marker, all eight are taken as they are.
    if (__builtin_expect(!may_have_ff(bytes), 1)) {
      b.buffer |= big_endian(bytes) >> b.left;
      b.next += (63 - b.left) >> 3;
      b.left |= 56;
      return b;
    }
  }
  s->bits = b;
  refill_slowly(s);
  return s->bits;
}

static inline Bits drop(Bits b, int bits) { return (Bits){b.buffer << bits, b.next, b.left - bits}; }

// The next code and its value, of at most 31 bits, which do not fit the table. Returns the step, or -1: no code.
static inline int long_code(Bits *b, const HuffmanTable *table, Look look, int is_dc, int *value) {
  int step = look.second_step, length = look.first_bits, size = look.value;  // where the code does
  if (length == 0) {
    const int32_t bits = (int32_t)(b->buffer >> 48);
    for (length = LOOK_BITS + 1; bits > table->greatest[length];) ++length;
    if (length > 16) return -1;
    const int symbol = table->from.huffval[(table->offset[length] + (bits >> (16 - length))) & 0xFF];
    step = step_of(symbol, is_dc), size = symbol & 15;
  }
  *b = drop(*b, length);
  *value = size ? extended((int)(b->buffer >> (64 - size)), size) : 0;
  *b = drop(*b, size);
  return step;
}

#endif
