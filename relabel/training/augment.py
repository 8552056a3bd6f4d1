"""Between loader and network: color augmentation with normalization, and CutMix.

All random numbers come from a generator that belongs to the step (`rng_of_step`): a resumed run draws what the
uninterrupted one drew, on whatever device.
"""

from functools import lru_cache
from pathlib import Path

import numba as nb
import numpy as np
import torch
from ffcv_fields.cuda import OUT_MACROS, compiled, launch

from ..normalization import IMAGENET_MEAN, IMAGENET_STD, normalize, on_device

# Eigenvalues and eigenvectors (columns) of ImageNet's RGB covariance (Krizhevsky et al., NeurIPS 2012).
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
CUDA_SOURCE = Path(__file__).with_name("augment.cu")
_STATISTICS = np.array([IMAGENET_MEAN, 1 / np.array(IMAGENET_STD, np.float32)], np.float32)
_THREADS = 512
_STRANDS = 16


def rng_of_step(seed: int, epoch: int, part: int, rank: int) -> np.random.Generator:
    """The generator of everything random in a micro-batch (`part`, counted over the epoch) of process `rank`.

    It seeds torch's own generator too, for dropout and the like: resuming needs no generator state.
    """
    rng = np.random.default_rng([seed, epoch, part, rank])
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


def augment(
    images: torch.Tensor, rng: np.random.Generator, color_jitter: float, lighting: float, dtype: torch.dtype
) -> torch.Tensor:
    """The official recipe's color augmentation, then `normalize`, fused: one kernel on CUDA, numba on the CPU.

    Per sample: brightness, contrast and saturation, each by a factor uniform in `1 -/+ color_jitter`, in random
    order (torchvision's `ColorJitter(j, j, j)`); then PCA lighting with standard deviation `lighting`.

    Args:
        images: uint8 `[B, S, S, 3]`, RGB; with both strengths 0 also float32 that is normalized already.
        rng: where the draws come from.
        color_jitter: 0 to 1; the paper's 0.4; 0: off.
        lighting: the paper's 0.1; 0: off.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[B, 3, S, S]` of `dtype`, channels last.
    """
    if not color_jitter and not lighting:
        return normalize(images, dtype)
    batch = len(images)
    draws = np.empty((batch, 9), np.float32)
    draws[:, :3] = rng.uniform(max(0, 1 - color_jitter), 1 + color_jitter, (batch, 3))
    draws[:, 3:6] = rng.random((batch, 3)).argsort(axis=1)
    draws[:, 6:] = (rng.normal(0, lighting, (batch, 3)) * PCA_VALUES) @ np.transpose(PCA_VECTORS)
    return apply_draws(images, draws, dtype)


def apply_draws(images: torch.Tensor, draws: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """`augment` with given draws.

    Each operation is a blend `f * pixels + (1 - f) * base`, clamped to 0..1, with base 0 (brightness), the image's
    mean gray (contrast), each pixel's gray (saturation).

    Args:
        images: uint8 `[B, S, S, 3]`, contiguous.
        draws: float32 `[B, 9]`: factors of brightness, contrast and saturation; which of the three (0, 1, 2) is
            first, second, third; what is added to R, G and B (of 0..1).
        dtype: of the result, `[B, 3, S, S]`, channels last.
    """
    if images.device.type == "cpu":
        out = torch.empty(images.shape, dtype=torch.float32)
        _augment_on_cpu(images.contiguous().numpy(), draws, _STATISTICS, out.numpy())
        return out.to(dtype).permute(0, 3, 1, 2)
    images = images.contiguous()
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    kernel, _ = compiled(CUDA_SOURCE, "augment", OUT_MACROS[dtype], images.device.index)
    pixels = np.int32(images.shape[1] * images.shape[2])
    launch(
        kernel,
        len(images),
        _THREADS,
        (images, on_device(draws, images.device), _statistics(images.device), out, pixels),
        32 * 4,
        images.device,
    )
    return out.permute(0, 3, 1, 2)


@lru_cache
def _statistics(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_STATISTICS).to(device)


# No fastmath: with it, what one process compiles and what the next loads from numba's cache round differently, and a
# resumed run would not be the same. Sums are split into partial sums, as vector instructions add.
@nb.njit(nogil=True, inline="always")
def _gray(r, g, b):  # ITU-R 601, as PIL and torchvision
    return np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b


@nb.njit(nogil=True, inline="always")
def _blend(value, base, factor):
    return min(max(factor * value + (np.float32(1) - factor) * base, np.float32(0)), np.float32(1))


@nb.njit(nogil=True, cache=True)
def _jitter(line, operation, factor, mean_gray):
    """One operation on the pixels of one line, float32 `[3, S]`."""
    for x in range(line.shape[1]):
        r, g, b = line[0, x], line[1, x], line[2, x]
        base = np.float32(0)
        if operation == CONTRAST:
            base = mean_gray
        elif operation == SATURATION:
            base = _gray(r, g, b)
        line[0, x], line[1, x], line[2, x] = _blend(r, base, factor), _blend(g, base, factor), _blend(b, base, factor)


@nb.njit(nogil=True, cache=True)
def _read_line(row, line):
    for x in range(line.shape[1]):
        for c in range(3):
            line[c, x] = row[x, c] * np.float32(1 / 255)


@nb.njit(nogil=True, cache=True)
def _sum_of_grays(line, sums):
    """The sum of the grays of a line's pixels, by partial sums in the scratch `sums`, float32 `[_STRANDS]`."""
    width = line.shape[1]
    vectorized = width // _STRANDS * _STRANDS
    for strand in range(_STRANDS):
        sums[strand] = 0
    for start in range(0, vectorized, _STRANDS):
        for strand in range(_STRANDS):
            x = start + strand
            sums[strand] += _gray(line[0, x], line[1, x], line[2, x])
    total = 0.0
    for strand in range(_STRANDS):
        total += sums[strand]
    for x in range(vectorized, width):
        total += _gray(line[0, x], line[1, x], line[2, x])
    return total


@nb.njit(nogil=True, parallel=True, cache=True)
def _augment_on_cpu(images, draws, statistics, out):
    batch, height, width, _ = images.shape
    lines = np.empty((batch, 3, width), np.float32)
    sums = np.empty((batch, _STRANDS), np.float32)
    for i in nb.prange(batch):
        image, line, strands = images[i], lines[i], sums[i]
        factors, order, shift = draws[i, :3], draws[i, 3:6], draws[i, 6:]
        before = 0  # operations before the contrast, which needs the mean gray of what they make
        while order[before] != CONTRAST:
            before += 1
        total = 0.0
        for y in range(height):
            _read_line(image[y], line)
            for position in range(before):
                _jitter(line, int(order[position]), factors[int(order[position])], np.float32(0))
            total += _sum_of_grays(line, strands)
        mean_gray = np.float32(total / (height * width))
        for y in range(height):
            _read_line(image[y], line)
            for position in range(3):
                _jitter(line, int(order[position]), factors[int(order[position])], mean_gray)
            for c in range(3):
                bias, scale = shift[c] - statistics[0, c], statistics[1, c]
                for x in range(width):
                    out[i, y, x, c] = (line[c, x] + bias) * scale


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, rng: np.random.Generator, prob: float, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix (Yun et al., ICCV 2019): with probability `prob`, one box of every image from another image of the batch.

    The box has area `1 - lam`, lam ~ Beta(beta, beta), and is clipped at the border; the targets are mixed by the area
    that was really pasted: `lam * t_a + (1 - lam) * t_b`.

    Args:
        images: `[B, 3, H, W]`; written in place.
        targets: `[B, C]`, rows sum to 1.
    """
    if beta <= 0 or rng.random() >= prob:
        return images, targets
    height, width = images.shape[2:]
    side = np.sqrt(1 - rng.beta(beta, beta))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    y1, y2 = max(y - half_h, 0), min(y + half_h, height)
    x1, x2 = max(x - half_w, 0), min(x + half_w, width)
    other = on_device(rng.permutation(len(images)), images.device)
    images[:, :, y1:y2, x1:x2] = images[other, :, y1:y2, x1:x2]
    lam = 1 - (y2 - y1) * (x2 - x1) / (height * width)
    return images, lam * targets + (1 - lam) * targets[other]
