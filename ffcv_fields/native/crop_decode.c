// Decode what a crop needs of a JPEG, and resize it: the pixels of RandomResizedCropDecoder(decode="fast").
//
// libjpeg reads the header. Of a plain JPEG (planes.h) the rest is ours:
//
//   bits.h    the bits of the stream; tables.h: what they mean by the file's Huffman tables
//   blocks.h  the blocks of MCUs
//   idct.h    their samples; planes.h: those that the crop needs, of every component
//   filter.h  each component is resized from the resolution that it is stored in
//   output.h  color conversion once, at the output's size; bytes or normalized floats
//
// Any other JPEG is decoded by libjpeg to RGB, and resized as raw pixels are. Nothing is allocated but by libjpeg, and
// no error exits: each returns a code. Called from numba through ctypes.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>

#include "crop.h"
#include "errors.h"
#include "tables.h"

#define GREATEST_SIZE 16384         // of an output
#define GREATEST_RESIZED (1L << 30) // of the longer side that a center crop is cut from
#define GREATEST_MEMORY (1L << 30)  // bytes, for the coefficients of a progressive JPEG that claims to be huge
#define GREATEST_PIXELS (1L << 26)  // of a crop that libjpeg decodes, after scaling

static void say_no_level(j_common_ptr info, int level) {
  if (level < 0) info->err->num_warnings++;
}

typedef struct {
  struct jpeg_decompress_struct info;
  ErrorManager error;
  Tables tables;
  int ready;
} Decompressor;

// Made once a thread, freed when the thread ends: every epoch has threads of its own.
static _Thread_local Decompressor decompressor;
static pthread_key_t at_thread_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const Steps *best_steps(void) {
#if defined(HAS_AVX2_STEPS)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma"))
    return &steps_avx2;
#endif
  return &steps_portable;
}

static void free_decompressor(void *d) { jpeg_destroy_decompress(&((Decompressor *)d)->info); }
static void make_key(void) { pthread_key_create(&at_thread_end, free_decompressor); }

static int make_decompressor(Decompressor *d) {
  if (d->ready) return 1;
  d->info.err = errors(&d->error, say_no_level);
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

// The crop of a JPEG that is not plain, by libjpeg: its rows and columns alone (jpeg_skip_scanlines,
// jpeg_crop_scanline), at 1/2, 1/4 or 1/8 scale where the crop has that many pixels to spare.
static int crop_by_libjpeg(const Request *r, j_decompress_ptr info, uint8_t *memory) {
  const int y = (int)r->y, x = (int)r->x, h = (int)r->h, w = (int)r->w;
  const int64_t rows = resized_rows(r), columns_wanted = resized_columns(r);
  int denominator = 1;
  while (denominator < 8 && w >= 4 * denominator * columns_wanted && h >= 4 * denominator * rows) denominator *= 2;
  info->scale_num = 1, info->scale_denom = denominator;
  info->out_color_space = JCS_RGB;
  info->dct_method = JDCT_ISLOW;
  jpeg_start_decompress(info);
  int bottom = (y + h + denominator - 1) / denominator, right = (x + w + denominator - 1) / denominator;
  if (bottom > (int)info->output_height) bottom = info->output_height;
  if (right > (int)info->output_width) right = info->output_width;
  const int top = y / denominator, left = x / denominator;
  if ((int64_t)(bottom - top) * (right - left) > GREATEST_PIXELS) return BAD_SIZE;
  JDIMENSION start = left, columns = right - left;
  if ((int)columns < (int)info->output_width) jpeg_crop_scanline(info, &start, &columns);
  if (top > 0) jpeg_skip_scanlines(info, top);
  const Pixels pixels = {memory, 3 * (ptrdiff_t)columns, (int)start, top, denominator};
  memory += aligned((size_t)pixels.stride * (size_t)(bottom - top));
  for (int row = 0; row < bottom - top; ++row) {
    JSAMPROW to = (JSAMPROW)pixels.pixels + row * pixels.stride;
    if (jpeg_read_scanlines(info, &to, 1) != 1) return BAD_JPEG;
  }
  if (info->err->num_warnings > 0) return BAD_JPEG;  // data cut off or damaged, as turbojpeg judges
  return best_steps()->pixels(r, &pixels, memory);
}

static int crop_jpeg(const Request *r) {
  Decompressor *d = &decompressor;
  struct jpeg_decompress_struct *info = &d->info;
  if (!make_decompressor(d)) return BAD_JPEG;
  int status;
  if (setjmp(d->error.leave) == 0) {
    jpeg_mem_src(info, (const uint8_t *)r->source, (size_t)r->bytes);
    jpeg_read_header(info, TRUE);
    if (info->image_width != (JDIMENSION)r->width || info->image_height != (JDIMENSION)r->height)
      status = BAD_SIZE;
    else if (best_steps()->is_plain(info))
      status = best_steps()->jpeg(r, info, &d->tables);
    else
      status = crop_by_libjpeg(r, info, (uint8_t *)aligned((size_t)r->scratch));
  } else {
    status = BAD_JPEG;
  }
  jpeg_abort_decompress(info);
  return status;
}

// Bytes of scratch memory that a call needs for images of at most `greatest_side` and an output of `size`. Most of it
// is for images that are not plain, and never touched.
int64_t crop_decode_scratch_bytes(int64_t greatest_side, int64_t size) {
  const int64_t side = greatest_side, squared = side * side < GREATEST_PIXELS ? side * side : GREATEST_PIXELS;
  // Samples along an axis of a component: reduced until an output pixel has fewer than 4, or an eighth is left.
  const int64_t reduced = side / 8 > 4 * size ? side / 8 : 4 * size;
  const int64_t samples = (reduced < side ? reduced : side) + 64;
  const int64_t taps = 6 * (32 * size + 2 * (2 * side + 8 * size) + 128);
  const int64_t jpeg = 3 * samples * (samples + 64) + 64 * (samples + 64) + 96 * size;
  const int64_t rgb = 3 * (squared + 32 * side) + 64 * (3 * side + 96) + 128 * (size + 16);
  return taps + (jpeg > rgb ? jpeg : rgb) + 32768;
}

// Cut a crop out of an image, resize and mirror it, as the request (crop.h) at this address says.
// Returns OK, BAD_JPEG (cannot be decoded) or BAD_SIZE (the image is not height x width, or the crop not inside).
int64_t crop_decode(int64_t request) {
  const Request *r = (const Request *)request;
  if (r->height < 1 || r->width < 1 || r->height > 65535 || r->width > 65535) return BAD_SIZE;
  if (r->size < 1 || r->size > GREATEST_SIZE) return BAD_SIZE;
  if (r->y < 0 || r->y > r->height || r->h < 1 || r->h > r->height - r->y) return BAD_SIZE;
  if (r->x < 0 || r->x > r->width || r->w < 1 || r->w > r->width - r->x) return BAD_SIZE;
  if (r->rows < 0 || r->columns < 0 || r->top < 0 || r->left < 0 || !r->rows != !r->columns) return BAD_SIZE;
  if (r->rows > GREATEST_RESIZED || r->columns > GREATEST_RESIZED) return BAD_SIZE;
  if (r->rows && (r->top > r->rows - r->size || r->left > r->columns - r->size)) return BAD_SIZE;
  if (!r->raw) return crop_jpeg(r);
  if (r->bytes < 3 * r->height * r->width) return BAD_SIZE;
  const Pixels pixels = {(const uint8_t *)r->source, 3 * (ptrdiff_t)r->width, 0, 0, 1};
  return best_steps()->pixels(r, &pixels, (uint8_t *)aligned((size_t)r->scratch));
}

// The functions above are called through their addresses; Python only has to be able to load the file.
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_crop_decode", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__crop_decode(void) {
  return PyModule_Create(&module);
}
