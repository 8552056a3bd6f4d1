"""FFCV decoders of the image field whose random crop is known outside: the pixels, and the crop's box."""

from collections.abc import Callable
from dataclasses import replace

import numba as nb
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, memcpy, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from .crops import CropSampler


class RandomResizedCropDecoder(SimpleRGBImageDecoder):
    """Decodes the image, cuts the sampler's crop out, resizes it (area filter) and flips it.

    Hands out uint8 `[B, output_size, output_size, 3]`, RGB. `output_size` may be set to another value between
    epochs (progressive resizing); nothing is compiled again.

    Args:
        output_size: side of the square output in pixels.
        crops: where the crops and flips come from; give the same object to `CropBoxDecoder`.
    """

    def __init__(self, output_size: int, crops: CropSampler) -> None:
        super().__init__()
        self.output_size = output_size
        self.crops = crops

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.output_size, self.output_size, 3)
        dtype = np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        read = self.memory_read
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        copy = Compiler.compile(memcpy)
        sample_crop, flips = self.crops.compile()
        jpg = IMAGE_MODES["jpg"]
        iterate = Compiler.get_iterator()
        max_bytes = int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max(initial=1)) * 3

        def decode(indices, destination, metadata, storage_state):
            # One scratch image a thread, not a sample: FFCV's own decoder keeps batch_size of them.
            scratch = np.empty((nb.get_num_threads(), max_bytes), np.uint8)
            for i in iterate(len(indices)):
                field = metadata[indices[i]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                source = read(field["data_ptr"], storage_state)
                pixels = scratch[nb.get_thread_id()][: height * width * 3].reshape(height, width, 3)
                if field["mode"] == jpg:
                    decode_jpeg(source, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                else:
                    copy(source, pixels)
                y, x, h, w = sample_crop(indices[i], height, width)
                resize(pixels, y, y + h, x, x + w, destination[i])
                if flips(indices[i]):
                    _flip_in_place(destination[i])
            return destination[: len(indices)]

        decode.is_parallel = True
        return decode


@nb.njit(nogil=True, cache=True)
def _flip_in_place(image):
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                left = image[y, x, c]
                image[y, x, c] = image[y, width - 1 - x, c]
                image[y, width - 1 - x, c] = left


class CropBoxDecoder(Operation):
    """Hands out the box of the crop that `RandomResizedCropDecoder` with the same sampler cuts.

    Decodes the image field's metadata only: `PipelineSpec("image", decoder=CropBoxDecoder(crops))`.
    Hands out float32 `[B, 4]`: `(x1, y1, x2, y2)` as fractions, 0 to 1, of the stored image. A flip does not
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
                destination[i, 0] = x / width
                destination[i, 1] = y / height
                destination[i, 2] = (x + w) / width
                destination[i, 3] = (y + h) / height
            return destination[: len(indices)]

        decode.is_parallel = True
        return decode
