// Decode what a crop needs of a JPEG, and resize it: the pixels of RandomResizedCropDecoder(decode="fast").
//
// 1. libjpeg decodes only the rows and columns of the crop (jpeg_skip_scanlines, jpeg_crop_scanline), at 1/2, 1/4 or
//    1/8 scale where the crop has that many pixels to spare; its entropy decoder is ours (huffman.c).
// 2. An area filter (each output pixel is the mean of the rectangle that it covers) resizes, vertically while rows
//    arrive, then horizontally; enlarging is bilinear. Rows hold 4 bytes per pixel: one vector load takes two pixels.
//
// Only libjpeg allocates memory, and no error exits the process: each returns a code. Called from numba through ctypes.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#include "huffman.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define VECTORIZED __attribute__((optimize("O3"), target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif

enum { OK = 0, BAD_JPEG = 1, BAD_SIZE = 2 };

#define WEIGHT_BITS 8      // vertical: weights of one output row sum to 256, so that a row of sums fits 16 bits
#define TAP_BITS 14        // horizontal: weights of one output column sum to 2^14
#define GREATEST_SIDE 65500  // libjpeg's
#define GREATEST_MEMORY (1L << 30)  // bytes, for the coefficients of a progressive JPEG that claims to be huge

typedef struct {
  struct jpeg_error_mgr manager;
  jmp_buf leave;
} ErrorManager;

static void leave_on_error(j_common_ptr info) { longjmp(((ErrorManager *)info->err)->leave, 1); }
static void say_nothing(j_common_ptr info) { (void)info; }
static void say_no_level(j_common_ptr info, int level) {
  if (level < 0) info->err->num_warnings++;
}

// --- resize ------------------------------------------------------------------------------------------------------

// One axis: the region offset..offset+scale*size of the source's pixels 0..source-1 becomes `size` output pixels.
typedef struct {
  double offset, scale;
  int source;
} Axis;

// The source pixels first..first+count-1 under output pixel `at`, and their integer weights, which sum to `total`.
// Reducing: the overlap of each with the output pixel's interval. Enlarging: bilinear between the two nearest centers.
static int taps(int at, Axis axis, int total, int *first, int16_t *weights) {
  double scale = axis.scale;
  int source = axis.source;
  double low, high, sum = 0;
  double share[64];
  int count;
  if (scale >= 1) {
    low = axis.offset + at * scale, high = low + scale;
    *first = (int)low < source ? (int)low : source - 1;
    int last = (int)high;
    if (last >= source || (double)last == high) last = last >= source ? source - 1 : last - 1;
    if (last < *first) last = *first;
    count = last - *first + 1;
    if (count > 64) return 0;
    for (int i = 0; i < count; ++i) {
      double a = *first + i, b = a + 1;
      share[i] = (b < high ? b : high) - (a > low ? a : low);
      if (share[i] < 0) share[i] = 0;
      sum += share[i];
    }
  } else {
    double center = axis.offset + (at + 0.5) * scale - 0.5;
    if (center < 0) center = 0;
    if (center > source - 1) center = source - 1;
    *first = (int)center;
    count = *first + 1 < source ? 2 : 1;
    share[1] = count == 2 ? center - *first : 0;
    share[0] = 1 - share[1];
    sum = 1;
  }
  int left = total, greatest = 0;
  for (int i = 0; i < count; ++i) {
    weights[i] = (int16_t)(share[i] / sum * total + 0.5);
    left -= weights[i];
    if (weights[i] > weights[greatest]) greatest = i;
  }
  weights[greatest] = (int16_t)(weights[greatest] + left);  // the rounding error goes where it is least visible
  return count;
}

// sums[i] += weight * row[i]; the sums of one output row stay below 2^16.
VECTORIZED static void add_row(uint16_t *restrict sums, const uint8_t *restrict row, int weight, int count) {
  uint16_t w = (uint16_t)weight;
  for (int i = 0; i < count; ++i) sums[i] = (uint16_t)(sums[i] + w * row[i]);
}

VECTORIZED static void start_row(uint16_t *restrict sums, const uint8_t *restrict row, int weight, int count) {
  uint16_t w = (uint16_t)weight;
  for (int i = 0; i < count; ++i) sums[i] = (uint16_t)(w * row[i]);
}

VECTORIZED static void halve(uint16_t *sums, int count) {  // to 15 bits, for signed multiplication
  for (int i = 0; i < count; ++i) sums[i] >>= 1;
}

// An output column: its taps, in fours, begin at source pixel `first`; their weights at `offset`, 16 to a four.
typedef struct {
  int first, fours, offset;
} Column;

#define SUM_BITS (TAP_BITS + WEIGHT_BITS - 1)  // fixed-point fraction of a pixel's sums

// How one output row is made from the vertically resized one, int16 [width, 4] of 15 bits. `scale` and `bias` of each
// channel make floats of the sums, not rounded in between; without them out is bytes.
typedef void (*ReduceRow)(const int16_t *row, const Column *columns, const int16_t *weights, int size, int flip,
                          const float *normalize, void *out);

static void reduce_row(const int16_t *row, const Column *columns, const int16_t *weights, int size, int flip,
                       const float *normalize, void *out) {
  for (int at = 0; at < size; ++at) {
    const Column column = columns[flip ? size - 1 - at : at];
    for (int c = 0; c < 3; ++c) {
      int sum = 0;
      for (int tap = 0; tap < 4 * column.fours; ++tap)
        sum += row[4 * (column.first + tap) + c] * weights[column.offset + 16 * (tap / 4) + 8 * (tap / 2 % 2) + tap % 2];
      if (normalize) {
        ((float *)out)[3 * at + c] = (float)sum * (normalize[c] / (1 << SUM_BITS)) + normalize[3 + c];
      } else {
        sum = (sum + (1 << (SUM_BITS - 1))) >> SUM_BITS;
        ((uint8_t *)out)[3 * at + c] = (uint8_t)(sum > 255 ? 255 : sum);
      }
    }
  }
}

#if defined(__x86_64__)
// Four pixels per load. A four's 16 weights are laid out as the multiplication needs them: (w0, w1) four times, once
// for each channel, then (w2, w3).
__attribute__((target("avx2"))) static void reduce_row_avx2(const int16_t *row, const Column *columns,
                                                            const int16_t *weights, int size, int flip,
                                                            const float *normalize, void *out) {
  const __m256i interleave =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  __m128 scale = _mm_setzero_ps(), bias = _mm_setzero_ps();
  if (normalize) {
    scale = _mm_div_ps(_mm_setr_ps(normalize[0], normalize[1], normalize[2], 0), _mm_set1_ps(1 << SUM_BITS));
    bias = _mm_setr_ps(normalize[3], normalize[4], normalize[5], 0);
  }
  for (int at = 0; at < size; ++at) {
    const Column column = columns[flip ? size - 1 - at : at];
    const int16_t *pixel = row + 4 * (ptrdiff_t)column.first, *w = weights + column.offset;
    __m256i sums = _mm256_setzero_si256();
    for (int four = 0; four < column.fours; ++four, pixel += 16, w += 16) {
      __m256i pixels = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)pixel), interleave);
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pixels, _mm256_loadu_si256((const __m256i *)w)));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    // A pixel is written with one element too many, which the next pixel overwrites; not so in the last one.
    if (normalize) {
      __m128 value = _mm_add_ps(_mm_mul_ps(_mm_cvtepi32_ps(sum), scale), bias);
      float *target = (float *)out + 3 * at;
      if (at + 1 < size) {
        _mm_storeu_ps(target, value);
      } else {
        _mm_storel_pi((__m64 *)target, value);
        _mm_store_ss(target + 2, _mm_movehl_ps(value, value));
      }
    } else {
      sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(1 << (SUM_BITS - 1))), SUM_BITS);
      sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), sum);
      int rgbx = _mm_cvtsi128_si32(sum);
      if (at + 1 < size)
        memcpy((uint8_t *)out + 3 * at, &rgbx, 4);
      else
        memcpy((uint8_t *)out + 3 * at, &rgbx, 3);
    }
  }
}
#endif

static ReduceRow best_reduce_row(void) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return reduce_row_avx2;
#endif
  return reduce_row;
}

// Parts of the caller's scratch memory.
typedef struct {
  uint16_t *sums;   // [width + 66, 4]: the output row under construction
  Column *columns;  // [size]
  int16_t *weights;
} Scratch;

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

typedef struct {
  int width, size, flip, row;  // pixels of a source row, output side, output row under construction
  Axis vertical;
  Scratch scratch;
  uint8_t *out;
  const float *normalize;  // scale and bias of each channel for float output, or NULL for bytes
  ReduceRow reduce_row;
  int first, count;
  int16_t row_weights[66];
} Resizer;

static int resizer_start(Resizer *r, Axis vertical, Axis horizontal, int size, int flip, void *out,
                         const float *normalize, uint8_t *memory) {
  int width = horizontal.source;
  r->width = width, r->size = size, r->flip = flip, r->row = 0, r->vertical = vertical;
  r->out = out, r->normalize = normalize;
  memory = (uint8_t *)aligned((size_t)memory);
  r->scratch.sums = (uint16_t *)memory, memory += aligned(8 * (size_t)(width + 66));
  r->scratch.columns = (Column *)memory, memory += aligned(sizeof(Column) * (size_t)size);
  r->scratch.weights = (int16_t *)memory;
  memset(r->scratch.sums + 4 * (size_t)width, 0, 64);  // a four may read, with weight 0, three pixels past the row
  r->reduce_row = best_reduce_row();
  int offset = 0;
  int16_t column_weights[66];
  for (int at = 0; at < size; ++at) {
    int first;
    int count = taps(at, horizontal, 1 << TAP_BITS, &first, column_weights);
    if (count == 0) return BAD_SIZE;
    const int fours = (count + 3) / 4;
    int16_t *laid_out = r->scratch.weights + offset;
    memset(laid_out, 0, 32 * (size_t)fours);
    for (int tap = 0; tap < count; ++tap)
      for (int channel = 0; channel < 4; ++channel)
        laid_out[16 * (tap / 4) + 8 * (tap / 2 % 2) + 2 * channel + tap % 2] = column_weights[tap];
    r->scratch.columns[at] = (Column){first, fours, offset};
    offset += 16 * fours;
  }
  r->count = taps(0, vertical, 1 << WEIGHT_BITS, &r->first, r->row_weights);
  return r->count ? OK : BAD_SIZE;
}

// Take source row `y`, 4 bytes per pixel, with the row before it; finishes every output row whose last one it is.
static int resizer_take(Resizer *r, int y, const uint8_t *row, const uint8_t *before) {
  const int bytes = 4 * r->width;
  uint16_t *sums = r->scratch.sums;
  while (r->row < r->size) {
    if (y < r->first) return OK;
    if (r->vertical.scale < 1) {  // enlarging: at most two source rows, which several output rows may share
      if (y < r->first + r->count - 1) return OK;
      start_row(sums, r->count == 2 ? before : row, r->row_weights[0], bytes);
      if (r->count == 2) add_row(sums, row, r->row_weights[1], bytes);
    } else {
      int tap = y - r->first;
      if (tap == 0)
        start_row(sums, row, r->row_weights[0], bytes);
      else
        add_row(sums, row, r->row_weights[tap], bytes);
      if (tap + 1 < r->count) return OK;
    }
    halve(sums, bytes);
    uint8_t *to = r->out + 3 * (size_t)r->size * r->row * (r->normalize ? sizeof(float) : 1);
    r->reduce_row((const int16_t *)sums, r->scratch.columns, r->scratch.weights, r->size, r->flip, r->normalize, to);
    if (++r->row == r->size) return OK;
    r->count = taps(r->row, r->vertical, 1 << WEIGHT_BITS, &r->first, r->row_weights);
    if (r->count == 0) return BAD_SIZE;
  }
  return OK;
}

// --- the two sources of rows ---------------------------------------------------------------------------------------

typedef struct {
  struct jpeg_decompress_struct info;
  ErrorManager error;
  Huffman huffman;
  int ready;
} Decompressor;

// Created once per thread, freed when the thread ends: every epoch has its own threads.
static _Thread_local Decompressor decompressor;
static pthread_key_t at_thread_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void free_decompressor(void *d) { jpeg_destroy_decompress(&((Decompressor *)d)->info); }
static void make_key(void) { pthread_key_create(&at_thread_end, free_decompressor); }

static int make_decompressor(Decompressor *d) {
  if (d->ready) return 1;
  d->info.err = jpeg_std_error(&d->error.manager);
  d->error.manager.error_exit = leave_on_error;
  d->error.manager.output_message = say_nothing;
  d->error.manager.emit_message = say_no_level;
  if (setjmp(d->error.leave)) return 0;
  jpeg_create_decompress(&d->info);
  d->info.mem->max_memory_to_use = GREATEST_MEMORY;
  pthread_once(&once, make_key);
  pthread_setspecific(at_thread_end, d);
  return d->ready = 1;
}

// Whether a JPEG's header says height x width, for decoders that trust it. Returns OK, BAD_JPEG or BAD_SIZE.
int64_t jpeg_has_size(int64_t source, int64_t bytes, int64_t height, int64_t width) {
  Decompressor *d = &decompressor;
  if (!make_decompressor(d)) return BAD_JPEG;
  if (setjmp(d->error.leave)) {
    jpeg_abort_decompress(&d->info);
    return BAD_JPEG;
  }
  jpeg_mem_src(&d->info, (const uint8_t *)source, (size_t)bytes);
  jpeg_read_header(&d->info, TRUE);
  int same = d->info.image_width == (JDIMENSION)width && d->info.image_height == (JDIMENSION)height;
  jpeg_abort_decompress(&d->info);
  return same ? OK : BAD_SIZE;
}

static int decode_jpeg(const uint8_t *source, size_t bytes, int height, int width, int y, int x, int h, int w,
                       Resizer *r, int size, int flip, void *out, const float *normalize, uint8_t *memory) {
  Decompressor *d = &decompressor;
  struct jpeg_decompress_struct *info = &d->info;
  if (!make_decompressor(d)) return BAD_JPEG;
  if (setjmp(d->error.leave)) {
    jpeg_abort_decompress(info);
    return BAD_JPEG;
  }
  jpeg_mem_src(info, source, bytes);
  jpeg_read_header(info, TRUE);
  if ((int)info->image_width != width || (int)info->image_height != height) {
    jpeg_abort_decompress(info);
    return BAD_SIZE;
  }
  int denominator = 1;
  while (denominator < 8 && w >= 2 * denominator * size && h >= 2 * denominator * size) denominator *= 2;
  info->scale_num = 1, info->scale_denom = denominator;
  info->out_color_space = JCS_EXT_RGBX;
  info->dct_method = JDCT_IFAST;  // as FFCV
  jpeg_start_decompress(info);

  double step = 1.0 / denominator;
  int top = y / denominator, left = x / denominator;
  int bottom = (y + h + denominator - 1) / denominator, right = (x + w + denominator - 1) / denominator;
  if (bottom > (int)info->output_height) bottom = info->output_height;
  if (right > (int)info->output_width) right = info->output_width;
  JDIMENSION start = left, columns = right - left;
  if ((int)columns < (int)info->output_width) jpeg_crop_scanline(info, &start, &columns);
  const JDIMENSION mcu = DCTSIZE / denominator * (info->num_components > 1 ? info->max_h_samp_factor : 1);
  huffman_take_over(info, &d->huffman, (int)(start / mcu), (int)((start + columns - 1) / mcu));
  if (top > 0) jpeg_skip_scanlines(info, top);

  const size_t row_bytes = aligned(4 * (size_t)(width + 66));  // a decoded row has the full width, at most
  uint8_t *const start_of_rows = (uint8_t *)aligned((size_t)memory);
  uint8_t *const rows[2] = {start_of_rows, start_of_rows + row_bytes};
  Axis vertical = {y * step - top, h * step / size, bottom - top};
  Axis horizontal = {x * step - left, w * step / size, right - left};
  int status = resizer_start(r, vertical, horizontal, size, flip, out, normalize, start_of_rows + 2 * row_bytes);
  const size_t skip = 4 * (size_t)(left - (int)start);
  for (int at = 0; at < bottom - top && status == OK && r->row < size; ++at) {
    JSAMPROW row = rows[at & 1];
    if (jpeg_read_scanlines(info, &row, 1) != 1) status = BAD_JPEG;
    if (status == OK) status = resizer_take(r, at, row + skip, rows[(at & 1) ^ 1] + skip);
  }
  if (d->error.manager.num_warnings > 0) status = BAD_JPEG;  // data truncated or damaged, as turbojpeg judges
  jpeg_abort_decompress(info);
  return status == OK && r->row < size ? BAD_JPEG : status;
}

static int read_raw(const uint8_t *source, int width, int y, int x, int h, int w, Resizer *r, int size, int flip,
                    void *out, const float *normalize, uint8_t *memory) {
  uint8_t *rows[2];
  memory = (uint8_t *)aligned((size_t)memory);
  for (int i = 0; i < 2; ++i) rows[i] = memory, memory += aligned(4 * (size_t)(width + 66));
  int status = resizer_start(r, (Axis){0, (double)h / size, h}, (Axis){0, (double)w / size, w}, size, flip, out,
                             normalize, memory);
  for (int at = 0; at < h && status == OK && r->row < size; ++at) {
    const uint8_t *from = source + 3 * ((size_t)(y + at) * width + x);
    uint8_t *row = rows[at & 1];
    for (int i = 0; i < w; ++i) {
      row[4 * i] = from[3 * i], row[4 * i + 1] = from[3 * i + 1], row[4 * i + 2] = from[3 * i + 2];
    }
    status = resizer_take(r, at, row, rows[(at & 1) ^ 1]);
  }
  return status;
}

// Bytes of scratch memory that a call needs for images of at most `greatest_side` and an output of `size`.
int64_t crop_decode_scratch_bytes(int64_t greatest_side, int64_t size) {
  return (int64_t)(aligned(8 * (size_t)(greatest_side + 66)) + 2 * aligned(4 * (size_t)(greatest_side + 66)) +
                   aligned(sizeof(Column) * (size_t)size) +
                   aligned(32 * (size_t)(greatest_side / 4 + 2 * size + 2)) + 128);
}

// Crop (y, x, h, w) from an image of height x width pixels, resize to size x size, flip horizontally if `flip`.
//   source, bytes   a JPEG, or RGB pixels if `raw`
//   out             uint8 [size, size, 3], or float32 with `normalize`: 3 scales, then 3 biases, of values 0..255
//   scratch         crop_decode_scratch_bytes(max(height, width), size) bytes
// Returns OK, BAD_JPEG (cannot be decoded) or BAD_SIZE (the image is not height x width, or the crop not inside).
int64_t crop_decode(int64_t source, int64_t bytes, int64_t raw, int64_t height, int64_t width, int64_t y, int64_t x,
                    int64_t h, int64_t w, int64_t size, int64_t flip, int64_t normalize, int64_t out,
                    int64_t scratch) {
  if (height < 1 || width < 1 || height > 65535 || width > 65535 || size < 1 || size > 65535) return BAD_SIZE;
  if (y < 0 || x < 0 || h < 1 || w < 1 || y + h > height || x + w > width) return BAD_SIZE;
  if (raw && bytes < 3 * height * width) return BAD_SIZE;
  Resizer resizer;
  const float *floats = (const float *)normalize;
  if (raw)
    return read_raw((const uint8_t *)source, (int)width, (int)y, (int)x, (int)h, (int)w, &resizer, (int)size,
                    (int)flip, (void *)out, floats, (uint8_t *)scratch);
  return decode_jpeg((const uint8_t *)source, (size_t)bytes, (int)height, (int)width, (int)y, (int)x, (int)h, (int)w,
                     &resizer, (int)size, (int)flip, (void *)out, floats, (uint8_t *)scratch);
}

// The functions above are called through their addresses; Python only has to be able to load the file.
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_crop_decode", NULL, -1, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__crop_decode(void) { return PyModule_Create(&module); }
