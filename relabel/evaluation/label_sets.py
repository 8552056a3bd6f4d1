"""Human labels of ImageNet's validation images beyond the single one.

Every reader takes samples by file name, so that neither the order of a `.beton` nor that of a folder matters.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.classes import imagenet_classes
from ..data.names import Identity, SampleNames
from ..errors import BadInput

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.\w+", re.IGNORECASE)
RECORD = {"file_name": str, "correct_multi_labels": list, "unclear_multi_labels": list, "is_problematic": bool}
PUBLISHED = ("initial_annots", "problematic_images")
# Mean error over the five severities of AlexNet, by which ImageNet-C's errors are divided (Hendrycks and Dietterich,
# ICLR 2019, and their published code).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def read_json(file: str) -> Any:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _list_of(file: str, form: str) -> list[Any]:
    content = read_json(file)
    if not isinstance(content, list):
        raise BadInput(f"{file}: must be {form}")
    return content


def _set_classes(row: np.ndarray, classes: Any, index: dict[Any, int], file: str, which: str) -> None:
    """Mark the classes of a list in a row of right classes; `index` says which they are for the network."""
    if not isinstance(classes, list):
        raise BadInput(f"{file}: {which} is {classes!r}, must be a list of classes")
    for c in classes:
        if isinstance(c, bool) or not isinstance(c, int | str) or c not in index:
            count = sum(isinstance(known, int) for known in index)  # names are in it too
            raise BadInput(f"{file}: {which} is {classes}; {c!r} is none of the {count:,} classes")
        if index[c] >= 0:
            row[index[c]] = True


def imagenet_index(classes: Sequence[str] | None, num_classes: int, file: str) -> dict[Any, int]:
    """The network's index of each of ImageNet-1k's classes, by its index and WordNet id; -1: it does not know it."""
    names = imagenet_classes()
    if classes is None:
        return {i: i for i in range(num_classes)} | {name: i for i, name in enumerate(names[:num_classes])}
    index = {name: i for i, name in enumerate(classes)}
    found = {name: index.get(name, -1) for name in names}
    if max(found.values()) < 0:
        raise BadInput(f"{file}: names classes of ImageNet-1k; the network knows none of them")
    return {**found, **dict(enumerate(found.values()))}


def read_multilabels(file: str, identity: Identity, num_classes: int, labels: np.ndarray | None = None) -> np.ndarray:
    """Sets of right classes of a validation set: JSON, `{"CLASS/IMAGE.jpg": ["CLASS", ...], ...}`, by names.

    Also understood: one list with a list of class indices (of the data's class list) for each sample, in the order of
    their paths (torchvision ImageFolder's), whatever order they were packed in.

    Args:
        identity: of the validation set.
        num_classes: of the network.
        labels: int64 `[N]`, the single labels for the network, by which a list in another order is found out.

    Returns:
        bool `[N, num_classes]`; a row without any class is a sample that is not counted.

    Raises:
        BadInput: no such file, contents of another form or length, a sample or class that is unknown; named. Also a
            list without names that rarely has the single labels: it is in another order.
    """
    content, count = read_json(file), len(identity.names)
    known: dict[Any, int] = {i: int(j) for i, j in enumerate(identity.index)}
    right = np.zeros((count, num_classes), bool)
    if isinstance(content, dict):
        known = {name: int(j) for name, j in zip(identity.classes or (), identity.index, strict=False)}
        known |= {name: j for j, name in enumerate(identity.network or ())}
        found = SampleNames(identity.names, "the validation set").find((name, file) for name in content)
        seen: dict[int, str] = {}
        for sample, (name, classes) in zip(found, content.items(), strict=True):
            assert sample is not None
            if sample in seen:
                raise BadInput(f"{file}: {seen[sample]!r} and {name!r} are one sample")
            seen[sample] = name
            _set_classes(right[sample], classes, known, file, name)
    elif isinstance(content, list) and len(content) == count:
        for i, (sample, classes) in enumerate(zip(identity.by_path(), content, strict=True)):
            _set_classes(right[sample], classes, known, file, f"entry {i}")
    else:
        size = f"has {len(content)} entries; " if isinstance(content, list) else ""
        raise BadInput(f"{file}: {size}must name each of the {count} samples' classes, or list them in order")
    if not right.any():
        raise BadInput(f"{file}: no sample has a right class")
    if isinstance(content, list) and labels is not None:
        _check_order(file, right, labels)
    return right


def _check_order(file: str, right: np.ndarray, labels: np.ndarray) -> None:
    """Raise BadInput where clearly fewer than half of the single labels are among their samples' right classes."""
    counts = right.any(1)
    share = float(right[np.arange(len(right)), labels][counts].mean())
    if share + 1.5 / np.sqrt(counts.sum()) < 0.5:  # three standard errors of a half
        raise BadInput(
            f"{file}: lists classes in the order of the samples' paths, but only {100 * share:.1f} % of the single "
            'labels are among these: it is in another order; name the samples, {"CLASS/IMAGE.jpg": ["CLASS", ...]}'
        )


def read_real(file: str, samples: Sequence[str], num_classes: int, classes: Sequence[str] | None = None) -> np.ndarray:
    """ReaL labels (Beyer et al., 2020): `real.json`, entry i for `ILSVRC2012_val_{i+1:08d}.JPEG`.

    Args:
        samples: the samples' names.
        num_classes: of the network.
        classes: the network's class list, in which ImageNet's are found by name; None: ImageNet's own order.

    Returns:
        bool `[len(samples), num_classes]`, the correct classes; a row without any is not counted.

    Raises:
        BadInput: the file is of another form; a sample is no validation image that it has, or two are the same one; no
            sample has a right class.
    """
    lists, index = (
        _list_of(file, "ReaL's real.json, a list of lists of classes"),
        imagenet_index(classes, num_classes, file),
    )
    right, seen = np.zeros((len(samples), num_classes), bool), dict[int, str]()
    for row, name in zip(right, samples, strict=True):
        number = VALIDATION_NAME.fullmatch(Path(name).name)
        at = int(number[1]) if number else 0
        if not 1 <= at <= len(lists):
            raise BadInput(f"{file}: has no entry for {name}; its entries start at ILSVRC2012_val_00000001.JPEG")
        if at in seen:
            raise BadInput(f"{file}: entry {at - 1} fits {seen[at]} and {name}")
        seen[at] = name
        _set_classes(row, lists[at - 1], index, file, f"entry {at - 1}")
    if not right.any():
        raise BadInput(f"{file}: no sample has a right class")
    return right


def _records(file: str) -> list[Any]:
    """The records of `imagenet2012_multilabel`, from their list or made of the published file as TFDS makes them."""
    content = read_json(file)
    if isinstance(content, list):
        return content
    labels, problematic = (content.get(key) if isinstance(content, dict) else None for key in PUBLISHED)
    if not isinstance(labels, dict) or not isinstance(problematic, dict):
        raise BadInput(
            f"{file}: must be a list of the records of imagenet2012_multilabel, or the published human_accuracy_*.json "
            f"with {' and '.join(PUBLISHED)}"
        )
    for name, sets in labels.items():
        if not isinstance(sets, dict):
            raise BadInput(f"{file}: {name} is {sets!r}, must be an object with correct, wrong, unclear")
    return [
        {"file_name": name, "is_problematic": name in problematic}
        | {f"{kind}_multi_labels": sets.get(kind, []) for kind in ("correct", "unclear")}
        for name, sets in labels.items()
        if VALIDATION_NAME.fullmatch(name)  # the file has ImageNetV2's images too
    ]


def read_multilabel_records(
    file: str, samples: Sequence[str], num_classes: int, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Shankar et al.'s labels (ICML 2020): the published file, `human_accuracy_*.json`, or TFDS's records as JSON.

    The published file is an object with `initial_annots`, `{file name: {"correct": [WordNet id, ...], "wrong": ...,
    "unclear": ...}}`, and `problematic_images`, `{file name: ...}`. The records of `imagenet2012_multilabel` are a list
    of objects with `file_name`, `correct_multi_labels`, `wrong_multi_labels`, `unclear_multi_labels` and
    `is_problematic`. Correct and unclear labels both count as correct; problematic images are left out.

    Args:
        samples, num_classes, classes: as for `read_real`.

    Returns:
        bool `[len(samples), num_classes]`, the right classes; bool `[len(samples)]`, which samples count: those with a
        record that is not problematic; and a line that counts what was left out.

    Raises:
        BadInput: a record of another form, two records of one image, or none that counts.
    """
    index = imagenet_index(classes, num_classes, file)
    records = _records(file)
    rows, labels = [], []
    for number, record in enumerate(records):
        which = f"record {number}"
        if not isinstance(record, dict):
            raise BadInput(
                f"{file}: {which} is {record!r}, must be an object with file_name, correct_multi_labels, ..."
            )
        for key, kind in RECORD.items():
            if not isinstance(record.get(key), kind):
                raise BadInput(
                    f"{file}: {which} has {key!r} {record.get(key)!r}, must be a {kind.__name__}; export the records "
                    "with all fields"
                )
        rows.append((record["file_name"], f"{file}, {which}"))
        labels.append(record["correct_multi_labels"] + record["unclear_multi_labels"])
    right, counts = np.zeros((len(samples), num_classes), bool), np.zeros(len(samples), bool)
    seen: dict[int, int] = {}
    found = SampleNames(samples, "the validation set").find(rows, strict=False)
    for number, sample in enumerate(found):
        if sample is None:
            continue
        if sample in seen:
            raise BadInput(f"{file}: records {seen[sample]} and {number} are both of {rows[number][0]}")
        seen[sample] = number
        if not records[number]["is_problematic"]:
            counts[sample] = True
            _set_classes(right[sample], labels[number], index, file, f"record {number}")
    if not (counts & right.any(1)).any():
        raise BadInput(f"{file}: has no record that counts of any of the images, as {samples[0]}")
    missing = [rows[i][0] for i, sample in enumerate(found) if sample is None]
    line = f"{file}: {int(counts.sum()):,} of {len(samples):,} images count"
    return right, counts, line + (f"; {len(missing):,} records are of other images ({missing[0]})" if missing else "")
