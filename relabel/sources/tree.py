"""A tree of class folders, as torchvision's ImageFolder reads it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadSample
from .base import IMAGE_SUFFIXES, ClassChoice, ImageSource, Sample, left_out

SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass
class Tree(ImageSource):
    """The images in the class folders of `root`, at any depth, in ImageFolder's order."""

    def read(self, index: int) -> bytes:
        return read_file(self.place(index))

    def place(self, index: int) -> Path:
        return self.root / self.samples[index].name

    def files(self) -> Iterable[tuple[str, Path]]:
        return ((sample.name, self.place(sample.index)) for sample in self.samples)


def read_file(file: Path) -> bytes:
    """A whole file.

    Raises:
        BadSample: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadSample(file, f"cannot be read ({error.strerror})") from None


def open_tree(root: Path, choice: ClassChoice) -> Tree:
    """The images in the class folders of `root`; linked folders are followed, loops are not.

    Hidden files and folders are left out, and so are files that do not end as images do; both are counted in
    `remarks`. Empty class folders count.

    Raises:
        BadSample: no class folders, no images, or a class folder that is not in the class list.
        BadInput: see `ClassChoice.of`.
    """
    entries = sorted((entry for entry in os.scandir(root) if entry.is_dir()), key=lambda entry: entry.name)
    folders = [entry.name for entry in entries if not entry.name.startswith(".")]
    if not folders:
        raise BadSample(root, "holds no class folders; images must be in CLASS/IMAGE.jpg")
    if SPLITS.issuperset(folders):
        raise BadSample(root, f"holds the folders {', '.join(folders)}, which are no classes; give one of them")
    classes = choice.of(folders, root)
    index = {name: i for i, name in enumerate(classes)}
    samples: list[Sample] = []
    hidden = [entry.name for entry in entries if entry.name.startswith(".")]
    passed_over: Counter[str] = Counter()
    for name in folders:
        for file in _files(root / name, hidden):
            if file.name.lower().endswith(IMAGE_SUFFIXES):
                samples.append(Sample(file.relative_to(root).as_posix(), index[name], len(samples)))
            else:
                passed_over[file.suffix.lower() or "without ending"] += 1
    if not samples:
        raise BadSample(root, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    remarks = left_out(root, hidden, passed_over)
    partial = choice.given is not None or len(classes) != len(folders)
    return Tree(root, "class folders", classes, samples, partial, remarks)


def _files(folder: Path, hidden: list[str], above: tuple = ()) -> Iterator[Path]:
    """The files below a folder, each folder's own first, in order of name, as os.walk sorted gives them."""
    for directory in sorted(_walk(folder, hidden, above), key=str):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if not entry.is_dir():
                if entry.name.startswith("."):
                    hidden.append(entry.name)
                else:
                    yield directory / entry.name


def _walk(folder: Path, hidden: list[str], above: tuple) -> Iterator[Path]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that it stands in
        return
    yield folder
    for entry in os.scandir(folder):
        if entry.is_dir():
            if entry.name.startswith("."):
                hidden.append(entry.name)
            else:
                yield from _walk(folder / entry.name, hidden, (*above, here))
