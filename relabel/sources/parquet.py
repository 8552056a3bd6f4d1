"""Parquet files as Hugging Face's datasets write them: columns `image`, a struct of `bytes` and `path`, and `label`.

In `imagenet-1k` the path is the official file's name with `_` and the WordNet id appended
(`n01440764_10026_n01440764.JPEG`), so that names, classes and label maps match those of a tree. Of other data sets the
classes are those that the schema names, and the file's name is the path's last part.
"""

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, BadSample
from .base import ClassChoice, ImageSource, Sample, in_order

WITH_CLASS = re.compile(r"(.+)_(n\d{8})(\.\w+)")  # imagenet-1k's
CACHED = 256 << 20  # bytes of images, uncompressed, that a process keeps: row groups are read whole
OPEN = 64  # files
TOGETHER = 8  # row groups that are read together where each holds few classes


class _RowGroups:
    """The images of row groups, read whole and kept for a while, in the process that reads them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._clear()

    def _clear(self) -> None:
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._kept = 0

    def image(self, file: int, group: int, row: int) -> bytes | None:
        """The bytes of a row of a row group; raises pyarrow's errors."""
        images = self._groups.get((file, group))
        if images is None:
            if file not in self._files:
                self._files[file] = _open(self.paths[file])
                if len(self._files) > OPEN:
                    self._files.popitem(last=False)
            table = self._files[file].read_row_group(group, columns=["image.bytes"], use_threads=False)
            images = table.column("image").combine_chunks().field("bytes")
            self._groups[file, group] = images
            self._kept += images.nbytes
            while self._kept > CACHED and len(self._groups) > 1:
                self._kept -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end((file, group))
        return images[row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._clear()


@dataclass
class Parquet(ImageSource):
    """Images in parquet files. `rows`, int64 `[len(samples), 3]`: file, row group, row in it."""

    row_groups: _RowGroups = field(default_factory=lambda: _RowGroups(()))
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def read(self, index: int) -> bytes:
        from pyarrow import ArrowException

        try:
            data = self.row_groups.image(*self.rows[index].tolist())
        except (ArrowException, OSError) as error:
            raise BadSample(self.place(index), f"cannot be read ({_line(error)}); get the file again") from None
        if not data:
            raise BadSample(self.place(index), "has no bytes, the path alone; get the data set with its images")
        return data

    def place(self, index: int) -> str:
        file, group, row = self.rows[index].tolist()
        return f"{self.row_groups.paths[file]}: row group {group}, row {row}, {self.samples[index].name}"

    def files(self) -> Iterable[tuple[str, Path]]:
        return ((path.name, path) for path in self.row_groups.paths)


@dataclass
class _Rows:
    """All rows of some files: `names` as `image.path` has them, `labels` int64 `[N]`, `places` as `Parquet.rows`;
    `classes` are those that the schema names (None: it names none), `size` the bytes of the largest row group."""

    paths: Sequence[Path]
    names: list[str]
    labels: np.ndarray
    places: np.ndarray
    classes: tuple[str, ...] | None
    size: int

    def at(self, i: int) -> str:
        """A row, for messages."""
        file, group, row = self.places[i].tolist()
        return f"{self.paths[file]}: row group {group}, row {row}"


def open_parquet(root: Path, paths: Sequence[Path], choice: ClassChoice) -> Parquet:
    """The rows of some files, in their order.

    Raises:
        BadSample: a file is damaged or has other columns; a row without name, of two names, or of another class than
            its name says.
        BadInput: pyarrow is missing, or the classes have no names.
    """
    rows = _all(root, paths)
    matched = [match for match in map(WITH_CLASS.fullmatch, rows.names) if match]
    if len(matched) == len(rows.names):
        found = _check([match[2] for match in matched], rows)
        names = [f"{match[2]}/{match[1]}{match[3]}" for match in matched]
    elif matched:
        odd = next(i for i, name in enumerate(rows.names) if not WITH_CLASS.fullmatch(name))
        raise BadSample(
            rows.at(odd), f"has the name {rows.names[odd]}, without the WordNet id that other rows' names end in"
        )
    else:
        found = list(_names_of(rows, choice))
        names = [f"{found[label]}/{name}" for label, name in zip(rows.labels.tolist(), rows.names, strict=True)]
    classes = choice.of(found, root)
    index = {name: i for i, name in enumerate(classes)}
    samples = [Sample(name, index[name.partition("/")[0]], i) for i, name in enumerate(names)]
    source = Parquet(
        root, f"{len(paths):,} parquet files", classes, samples,
        partial=choice.given is not None or len(classes) != len(found),
        groups=_groups(rows.places, rows.labels, rows.size), row_groups=_RowGroups(paths), rows=rows.places,
    )  # fmt: skip
    seen: dict[str, int] = {}
    for sample in samples:
        if seen.setdefault(sample.name, sample.index) != sample.index:
            raise BadSample(source.place(sample.index), f"has the name of {source.place(seen[sample.name])}")
    return source


def _all(root: Path, paths: Sequence[Path]) -> _Rows:
    listed = [_list(path) for path in paths]
    of_files = [classes for classes, *_ in listed]
    if any(classes != of_files[0] for classes in of_files):
        raise BadSample(root, "holds files of different class lists: give those of one data set")
    names = [name for _, part, _, _, _ in listed for name in part]
    if not names:
        raise BadSample(root, "holds no rows")
    labels = np.concatenate([part for _, _, part, _, _ in listed])
    places = np.array([(file, *row) for file, (_, _, _, part, _) in enumerate(listed) for row in part], np.int64)
    return _Rows(paths, names, labels, places, of_files[0], max(size for *_, size in listed))


def _names_of(rows: _Rows, choice: ClassChoice) -> tuple[str, ...]:
    """The classes by their label, of rows whose names do not say them: those of the schema, or of the list given.

    A list that is given holds the schema's names, or has others for the same numbers.
    """
    names, given = rows.classes, choice.given
    if given is not None and (names is None or (len(names) == len(given) and set(names).isdisjoint(given))):
        names = given
    if names is None:
        raise BadInput(
            f"{rows.at(0)}: its class has a number and no name; give the classes' names, one a line, in the file "
            "cfg.class_list"
        )
    if any(not name or "/" in name for name in names) or len(set(names)) < len(names):
        raise BadInput(
            f"{rows.paths[0]}: its classes' names are empty, equal or hold a slash; give others as cfg.class_list"
        )
    if rows.labels.max() >= len(names):
        odd = int(rows.labels.argmax())
        raise BadSample(rows.at(odd), f"has label {rows.labels[odd]}, of {len(names):,} classes")
    return names


def _groups(places: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Which rows are to be read together: a row group's, or where they are sorted by class, those of several.

    Args:
        places: `[N, 3]`: file, row group, row.
        labels: `[N]`.
        size: bytes of the largest row group.
    """
    _, group = np.unique(places[:, :2], axis=0, return_inverse=True)
    group, classes = group.reshape(-1), int(labels.max()) + 1
    count = int(group.max()) + 1
    held = len(np.unique(group * classes + labels)) / count  # classes in a row group, on average
    if 2 * held >= min(len(labels) / count, len(np.unique(labels))):
        return group
    together = max(1, min(TOGETHER, CACHED // max(1, size)))
    return (np.random.default_rng(0).permutation(count) // together)[group]


def _check(of_each: Sequence[str], rows: _Rows) -> list[str]:
    """The class list: each class has one label, and each label one class."""
    of_label: dict[int, str] = {}
    of_name: dict[str, int] = {}
    for i, (name, label) in enumerate(zip(of_each, rows.labels.tolist(), strict=True)):
        if of_label.setdefault(label, name) != name or of_name.setdefault(name, label) != label:
            other = f"label {label} is {of_label[label]}" if of_label[label] != name else f"{name} is {of_name[name]}"
            raise BadSample(rows.at(i), f"has label {label} and the class {name}; elsewhere {other}")
    return in_order(of_label)


def _list(path: Path) -> tuple[tuple[str, ...] | None, list[str], np.ndarray, list[tuple[int, int]], int]:
    """Of a file: the classes that its schema names, each row's name, label, and row group and row in that; and the
    bytes of its largest row group."""
    file = _open(path)
    from pyarrow import ArrowException, types

    schema = file.schema_arrow
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not types.is_struct(image) or not {"bytes", "path"} <= {f.name for f in image}:
        raise BadSample(path, f"has the columns {', '.join(schema.names)}; needed are image (bytes, path) and label")
    if "label" not in schema.names or not types.is_integer(schema.field("label").type):
        raise BadSample(path, f"has the columns {', '.join(schema.names)}; needed is label, a whole number")
    names: list[str] = []
    labels, rows = [np.zeros(0, np.int64)], list[tuple[int, int]]()
    try:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["image.path", "label"], use_threads=False)
            found = table.column("label").to_pylist()
            for row, (entry, label) in enumerate(zip(table.column("image").to_pylist(), found, strict=True)):
                name = ((entry or {}).get("path") or "").rpartition("/")[2]
                if not name:
                    raise BadSample(
                        f"{path}: row group {group}, row {row}",
                        "has no name in image.path, by which an image is known; get the data set with file names, or "
                        "save its images into class folders",
                    )
                if label is None or label < 0:
                    raise BadSample(f"{path}: row group {group}, row {row}", f"has label {label}: is it a test set?")
                names.append(name)
                rows.append((group, row))
            labels.append(np.array(found, np.int64))
    except (ArrowException, OSError) as error:
        raise BadSample(path, f"cannot be read ({_line(error)}); get it again") from None
    size = max((file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)), default=0)
    return _classes_of(schema.metadata or {}), names, np.concatenate(labels), rows, size


def _classes_of(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """The class names in Hugging Face's schema; None: there are none."""
    try:
        about = json.loads(metadata.get(b"huggingface", b"{}"))
        names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _open(path: Path) -> Any:
    """A file; no thread is started: workers are forked from this process."""
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # of pyarrow's allocator
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput(f"{path}: parquet files are read by pyarrow; first: pip install pyarrow") from None
    try:
        return ParquetFile(path, pre_buffer=False)
    except (ArrowException, OSError) as error:
        raise BadSample(path, f"is no parquet file, or truncated ({_line(error)}); get it again") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
