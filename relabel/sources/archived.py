"""Images in tar archives, read in place: the official ones, class tars, and trees of class folders that were packed."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadSample
from .base import IMAGE_SUFFIXES, ClassChoice, ImageSource, Sample, is_hidden, left_out
from .tar import TarIndex

OPEN = 64  # files that are kept open: shards may be more than a process may open


class Archives:
    """Files that are read by offset, opened in the process that reads them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: dict[int, int] = {}

    def read(self, number: int, offset: int, size: int, where: Any) -> bytes:
        """`size` bytes of a file.

        Raises:
            BadSample: `where` cannot be read.
        """
        try:
            data = os.pread(self._file(number), size, offset)
            while len(data) < size:  # a signal, or more than 2 GB
                more = os.pread(self._file(number), size - len(data), offset + len(data))
                if not more:
                    raise BadSample(where, f"ends {size - len(data):,} bytes early: changed since it was opened?")
                data += more
        except OSError as error:
            raise BadSample(where, f"cannot be read ({error.strerror})") from None
        return data

    def _file(self, number: int) -> int:
        file = self._open.pop(number, None)
        if file is None:
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            file = os.open(self.paths[number], os.O_RDONLY)
        self._open[number] = file  # the latest stands last
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": {}}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


@dataclass(frozen=True, slots=True)
class Entry:
    """An image in an archive: its name as a sample, its member's name, and which bytes of which archive it is."""

    name: str
    member: str
    archive: int
    offset: int
    size: int


@dataclass
class Archived(ImageSource):
    """Images in archives. `spans`, int64 `[len(samples), 3]`: archive, offset, size."""

    archives: Archives = field(default_factory=lambda: Archives(()))
    members: list[str] = field(default_factory=list)
    spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def read(self, index: int) -> bytes:
        archive, offset, size = self.spans[index].tolist()
        return self.archives.read(archive, offset, size, self.place(index))

    def place(self, index: int) -> str:
        return f"{self.archives.paths[self.spans[index, 0]]}: member {self.members[index]}"

    def files(self) -> Iterable[tuple[str, Path]]:
        return ((path.name, path) for path in (*self.archives.paths, *self.labels))


def archived(
    root: Path, what: str, paths: Sequence[Path], entries: Sequence[Entry], classes: tuple[str, ...],
) -> Archived:  # fmt: skip
    """The source of some entries, in their order, whose names begin with their class.

    Raises:
        BadSample: no entries, or two of one name.
    """
    if not entries:
        raise BadSample(root, f"holds no images ({', '.join(IMAGE_SUFFIXES)})")
    index = {name: i for i, name in enumerate(classes)}
    samples = [Sample(entry.name, index[entry.name.partition("/")[0]], i) for i, entry in enumerate(entries)]
    spans = np.array([(entry.archive, entry.offset, entry.size) for entry in entries], np.int64)
    members = [entry.member for entry in entries]
    source = Archived(root, what, classes, samples, archives=Archives(paths), members=members, spans=spans)
    seen: dict[str, int] = {}
    for sample in samples:
        other = seen.setdefault(sample.name, sample.index)
        if other != sample.index:
            raise BadSample(source.place(sample.index), f"and {source.place(other)} are one sample, {sample.name}")
    return source


def open_class_folders(root: Path, indices: Sequence[TarIndex], choice: ClassChoice, below: str = "") -> Archived:
    """Archives whose members are `CLASS/IMAGE.jpg` or `CLASS.tar/IMAGE.jpg`, at any depth; in a tree's order.

    The archives of one class each are such a tree too: their names are the classes'.

    Args:
        below: the folder in which the class folders stand, with a slash; empty: none.

    Raises:
        BadSample: see `archived` and `ClassChoice.of`.
    """
    hidden: list[str] = []
    passed_over: Counter[str] = Counter()
    entries: list[Entry] = []
    found: set[str] = set()
    tars = sum(name.lower().endswith(".tar") for index in indices for name in index.folders)
    flat = all("/" not in name for index in indices for name in index.names)
    for number, index in enumerate(indices):
        prefix = f"{index.path.stem}/" if flat else ""
        found |= (
            {prefix[:-1]}
            if flat
            else {
                _class_of(name.removeprefix(below))
                for name in index.folders
                if not is_hidden(name) and name != below[:-1]
            }
        )
        for member, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
            folder, slash, rest = (prefix + member.removeprefix(below)).partition("/")
            if is_hidden(f"{folder}/{rest}"):
                hidden.append(member.rpartition("/")[2])
            elif member.lower().endswith(IMAGE_SUFFIXES) and slash:
                name = f"{_class_of(folder)}/{rest}"
                found.add(_class_of(folder))
                entries.append(Entry(name, member, number, offset, size))
            else:
                passed_over[os.path.splitext(member)[1].lower() or "without ending"] += 1
    names = sorted(found)
    entries.sort(key=lambda entry: (entry.name.partition("/")[0], *_folder_and_file(entry.name)))
    what = f"an archive of {tars:,} class tars" if tars else "an archive of class folders"
    what = f"{len(indices):,} class tars" if flat else what
    classes = choice.of(names, root)
    source = archived(root, what, [index.path for index in indices], entries, classes)
    source.partial = choice.given is not None or len(classes) != len(names)
    source.remarks = left_out(root, hidden, passed_over)
    return source


def _class_of(folder: str) -> str:
    """The class of a top-level folder, or of a class tar."""
    folder = folder.partition("/")[0]
    return folder[:-4] if folder.lower().endswith(".tar") else folder


def _folder_and_file(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    return folder, file
