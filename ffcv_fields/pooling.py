"""LabelPooling: from label maps and crop boxes to soft targets, on the CPU (numba) and on CUDA (CuPy).

Yun et al., CVPR 2021, section 3.2, as the official code computes it: scatter the `top_k` scores of each cell
into a dense map `D[C, H, W]` of zeros, `z = roi_align(D, box * (W, H) - 0.5, 1x1, aligned=False)`,
`target = softmax(z)`. RoIAlign with one output cell is separable, `z[c] = sum_yx wy[y] wx[x] D[c, y, x]`, so the
dense map never has to exist: each entry of the sparse map adds `wy * wx * score` to its class.

What follows from the definition and is kept: a class that no cell lists has logit 0, not -inf, and gets a
share of the probability; a box side counts as at least one cell; grid points beyond [-1, size] add nothing but
stay in the divisor.
"""

import math
from pathlib import Path

import numba as nb
import numpy as np
import torch

from .cuda import OUT_MACROS, compiled, launch
from .label_map import EMPTY, MAX_CLASSES, NO_LABEL_MAP

_MAP_MACROS = {torch.int16: "-DMAP_T=short", torch.int32: "-DMAP_T=int"}
_THREADS = 256
CUDA_SOURCE = Path(__file__).parent / "cuda" / "pooling.cu"

BAD_BOX, BAD_CLASS, NO_LABEL = 1, 2, 3  # a sample's status; 0: good
GREATEST_OUTPUT = 64
GREATEST_COORDINATE = 16.0  # image sides; a box beyond it is an error, so that the grid stays bounded


def label_pooling(
    label_maps: torch.Tensor,
    crop_boxes: torch.Tensor,
    num_classes: int,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softmax: bool = True,
    output_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The soft multi-label target of each crop.

    A class listed twice in one cell counts with the sum of its scores (the converter refuses such maps).

    Args:
        label_maps: int16 (or int32) `[B, 2, top_k, H, W]`, as `LabelMapDecoder` returns them.
        crop_boxes: float32 `[B, 4]`, `(x1, y1, x2, y2)` as fractions of the stored image.
        num_classes: C, at most 32,767.
        labels: int64 `[B]`: the single label, target of a sample that has no label map.
        temperature: the target is `softmax(z / temperature)`.
        softmax: False where the scores are probabilities already: the target is `z` itself,
            whose sum may be less than 1.
        output_size: side of the grid of targets: 1, or e.g. 14 for the tokens of TokenLabeling's networks; RoIAlign
            then pools each of the crop's `output_size` x `output_size` parts.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[B, num_classes]` of `dtype`, on the device of `label_maps`; rows sum to 1. With `output_size` S > 1
        `[B, num_classes, S, S]`, rows = y.

    Raises:
        ValueError: wrong dtype, shape or device. On the CPU also a NaN box or one with x2 < x1, a class out of
            range, a sample without label map and without label, named by its index in the batch; on CUDA, where
            raising would synchronize the device, such a sample's row is NaN, so that its loss cannot go unnoticed.
    """
    _check(label_maps, crop_boxes, num_classes, labels, temperature, output_size, dtype)
    targets = _label_pooling(label_maps, crop_boxes, num_classes, labels, temperature, softmax, output_size, dtype)
    return targets.view(len(targets), num_classes) if output_size == 1 else targets.permute(0, 3, 1, 2)


def _check(label_maps, crop_boxes, num_classes, labels, temperature, output_size, dtype):
    shape = list(label_maps.shape)
    if label_maps.dtype not in _MAP_MACROS or label_maps.dim() != 5 or shape[1] != 2 or 0 in shape[2:]:
        raise ValueError(f"label_maps is {label_maps.dtype}{shape}; give int16 or int32 [B, 2, top_k, H, W]")
    if crop_boxes.dtype != torch.float32 or list(crop_boxes.shape) != [shape[0], 4]:
        raise ValueError(f"crop_boxes is {crop_boxes.dtype}{list(crop_boxes.shape)}; give float32 [{shape[0]}, 4]")
    if labels is not None and (labels.dtype != torch.int64 or list(labels.shape) != [shape[0]]):
        raise ValueError(f"labels is {labels.dtype}{list(labels.shape)}; give int64 [{shape[0]}]")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {num_classes}; give 1 to {MAX_CLASSES}")
    if dtype not in OUT_MACROS:
        raise ValueError(f"dtype is {dtype}; give float32, float16 or bfloat16")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; give a positive number")
    if not 1 <= output_size <= GREATEST_OUTPUT:
        raise ValueError(f"output_size is {output_size}; give 1 to {GREATEST_OUTPUT}")
    devices = {t.device for t in (label_maps, crop_boxes, labels) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"label_maps, crop_boxes and labels are on different devices: {sorted(map(str, devices))}")


@torch.library.custom_op("relabel::label_pooling", mutates_args=(), device_types="cpu")
def _label_pooling(
    label_maps: torch.Tensor,
    crop_boxes: torch.Tensor,
    num_classes: int,
    labels: torch.Tensor | None,
    temperature: float,
    softmax: bool,
    output_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    targets = torch.empty((len(label_maps), output_size, output_size, num_classes), dtype=torch.float32)
    known = np.empty(0, np.int64) if labels is None else labels.contiguous().numpy()
    status = np.zeros(len(label_maps), np.int8)
    _pool_on_cpu(
        label_maps.contiguous().numpy(),
        crop_boxes.contiguous().numpy(),
        known,
        np.float32(1 / temperature),
        softmax,
        targets.numpy(),
        status,
    )
    if status.any():
        i = int(status.nonzero()[0][0])
        raise ValueError(
            {
                BAD_BOX: f"crop box {i} of the batch is {crop_boxes[i].tolist()}; "
                "give (x1, y1, x2, y2) with x1 <= x2, y1 <= y2, fractions of the image",
                BAD_CLASS: f"label map {i} of the batch names a class outside 0 to {num_classes - 1} (-1: empty)",
                NO_LABEL: f"sample {i} of the batch has no label map; give its label from 0 to {num_classes - 1}",
            }[int(status[i])]
        )
    return targets if dtype == torch.float32 else targets.to(dtype)


@_label_pooling.register_fake
def _(label_maps, crop_boxes, num_classes, labels, temperature, softmax, output_size, dtype):
    return label_maps.new_empty((label_maps.shape[0], output_size, output_size, num_classes), dtype=dtype)


@nb.njit(nogil=True, error_model="numpy", cache=True)
def _axis_weights(low, high, size, part, parts, weights):
    """RoIAlign's weights of an axis' `size` cells for one of the box's `parts`: the mean of bilinear samples."""
    one, half = np.float32(1), np.float32(0.5)
    start = low * np.float32(size) - half
    side = max((high * np.float32(size) - half) - start, one) / np.float32(parts)
    start += np.float32(part) * side
    points = math.ceil(side)
    weights[:] = 0
    for i in range(points):
        where = start + (np.float32(i) + half) * side / np.float32(points)
        if where < -one or where > size:
            continue
        where = max(where, np.float32(0))
        below = int(where)
        if below >= size - 1:
            weights[size - 1] += one
        else:
            above_share = where - np.float32(below)
            weights[below] += one - above_share
            weights[below + 1] += above_share
    weights /= np.float32(points)


@nb.njit(nogil=True, inline="always")
def _score_from_bits(bits, is_half):
    if is_half:
        # Exponent and mantissa shifted to float32's positions, then 2**112 for the difference of the biases: exact,
        # subnormals included. Infinities and NaN are refused at conversion.
        magnitude = np.int32((np.int32(bits) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
        return -magnitude if bits < 0 else magnitude
    return np.int32(bits).view(np.float32)


_LOG2_E = np.float32(math.log2(math.e))
_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))


# Written so that its loops become vector instructions without fastmath (with which code from numba's cache rounds
# differently from code that was just compiled): three times faster than math.exp.
@nb.njit(nogil=True, error_model="numpy", cache=True)
def _softmax_in_place(logits, inverse_temperature):
    """softmax of float32 `[C]` of which most are 0 (classes that are named nowhere), to a few 1e-7."""
    # Floats that are not negative are in the order of their bits, and negative ones have negative bits.
    bits = logits.view(np.int32)
    most = np.int32(0)
    for c in range(len(bits)):
        most = max(most, bits[c])
    greatest = np.int32(most).view(np.float32)
    scale = inverse_temperature * _LOG2_E
    for c in range(len(logits)):
        # exp(x) = 2**n * 2**f, the first by its exponent bits, the second, f in -0.5..0.5, by its Taylor series.
        t = (logits[c] - greatest) * scale
        t = t if t > np.float32(-126) else np.float32(-126)
        n = np.floor(t + np.float32(0.5))
        f = t - n
        power = _EXP2[5] + f * _EXP2[6]
        power = _EXP2[4] + f * power
        power = _EXP2[3] + f * power
        power = _EXP2[2] + f * power
        power = _EXP2[1] + f * power
        power = _EXP2[0] + f * power
        logits[c] = power * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    share = np.float32(1 / _sum(logits))
    for c in range(len(logits)):
        logits[c] *= share


@nb.njit(nogil=True, error_model="numpy", cache=True)
def _sum(values):
    """Sum of float32 values in float64 (thousands of equal terms add up to the last digit), in eight partial sums."""
    a = b = c = d = e = f = g = h = 0.0
    whole = len(values) // 8 * 8
    for i in range(0, whole, 8):
        a += values[i]
        b += values[i + 1]
        c += values[i + 2]
        d += values[i + 3]
        e += values[i + 4]
        f += values[i + 5]
        g += values[i + 6]
        h += values[i + 7]
    for i in range(whole, len(values)):
        a += values[i]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@nb.njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def _pool_on_cpu(label_maps, crop_boxes, labels, inverse_temperature, softmax, targets, status):
    batch, _, _, height, width = label_maps.shape
    parts, num_classes = targets.shape[1], targets.shape[3]
    scratch = np.empty((batch, height + width), np.float32)
    for i in nb.prange(batch):
        targets[i] = 0
        if label_maps[i, 1, 0, 0, 0] == NO_LABEL_MAP:
            if labels.size and 0 <= labels[i] < num_classes:
                targets[i, :, :, labels[i]] = 1
            else:
                status[i] = NO_LABEL
            continue
        x1, y1, x2, y2 = crop_boxes[i, 0], crop_boxes[i, 1], crop_boxes[i, 2], crop_boxes[i, 3]
        # Written so that NaN fails it.
        if not (-GREATEST_COORDINATE <= x1 <= x2 <= GREATEST_COORDINATE):
            status[i] = BAD_BOX
            continue
        if not (-GREATEST_COORDINATE <= y1 <= y2 <= GREATEST_COORDINATE):
            status[i] = BAD_BOX
            continue
        weight_y, weight_x = scratch[i, :height], scratch[i, height:]
        for row in range(parts):
            _axis_weights(y1, y2, height, row, parts, weight_y)
            for column in range(parts):
                _axis_weights(x1, x2, width, column, parts, weight_x)
                if not _add_scores(label_maps[i], weight_y, weight_x, targets[i, row, column]):
                    status[i] = BAD_CLASS
                if softmax:
                    _softmax_in_place(targets[i, row, column], inverse_temperature)


@nb.njit(nogil=True, error_model="numpy", cache=True)
def _add_scores(label_map, weight_y, weight_x, target):
    """Add each entry's weighted score to its class; False if one names a class outside `target`."""
    _, top_k, height, width = label_map.shape
    is_half = label_map.itemsize == 2
    good = True
    for y in range(height):
        if weight_y[y] == 0:
            continue
        for x in range(width):
            weight = weight_y[y] * weight_x[x]
            if weight == 0:
                continue
            for k in range(top_k):
                c = label_map[1, k, y, x]
                if 0 <= c < len(target):
                    target[c] += weight * _score_from_bits(label_map[0, k, y, x], is_half)
                elif c != EMPTY:
                    good = False
    return good


@_label_pooling.register_kernel("cuda")
def _pool_on_cuda(label_maps, crop_boxes, num_classes, labels, temperature, softmax, output_size, dtype):
    label_maps, crop_boxes = label_maps.contiguous(), crop_boxes.contiguous()
    labels = None if labels is None else labels.contiguous()
    batch, _, top_k, height, width = label_maps.shape
    targets = torch.empty((batch, output_size, output_size, num_classes), dtype=dtype, device=label_maps.device)
    if batch == 0:
        return targets
    macros = (_MAP_MACROS[label_maps.dtype], *OUT_MACROS[dtype])
    kernel, shared_limit = compiled(CUDA_SOURCE, "pool_labels", macros, label_maps.device.index)
    shared = 4 * (height + width + 32) + 8 * num_classes
    workspace = None
    if shared > shared_limit:  # about 12,000 classes on a GPU with 99 KB of it, 28,000 with 227 KB
        shared -= 8 * num_classes
        workspace = torch.empty(targets.shape, dtype=torch.int64, device=label_maps.device)
    sizes = tuple(np.int32(n) for n in (num_classes, top_k, height, width))
    options = np.float32(1 / temperature), np.int32(softmax), np.int32(output_size)
    arguments = (label_maps, crop_boxes, labels, targets, workspace, *sizes, *options)
    launch(kernel, batch * output_size**2, _THREADS, arguments, shared, label_maps.device)
    return targets
