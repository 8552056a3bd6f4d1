"""A sheet of training scenes, random crops of them, and the crops' targets."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_crops(
    images: np.ndarray, crops: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]], labels: list[str],
    classes: list[str], file: Path,
) -> None:  # fmt: skip
    """A sheet: each row an image with its single label, and random crops of it with their pooled targets.

    Args:
        images: one uint8 `[H, W, 3]` per row.
        crops: for each image `(pixels uint8 [S, S, 3], crop box [4] in fractions, soft target [C])`.
        labels: the images' single labels.
        classes: class names.
        file: the PNG to write.
    """
    rows, columns = len(images), 1 + len(crops[0])
    figure = Figure(figsize=(2.3 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (image, its_crops, label) in enumerate(zip(images, crops, labels, strict=True)):
        height, width = image.shape[:2]
        axes[row, 0].imshow(image)
        axes[row, 0].set_title(f"single label:\n{label}", fontsize=9)
        for i, (pixels, (x1, y1, x2, y2), target) in enumerate(its_crops):
            color = f"C{i}"
            box = Rectangle(
                (x1 * width - 0.5, y1 * height - 0.5), (x2 - x1) * width, (y2 - y1) * height, fill=False, color=color
            )
            axes[row, 0].add_patch(box)
            axis = axes[row, 1 + i]
            axis.imshow(pixels)
            best = np.argsort(-target)[:3]
            axis.set_title("\n".join(f"{classes[c]} {target[c]:.2f}" for c in best), fontsize=8, color=color)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(file, dpi=90)
