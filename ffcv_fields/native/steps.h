// All steps in order, compiled once for every instruction set (steps_avx2.c, steps_portable.c).

#include "output.h"
#include "planes.h"

// A crop of a plain JPEG whose header `info` has read.
static int crop_jpeg(const Request *r, j_decompress_ptr info, Tables *tables) {
  uint8_t *memory = (uint8_t *)aligned((size_t)r->scratch);
  Planes planes;
  int status = make_planes(&planes, r, info, tables, &memory);
  if (status == OK) status = decode_planes(&planes, info, &memory);
  if (status != OK) return status;

  const int size = (int)r->size, gray = planes.components == 1;
  const Output output = make_output(r, !gray);
  int most = 0;
  for (int c = 0; c < planes.components; ++c) MOST(most, planes.planes[c].down.behind - planes.planes[c].top);
  const int length = (most + 31) / 32 * 32;
  int16_t *columns = take(&memory, 2 * (size_t)TILE * (size_t)length);
  int16_t *rows = take(&memory, 2 * (size_t)TILE * (size_t)length);
  int16_t *mixed[COMPONENTS];
  for (int c = 0; c < planes.components; ++c) mixed[c] = take(&memory, 2 * (size_t)TILE * (size_t)size);
  for (int x = 0; x < size; x += TILE) {
    const int count = size - x < TILE ? size - x : TILE;
    for (int c = 0; c < planes.components; ++c) {
      const Plane *plane = &planes.planes[c];
      const int from = plane->down.first - plane->top, needed = plane->down.behind - plane->down.first;
      const ptrdiff_t stride = (needed + 31) / 32 * 32;
      for (int i = 0; i < count; ++i) {
        const Tap tap = plane->across.taps[x + i];
        mix_bytes(plane->samples + (tap.first - plane->left) * plane->stride + from, plane->stride, tap, needed,
                  columns + i * stride);
      }
      for (int i = 0; i < needed; i += 8)
        for (int half = 0; half < TILE; half += 8)
          transpose(columns + half * stride + i, stride, rows + TILE * i + half, TILE);
      for (int y = 0; y < size; ++y) {
        const Tap tap = plane->down.taps[y];
        mix_words(rows + TILE * (ptrdiff_t)(tap.first - plane->down.first), TILE, tap, mixed[c] + TILE * y);
      }
    }
    for (int y = 0; y < size; ++y) {
      const int16_t *const channels[3] = {mixed[0] + TILE * y, mixed[gray ? 0 : 1] + TILE * y,
                                          mixed[gray ? 0 : 2] + TILE * y};
      write_pixels(&output, channels, y, x, count);
    }
  }
  end_output();
  return OK;
}

// A crop of RGB pixels.
static int crop_pixels(const Request *r, const Pixels *p, uint8_t *memory) {
  const int size = (int)r->size;
  const Output output = make_output(r, 0);
  const Axis down = {(int)r->y, (int)r->h, size, ceil_div((int)r->height, p->covered), p->covered, 0, 0,
                     (int)r->rows, (int)r->top};
  const Axis across = {(int)r->x, (int)r->w, size, ceil_div((int)r->width, p->covered), p->covered, 0, (int)r->flip,
                       (int)r->columns, (int)r->left};
  Taps by_row, by_column;
  if (make_taps(&down, &by_row, &memory) || make_taps(&across, &by_column, &memory))
    return BAD_SIZE;
  const int needed = 3 * (by_column.behind - by_column.first);  // bytes of a row
  const ptrdiff_t stride = (needed + 31) / 32 * 32, line = (size + TILE - 1) / TILE * TILE;
  int16_t *rows = take(&memory, 2 * (size_t)TILE * (size_t)stride);
  int16_t *columns = take(&memory, 2 * (size_t)TILE * (size_t)stride);
  int16_t *mixed = take(&memory, 2 * (size_t)TILE * (size_t)line), *lines[3];
  for (int c = 0; c < 3; ++c) lines[c] = take(&memory, 2 * (size_t)TILE * (size_t)line);
  for (int y = 0; y < size; y += TILE) {
    const int count = size - y < TILE ? size - y : TILE;
    for (int i = 0; i < count; ++i) {
      const Tap tap = by_row.taps[y + i];
      const uint8_t *from = p->pixels + (tap.first - p->top) * p->stride + 3 * (by_column.first - p->left);
      mix_bytes(from, p->stride, tap, needed, rows + i * stride);
    }
    for (int i = 0; i < needed; i += 8)
      for (int half = 0; half < TILE; half += 8)
        transpose(rows + half * stride + i, stride, columns + TILE * i + half, TILE);
    for (int c = 0; c < 3; ++c) {
      for (int x = 0; x < size; ++x) {
        const Tap tap = by_column.taps[x];
        mix_words(columns + TILE * (ptrdiff_t)(3 * (tap.first - by_column.first) + c), 3 * TILE, tap, mixed + TILE * x);
      }
      for (int x = 0; x < size; x += 8)
        for (int half = 0; half < TILE; half += 8)
          transpose(mixed + TILE * x + half, TILE, lines[c] + half * line + x, line);
    }
    for (int i = 0; i < count; ++i)
      for (int x = 0; x < size; x += TILE) {
        const int16_t *const channels[3] = {lines[0] + i * line + x, lines[1] + i * line + x, lines[2] + i * line + x};
        write_pixels(&output, channels, y + i, x, size - x < TILE ? size - x : TILE);
      }
  }
  end_output();
  return OK;
}
