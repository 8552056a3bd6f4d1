"""Human labels of ImageNet's validation images beyond the single one.

Every reader takes samples by file name, so that neither the order of a `.beton` nor that of a folder matters.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.", re.IGNORECASE)
# Mean error over the five severities of AlexNet, by which ImageNet-C's errors are divided (Hendrycks and Dietterich,
# ICLR 2019, and their published code).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def _read_json(file: str, form: str) -> list[Any]:
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(content, list):
        raise BadInput(f"{file}: must be {form}")
    return content


def _set_classes(row: np.ndarray, classes: Any, file: str, which: str) -> None:
    good = isinstance(classes, list) and all(type(c) is int and 0 <= c < len(row) for c in classes)
    if not good:
        raise BadInput(f"{file}: {which} is {classes}, must be a list of classes from 0 to {len(row) - 1}")
    row[classes] = True


def read_multilabels(file: str, num_samples: int, num_classes: int) -> np.ndarray:
    """Sets of correct classes: a JSON list with one list of class indices for each sample, in the samples' order.

    Returns:
        bool `[num_samples, num_classes]`; a row without any class is a sample that is not counted.

    Raises:
        BadInput: no such file, or contents of another form or length; named.
    """
    lists = _read_json(file, "a list of lists of classes")
    if len(lists) != num_samples:
        raise BadInput(f"{file}: has {len(lists)} entries; must be a list of {num_samples}, one for each sample")
    right = np.zeros((num_samples, num_classes), bool)
    for i, classes in enumerate(lists):
        _set_classes(right[i], classes, file, f"entry {i}")
    return right


def read_real(file: str, files: Sequence[str], num_classes: int) -> np.ndarray:
    """ReaL labels (Beyer et al., 2020): `real.json`, entry i for `ILSVRC2012_val_{i+1:08d}.JPEG`.

    Args:
        files: the samples' file names.

    Returns:
        bool `[len(files), num_classes]`, the correct classes; a row without any is not counted.

    Raises:
        BadInput: the file is of another form, or a sample is no validation image that it has.
    """
    lists = _read_json(file, "ReaL's real.json, a list of lists of classes")
    right = np.zeros((len(files), num_classes), bool)
    for row, name in zip(right, files, strict=True):
        number = VALIDATION_NAME.search(Path(name).name)
        if not number or not 1 <= int(number[1]) <= len(lists):
            raise BadInput(f"{file}: has no entry for {name}; its entries start at ILSVRC2012_val_00000001.JPEG")
        _set_classes(row, lists[int(number[1]) - 1], file, f"entry {int(number[1]) - 1}")
    return right


def read_multilabel_records(file: str, files: Sequence[str], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shankar et al.'s labels (ICML 2020): the records of `imagenet2012_multilabel`, exported to JSON.

    A list of objects with `file_name`, `correct_multi_labels`, `wrong_multi_labels`, `unclear_multi_labels` and
    `is_problematic`. Correct and unclear labels both count as correct; problematic images are left out.

    Returns:
        bool `[len(files), num_classes]`, the correct classes, and bool `[len(files)]`, which samples count: those with
        a record that is not problematic.

    Raises:
        BadInput: a record of another form, or none that names one of `files`.
    """
    position = {Path(name).name: i for i, name in enumerate(files)}
    right, counts = np.zeros((len(files), num_classes), bool), np.zeros(len(files), bool)
    for number, record in enumerate(_read_json(file, "a list of the records of imagenet2012_multilabel")):
        try:
            name, problematic = record["file_name"], record["is_problematic"]
            labels = [*record["correct_multi_labels"], *record["unclear_multi_labels"]]
        except (KeyError, TypeError) as error:
            raise BadInput(f"{file}: record {number} has no {error}; export the records with all fields") from None
        at = position.get(Path(str(name)).name)
        if at is None or problematic:
            continue
        counts[at] = True
        _set_classes(right[at], labels, file, f"record {number}")
    if not counts.any():
        raise BadInput(f"{file}: names none of the images, as {files[0]}")
    return right, counts
