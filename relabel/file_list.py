"""Folders of images, and the names of a `.beton`'s samples, in `FILE.beton.files.json` beside it; label lists by name.

FFCV's format has no place for names. They are needed to say which image broke a run, to look up human labels of an
image, and to clean labels.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ffcv_fields.label_map import MAX_CLASSES

from .atomic import write_text
from .errors import BadInput, BadSample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def find_images(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """`[(file, label)]` and the class names, in torchvision ImageFolder's order; empty class folders count."""
    if not root.is_dir():
        raise BadSample(root, "is not a folder; give the folder of the class folders")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise BadSample(root, "holds no class folders; images must be in CLASS/IMAGE.jpg")
    if len(classes) > MAX_CLASSES:
        raise BadSample(root, f"holds {len(classes)} class folders; at most {MAX_CLASSES} can be stored")
    images = []
    for label, name in enumerate(classes):
        for folder, _, names in sorted(os.walk(root / name)):
            images += [(Path(folder, n), label) for n in sorted(names) if n.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise BadSample(root, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return images, classes


def file_list_of(beton: str | Path) -> Path:
    return Path(f"{beton}.files.json")


def write_file_list(beton: Path, classes: Sequence[str], files: Sequence[str]) -> None:
    """Write the list: class names by label, and each sample's path below the image folder, in the samples' order."""
    write_text(file_list_of(beton), json.dumps({"classes": list(classes), "files": list(files)}, indent=0))


def read_file_list(beton: str | Path, num_samples: int) -> tuple[list[str], list[str]]:
    """`(classes, files)` as `write_file_list` wrote them.

    Raises:
        BadInput: there is no list, or it is not of this file.
    """
    path = file_list_of(beton)
    try:
        content = json.loads(path.read_text())
        classes, files = content["classes"], content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}); write {beton} again with write_datasets.py, which makes this list"
        ) from None
    if len(files) != num_samples:
        raise BadInput(f"{path}: lists {len(files):,} files; {beton} holds {num_samples:,} samples")
    return classes, files


def cleaned_labels(list_file: str, beton: str, labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Labels with the corrections of a list ("label cleaning" in the paper's table): replaced or left out.

    Args:
        list_file: text, one line a sample, `PATH<tab>LABEL`: the path below the image folder, or the file's name
            alone; the label a class index, a class folder's name, or `-`: leave this sample out.
        beton: the file whose samples they are.
        labels: int64 `[num_samples]`, its labels.

    Returns:
        int64 `[num_samples]`, -1 for samples to leave out; and a sentence that counts what was done.

    Raises:
        BadInput: a line that is not of this form, or that names no sample or no class of the file.
    """
    classes, files = read_file_list(beton, len(labels))
    place = {name: i for i, name in enumerate(files)}
    place |= {Path(name).name: i for i, name in enumerate(files)}
    index = {name: i for i, name in enumerate(classes)} | {str(i): i for i in range(len(classes))} | {"-": -1}
    cleaned = labels.copy()
    try:
        lines = Path(list_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{list_file}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, label = line.rstrip().partition("\t")
        if not tab:
            raise BadInput(f"{list_file}, line {number}: {line!r} is not PATH<tab>LABEL")
        if name not in place:
            raise BadInput(f"{list_file}, line {number}: {name!r} is no sample of {beton}")
        if label not in index:
            raise BadInput(f"{list_file}, line {number}: {label!r} is no class of {beton}, and not - (leave out)")
        cleaned[place[name]] = index[label]
    left_out = int((cleaned < 0).sum())
    replaced = int((cleaned != labels).sum()) - left_out
    return cleaned, f"{list_file}: {replaced:,} labels replaced, {left_out:,} of {len(labels):,} samples left out"
