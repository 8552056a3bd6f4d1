"""FFCV's image field with JPEGs that crops are decoded from fast, and its decoders: a crop's pixels, and its box.

`decode="fast"` (native/crop_decode.c) decodes the blocks that the crop touches, by libjpeg's accurate inverse DCT, and
resizes each component of the JPEG from the resolution that it is stored in.
`decode="exact"` gives stock FFCV's pixels bit for bit: the whole image is decoded, then OpenCV's area filter.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numba as nb
import numpy as np
from ffcv.fields import RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder, resizer
from ffcv.libffcv import ctypes_imdecode, ctypes_memcopy, ctypes_resize
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from . import _crop_decode
from .crops import CropSampler, crop_box
from .jpeg import KeptJpeg

_library = ctypes.CDLL(_crop_decode.__file__)
_crop_decode_c = _library.crop_decode
_crop_decode_c.argtypes, _crop_decode_c.restype = [ctypes.c_int64], ctypes.c_int64
_jpeg_has_size_c = _library.jpeg_has_size
_jpeg_has_size_c.argtypes, _jpeg_has_size_c.restype = 4 * [ctypes.c_int64], ctypes.c_int64
_scratch_bytes_c = _library.crop_decode_scratch_bytes
_scratch_bytes_c.argtypes, _scratch_bytes_c.restype = 2 * [ctypes.c_int64], ctypes.c_int64

# What the C function is asked for: int64 in this order (native/crop.h, Request).
REQUEST = (
    "source", "bytes", "raw", "height", "width", "y", "x", "h", "w", "size", "flip", "rows", "columns", "top", "left",
    "normalize", "out", "scratch",
)  # fmt: skip


def image_field(restart_interval: int, **settings: Any) -> RGBImageField:
    """FFCV's image field, with a restart marker in its JPEGs every `restart_interval` MCUs.

    A marker is a position where decoding can begin: `decode="fast"` skips what lies before and beside a crop from
    marker to marker. They are plain JPEGs with the same pixels, for every reader; a marker takes about 4 bytes.
    Besides images, its `encode` takes a `KeptJpeg` (`keep_jpeg`), which is stored as it is.

    Args:
        restart_interval: MCUs (16 x 16 pixels) between markers; 0 for none, as FFCV writes them.
        **settings: `RGBImageField`'s. `write_mode="smart"` is "raw", as FFCV's is without a threshold.
    """
    field = RGBImageField(**settings)
    field.encode = partial(_encode, field, restart_interval)  # on FFCV's own class, which files name by its number
    return field


def _encode(field, restart_interval, destination, image, malloc):
    if isinstance(image, KeptJpeg):
        _store(destination, "jpg", image.height, image.width, image.data, malloc)
        return
    pixels = resizer(np.asarray(image), field.max_resolution)
    jpg = field.write_mode == "jpg" or (field.write_mode == "proportion" and np.random.rand() < field.proportion)
    if jpg:
        options = [cv2.IMWRITE_JPEG_QUALITY, field.jpeg_quality, cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval]
        good, stored = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        if not good:
            raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels cannot be stored as JPEG")
        stored = stored.reshape(-1)
    else:
        stored = np.ascontiguousarray(pixels).reshape(-1)
    _store(destination, "jpg" if jpg else "raw", *pixels.shape[:2], stored, malloc)


def _store(destination, mode, height, width, stored, malloc):
    destination["mode"], destination["height"], destination["width"] = IMAGE_MODES[mode], height, width
    destination["data_ptr"], storage = malloc(stored.nbytes)
    storage[:] = stored


class _CropDecoder(SimpleRGBImageDecoder):
    """What the two decoders below share; they define what to crop and what to flip."""

    def __init__(self, output_size: int, decode: str, normalize: tuple | None) -> None:
        super().__init__()
        if decode not in ("fast", "exact"):
            raise ValueError(f"decode is {decode!r}; give 'fast' or 'exact'")
        if normalize is not None and decode == "exact":
            raise ValueError("normalize goes with decode='fast'; 'exact' gives stock FFCV's bytes")
        self.output_size, self.decode = output_size, decode
        self.normalize = None
        if normalize is not None:  # kept alive here: the compiled code holds its address
            mean, std = (np.asarray(values, np.float64) * 255 for values in normalize)
            self.normalize = np.concatenate([1 / std, -mean / std]).astype(np.float32)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.output_size, self.output_size, 3)
        dtype = np.dtype("<u1" if self.normalize is None else "<f4")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def _crop_functions(self) -> tuple[Callable, Callable]:
        """Two jitted functions: `crop(index, height, width) -> (y, x, h, w)` and `flips(index) -> bool`."""
        raise NotImplementedError

    def _resize_function(self) -> Callable:
        """A jitted function: `resize(height, width) -> (rows, columns, top, left)`, as native/crop.h has them."""
        return _to_the_output

    def generate_code(self) -> Callable:
        read = self.memory_read
        crop, flips = self._crop_functions()
        resize = self._resize_function()
        one = _decode_fast if self.decode == "fast" else _decode_exact
        normalize = 0 if self.normalize is None else self.normalize.ctypes.data
        iterate = Compiler.get_iterator()
        widths, heights = self.metadata["width"].astype(np.int64), self.metadata["height"].astype(np.int64)
        side, pixels = int(max(widths.max(), heights.max())), int((widths * heights).max())
        fast, jpg = self.decode == "fast", IMAGE_MODES["jpg"]
        scratch_bytes_of = _scratch_bytes_c

        def decode(indices, destination, metadata, storage_state):
            # One scratch buffer per thread, not per sample: FFCV's own decoder keeps batch_size full images.
            size, threads = destination.shape[1], nb.get_num_threads()
            scratch = np.empty((threads, scratch_bytes_of(side, size) if fast else 3 * pixels), np.uint8)
            requests = np.empty((threads, 24), np.int64)  # of three cache lines' size
            failed = np.zeros(len(indices), np.int64)
            for i in iterate(len(indices)):
                field = metadata[indices[i]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                source = read(field["data_ptr"], storage_state)
                y, x, h, w = crop(indices[i], height, width)
                request = requests[nb.get_thread_id()]  # REQUEST
                request[0], request[1], request[2] = source.ctypes.data, source.size, np.int64(field["mode"] != jpg)
                request[3], request[4] = height, width
                request[5], request[6], request[7], request[8] = y, x, h, w
                request[9], request[10] = size, np.int64(flips(indices[i]))
                request[11], request[12], request[13], request[14] = resize(height, width)
                request[15], request[16] = normalize, destination[i].ctypes.data
                request[17] = scratch[nb.get_thread_id()].ctypes.data
                failed[i] = one(request, destination[i])
            for i in range(len(indices)):
                if failed[i] != 0:
                    raise ValueError("the image of this sample of the .beton cannot be decoded", indices[i])
            return destination[: len(indices)]

        decode.is_parallel = True
        return decode


@nb.njit(nogil=True, cache=True)
def _to_the_output(height, width):
    return 0, 0, 0, 0


@nb.njit(nogil=True, cache=True)
def _half(difference):
    """Rounded to the nearest even number, as Python's round does."""
    return difference // 2 + (difference % 2) * (difference // 2 % 2)


@nb.njit(nogil=True, cache=True)
def _resize_and_center(height, width, size, shorter):
    """torchvision's `Resize(shorter)` and `CenterCrop(size)` as native/crop.h's `(rows, columns, top, left)`."""
    longer = shorter * max(height, width) // min(height, width)
    rows, columns = (shorter, longer) if height <= width else (longer, shorter)
    return rows, columns, _half(rows - size), _half(columns - size)


# Memory is passed as addresses: FFCV changes numba's interned type of uint8[::1] when a loader is made, and what was
# compiled for that type before is lost.
@nb.njit(nogil=True)
def _decode_fast(request, out):
    return _crop_decode_c(request.ctypes.data)


@nb.njit(nogil=True)
def _decode_exact(request, out):
    source, nbytes, raw, height, width = request[0], request[1], request[2], request[3], request[4]
    y, x, h, w, size, flip, pixels = (
        request[5], request[6], request[7], request[8], request[9], request[10], request[17],
    )  # fmt: skip
    if raw:
        if nbytes != height * width * 3:
            return 1
        ctypes_memcopy(source, pixels, nbytes)
    else:
        if _jpeg_has_size_c(source, nbytes, height, width) != 0:  # FFCV would scale it
            return 1
        if ctypes_imdecode(source, nbytes, height, width, pixels, height, width, 0, 0, 1, 1, False, False):
            return 1
    ctypes_resize(0, pixels, height, width, y, y + h, x, x + w, out.ctypes.data, size, size)
    if flip:
        _flip_in_place(out)
    return 0


@nb.njit(nogil=True, cache=True)
def _flip_in_place(image):
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                left = image[y, x, c]
                image[y, x, c] = image[y, width - 1 - x, c]
                image[y, width - 1 - x, c] = left


class RandomResizedCropDecoder(_CropDecoder):
    """Decodes the sampler's crop, resizes it (anti-aliased) and flips it.

    Outputs uint8 `[B, output_size, output_size, 3]`, RGB, or float32 with `normalize`. `output_size` may be set to
    another value between epochs (progressive resizing); nothing is compiled again.

    Args:
        output_size: side of the square output in pixels.
        crops: where the crops and flips come from; give the same object to `CropBoxDecoder`.
        decode: "fast", or "exact" for stock FFCV's pixels.
        normalize: `(mean, std)` of RGB in 0..1: outputs `(pixel / 255 - mean) / std`.

    Raises:
        ValueError: while iterating: an image that cannot be decoded, with its sample's index.
    """

    def __init__(
        self,
        output_size: int,
        crops: CropSampler,
        decode: str = "fast",
        normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__(output_size, decode, normalize)
        self.crops = crops

    def _crop_functions(self) -> tuple[Callable, Callable]:
        return self.crops.compile()


class CenterCropDecoder(_CropDecoder):
    """Decodes what torchvision's `Resize(round(output_size / ratio))`, `CenterCrop(output_size)` give from a PIL image.

    Outputs what `RandomResizedCropDecoder` does, from the same arguments. `decode="fast"` takes the same region of the
    image, to a fraction of a pixel, and PIL's bilinear filter; `decode="exact"` gives the pixels of stock FFCV's
    `CenterCropRGBImageDecoder`: a square of whole pixels of `ratio` times the shorter side, by the area filter.
    """

    def __init__(
        self,
        output_size: int,
        ratio: float,
        decode: str = "fast",
        normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__(output_size, decode, normalize)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}; give a fraction of the shorter side, above 0 and at most 1")
        self.ratio = ratio

    def _crop_functions(self) -> tuple[Callable, Callable]:
        ratio, whole = self.ratio, self.decode == "fast"

        @nb.njit(nogil=True)
        def crop(index, height, width):
            if whole:
                return 0, 0, height, width
            side = max(1, int(ratio * min(height, width)))
            return (height - side) // 2, (width - side) // 2, side, side

        @nb.njit(nogil=True)
        def flips(index):
            return False

        return crop, flips

    def _resize_function(self) -> Callable:
        size, shorter = self.output_size, round(self.output_size / self.ratio)

        @nb.njit(nogil=True)
        def resize(height, width):
            return _resize_and_center(height, width, size, shorter)

        return resize


class CropBoxDecoder(Operation):
    """Outputs the box of the crop that `RandomResizedCropDecoder` takes with the same sampler.

    Decodes the image field's metadata only: `PipelineSpec("image", decoder=CropBoxDecoder(crops))`.
    Outputs float32 `[B, 4]`: `(x1, y1, x2, y2)` as fractions, 0 to 1, of the stored image. A flip does not
    change the box: it is where the pixels came from.
    """

    def __init__(self, crops: CropSampler) -> None:
        super().__init__()
        self.crops = crops

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        dtype = np.dtype("<f4")
        return replace(previous_state, jit_mode=True, shape=(4,), dtype=dtype), AllocationQuery((4,), dtype)

    def generate_code(self) -> Callable:
        sample_crop, _ = self.crops.compile()
        iterate = Compiler.get_iterator()

        def decode(indices, destination, metadata, storage_state):
            for i in iterate(len(indices)):
                field = metadata[indices[i]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                y, x, h, w = sample_crop(indices[i], height, width)
                crop_box(y, x, h, w, height, width, destination[i])
            return destination[: len(indices)]

        decode.is_parallel = True
        return decode
