"""Label maps on disk: the official format, `CLASS/IMAGE.pt` or `.p`, one tensor `[2, top_k, H, W]` each; or one file.

The official files may stand in folders, or in a `.tar` of these (relabel_imagenet.tar), which is read in place.

An archive is one file `NAME.npy` instead of a million small ones: int16 `[N, 2, top_k, H, W]` in the layout of
`ffcv_fields.label_map` (float16 scores). Beside a tree (`label_maps.json`) or an archive (`NAME.npy.json`) there may
be a manifest that says how it was made, and in which axis order.

A `.tsv` is a list of labels without places (`label_lists`).

`tensor[0]` holds the scores (logits), `tensor[1]` the class indices as floats. Nothing in a file is trusted: it
is read by torch's restricted unpickler, which executes nothing, and every value is checked.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ffcv_fields.label_map import SCORES

from ..errors import BadSample
from ..progress import Progress
from ..sources.archived import Archives
from ..sources.tar import TarIndex, index_tar
from .label_lists import Row, read_label_list
from .tensors import GREATEST_FILE, tensor_of

SUFFIXES = (".pt", ".p")


@dataclass(frozen=True)
class LabelMapFormat:
    """What every file of a tree must agree on: `[2, top_k, height, width]` once the rows are the image's y."""

    top_k: int
    height: int
    width: int
    num_classes: int
    axis_order: str


@dataclass(frozen=True)
class ArchiveEntry:
    """One label map of an archive: row `row` of `archive`; `name` for messages."""

    archive: np.ndarray
    row: int
    name: str

    def __str__(self) -> str:
        return self.name

    def tensor(self) -> torch.Tensor:
        """As an official file holds it: float32 `[2, top_k, rows, columns]`."""
        scores, classes = np.array(self.archive[self.row])
        return torch.from_numpy(np.stack([scores.view(np.float16).astype(np.float32), classes.astype(np.float32)]))


@dataclass(frozen=True)
class TarOfMaps:
    """A tar of label maps, opened in the process that reads it."""

    index: TarIndex
    archives: Archives


@dataclass(frozen=True, slots=True)
class TarMember:
    """One label map of a tar."""

    tar: TarOfMaps
    row: int

    def __str__(self) -> str:
        return self.tar.index.member(self.row)

    def read(self) -> bytes:
        """The file; raises BadSample."""
        index = self.tar.index
        return self.tar.archives.read(0, index.offsets[self.row], index.sizes[self.row], self)


Source = Path | ArchiveEntry | TarMember | Row


def manifest_of(root: Path) -> Path:
    """Where the manifest of a tree or an archive is, if it has one."""
    return root / "label_maps.json" if root.is_dir() else root.with_name(root.name + ".json")


def read_manifest(root: Path) -> dict[str, Any]:
    """What the manifest says; empty without one.

    Raises:
        BadSample: it is there and cannot be read.
    """
    file = manifest_of(root)
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8-sig"))
        if manifest["axis_order"] not in ("yx", "xy"):
            raise ValueError(f"axis_order is {manifest['axis_order']!r}")
        if manifest.get("scores", "logits") not in SCORES:
            raise ValueError(f"scores is {manifest['scores']!r}")
        for name in ("classes", "files", "skipped"):
            names = manifest.get(name)
            good = isinstance(names, list) and all(isinstance(entry, str) for entry in names)
            if names is not None and not (good and len(set(names)) == len(names)):
                raise ValueError(f"{name} must be a list of different names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadSample(file, f"is no manifest of label maps ({error})") from None
    return manifest


def open_archive(file: Path, mode: Literal["r", "r+"] = "r") -> np.memmap:
    """The maps of an archive, mapped into memory.

    Raises:
        BadSample: it is not one.
    """
    try:
        maps = np.load(file, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadSample(file, f"is no archive of label maps ({str(error)[:120]})") from None
    if maps.dtype != np.int16 or maps.ndim != 5 or maps.shape[1] != 2:
        raise BadSample(file, f"holds {maps.dtype}{list(maps.shape)}, must be int16 [N, 2, top_k, H, W]")
    return maps


def find_label_maps(root: Path, classes: Sequence[str]) -> dict[str, Source]:
    """All label maps of a tree or an archive by their keys: the class folder and the path below it, without the ending.

    The class folders may stand in `root` itself or in one inner folder, as the official archive has them.

    Raises:
        BadSample: there are no class folders below `root`, or two maps share a key; both are named.
    """
    if root.is_file():
        readers: dict[str, Callable[..., Iterable[tuple[str, Source]]]]
        readers = {".npy": _archived, ".tar": _packed, ".tsv": read_label_list}
        reader = readers.get(root.suffix)
        if reader is None:
            packed = "; it is compressed: unpack it first" if root.suffix in (".gz", ".tgz", ".zip", ".xz") else ""
            raise BadSample(root, f"is no .npy, .tar or .tsv of label maps{packed}")
        return _by_key(reader(root, classes))
    folder = _class_root(root, set(classes))
    inside, others = f"{os.path.realpath(folder)}/", Counter[str]()
    found: list[tuple[str, Source]] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            _refuse_link(entry, inside)
            found += _tree(entry.path, f"{entry.name}/", inside, others)
    if not found:
        kinds = f"; found {', '.join(others)}: give .pt or .p" if others else ""
        raise BadSample(root, f"holds no label maps (.pt or .p){kinds}")
    return _by_key(found)


def _archived(root: Path, classes: Sequence[str]) -> list[tuple[str, Source]]:
    maps, manifest = open_archive(root), read_manifest(root)
    files, skipped = manifest.get("files") or [], set(manifest.get("skipped") or [])
    if len(files) != len(maps):
        raise BadSample(root, f"holds {len(maps):,} label maps; its manifest {manifest_of(root)} names {len(files):,}")
    entries = [(name, ArchiveEntry(maps, row, f"{root}[{name}]")) for row, name in enumerate(files)]
    return [(name, entry) for name, entry in entries if name not in skipped]


def _packed(root: Path, classes: Sequence[str]) -> list[tuple[str, Source]]:
    """Those of a tar, whose class folders may stand in inner folders."""
    with Progress(f"index of {root.name}", None, "members") as progress:
        index, known = index_tar(root, progress.update), set(classes)
    tar = TarOfMaps(index, Archives([root]))
    rows = [row for row, name in enumerate(index.names) if os.path.splitext(name)[1] in SUFFIXES and "/." not in name]
    parts = ((index.names[row].split("/")[:-1], row) for row in rows)
    inner = {"/".join(part[: next((i for i, p in enumerate(part) if p in known), 0)]) for part, _ in parts
             if known.intersection(part)}  # fmt: skip
    if len(inner) != 1:
        which = f"holds class folders in {' and in '.join(sorted(inner)[:2])}" if inner else ""
        raise BadSample(root, which or f"holds no folder named as an image class ({', '.join(sorted(known)[:3])}, ...)")
    (below,) = inner
    below += "/" if below else ""
    for row in rows:
        if not index.names[row].startswith(below):
            raise BadSample(index.member(row), f"stands beside {below}, in which the class folders are")
    return [(index.names[row].removeprefix(below), TarMember(tar, row)) for row in rows]


def _tree(folder: str, prefix: str, inside: str, others: Counter) -> Iterator[tuple[str, Source]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _refuse_link(entry, inside)
            yield from _tree(entry.path, f"{prefix}{entry.name}/", inside, others)
        elif os.path.splitext(entry.name)[1] in SUFFIXES:
            _refuse_link(entry, inside)
            yield prefix + entry.name, Path(entry.path)
        else:
            others[os.path.splitext(entry.name)[1] or "files without ending"] += 1


def _by_key(maps: Iterable[tuple[str, Source]]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name, source in maps:
        key = os.path.splitext(name)[0]
        if key in found:
            raise BadSample(source, f"and {found[key]} are label maps of one name; only the ending differs")
        found[key] = source
    return found


def _refuse_link(entry: os.DirEntry, inside: str) -> None:
    if entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside):
        raise BadSample(Path(entry.path), f"is a link out of {inside}; copy what it points to")


def _class_root(root: Path, classes: set[str]) -> Path:
    if not root.is_dir():
        raise BadSample(root, "is not a folder or an archive of label maps")
    folders = [entry for entry in os.scandir(root) if entry.is_dir()]
    if any(entry.name in classes for entry in folders):
        return root
    inner = [f for f in folders if any(e.name in classes for e in os.scandir(f.path) if e.is_dir())]
    if len(inner) != 1:
        raise BadSample(root, f"holds no folder named as an image class ({', '.join(sorted(classes)[:3])}, ...)")
    return Path(inner[0].path)


def read_tensor(file: Source) -> torch.Tensor:
    """The tensor of a label map, `[2, top_k, rows, columns]`, unchecked but for its type.

    Raises:
        BadSample: see `tensors.tensor_of`.
    """
    if isinstance(file, ArchiveEntry | Row):
        return file.tensor()
    if isinstance(file, TarMember):
        return tensor_of(file.read(), file)
    try:
        size = os.stat(file).st_size
        if size > GREATEST_FILE:
            raise BadSample(file, f"has {size:,} bytes, more than any label map ({GREATEST_FILE:,})")
        return tensor_of(file.read_bytes(), file)
    except FileNotFoundError:
        raise BadSample(file, "does not exist") from None
    except OSError as error:
        raise BadSample(file, f"cannot be read ({error.strerror})") from None


def label_map_format(sources: Sequence[Source], num_classes: int, axis_order: str) -> LabelMapFormat:
    """The format that most of some maps have, for all of their tree to follow.

    Args:
        sources: some of the maps, from everywhere in the tree.

    Raises:
        BadSample: most of them cannot be read, or no shape is that of more than half of them.
    """
    shapes: Counter[tuple[int, ...]] = Counter()
    problem: BadSample | None = None
    for source in sources:
        try:
            shape = tuple(read_tensor(source).shape)
            if len(shape) != 4 or shape[0] != 2 or 0 in shape:
                raise BadSample(source, f"has shape {list(shape)}, must be [2, top_k, height, width]")
            shapes[shape] += 1
        except BadSample as error:
            problem = problem or error
    shape, count = shapes.most_common(1)[0] if shapes else ((), 0)
    if 2 * count <= len(sources):
        if problem is not None:
            raise problem
        raise BadSample(sources[0], f"and {len(sources) - 1} others have shapes {', '.join(map(str, shapes))}")
    height, width = shape[2:] if axis_order == "yx" else shape[:1:-1]
    return LabelMapFormat(shape[1], height, width, num_classes, axis_order)


def read_label_map(file: Source, expected: LabelMapFormat) -> tuple[np.ndarray, np.ndarray]:
    """One checked label map, rows = the image's y.

    Returns:
        scores float32 and class indices int64, each `[top_k, height, width]`.

    Raises:
        BadSample: the shape differs from `expected`, a score is not finite, an index is not a whole number from
            0 to `num_classes - 1`, or a place names a class twice.
    """
    tensor = read_tensor(file)
    height, width = expected.height, expected.width
    rows, columns = (height, width) if expected.axis_order == "yx" else (width, height)
    shape = [2, expected.top_k, rows, columns]
    if list(tensor.shape) != shape or not tensor.is_floating_point():
        raise BadSample(file, f"is {tensor.dtype}{list(tensor.shape)}, must be floats {shape} as most files'")
    exact = {torch.bfloat16: 257, torch.float16: 2049}.get(tensor.dtype)  # classes whose indices it can hold
    if exact and expected.num_classes > exact:
        raise BadSample(
            file, f"is {tensor.dtype}, which holds class indices up to {exact - 1} only; write it as float32"
        )
    values = tensor.detach().float().numpy()
    if expected.axis_order == "xy":
        values = values.swapaxes(-1, -2)
    scores, indices = np.ascontiguousarray(values[0]), values[1]
    finite = np.isfinite(scores)
    if not finite.all():
        k, y, x = np.argwhere(~finite)[0]
        raise BadSample(file, f"score {scores[k, y, x]} at entry {k}, y {y}, x {x} is not finite")
    in_range = (indices >= 0) & (indices < expected.num_classes) & (indices == np.floor(indices))
    if not in_range.all():
        k, y, x = np.argwhere(~in_range)[0]
        raise BadSample(
            file,
            f"class index {indices[k, y, x]:g} at entry {k}, y {y}, x {x} is not one of the {expected.num_classes} "
            "classes (one per class folder of cfg.data_dir; an empty folder counts; for a part of the classes give "
            "cfg.num_classes or cfg.class_list)",
        )
    classes = indices.astype(np.int64)
    ordered = np.sort(classes, axis=0)
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        k, y, x = np.argwhere(twice)[0]
        raise BadSample(file, f"class {ordered[k, y, x]} is listed twice at y {y}, x {x}")
    return scores, classes


def write_label_map(file: Path, scores: np.ndarray, classes: np.ndarray) -> None:
    """Write one label map, rows = y, in the official format (float32 `[2, top_k, height, width]`)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(np.stack([scores, classes]).astype(np.float32)), file)
