// Huffman tables of a file (ITU-T T.81, annex F). One look-up gives a coefficient whole, its run of zeros, its value
// and all its bits, and often the next too.

#ifndef TABLES_H
#define TABLES_H

#include "crop.h"

#define LOOK_BITS 11     // bits of the stream that index a table: most codes with their value fit
#define END_OF_BLOCK 64  // a step that leads out of the block
#define NOT_HERE 128     // a step: this code is too long for the table

// What these bits begin with: a coefficient and, if it fits too, the one that follows (else the first one again).
// `step` is how far a coefficient is from the one before it. Where a coefficient does not fit, `bits` is 0 and `step`
// NOT_HERE; if its code does, `first_bits` is that code's length, `second_step` its step, and `value` the size of the
// value behind it.
typedef struct {
  uint8_t bits, first_bits;  // that both, that the first one takes
  uint8_t step, second_step;
  int16_t value, second_value;  // of a DC code: the difference
} Look;

// A Huffman table of the file, and what the next LOOK_BITS of the stream mean by it.
typedef struct {
  JHUFF_TBL from;                    // what it was made of: files of one encoder share their tables
  Look look[1 << LOOK_BITS];
  int32_t greatest[18], offset[17];  // of codes of each length: the greatest (left-aligned to 16 bits), first symbol
  int made;
} HuffmanTable;

// What a thread keeps from image to image.
struct Tables {
  HuffmanTable dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
};

static inline int extended(int value, int size) { return value < 1 << (size - 1) ? value - (1 << size) + 1 : value; }

static inline int step_of(int symbol, int is_dc) {
  if (is_dc) return 0;
  return symbol == 0 || (symbol < 0xF0 && (symbol & 15) == 0) ? END_OF_BLOCK : (symbol >> 4) + 1;
}

// `table` made of `from`, if it is not yet. Returns 0 if `from` is no Huffman code.
int make_table(HuffmanTable *table, const JHUFF_TBL *from, int is_dc);

#endif
