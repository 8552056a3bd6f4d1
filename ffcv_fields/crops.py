"""Random crops as a pure function of (seed, epoch, sample index), for every decoder that needs them.

The image decoder and the crop-box decoder must agree on the crop of a sample without sharing memory, and a
resumed run must see the crops that it would have seen. So nothing is drawn from a generator with a state:
each number is a hash (splitmix64, Steele et al., OOPSLA 2014) of the seed, the epoch, the sample's index in the
file and the number of the draw.
"""

import math
from collections.abc import Callable

import numba as nb
import numpy as np
from ffcv.utils import cast_int_to_byte_ptr

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
TRIES = 10  # as torchvision's RandomResizedCrop, before it falls back to a center crop

# Strict floating point (no fastmath, which FFCV compiles decoders with): two decoders must round to the same pixel,
# however each is compiled.
_jit = nb.njit(nogil=True, error_model="numpy", cache=True)


@_jit
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


@_jit
def sample_key(seed, epoch, index):
    """The uint64 key of one sample in one epoch, from which all of its draws come."""
    key = _mix(np.uint64(seed) + GOLDEN)
    key = _mix(key + np.uint64(epoch) * GOLDEN)
    return _mix(key + np.uint64(index))


@_jit
def uniform(key, draw):
    """Draw number `draw` of a sample: a float64 in [0, 1)."""
    bits = _mix(key + np.uint64(draw + 1) * GOLDEN)
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


@_jit
def _round(value):
    return math.floor(value + 0.5)


@_jit
def random_resized_crop(key, height, width, scale_min, scale_max, log_ratio_min, log_ratio_max):
    """One crop in pixels, `(y, x, h, w)`, distributed as torchvision's `RandomResizedCrop.get_params`.

    The crop's area is uniform in `[scale_min, scale_max]` of the image's, its aspect ratio w/h log-uniform; a
    crop that does not fit is drawn again, `TRIES` times, and then is the center crop of the nearest ratio.
    """
    area = float(height) * float(width)
    for attempt in range(TRIES):
        draw = 1 + 4 * attempt  # draw 0 is the flip
        target_area = area * (scale_min + (scale_max - scale_min) * uniform(key, draw))
        ratio = math.exp(log_ratio_min + (log_ratio_max - log_ratio_min) * uniform(key, draw + 1))
        w = _round(math.sqrt(target_area * ratio))
        h = _round(math.sqrt(target_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y = int(uniform(key, draw + 2) * (height - h + 1))
            x = int(uniform(key, draw + 3) * (width - w + 1))
            return y, x, h, w
    h, w = int(height), int(width)
    if width < height * math.exp(log_ratio_min):
        h = max(1, min(h, _round(width / math.exp(log_ratio_min))))
    elif width > height * math.exp(log_ratio_max):
        w = max(1, min(w, _round(height * math.exp(log_ratio_max))))
    return (height - h) // 2, (width - w) // 2, h, w


@_jit
def _key_of(address, index):
    """`sample_key` for the seed and the epoch that stand at an address, uint64 `[2]`."""
    state = nb.carray(cast_int_to_byte_ptr(address), 16).view(np.uint64)
    return sample_key(state[0], state[1], index)


@_jit
def _crop_of(address, index, size, scale, log_ratio):
    return random_resized_crop(_key_of(address, index), *size, *scale, *log_ratio)


@_jit
def _flips(address, index, flip_prob):
    return uniform(_key_of(address, index), 0) < flip_prob


@_jit
def crop_box(y, x, h, w, height, width, box):
    """Write a crop in pixels into float32 `box`: `(x1, y1, x2, y2)` as fractions of the image."""
    box[0], box[1], box[2], box[3] = x / width, y / height, (x + w) / width, (y + h) / height


class CropSampler:
    """The crops and flips of a training run; the same object goes to every decoder that must agree on them.

    Set `epoch` before iterating: compiled code reads it, so a new epoch needs no compilation.

    Args:
        seed: any int from 0 to 2**63 - 1; the run's seed.
        scale: minimum and maximum area of a crop, as fractions of the image's area.
        ratio: minimum and maximum aspect ratio (width / height) of a crop.
        flip_prob: probability of a horizontal flip.

    Raises:
        ValueError: a range that is empty or out of bounds, named with its value.
    """

    def __init__(
        self,
        seed: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; give an integer from 0 to 2**63 - 1")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; give 0 < min <= max <= 1, fractions of the image's area")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio is {ratio}; give 0 < min <= max, width / height")
        if not 0 <= flip_prob <= 1:
            raise ValueError(f"flip_prob is {flip_prob}; give a probability from 0 to 1")
        self.scale, self.ratio, self.flip_prob = scale, ratio, flip_prob
        # numba freezes globals and closures into the compiled code, so seed and epoch are read through this
        # array's address, which stays the same, at every batch.
        self._seed_and_epoch = np.array([seed, 0], dtype=np.uint64)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self._seed_and_epoch[0])

    @property
    def epoch(self) -> int:
        """The epoch whose crops are sampled, from 0."""
        return int(self._seed_and_epoch[1])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._seed_and_epoch[1] = epoch

    def compile(self) -> tuple[Callable, Callable]:
        """Two jitted functions of this sampler, for use inside decoders.

        Returns:
            `sample(index, height, width) -> (y, x, h, w)` in pixels of the stored image, and
            `flips(index) -> bool`, both for the epoch at the time of the call.
        """
        scale, log_ratio = self.scale, (math.log(self.ratio[0]), math.log(self.ratio[1]))
        flip_prob = self.flip_prob
        # What these call comes from numba's cache. (For an integer in their closures it would be compiled each time.)
        address = np.array([self._seed_and_epoch.ctypes.data])

        @nb.njit(nogil=True, error_model="numpy")
        def sample(index, height, width):
            return _crop_of(address[0], index, (height, width), scale, log_ratio)

        @nb.njit(nogil=True, error_model="numpy")
        def flips(index):
            return _flips(address[0], index, flip_prob)

        return sample, flips
