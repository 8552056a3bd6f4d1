"""Images in one folder, or in an archive without folders, that a list labels: ImageNet's validation set as it comes."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadSample
from .archived import Archived, Entry, archived
from .base import ClassChoice, ImageSource, Sample, is_hidden, is_image, left_out
from .image_labels import ImageLabels
from .tar import TarIndex
from .tree import read_file


@dataclass
class Flat(ImageSource):
    """Images in one folder."""

    def read(self, index: int) -> bytes:
        return read_file(self.place(index))

    def place(self, index: int) -> Path:
        return self.root / self.samples[index].name.partition("/")[2]

    def files(self) -> Iterable[tuple[str, Path]]:
        own = ((sample.name, self.place(sample.index)) for sample in self.samples)
        return (*own, *((file.name, file) for file in self.labels))


def is_flat(root: Path) -> bool:
    """Whether a folder holds images, and no folders."""
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    return not any(entry.is_dir() for entry in entries) and any(is_image(entry.name) for entry in entries)


def open_flat_folder(root: Path, labels: ImageLabels, choice: ClassChoice) -> Flat:
    """The images of a folder, by the names that they would have in class folders.

    Raises:
        BadSample: see `ImageLabels.match`.
    """
    entries = [entry.name for entry in os.scandir(root) if not entry.is_dir()]
    names, remarks = _images(root, entries)
    classes, named = _named(root, names, labels, choice)
    index = {name: i for i, name in enumerate(classes)}
    samples = [Sample(name, index[name.partition("/")[0]], i) for i, (name, _) in enumerate(named)]
    return Flat(root, _what("a flat folder", labels), classes, samples, True, remarks, labels=(labels.file,))


def open_flat_archive(index: TarIndex, labels: ImageLabels, choice: ClassChoice) -> Archived:
    """The images of an archive, as those of a folder; their folder's name, if they stand in one, does not count."""
    rows = {name.rpartition("/")[2]: row for row, name in enumerate(index.names)}
    if len(rows) < len(index):
        raise BadSample(index.path, f"holds {len(index) - len(rows):,} files twice, in different folders")
    names, remarks = _images(index.path, list(rows))
    classes, named = _named(index.path, names, labels, choice)
    entries = []
    for name, file in named:
        row = rows[file]
        entries.append(Entry(name, index.names[row], 0, index.offsets[row], index.sizes[row]))
    source = archived(index.path, _what("a flat archive", labels), [index.path], entries, classes)
    source.remarks, source.partial, source.labels = remarks, True, (labels.file,)
    return source


def _what(kind: str, labels: ImageLabels) -> str:
    return f"{kind}, labelled by {labels.file}"


def _named(root: Path, names: list[str], labels: ImageLabels, choice: ClassChoice) -> tuple[tuple[str, ...], list]:
    """The class list, and of each image its name as a sample and its file's, in a tree's order."""
    of_each = labels.match(names, root)
    return choice.of(labels.classes, labels.file), sorted(
        ((f"{label}/{name}", name) for label, name in zip(of_each, names, strict=True)),
        key=lambda pair: pair[0].split("/"),
    )


def _images(root: Path, files: list[str]) -> tuple[list[str], list[str]]:
    """Those of some files that are images, and remarks on the others."""
    hidden = [name for name in files if is_hidden(name)]
    names = [name for name in files if is_image(name)]
    others = [name for name in files if not is_hidden(name) and not is_image(name)]
    return names, left_out(root, hidden, Counter(os.path.splitext(n)[1].lower() or "without ending" for n in others))
