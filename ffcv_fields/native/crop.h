// What the steps share: what is asked for, codes, scratch memory.

#ifndef CROP_H
#define CROP_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#if defined(__x86_64__) && !defined(PORTABLE)  // PORTABLE: without them, for tests
#define HAS_AVX2_STEPS
#endif

enum { OK = 0, BAD_JPEG = 1, BAD_SIZE = 2 };

// The fields of a request, as Python lays them out (ffcv_fields/image.py, REQUEST). Addresses are integers.
typedef struct {
  int64_t source, bytes, raw;  // a JPEG, or RGB pixels if `raw`
  int64_t height, width;       // of the image
  int64_t y, x, h, w;          // the crop
  int64_t size, flip;          // side of the output; whether it is mirrored
  int64_t rows, columns;       // 0: the crop becomes the output, by the area filter; else it is resized to these by
  int64_t top, left;           // PIL's bilinear filter, and the output is the part of that from (top, left) on
  int64_t normalize;           // float[6], scale and bias of each channel, for output in float32; 0 for bytes
  int64_t out, scratch;
} Request;

// What the crop is resized to, of which the output is all or a part.
static inline int resized_rows(const Request *r) { return (int)(r->rows ? r->rows : r->size); }
static inline int resized_columns(const Request *r) { return (int)(r->columns ? r->columns : r->size); }

typedef struct Tables Tables;

// RGB pixels of an image, or of the part that a crop needs.
typedef struct {
  const uint8_t *pixels;
  ptrdiff_t stride;
  int left, top;  // the first pixel's place
  int covered;    // a pixel stands for so many squared of the image
} Pixels;

// The steps, compiled for one instruction set.
typedef struct {
  int (*is_plain)(j_decompress_ptr info);
  int (*jpeg)(const Request *request, j_decompress_ptr info, Tables *tables);
  int (*pixels)(const Request *request, const Pixels *pixels, uint8_t *memory);
} Steps;

extern const Steps steps_portable, steps_avx2;

static inline size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

// The next part of the scratch memory.
static inline void *take(uint8_t **memory, size_t bytes) {
  void *part = *memory;
  *memory += aligned(bytes);
  return part;
}

#endif
