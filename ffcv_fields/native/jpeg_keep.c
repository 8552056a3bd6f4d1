// JPEGs on their way into a `.beton`: written again without loss, with restart markers; or their pixels.
//
// What is written again keeps its coefficients. Of the usual JPEG (one Huffman-coded scan of 8 bits) the codes are copied
// (copy_codes.h): they are read only to find where blocks end, and nothing but the DC coefficients behind a marker is
// coded anew. The coefficients of progressive ones, and of several scans, go through libjpeg. What has a fault, or could
// not be stored bit for bit, is refused, for others to judge. No error exits: each returns a code. Called through ctypes.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "copy_codes.h"
#include "errors.h"

#define GREATEST_MEMORY (1L << 30)  // bytes, for the coefficients of a JPEG that claims to be huge

static void leave_on_warning(j_common_ptr info, int level) {
  if (level < 0) leave_on_error(info);
}

// --- libjpeg writes into memory of a given size -------------------------------------------------------------------------

typedef struct {
  struct jpeg_destination_mgr manager;
  uint8_t *out;
  size_t room;
  int full;
} Destination;

static void begin_writing(j_compress_ptr info) {
  Destination *d = (Destination *)info->dest;
  d->manager.next_output_byte = d->out, d->manager.free_in_buffer = d->room;
}
static boolean no_room(j_compress_ptr info) {
  ((Destination *)info->dest)->full = 1;
  leave_on_error((j_common_ptr)info);
  return FALSE;
}
static void end_writing(j_compress_ptr info) { (void)info; }

// Whether every bit of every coefficient was sent: libjpeg smooths the pixels of what it does not know.
static int is_complete(j_decompress_ptr info) {
  if (!info->progressive_mode) return 1;
  if (info->coef_bits == NULL) return 0;
  for (int i = 0; i < info->num_components; ++i)
    for (int k = 0; k < DCTSIZE2; ++k)
      if (info->coef_bits[i][k] != 0) return 0;
  return 1;
}

static int keep_by_libjpeg(KeepRequest *r, j_decompress_ptr from) {
  ErrorManager error;
  struct jpeg_compress_struct to = {0};
  Destination destination = {{NULL, 0, begin_writing, no_room, end_writing}, (uint8_t *)r->out, (size_t)r->room, 0};
  volatile int status = DAMAGED;
  jvirt_barray_ptr *coefficients = jpeg_read_coefficients(from);  // errors leave by the caller
  if (!is_complete(from)) return OTHER_KIND;
  to.err = errors(&error, leave_on_warning);
  if (setjmp(error.leave) == 0) {
    jpeg_create_compress(&to);
    to.dest = &destination.manager;
    jpeg_copy_critical_parameters(from, &to);
    to.optimize_coding = TRUE;
    to.restart_interval = (unsigned)restart_interval(r, from);
    jpeg_write_coefficients(&to, coefficients);
    jpeg_finish_compress(&to);
    r->written = r->room - (int64_t)destination.manager.free_in_buffer;
    status = KEPT;
  } else if (destination.full) {
    status = OTHER_KIND;
  }
  jpeg_destroy_compress(&to);
  return status;
}

static int keep(KeepRequest *r, j_decompress_ptr info) {
  jpeg_mem_src(info, (const uint8_t *)r->source, (size_t)r->bytes);
  jpeg_read_header(info, TRUE);
  r->height = info->image_height, r->width = info->image_width;
  if (r->longest && (r->height > r->longest || r->width > r->longest)) return TOO_LARGE;
  if (!can_be_kept(info)) return OTHER_KIND;
  if (has_one_scan(info)) {
    static _Thread_local CopyTables tables;
    const int64_t written = copy_codes(r, info, &tables);
    if (written > 0) {
      r->written = written;
      return KEPT;
    }
  }
  return keep_by_libjpeg(r, info);
}

// Write the JPEG of the request (copy_codes.h) at this address again. Returns KEPT, or why not.
int64_t jpeg_keep(int64_t request) {
  KeepRequest *r = (KeepRequest *)request;
  ErrorManager error;
  struct jpeg_decompress_struct info = {0};
  volatile int status = DAMAGED;
  info.err = errors(&error, leave_on_warning);
  r->height = r->width = r->written = 0;
  if (r->bytes < 1 || r->room < 1 || r->every < 0 || r->every > 65535) return OTHER_KIND;
  if (setjmp(error.leave) == 0) {
    jpeg_create_decompress(&info);
    info.mem->max_memory_to_use = GREATEST_MEMORY;
    status = keep(r, &info);
  }
  jpeg_destroy_decompress(&info);
  return status;
}

typedef struct {
  int64_t source, bytes;
  int64_t denominator;         // 1, 2, 4 or 8: of the scale
  int64_t out, height, width;  // uint8 [height, width, 3], RGB: of the scaled image
} PixelsRequest;

static int decode(const PixelsRequest *r, j_decompress_ptr info) {
  jpeg_mem_src(info, (const uint8_t *)r->source, (size_t)r->bytes);
  jpeg_read_header(info, TRUE);
  if (info->data_precision != 8 || (info->num_components != 1 && info->num_components != 3)) return OTHER_KIND;
  info->out_color_space = JCS_RGB;
  info->dct_method = JDCT_ISLOW;
  info->scale_num = 1, info->scale_denom = (unsigned)r->denominator;
  jpeg_start_decompress(info);
  if (info->output_height != r->height || info->output_width != r->width) return OTHER_KIND;
  while (info->output_scanline < info->output_height) {
    JSAMPROW row = (JSAMPROW)r->out + 3 * (size_t)r->width * info->output_scanline;
    jpeg_read_scanlines(info, &row, 1);
  }
  jpeg_finish_decompress(info);
  return KEPT;
}

// The pixels of a gray or color JPEG without fault, as the request at this address says. Returns KEPT, or why not.
int64_t jpeg_pixels(int64_t request) {
  ErrorManager error;
  struct jpeg_decompress_struct info = {0};
  volatile int status = DAMAGED;
  info.err = errors(&error, leave_on_warning);
  if (setjmp(error.leave) == 0) {
    jpeg_create_decompress(&info);
    info.mem->max_memory_to_use = GREATEST_MEMORY;
    status = decode((const PixelsRequest *)request, &info);
  }
  jpeg_destroy_decompress(&info);
  return status;
}

// The functions above are called through their addresses; Python only has to be able to load the file.
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpeg_keep", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_keep(void) {
  return PyModule_Create(&module);
}
