"""Label cleaning: training labels replaced, or samples left out, by a list."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import BadInput
from .dataset import open_dataset
from .names import SampleNames

LEAVE_OUT = "-"


def cleaned_labels(list_file: str, beton: str, say: bool = True) -> np.ndarray:
    """Labels with the corrections of a list ("label cleaning" in the paper's table): replaced or left out.

    Args:
        list_file: text, one line a sample, `PATH<tab>LABEL`: the path below the image folder or below the class folder,
            with or without the ending; the label a class's name, or its index where no class is named by a number,
            or `-`: leave this sample out.
        beton: the file, or its shards, whose samples they are.
        say: print what was done, with counts.

    Returns:
        int64 `[num_samples]`, -1 for samples to leave out.

    Raises:
        BadInput: a line that is not of this form, that names no sample, several samples or no class of the file, or
            that contradicts another line; a list that leaves nothing.
    """
    dataset = open_dataset(beton)
    labels = dataset.column("label").copy()
    contents, samples = dataset.contents, dataset.sample_list()
    if contents is None or samples is None:
        raise BadInput(f"{beton}: does not say its samples' names; write it with write_datasets.py")
    if LEAVE_OUT in contents.classes:
        raise BadInput(f"{beton}: has a class called {LEAVE_OUT!r}, which in a list means to leave a sample out")
    names, index = SampleNames(samples.names, beton, samples.left_out), _label_index(contents.classes)
    rows: list[tuple[str, str]] = []
    new: list[str] = []
    for number, line in enumerate(_lines(list_file), 1):
        name, tab, label = line.rstrip().partition("\t")
        where = f"{list_file}, line {number}"
        if name and not tab:
            raise BadInput(f"{where}: {line!r} is not PATH<tab>LABEL")
        if tab and label not in index:
            raise BadInput(f"{where}: {label!r} is no class of {beton}, and not - (leave out)")
        if tab:
            rows.append((name, where))
            new.append(label)
    not_packed = 0
    cleaned, said = labels.copy(), dict[int, tuple[str, str]]()
    for sample, (name, where), label in zip(names.find(rows), rows, new, strict=True):
        if sample is None:
            not_packed += 1
            continue
        earlier, other = said.setdefault(sample, (where, label))
        if index[other] != index[label]:
            raise BadInput(f"{where}: says {label!r} of {name!r}; {earlier} says {other!r}")
        cleaned[sample] = index[label]
    left_out = int((cleaned < 0).sum())
    if left_out == len(cleaned):
        raise BadInput(f"{list_file}: leaves no sample of {beton}")
    replaced = int((cleaned != labels).sum()) - left_out
    if say:
        print(f"{list_file}: {replaced:,} labels replaced, {left_out:,} of {len(labels):,} samples left out")
        if not_packed:
            print(f"{list_file}: {not_packed:,} rows are of images that are not in {beton}")
    return cleaned


def _lines(list_file: str) -> list[str]:
    try:
        return Path(list_file).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise BadInput(f"{list_file}: cannot be read ({error})") from None


def _label_index(classes: Sequence[str]) -> dict[str, int]:
    index = {name: i for i, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):  # a number would be a name and another class's index
        index |= {str(i): i for i in range(len(classes))}
    return index | {LEAVE_OUT: -1}
