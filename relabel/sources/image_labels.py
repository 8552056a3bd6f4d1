"""Labels of images that stand in no class folders: ImageNet's devkit, Kaggle's solution, or a list of two columns.

The devkit of 2012 (`ILSVRC2012_devkit_t12.tar.gz`) gives one ILSVRC2012_ID a line, in the order of the images' names.
These numbers, from 1, are not the order of the WordNet ids: `meta.mat` says which is which.
"""

import csv
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInput, BadSample
from ..imagenet import IMAGENET_CLASSES, imagenet_classes
from .base import ClassChoice, key_of

DEVKIT, KAGGLE, SYNSETS = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv", "LOC_synset_mapping.txt"
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
GREATEST = 64 << 20  # bytes of a file in the devkit; the largest has 0.3 MB
ABOVE = 5  # folders in which labels are looked for: Kaggle's stand four above its images


@dataclass(frozen=True)
class ImageLabels:
    """The class of each image by its file's name without ending; `classes` are all there are, sorted; from `file`."""

    file: Path
    of: dict[str, str]
    classes: tuple[str, ...]

    def match(self, names: Sequence[str], where: Path) -> list[str]:
        """The class of each of `names`, which are all that the labels are of.

        Raises:
            BadSample: an image without label, or a label without image; the first is named, and how many there are.
        """
        keys = [key_of(name) for name in names]
        without = [name for name, key in zip(names, keys, strict=True) if key not in self.of]
        if without:
            raise BadSample(where / without[0], f"has no label in {self.file}, nor have {len(without) - 1:,} others")
        if len(set(keys)) < len(keys):
            twice = next(name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1)
            raise BadSample(where / twice, f"shares its label in {self.file} with an image of another ending")
        missing = sorted(self.of.keys() - set(keys))
        if missing:
            raise BadSample(
                self.file, f"labels {len(missing):,} images that are not in {where}, {missing[0]} first; get them all"
            )
        return [self.of[key] for key in keys]


def find_labels(near: Path) -> Path | None:
    """The devkit or Kaggle's solution in a folder, or above it; None: there is neither."""
    near = near.absolute()
    for folder in (near, *near.parents)[: ABOVE + 1]:
        for name in (f"{DEVKIT}.tar.gz", DEVKIT, KAGGLE):
            if (folder / name).exists():
                return folder / name
    return None


def read_labels(path: Path, choice: ClassChoice) -> ImageLabels:
    """The labels of a devkit (`.tar.gz` or folder), of Kaggle's solution, or of a list, one `NAME LABEL` a line.

    Args:
        choice: what is said of the classes; a list's labels are names, or places in the class list, from 0.

    Raises:
        BadSample: the file cannot be read, is of another year, or labels an image twice.
    """
    if not path.exists():
        raise BadSample(path, "does not exist; cfg.val_labels is the devkit, LOC_val_solution.csv or a list NAME LABEL")
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _devkit(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise BadSample(path, f"cannot be read ({error.strerror})") from None
    if text.startswith("ImageId,"):
        return _kaggle(path, text)
    return _list(path, text, choice)


def _devkit(path: Path) -> ImageLabels:
    found = {file: _member(path, file) for file in (TRUTH, META)}
    try:
        from scipy.io import loadmat
    except ImportError:
        raise BadInput(f"{path}: its meta.mat is read by scipy; first: pip install scipy") from None
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"])
        leaves = synsets[[int(count) == 0 for count in synsets["num_children"]]]
        of_id = {int(n): str(wnid) for n, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    except Exception as error:  # scipy raises many kinds for what is no such file
        raise BadSample(path, f"has a {META} that is not ILSVRC 2012's ({str(error)[:80]}); get {DEVKIT}") from None
    labels = {}
    for number, line in enumerate(found[TRUTH].decode("ascii", "replace").split(), 1):
        if not line.isdigit() or int(line) not in of_id:
            raise BadSample(path, f"{TRUTH}, line {number}: {line!r} is no ILSVRC2012_ID of its meta.mat; get it again")
        labels[f"ILSVRC2012_val_{number:08d}"] = of_id[int(line)]
    return ImageLabels(path, labels, tuple(sorted(of_id.values())))


def _member(path: Path, name: str) -> bytes:
    """A file of the devkit, which is one folder, or an archive of it."""
    if path.is_dir():
        file = path / name
        if not file.is_file():
            raise _another_year(path, [str(other.relative_to(path)) for other in path.rglob("*ground_truth*")])
        return file.read_bytes()
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            member = next((m for m in members if m.isfile() and m.name.partition("/")[2] == name), None)
            if member is None:
                raise _another_year(path, [m.name for m in members if "ground_truth" in m.name])
            content = archive.extractfile(member)
            if content is None or member.size > GREATEST:
                raise BadSample(path, f"has a {name} of {member.size:,} bytes; get {DEVKIT}.tar.gz")
            return content.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(path, f"cannot be read as the devkit ({str(error)[:80]}); get {DEVKIT}.tar.gz again") from None


def _another_year(path: Path, others: list[str]) -> BadSample:
    has = f"has {others[0]}" if others else "has no ground truth"
    return BadSample(path, f"{has}, not {TRUTH}: the devkit of another year or task; get {DEVKIT}.tar.gz")


def _kaggle(path: Path, text: str) -> ImageLabels:
    labels: dict[str, str] = {}
    for number, row in enumerate(csv.reader(text.splitlines()[1:]), 2):
        words = row[1].split() if len(row) == 2 else []
        if not words or len(words) % 5 or len(set(words[::5])) != 1:
            raise BadSample(path, f"line {number}: {','.join(row)[:80]!r} is not an image and the boxes of one class")
        _add(labels, row[0], words[0], f"line {number}", path)
    classes, synsets = set(labels.values()), path.with_name(SYNSETS)
    if synsets.is_file():
        named = {line.split()[0] for line in synsets.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
        if not classes <= named:
            raise BadSample(synsets, f"does not name {min(classes - named)}, a class of {path}; get both again")
        classes = named
    return ImageLabels(path, labels, tuple(sorted(classes)))


def _list(path: Path, text: str, choice: ClassChoice) -> ImageLabels:
    rows = list(_two_columns(path, text))
    known = choice.given
    if known is None and choice.num_classes == IMAGENET_CLASSES:
        known = imagenet_classes()
    index: dict[str, str] = {name: name for name in known or ()}
    numbers = all(label.isdigit() for _, label, _ in rows)
    if known is not None and not any(name.isdigit() for name in known):  # a number would be a name and a place
        index |= {str(i): name for i, name in enumerate(known)}
    if known is None and numbers:
        raise BadInput(
            f"{path}: its labels are numbers; give the classes' names, one a line, in the file cfg.class_list, or "
            "cfg.num_classes=1000 where they are ImageNet-1k's in order of their WordNet ids, from 0"
        )
    labels: dict[str, str] = {}
    for name, label, where in rows:
        if known is not None and label not in index:
            raise BadSample(
                path, f"{where}: {label!r} is none of the {len(known):,} classes, and no number from 0 of one"
            )
        _add(labels, key_of(name), label if known is None else index[label], where, path)
    return ImageLabels(path, labels, known or tuple(sorted(set(labels.values()))))


def _two_columns(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    """`(name, label, where)`; separated by a tab, a comma (`.csv`), or the last space."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        separator = "\t" if "\t" in line else "," if path.suffix == ".csv" else " "
        name, found, label = line.strip().rpartition(separator)
        if not found or not name.strip() or not label.strip() or "/" in name:
            raise BadSample(path, f"line {number}: {line[:80]!r} is not NAME LABEL, the name a file's without folder")
        yield name.strip(), label.strip(), f"line {number}"


def _add(labels: dict[str, str], key: str, label: str, where: str, path: Path) -> None:
    if key in labels:
        raise BadSample(path, f"{where}: labels {key} a second time")
    if "/" in label:
        raise BadSample(path, f"{where}: {label!r} is no class name")
    labels[key] = label
