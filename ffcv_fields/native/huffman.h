// libjpeg with another Huffman decoder: faster, and it skips what a crop does not need. See huffman.c.

#ifndef HUFFMAN_H
#define HUFFMAN_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

#define LOOK_BITS 11  // bits of the stream that index a table: most codes with their value fit

// What these bits begin with: a coefficient and, if it fits too, the one that follows (else the first one again). `step`
// is how far a coefficient is from the one before it; bits == 0: the first one does not fit.
typedef struct {
  uint8_t bits, first_bits;  // that both, that the first one takes
  uint8_t step, second_step;
  int16_t value, second_value;  // of a DC code: the difference
} Look;

// A Huffman table of the file, and what the next LOOK_BITS of the stream mean by it.
typedef struct {
  JHUFF_TBL from;                    // what it was built from: files of one encoder share their tables
  Look look[1 << LOOK_BITS];
  int32_t greatest[18], offset[17];  // of codes of each length: the largest (left-aligned to 16 bits), first symbol
  int made;
} HuffmanTable;

// A stream of bits.
typedef struct {
  const uint8_t *next, *end;  // bytes not yet in `buffer`
  uint64_t buffer;            // available bits, from the top
  int left, invented;         // how many, and how many of these are zeros past the end of the data
} Bits;

// What a thread keeps from image to image (the tables), and where it is in the current one.
typedef struct {
  HuffmanTable dc[4], ac[4];
  const HuffmanTable *dc_of[D_MAX_BLOCKS_IN_MCU], *ac_of[D_MAX_BLOCKS_IN_MCU];
  int component[D_MAX_BLOCKS_IN_MCU], blocks;
  Bits bits;
  int last_dc[MAX_COMPONENTS];
  int64_t asked, at;                     // MCU that libjpeg asks for next, MCU that is next in the stream
  int64_t interval, segment;             // MCUs from one restart marker to the next (or all); the one we are in
  int per_row, first_column, last_column;  // MCUs of a row, and those of them that are needed
} Huffman;

// Have the started decompressor `info`, with memory as its source, decoded by `h`, columns of MCUs `first` to `last`
// alone (others are left 0). Does nothing for a file that is not sequential Huffman in one scan.
void huffman_take_over(j_decompress_ptr info, Huffman *h, int first_column, int last_column);

#endif
