"""The decoder's C code compiled for arm64, under qemu, against this machine's: the same pixels, and the same refusals.

    apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
    apt-get download libjpeg62-turbo-dev:arm64 && dpkg-deb -x libjpeg62-turbo-dev_*_arm64.deb jpeg-arm64
    python tests/arm64.py --jpeg jpeg-arm64 --count 2000

JPEGs of all kinds, as of fuzz_jpeg.py, intact and damaged; random crops and center crops. Exit code 1 where a code or a
pixel differs.
"""

import argparse
import ctypes
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from ffcv_fields import _crop_decode
from ffcv_fields.image import _resize_and_center
from fuzz_jpeg import SOURCES, STATISTICS, damaged, jpeg

# Reads requests until the input ends: 12 int64 and the JPEG; writes the code and the output of each.
HARNESS = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int64_t crop_decode(int64_t request), crop_decode_scratch_bytes(int64_t side, int64_t size);
void *PyModule_Create2(void *module, int version) { return NULL; }
int main(void) {
  float statistics[6];
  int64_t r[16];
  fread(statistics, sizeof statistics, 1, stdin);
  while (fread(r, sizeof r, 1, stdin) == 1) {
    size_t bytes = r[9] * r[9] * 3 * (r[11] ? 4 : 1);
    void *source = malloc(r[1]), *out = calloc(bytes, 1);
    void *scratch = malloc(crop_decode_scratch_bytes(r[3] > r[4] ? r[3] : r[4], r[9]));
    if (r[1] && fread(source, r[1], 1, stdin) != 1) return 1;
    int64_t request[18] = {(int64_t)source, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10],
                           r[12], r[13], r[14], r[15],
                           r[11] ? (int64_t)statistics : 0, (int64_t)out, (int64_t)scratch};
    int64_t code = crop_decode((int64_t)request);
    fwrite(&code, sizeof code, 1, stdout);
    fwrite(out, bytes, 1, stdout);
    free(source), free(out), free(scratch);
  }
  return 0;
}
"""


def build(program: Path, libjpeg: Path) -> None:
    harness = program.with_suffix(".c")
    harness.write_text(HARNESS)
    headers = [libjpeg / "usr/include", libjpeg / "usr/include/aarch64-linux-gnu", sysconfig.get_path("include")]
    archive = libjpeg / "usr/lib/aarch64-linux-gnu/libjpeg.a"
    command = ["aarch64-linux-gnu-gcc", "-O3", "-static", "-pthread", *(f"-I{path}" for path in headers)]
    subprocess.run([*command, "-o", program, harness, *SOURCES, archive], check=True)


def requests(rng: np.random.Generator, count: int) -> list[tuple[list[int], np.ndarray]]:
    """`(the 16 numbers, the JPEG)` of each: crops of intact and, one in four, damaged JPEGs."""
    made = []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(1, 140, 2))
        source, size = jpeg(rng, height, width), int(rng.integers(1, 60))
        source = damaged(rng, source) if rng.random() < 0.25 else source
        y, x = int(rng.integers(height)), int(rng.integers(width))
        h, w = int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))
        flip, floats, center = (int(bit) for bit in rng.integers(2, size=3))
        box, resized = (y, x, h, w), (0, 0, 0, 0)
        if center:
            box, resized = (0, 0, height, width), _resize_and_center(height, width, size, int(rng.integers(size, 80)))
        made.append(([0, source.size, 0, height, width, *box, size, flip, floats, *resized], source))
    return made


def decode_here(numbers: list[int], source: np.ndarray) -> tuple[int, np.ndarray]:
    c = ctypes.CDLL(_crop_decode.__file__)
    c.crop_decode.argtypes, c.crop_decode.restype = [ctypes.c_int64], ctypes.c_int64
    c.crop_decode_scratch_bytes.argtypes, c.crop_decode_scratch_bytes.restype = 2 * [ctypes.c_int64], ctypes.c_int64
    height, width, size, floats = numbers[3], numbers[4], numbers[9], numbers[11]
    out = np.zeros((size, size, 3), np.float32 if floats else np.uint8)
    scratch = np.empty(c.crop_decode_scratch_bytes(max(height, width), size), np.uint8)
    memory = [floats and STATISTICS.ctypes.data, out.ctypes.data, scratch.ctypes.data]
    request = np.array([source.ctypes.data, *numbers[1:11], *numbers[12:], *memory], np.int64)
    return c.crop_decode(request.ctypes.data), out


def main(libjpeg: Path, count: int, seed: int) -> int:
    made = requests(np.random.default_rng(seed), count)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "decode", libjpeg)
        data = b"".join(np.int64(numbers).tobytes() + source.tobytes() for numbers, source in made)
        result = subprocess.run(
            ["qemu-aarch64", f"{folder}/decode"], input=STATISTICS.tobytes() + data, stdout=subprocess.PIPE, check=True
        )
    at, codes, different, greatest = 0, [0, 0, 0], 0, 0.0
    for numbers, source in made:
        code, here = decode_here(numbers, source)
        there_code = int(np.frombuffer(result.stdout, np.int64, 1, at)[0])
        there = np.frombuffer(result.stdout, here.dtype, here.size, at + 8).reshape(here.shape)
        at += 8 + here.nbytes
        codes[code] += 1
        if code != there_code or (code == 0 and not np.array_equal(here, there)):
            different += 1
            greatest = max(greatest, float(np.abs(here.astype(np.float64) - there).max()))
    print(f"{count:,} JPEGs: {codes[0]:,} decoded, {codes[1]:,} damaged, {codes[2]:,} of another size; ", end="")
    print(f"{different:,} differ" + (f", by up to {greatest:g}" if different else ""))
    return int(different > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jpeg", type=Path, required=True, help="folder with the arm64 package of libjpeg")
    parser.add_argument("--count", type=int, default=2000, help="JPEGs [2000]")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried [0]")
    arguments = parser.parse_args()
    sys.exit(main(arguments.jpeg, arguments.count, arguments.seed))
