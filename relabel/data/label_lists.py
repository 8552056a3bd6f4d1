"""One file with all labels of a training set: a multi-label list, as label maps of 1 x 1 cell.

The format is that of "Unlocking ImageNet's Multi-Object Nature" (Chen et al., CVPR 2026; multilabel_annotations.tsv):
`FILE<tab>INDEX<tab>INDICES<tab>PROBABILITIES` a line, for instance

    n01440764/n01440764_10042.JPEG<tab>0<tab>0,391<tab>0.2654,1.0000

with the single label's index, and the classes with a probability above 0. The probabilities are each class's own; a
target must sum to 1, so they are divided by their sum. An image that the list gives no class keeps its single label.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BadSample

MOST = 32  # classes of an image: what a label map can hold


@dataclass
class LabelList:
    """All rows of a list: of row i, classes and probabilities are `[ends[i - 1], ends[i])`; `top_k` of the longest."""

    path: Path
    names: list[str] = field(default_factory=list)
    ends: array = field(default_factory=lambda: array("q"))
    classes: array = field(default_factory=lambda: array("h"))
    probabilities: array = field(default_factory=lambda: array("f"))
    top_k: int = 1
    single: int = 0  # images that keep their single label

    def tensor(self, row: int) -> torch.Tensor:
        """Float32 `[2, top_k, 1, 1]`, the greatest first; entries that there are none for have class -1 and score 0."""
        start, end = self.ends[row - 1] if row else 0, self.ends[row]
        values = np.zeros((2, self.top_k, 1, 1), np.float32)
        values[1] = -1
        probabilities = np.array(self.probabilities[start:end], np.float32)
        order = np.argsort(-probabilities, kind="stable")
        values[0, : end - start, 0, 0] = probabilities[order] / probabilities.sum()
        values[1, : end - start, 0, 0] = np.array(self.classes[start:end], np.float32)[order]
        return torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class Row:
    """One image's labels in a list."""

    labels: LabelList
    row: int

    def __str__(self) -> str:
        return f"{self.labels.path}, line {self.row + 1}"

    def tensor(self) -> torch.Tensor:
        return self.labels.tensor(self.row)


def read_label_list(path: Path, classes: Sequence[str]) -> list[tuple[str, Row]]:
    """Each row by its file's name.

    Args:
        classes: the class list that the indices are of; a file's folder must be the class of its single label.

    Raises:
        BadSample: a line that is not of the form above, or of another class list; it is named.
    """
    labels = LabelList(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                _add(labels, line.rstrip("\r\n"), f"{path}, line {number}", classes)
    except OSError as error:
        raise BadSample(path, f"cannot be read ({error.strerror})") from None
    if not labels.names:
        raise BadSample(path, "holds no labels")
    return [(name, Row(labels, row)) for row, name in enumerate(labels.names)]


def _add(labels: LabelList, line: str, where: Any, classes: Sequence[str]) -> None:
    entries = line.split("\t")
    try:
        name, single, indices, probabilities = entries
        own, named = int(single), [int(index) for index in indices.split(",") if indices]
        values = [float(value) for value in probabilities.split(",") if probabilities]
        good = len(named) == len(values) <= MOST and len(set(named)) == len(named)
    except ValueError:
        good = False
    if not good:
        raise BadSample(where, f"{line[:80]!r} is not FILE, INDEX, INDICES, PROBABILITIES, separated by tabs")
    for index in (own, *named):
        if not 0 <= index < len(classes):
            raise BadSample(where, f"class index {index} is none of the {len(classes):,} classes")
    if not all(0 < value <= 1 for value in values):
        raise BadSample(where, f"{probabilities[:80]!r} are not probabilities above 0, up to 1")
    folder = name.partition("/")[0]
    if folder != classes[own]:
        raise BadSample(where, f"{name} has the single label {own}, which is {classes[own]}: another class list")
    if not named:
        named, values = [own], [1.0]
        labels.single += 1
    labels.names.append(name)
    labels.classes.extend(named)
    labels.probabilities.extend(values)
    labels.ends.append(len(labels.classes))
    labels.top_k = max(labels.top_k, len(named))
