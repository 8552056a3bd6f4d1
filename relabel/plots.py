"""Pictures of a run: the curves of its log, and crops with the targets that they were given.

Who draws takes `plt` from here, which needs no screen.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's `log.jsonl`, one dict an epoch."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def draw_curves(runs: dict[str, list[dict]], file: Path) -> None:
    """Loss, validation accuracy and learning rate over the epochs; one colour a run.

    Args:
        runs: name -> lines of its log.
        file: the PNG to write.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for i, (name, lines) in enumerate(runs.items()):
        color = f"C{i}"
        epochs = [line["epoch"] + 1 for line in lines]
        left.plot(epochs, [line["train_loss"] for line in lines], color=color, label=f"{name}, training")
        validated = [line for line in lines if "top_1" in line]
        at = [line["epoch"] + 1 for line in validated]
        left.plot(at, [line["loss"] for line in validated], "--", color=color, label=f"{name}, validation")
        middle.plot(at, [line["top_1"] for line in validated], color=color, label=f"{name}, top-1")
        if any("multilabel" in line for line in validated):
            accuracy = [line.get("multilabel", np.nan) for line in validated]
            middle.plot(at, accuracy, "--", color=color, label=f"{name}, multi-label")
        right.plot(epochs, [line["lr"] for line in lines], color=color, label=name)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="loss")
    middle.set(xlabel="epoch", ylabel="%", title="validation accuracy")
    right.set(xlabel="epoch", title="learning rate at the epoch's end")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_crops(
    images: np.ndarray, crops: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]], labels: list[str],
    classes: list[str], file: Path,
) -> None:  # fmt: skip
    """A sheet: each row an image with its single label, and random crops of it with their pooled targets.

    Args:
        images: one uint8 `[H, W, 3]` a row.
        crops: for each image `(pixels uint8 [S, S, 3], crop box [4] in fractions, soft target [C])`.
        labels: the images' single labels.
        classes: class names.
        file: the PNG to write.
    """
    rows, columns = len(images), 1 + len(crops[0])
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for row, (image, its_crops, label) in enumerate(zip(images, crops, labels, strict=True)):
        height, width = image.shape[:2]
        axes[row, 0].imshow(image)
        axes[row, 0].set_title(f"single label:\n{label}", fontsize=9)
        for i, (pixels, (x1, y1, x2, y2), target) in enumerate(its_crops):
            color = f"C{i}"
            box = plt.Rectangle(
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
    plt.close(figure)
