"""The curves of a run: loss, accuracy and learning rate over the epochs."""

from pathlib import Path

import numpy as np

from ..files import atomic


def draw_curves(runs: dict[str, list[dict]], file: Path) -> None:
    """Loss, validation accuracy and learning rate over the epochs; one color per run.

    Args:
        runs: name -> lines of its log.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure  # not before the first step, which it would keep waiting

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
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
    with atomic(file, sync=False) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
