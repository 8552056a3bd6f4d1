"""The figures of the paper's claims on Scenes, one each: means and standard errors over seeds."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .statistics import mean_and_error

COLORS = {"none": "C7", "weak": "C0", "strong": "C1"}  # of annotators


def ablation(results: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Multi-label accuracy of each row `LABELS | ANNOTATOR`; each seed a mark."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    rows = list(dict.fromkeys(name.split(" | ")[0] for name in results))[::-1]
    for name, values in results.items():
        row, annotator = name.split(" | ")
        y = rows.index(row) + {"none": 0, "weak": -0.12, "strong": 0.12}[annotator]
        mean, error = mean_and_error(values["multilabel"])
        axis.errorbar(mean, y, xerr=error, fmt="o", color=COLORS[annotator], capsize=4)
        axis.plot(values["multilabel"], np.full(len(values["multilabel"]), y), "|", color=COLORS[annotator], alpha=0.5)
    for annotator in ("strong", "weak"):
        axis.plot([], [], "o", color=COLORS[annotator], label=f"{annotator} annotator")
    axis.set(xlabel="multi-label accuracy, %", yticks=range(len(rows)), yticklabels=rows)
    _finish(figure, [axis], file)


def curves(found: dict[str, dict[int, list[float]]], name: str, file: Path) -> None:
    """Left: the accuracy of the rows at each point; right: what all gain over the first, paired by seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = next(iter(found.values()))
    points = list(base)
    gains = {
        row: {at: [a - b for a, b in zip(values[at], base[at], strict=True)] for at in points}
        for row, values in found.items() if values is not base
    }  # fmt: skip
    for axis, lines in ((left, found), (right, gains)):
        for row, values in lines.items():
            means, errors = zip(*(mean_and_error(values[at]) for at in points), strict=True)
            color = f"C{list(found).index(row)}"
            axis.errorbar(points, means, yerr=errors, fmt="o-", color=color, capsize=4, label=row)
    for axis, label in ((left, "multi-label accuracy, %"), (right, f"gain over the {next(iter(found))}, points")):
        axis.set(xscale="log", xlabel={"scenes": "training scenes"}.get(name, name), ylabel=label)
        axis.set_xticks(points, [f"{at:,}" for at in points])
        axis.minorticks_off()
    right.axhline(0, color="C7", linewidth=1)
    _finish(figure, [left, right], file)


def robustness(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The accuracy of each row on each kind of test set."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axis = figure.subplots()
    rows, kinds = list(next(iter(found.values()))), list(found)[::-1]
    for i, row in enumerate(rows):
        means, errors = zip(*(mean_and_error(found[kind][row]) for kind in kinds), strict=True)
        at = np.arange(len(kinds)) + 0.16 * (len(rows) / 2 - i)
        axis.errorbar(means, at, xerr=errors, fmt="o", capsize=3, label=row)
    axis.set(xlabel="accuracy, %", yticks=range(len(kinds)), yticklabels=kinds)
    _finish(figure, [axis], file)


def _finish(figure: Figure, axes: list, file: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(file, dpi=90)
