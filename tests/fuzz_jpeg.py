"""Damaged JPEGs through crop_decode.c and jpeg_keep.c, built with gcc's address and undefined-behavior sanitizers.

    python tests/fuzz_jpeg.py --seconds 60

Images of all kinds of JPEG are encoded, damaged, truncated, and decoded from memory of exactly their size. The first
read or write outside a buffer ends it with the sanitizer's report and exit code 1, and so does a JPEG that is kept with
other pixels than PIL shows of it.
"""

import argparse
import collections
import ctypes
import io
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SOURCES = sorted((Path(__file__).parents[1] / "ffcv_fields" / "native").glob("*.c"))
STATISTICS = np.float32([0.01, 0.02, 0.03, 1, 2, 3])
MARKERS = (0, 0xFF, 0xD0, 0xD1, 0xD7, 0xD9)


def build(library: Path, portable: bool) -> None:
    include = sysconfig.get_path("include")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-shared", "-fPIC"]
    flags += ["-DPORTABLE", "-mno-avx2"] if portable else []
    subprocess.run(["gcc", *flags, f"-I{include}", "-o", library, *SOURCES, "-ljpeg"], check=True)


def jpeg(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    mode = rng.choice(["RGB", "L"])
    noise = rng.integers(0, 256, (height, width, 3) if rng.random() < 0.3 else (1 + height // 20, 1 + width // 20, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    options = {"subsampling": int(rng.integers(3))} if mode == "RGB" else {}
    if mode == "RGB" and rng.random() < 0.2:  # 4:1:1, 4:4:0
        sampling = int(rng.choice([cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440]))
        return cv2.imencode(".jpg", np.asarray(image), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].reshape(-1)
    file = io.BytesIO()
    image.save(
        file, "JPEG", quality=int(rng.integers(1, 101)), optimize=bool(rng.random() < 0.5),
        restart_marker_blocks=int(rng.choice([0, 0, 1, 2, 4, 9])), progressive=bool(rng.random() < 0.1), **options,
    )  # fmt: skip
    return np.frombuffer(file.getvalue(), np.uint8)


def damaged(rng: np.random.Generator, intact: np.ndarray) -> np.ndarray:
    bytes_ = intact.copy()
    first = 0 if rng.random() < 0.3 else intact.tobytes().find(b"\xff\xda")  # mostly after the header
    for at in rng.integers(first, len(bytes_), rng.integers(0, 8)):
        bytes_[at] = rng.choice([*MARKERS, rng.integers(256)])
    return bytes_[: rng.integers(len(bytes_))].copy() if rng.random() < 0.3 else bytes_


def pixels_of(data: bytes) -> np.ndarray | None:
    """By PIL, or None where it cannot."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def keep(c: ctypes.CDLL, rng: np.random.Generator, source: np.ndarray) -> int:
    """The code of `jpeg_keep`; what it keeps has the pixels of the source."""
    room = 2 * source.size + 20000 if rng.integers(4) else int(rng.integers(1, 2 * source.size + 9000))
    out, every = np.empty(room, np.uint8), int(rng.choice([0, 1, 2, 4, 50, 65535]))
    plain = np.empty(room, np.uint8)
    memory = out.ctypes.data, room, plain.ctypes.data
    request = np.array([source.ctypes.data, source.size, every, 0, *memory, 0, 0, 0], np.int64)
    code = c.jpeg_keep(request.ctypes.data)
    if code == 0:
        shown, kept = pixels_of(source.tobytes()), pixels_of(out[: request[7]].tobytes())
        assert kept is not None and (shown is None or np.array_equal(shown, kept)), source.tobytes()
        return 0 if shown is not None else 4
    return code


def main(library: str, seed: int, seconds: float) -> None:
    c = ctypes.CDLL(library)
    c.jpeg_keep.argtypes, c.jpeg_keep.restype = [ctypes.c_int64], ctypes.c_int64
    c.crop_decode.argtypes, c.crop_decode.restype = [ctypes.c_int64], ctypes.c_int64
    c.crop_decode_scratch_bytes.argtypes = 2 * [ctypes.c_int64]
    c.crop_decode_scratch_bytes.restype = ctypes.c_int64
    rng, end, codes = np.random.default_rng(seed), time.monotonic() + seconds, collections.Counter()
    kept: collections.Counter[int] = collections.Counter()
    while time.monotonic() < end:
        height, width = (int(side) for side in rng.integers(1, 140, 2))
        intact = jpeg(rng, height, width)
        for _ in range(5):
            source, size = damaged(rng, intact), int(rng.integers(1, 60))
            y, x = int(rng.integers(height)), int(rng.integers(width))
            box = y, x, int(rng.integers(1, height - y + 1)), int(rng.integers(1, width - x + 1))
            floats = int(rng.integers(2))
            out = np.empty((size, size, 3), np.float32 if floats else np.uint8)
            scratch = np.empty(c.crop_decode_scratch_bytes(max(height, width), size), np.uint8)
            normalize = floats and STATISTICS.ctypes.data
            data, memory = (source.ctypes.data, source.size, 0), (out.ctypes.data, scratch.ctypes.data)
            resized = 0, 0, 0, 0
            if rng.integers(3) == 0:  # a center crop
                rows, columns = (size + int(more) for more in rng.integers(0, 400, 2))
                resized = rows, columns, int(rng.integers(rows - size + 1)), int(rng.integers(columns - size + 1))
            flip = int(rng.integers(2))
            request = np.array([*data, height, width, *box, size, flip, *resized, normalize, *memory], np.int64)
            codes[c.crop_decode(request.ctypes.data)] += 1
            kept[keep(c, rng, source)] += 1
    print(f"{codes.total():,} JPEGs: {codes[0]:,} decoded, {codes[1]:,} damaged, {codes[2]:,} of another size")
    print(
        f"{kept[0]:,} kept with their pixels, {kept[1]:,} damaged, {kept[2]:,} of another kind, {kept[4]:,} not for PIL"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long [60]")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried [0]")
    parser.add_argument("--portable", action="store_true", help="the steps without AVX2")
    parser.add_argument("--library", help=argparse.SUPPRESS)  # given to itself, once it is built
    arguments = parser.parse_args()
    if arguments.library:
        main(arguments.library, arguments.seed, arguments.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder) / "decode.so", arguments.portable)
            names = [f"lib{name}.so" for name in ("asan", "ubsan")]
            preload = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
            environment = os.environ | {
                "LD_PRELOAD": " ".join(p.stdout.strip() for p in preload),
                "ASAN_OPTIONS": "detect_leaks=0:exitcode=1", "PYTHONMALLOC": "malloc",
            }  # fmt: skip
            command = [sys.executable, *sys.argv, "--library", f"{folder}/decode.so"]
            sys.exit(subprocess.run(command, env=environment).returncode)
