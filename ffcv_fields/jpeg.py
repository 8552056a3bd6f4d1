"""JPEGs on their way into a `.beton`: stored without loss, with restart markers, or decoded and made smaller."""

import ctypes
from dataclasses import dataclass

import numpy as np

from . import _jpeg_keep

_library = ctypes.CDLL(_jpeg_keep.__file__)
_jpeg_keep_c, _jpeg_pixels_c, _area_resize_c = _library.jpeg_keep, _library.jpeg_pixels, _library.area_resize
for _function in (_jpeg_keep_c, _jpeg_pixels_c, _area_resize_c):
    _function.argtypes, _function.restype = [ctypes.c_int64], ctypes.c_int64

# What the C function is asked for, and answers: int64 in this order (native/copy_codes.h, KeepRequest).
REQUEST = ("source", "bytes", "every", "longest", "out", "room", "plain", "written", "height", "width")
KEPT, DAMAGED, OTHER_KIND, TOO_LARGE = 0, 1, 2, 3  # its codes
GREATEST_BYTES = 8 << 20  # of a JPEG that is kept: FFCV's page
# One a process; what is not used of them takes no memory.
_room, _plain = np.empty(GREATEST_BYTES, np.uint8), np.empty(GREATEST_BYTES, np.uint8)


@dataclass(frozen=True, slots=True)
class KeptJpeg:
    """A JPEG as it is stored: its bytes, uint8 `[n]`, and the image's size in pixels."""

    data: np.ndarray
    height: int
    width: int


def keep_jpeg(source: bytes, restart_interval: int, longest: int = 0) -> tuple[KeptJpeg | None, int]:
    """A JPEG with the same coefficients, tables of quantization and colors, so that it has the same pixels bit for bit.

    Baseline and progressive ones, gray, YCbCr and RGB, of any subsampling. Metadata (EXIF, color profiles, comments)
    are left out. Not for several threads at once.

    Args:
        source: the file.
        restart_interval: 16 pixels between restart markers, so many times; 0: none.
        longest: the greatest side to keep, in pixels; 0: any.

    Returns:
        the JPEG, and KEPT; or None, and why not: DAMAGED (libjpeg finds a fault, though it may read it), OTHER_KIND
        (CMYK, arithmetic coding, 12 bits, a progressive one without its last scans, over 8 MiB, ...) or TOO_LARGE.
    """
    data = np.frombuffer(source, np.uint8)
    memory = _room.ctypes.data, _room.size, _plain.ctypes.data
    request = np.array([data.ctypes.data, data.size, restart_interval, longest, *memory, 0, 0, 0])
    code = _jpeg_keep_c(request.ctypes.data)
    if code != KEPT:
        return None, code
    written, height, width = request[-3:].tolist()
    return KeptJpeg(_room[:written].copy(), height, width), KEPT


def decode_jpeg(source: bytes, width: int, height: int, denominator: int = 1) -> np.ndarray | None:
    """The pixels of a gray or color JPEG, uint8 RGB `[h, w, 3]`: libjpeg's, as PIL gives them.

    Args:
        source: the file.
        width, height: of the image, as its header says.
        denominator: 1, 2, 4 or 8: the image is decoded to so many times fewer pixels an axis, rounded up.

    Returns:
        None for CMYK, 12 bits, another size, or any fault that libjpeg finds, though it may read the file.
    """
    data = np.frombuffer(source, np.uint8)
    pixels = np.empty((-(-height // denominator), -(-width // denominator), 3), np.uint8)
    request = np.array([data.ctypes.data, data.size, denominator, pixels.ctypes.data, *pixels.shape[:2]])
    return pixels if _jpeg_pixels_c(request.ctypes.data) == KEPT else None


def area_resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """An image made smaller: each pixel is the mean of the rectangle that it covers, as OpenCV's INTER_AREA has it.

    Args:
        pixels: uint8 `[H, W, 3]`.
        width, height: of the result, at most those of `pixels`.

    Returns:
        uint8 `[height, width, 3]`.
    """
    pixels = np.ascontiguousarray(pixels)
    smaller, sums = np.empty((height, width, 3), np.uint8), np.zeros(3 * pixels.shape[1] + 1, np.float32)
    taps = np.empty((width, 4), np.int32)
    source, out = (pixels.ctypes.data, *pixels.shape[:2]), (smaller.ctypes.data, height, width)
    request = np.array([*source, *out, sums.ctypes.data, taps.ctypes.data])
    if _area_resize_c(request.ctypes.data) != 0:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels cannot be made smaller to {width} x {height}")
    return smaller
