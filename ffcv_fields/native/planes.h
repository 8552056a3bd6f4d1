// Steps 1 to 3 for a whole crop: the samples that it needs of each component of a plain JPEG, and no others.
//
// A plain JPEG is sequential, Huffman-coded, of 8 bits, in one scan, gray or YCbCr: what FFCV's writer and PIL write.
// Stretches between restart markers that no block of the crop lies in are passed over.

#ifndef PLANES_H
#define PLANES_H

#include "blocks.h"
#include "filter.h"
#include "idct.h"

#define COMPONENTS 3
// Where samples are reduced, at least so many are left to an output pixel: with 1, PSNR falls from 55 to 40 dB there,
// and nothing gets faster. crop_decode_scratch_bytes counts on 2.
#define SPARE 2

// The part of a component that a crop needs.
typedef struct {
  uint8_t *samples;  // column by column: sample (x, y) of the component at samples[(x - left) * stride + y - top]
  ptrdiff_t stride;
  int left, top;
  int reduced_x, reduced_y;  // samples are means of 2^x by 2^y
  int first_column, behind_column, first_row, behind_row;  // blocks
  Taps across, down;
} Plane;

typedef struct {
  int components, across, down;  // `across`, `down`: MCUs of the image
  Plane planes[COMPONENTS];
  Layout layout;
  int16_t quantizers[COMPONENTS][64];
  int h[COMPONENTS], v[COMPONENTS];  // blocks of an MCU; 1 where there is one component alone
  int first_column, last_column, first_row, last_row;  // MCUs that the crop needs
  int64_t segment;                                     // stretch between restart markers that the stream is in
} Planes;

static int is_plain(j_decompress_ptr info) {
  const int components = info->num_components;
  if (info->progressive_mode || info->arith_code || info->data_precision != 8) return 0;
  if (jpeg_has_multiple_scans(info)) return 0;
  if (info->comps_in_scan != components || info->err->num_warnings) return 0;
  if (info->Ss != 0 || info->Se != 63 || info->Ah != 0 || info->Al != 0) return 0;
  if (!(components == 1 && info->jpeg_color_space == JCS_GRAYSCALE) &&
      !(components == 3 && info->jpeg_color_space == JCS_YCbCr))
    return 0;
  int blocks = 0;
  for (int i = 0; i < components; ++i) {
    const jpeg_component_info *c = &info->comp_info[i];
    const int h = info->max_h_samp_factor / c->h_samp_factor, v = info->max_v_samp_factor / c->v_samp_factor;
    if (h * c->h_samp_factor != info->max_h_samp_factor || v * c->v_samp_factor != info->max_v_samp_factor) return 0;
    const int dc = c->dc_tbl_no, ac = c->ac_tbl_no, quantizers = c->quant_tbl_no;
    if (dc < 0 || dc >= NUM_HUFF_TBLS || ac < 0 || ac >= NUM_HUFF_TBLS) return 0;
    if (quantizers < 0 || quantizers >= NUM_QUANT_TBLS) return 0;
    if (!info->dc_huff_tbl_ptrs[dc] || !info->ac_huff_tbl_ptrs[ac] || !info->quant_tbl_ptrs[quantizers]) return 0;
    blocks += c->h_samp_factor * c->v_samp_factor;
  }
  return components == 1 || blocks <= D_MAX_BLOCKS_IN_MCU;
}

// --- what is needed --------------------------------------------------------------------------------------------------

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How often a length is halved, at most 3 times, while SPARE samples or more are left to an output pixel.
static int halvings(int length, int size) {
  int times = 0;
  while (times < 3 && length >= 2 * SPARE * size << times) ++times;
  return times;
}

// The tables, the blocks and MCUs that the crop needs, and room for their samples.
static int make_planes(Planes *p, const Request *r, j_decompress_ptr info, Tables *tables, uint8_t **memory) {
  memset(p, 0, sizeof *p);
  const int components = p->components = info->num_components;
  const int most_h = info->max_h_samp_factor, most_v = info->max_v_samp_factor;
  p->across = ceil_div((int)r->width, 8 * (components > 1 ? most_h : 1));
  p->down = ceil_div((int)r->height, 8 * (components > 1 ? most_v : 1));
  p->first_column = p->across, p->first_row = p->down;
  for (int i = 0; i < components; ++i) {
    const jpeg_component_info *c = &info->comp_info[i];
    Plane *plane = &p->planes[i];
    const int every_x = most_h / c->h_samp_factor, every_y = most_v / c->v_samp_factor;
    const int samples_x = ceil_div((int)r->width, every_x), samples_y = ceil_div((int)r->height, every_y);
    const int fancy = every_x <= 2 && every_y <= 2 && samples_x > 2;  // where libjpeg interpolates
    const int x = plane->reduced_x = halvings((int)r->w / every_x, resized_columns(r));
    const int y = plane->reduced_y = halvings((int)r->h / every_y, resized_rows(r));
    const Axis across = {(int)r->x, (int)r->w, (int)r->size, ceil_div(samples_x, 1 << x), every_x << x,
                         fancy && every_x == 2 && x == 0, (int)r->flip, (int)r->columns, (int)r->left};
    const Axis down = {(int)r->y, (int)r->h, (int)r->size, ceil_div(samples_y, 1 << y), every_y << y,
                       fancy && every_y == 2 && y == 0, 0, (int)r->rows, (int)r->top};
    const jpeg_component_info *before = i ? c - 1 : NULL;
    if (before && before->h_samp_factor == c->h_samp_factor && before->v_samp_factor == c->v_samp_factor)
      plane->across = plane[-1].across, plane->down = plane[-1].down;
    else if (make_taps(&across, &plane->across, memory) || make_taps(&down, &plane->down, memory))
      return BAD_SIZE;
    plane->first_column = plane->across.first >> (3 - x), plane->first_row = plane->down.first >> (3 - y);
    plane->behind_column = ((plane->across.behind - 1) >> (3 - x)) + 1;
    plane->behind_row = ((plane->down.behind - 1) >> (3 - y)) + 1;
    plane->left = plane->first_column << (3 - x), plane->top = plane->first_row << (3 - y);
    const int height = (plane->behind_row - plane->first_row) << (3 - y);
    const int width = (plane->behind_column - plane->first_column) << (3 - x);
    plane->stride = (height + 63) / 32 * 32;
    plane->samples = take(memory, (size_t)plane->stride * (size_t)width + 64);
    p->h[i] = components > 1 ? c->h_samp_factor : 1, p->v[i] = components > 1 ? c->v_samp_factor : 1;
    for (int k = 0; k < 64; ++k) p->quantizers[i][k] = (int16_t)info->quant_tbl_ptrs[c->quant_tbl_no]->quantval[k];
#define LEAST(a, b) a = (b) < (a) ? (b) : (a)
#define MOST(a, b) a = (b) > (a) ? (b) : (a)
    LEAST(p->first_column, plane->first_column / p->h[i]), LEAST(p->first_row, plane->first_row / p->v[i]);
    MOST(p->last_column, (plane->behind_column - 1) / p->h[i]), MOST(p->last_row, (plane->behind_row - 1) / p->v[i]);
  }
  Layout *layout = &p->layout;
  for (int i = 0; i < components; ++i) {  // in the order of the scan
    const jpeg_component_info *c = info->cur_comp_info[i];
    const int number = c->component_index, dc = c->dc_tbl_no, ac = c->ac_tbl_no;
    if (!make_table(&tables->dc[dc], info->dc_huff_tbl_ptrs[dc], 1)) return BAD_JPEG;
    if (!make_table(&tables->ac[ac], info->ac_huff_tbl_ptrs[ac], 0)) return BAD_JPEG;
    for (int j = 0; j < p->h[number] * p->v[number]; ++j, ++layout->blocks) {
      layout->component[layout->blocks] = number;
      layout->dc[layout->blocks] = &tables->dc[dc], layout->ac[layout->blocks] = &tables->ac[ac];
    }
  }
  return OK;
}

// --- stretches and runs ----------------------------------------------------------------------------------------------

// On to the restart marker before `segment`. Marker n of a file is RST(n modulo 8).
static int begin_segment(Planes *p, Stream *s, int64_t segment) {
  const uint8_t *at = s->place.bits.next, *const end = s->source.end;
  while (p->segment < segment) {
    at = at < end ? memchr(at, 0xFF, (size_t)(end - at)) : NULL;
    if (at == NULL || at + 1 == end) return BAD_JPEG;
    if (at[1] == JPEG_RST0 + (p->segment & 7))
      ++p->segment, at += 2;
    else if (at[1] == 0 || at[1] == 0xFF)
      at += at[1] == 0 ? 2 : 1;
    else
      return BAD_JPEG;
  }
  s->place.bits = (Bits){0, at, 0};
  s->source.invented = 0;
  memset(s->last_dc, 0, sizeof s->last_dc);
  return OK;
}

// The first MCU, from `mcu` on, that the crop needs, or -1.
static int64_t next_needed(const Planes *p, int64_t mcu) {
  int64_t row = mcu / p->across, column = mcu % p->across;
  if (row < p->first_row) row = p->first_row, column = 0;
  if (column > p->last_column) ++row, column = 0;
  if (row > p->last_row) return -1;
  return row * p->across + (column < p->first_column ? p->first_column : column);
}

// The last MCU before `behind` that the crop needs, if there is one.
static int64_t last_needed(const Planes *p, int64_t behind) {
  int64_t row = (behind - 1) / p->across, column = (behind - 1) % p->across;
  if (row > p->last_row) row = p->last_row, column = p->last_column;
  if (column < p->first_column) --row, column = p->last_column;
  return row * p->across + (column > p->last_column ? p->last_column : column);
}

// The samples of the run of `mcus` MCUs from `mcu` on, of the blocks among theirs that the crop needs.
static void transform_run(const Planes *p, int64_t mcu, int mcus, const int16_t *blocks) {
  Transform lists[COMPONENTS][RUN * D_MAX_BLOCKS_IN_MCU];
  int counts[COMPONENTS] = {0};
  int row = (int)(mcu / p->across), column = (int)(mcu % p->across);
  for (int i = 0; i < mcus; ++i, blocks += 64 * p->layout.blocks) {
    if (row >= p->first_row && row <= p->last_row && column >= p->first_column && column <= p->last_column) {
      int numbers[COMPONENTS] = {0};
      for (int j = 0; j < p->layout.blocks; ++j) {
        const int c = p->layout.component[j], number = numbers[c]++;
        const Plane *plane = &p->planes[c];
        const int x = column * p->h[c] + number % p->h[c], y = row * p->v[c] + number / p->h[c];
        if (x < plane->first_column || x >= plane->behind_column || y < plane->first_row || y >= plane->behind_row)
          continue;
        const int left = (x - plane->first_column) << (3 - plane->reduced_x);
        const int top = (y - plane->first_row) << (3 - plane->reduced_y);
        lists[c][counts[c]++] = (Transform){blocks + 64 * j, plane->samples + left * plane->stride + top};
      }
    }
    if (++column == p->across) column = 0, ++row;
  }
  for (int c = 0; c < p->components; ++c)
    islow(lists[c], counts[c], p->quantizers[c], p->planes[c].stride, p->planes[c].reduced_x, p->planes[c].reduced_y);
}

// All samples that the crop needs.
static int decode_planes(Planes *p, j_decompress_ptr info, uint8_t **memory) {
  const uint8_t *data = info->src->next_input_byte;
  const int64_t interval = info->restart_interval ? (int64_t)info->restart_interval : INT64_MAX;
  const int64_t all = (int64_t)p->across * p->down;
  int16_t *blocks = take(memory, RUN * D_MAX_BLOCKS_IN_MCU * sizeof(JBLOCK));
  Stream s = {.place.bits.next = data, .source.end = data + info->src->bytes_in_buffer};
  for (int64_t needed = next_needed(p, 0); needed >= 0;) {
    int64_t mcu = needed / interval * interval;
    const int64_t behind = all - mcu < interval ? all : mcu + interval, end = last_needed(p, behind) + 1;
    if (begin_segment(p, &s, needed / interval) != OK) return BAD_JPEG;
    while (mcu < end) {
      const int mcus = (int)(end - mcu < RUN ? end - mcu : RUN);
      if (decode_run(&s, &p->layout, mcus, blocks) != RUN_IS_DONE) return BAD_JPEG;
      transform_run(p, mcu, mcus, blocks);
      mcu += mcus;
    }
    needed = behind < all ? next_needed(p, behind) : -1;
  }
  return OK;
}

#endif
