"""JPEGs of kinds that PIL and OpenCV do not write, by libjpeg, for tests: odd sampling, colors, scans, arithmetic."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np

SOURCE = r"""
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>
static jmp_buf leave;
static void fail(j_common_ptr info) { (void)info, longjmp(leave, 1); }
// o: height, width, components, color space, quality, interval, progressive, arithmetic, scans apart, optimize, then
// the sampling factors h, v of each component. Returns the bytes written, -1: libjpeg cannot.
int64_t encode(const uint8_t *pixels, const int32_t *o, uint8_t *out, int64_t room) {
  struct jpeg_compress_struct c;
  struct jpeg_error_mgr errors;
  jpeg_scan_info scans[4];
  memset(scans, 0, sizeof scans);
  c.err = jpeg_std_error(&errors);
  errors.error_exit = fail;
  jpeg_create_compress(&c);
  if (setjmp(leave)) {
    jpeg_destroy_compress(&c);
    return -1;
  }
  unsigned char *memory = out;
  unsigned long size = (unsigned long)room;
  jpeg_mem_dest(&c, &memory, &size);
  c.image_height = o[0], c.image_width = o[1], c.input_components = o[2];
  c.in_color_space = o[2] == 1 ? JCS_GRAYSCALE : o[2] == 3 ? JCS_RGB : JCS_CMYK;
  jpeg_set_defaults(&c);
  jpeg_set_colorspace(&c, (J_COLOR_SPACE)o[3]);
  jpeg_set_quality(&c, o[4], FALSE);
  c.restart_interval = o[5];
  c.optimize_coding = o[9];
  for (int i = 0; i < o[2]; ++i) {
    c.comp_info[i].h_samp_factor = o[10 + 2 * i], c.comp_info[i].v_samp_factor = o[11 + 2 * i];
    scans[i].comps_in_scan = 1, scans[i].component_index[0] = i, scans[i].Se = 63;
  }
  if (o[6]) jpeg_simple_progression(&c);
  if (o[8]) c.scan_info = scans, c.num_scans = o[2];
  c.arith_code = o[7];
  jpeg_start_compress(&c, TRUE);
  while (c.next_scanline < c.image_height) {
    JSAMPROW row = (JSAMPROW)(pixels + (size_t)c.next_scanline * o[1] * o[2]);
    jpeg_write_scanlines(&c, &row, 1);
  }
  jpeg_finish_compress(&c);
  jpeg_destroy_compress(&c);
  return memory == out ? (int64_t)size : -1;
}
"""
GRAY, RGB, YCBCR, CMYK, YCCK = 1, 2, 3, 4, 5  # libjpeg's J_COLOR_SPACE


class JpegWriter:
    """libjpeg's compressor with all its options, compiled into `folder`."""

    def __init__(self, folder: Path) -> None:
        (folder / "encode.c").write_text(SOURCE)
        flags = ["-O1", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", folder / "encode.so", folder / "encode.c", "-ljpeg"], check=True)
        self._encode = ctypes.CDLL(str(folder / "encode.so")).encode
        self._encode.argtypes, self._encode.restype = [*3 * [ctypes.c_void_p], ctypes.c_int64], ctypes.c_int64

    def __call__(self, pixels: np.ndarray, space: int, factors: list[tuple[int, int]], **options: int) -> bytes | None:
        """A JPEG of uint8 `[H, W, C]`; None if libjpeg cannot write it.

        Options: quality, interval, progressive, arithmetic, apart, optimize.
        """
        names = ("interval", "progressive", "arithmetic", "apart", "optimize")
        numbers = [*pixels.shape, space, options.get("quality", 90), *(options.get(name, 0) for name in names)]
        request = np.array([*numbers, *np.ravel(factors)], np.int32)
        pixels, out = np.ascontiguousarray(pixels), np.empty(pixels.size * 8 + 10000, np.uint8)
        size = self._encode(pixels.ctypes.data, request.ctypes.data, out.ctypes.data, out.size)
        return out[:size].tobytes() if size > 0 else None
