"""What random crops hold, and whose label is right: the paper's motivating figure, measured on Scenes.

Scenes know where each object is, so that a crop's single label and its pooled label can be compared with the objects
that are really inside it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields import CropSampler
from matplotlib.figure import Figure

from relabel.data.label_map_files import read_tensor
from relabel.label_maps.inspection import pool_one

from . import compose

CROPS = 50  # of each scene
INSIDE = 0.25  # an object is in a crop when at least this fraction of its frame is
BINS = np.array([0, 1e-9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0])  # of the intersection over union


def overlaps(crops: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union of crops and objects, and the share of each object inside each crop.

    Args:
        crops: `[N, 4]`, `(x1, y1, x2, y2)` in pixels.
        objects: `[M, 4]`, the same.

    Returns:
        Two arrays `[N, M]`.
    """
    least = np.maximum(crops[:, None, :2], objects[None, :, :2])
    greatest = np.minimum(crops[:, None, 2:], objects[None, :, 2:])
    common = (greatest - least).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (crops, objects)]
    return common / (areas[0][:, None] + areas[1] - common), common / areas[1]


def study(layout_file: Path, label_maps: Path) -> dict[str, np.ndarray]:
    """`CROPS` random crops (RandomResizedCrop, scale 0.08-1) of each scene of a split.

    Args:
        layout_file: the split's JSON.
        label_maps: the folder of its label maps.

    Returns:
        One value per crop: `iou` with the labeled object; `empty`, whether no object is in it; `single_right` and
        `pooled_right`, whether the single label, and the pooled label's best class, is that of an object in it.
    """
    layout, sampler = json.loads(layout_file.read_text()), CropSampler(seed=0)
    sample, _ = sampler.compile()
    found: dict[str, list[Any]] = {"iou": [], "empty": [], "single_right": [], "pooled_right": []}
    for index, (file, entries) in enumerate(zip(layout["files"], layout["objects"], strict=True)):
        crops = np.empty((CROPS, 4))
        for sampler.epoch in range(CROPS):
            y, x, h, w = sample(index, compose.CANVAS, compose.CANVAS)
            crops[sampler.epoch] = x, y, x + w, y + h
        classes = np.array([c for c, *_ in entries])
        objects = np.array([(x, y, x + side, y + side) for _, y, x, side in entries], float)
        iou, share = overlaps(crops, objects)
        scores, indices = read_tensor((label_maps / file).with_suffix(".pt")).numpy()
        boxes, num_classes = crops / compose.CANVAS, len(compose.CLASSES)
        pooled = pool_one(scores, indices.astype(np.int64), boxes, num_classes, "float16")
        inside = share >= INSIDE
        found["iou"].append(iou[:, 0])
        found["empty"].append(~inside.any(1))
        found["single_right"].append((inside & (classes == classes[0])).any(1))
        found["pooled_right"].append((inside & (classes == pooled.argmax(1)[:, None])).any(1))
    return {name: np.concatenate(values) for name, values in found.items()}


def summary(found: dict[str, np.ndarray]) -> str:
    """The results in words."""
    some = ~found["empty"]
    wrong, pooled = 100 * (1 - found["single_right"][some].mean()), 100 * (1 - found["pooled_right"][some].mean())
    apart, little, empty = (100 * part.mean() for part in (found["iou"] == 0, found["iou"] < 0.2, found["empty"]))
    return (
        f"{len(some):,} crops; {apart:.1f} % do not touch the labeled object, {little:.1f} % have IoU under 0.2 "
        f"with it; {empty:.1f} % hold no object. Of those that hold some, the single label names none of them in "
        f"{wrong:.1f} %, the pooled label's best class in {pooled:.1f} %"
    )


def draw(found: dict[str, np.ndarray], file: Path) -> None:
    """Left: how much of crops and labeled objects overlaps; right: how often either label is right, by overlap."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    iou, some = np.sort(found["iou"]), ~found["empty"]
    left.plot(iou, 100 * np.arange(1, len(iou) + 1) / len(iou))
    left.set(
        xlabel="IoU of random crop and labeled object", ylabel="% of crops at or below", xlim=(0, 1), ylim=(0, 100)
    )
    which = np.digitize(found["iou"], BINS[1:-1])
    names = ["0"] + [f"{max(a, 0):.1g}-{b:.1g}" for a, b in zip(np.r_[0, BINS[2:-1]], BINS[2:], strict=True)]
    at = np.arange(len(names))
    for offset, name, title in ((-0.2, "single_right", "single label"), (0.2, "pooled_right", "pooled label (top-1)")):
        shares = [100 * found[name][some & (which == i)].mean() for i in at]
        right.bar(at + offset, shares, 0.38, label=title)
    right.set(xlabel="IoU of random crop and labeled object", ylabel="% right: names an object in the crop")
    right.set_xticks(at, names, fontsize=8)
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
