"""Which reader a folder, file or pattern of images needs, found out by looking."""

import glob
import itertools
import os
import re
from pathlib import Path
from typing import TypeVar

from ..errors import BadSample
from ..progress import Progress
from .archived import Archived, open_class_folders
from .base import WNID, ClassChoice, ImageSource, is_image
from .flat import is_flat, open_flat_archive, open_flat_folder
from .image_labels import ImageLabels, find_labels, read_labels
from .parquet import open_parquet
from .tar import index_all
from .tree import SPLITS, open_tree
from .webdataset import is_webdataset, open_webdataset, refuse_gaps

S = TypeVar("S", bound=ImageSource)
KINDS = (".tar", ".parquet")
FORMS = (
    "a folder of class folders, a folder or an archive of images with cfg.val_labels, .tar or .parquet files, or a "
    "pattern of these"
)


def open_source(path: str | Path, choice: ClassChoice | None = None, labels: str = "") -> ImageSource:
    """The images of a folder, an archive, or the files that a pattern names.

    Args:
        path: see `FORMS`; a pattern may hold `*`, `?`, `[...]`, `{0000..1023}` and `{a,b}`.
        choice: what is said of the classes.
        labels: for images without class folders, what labels them; empty: found beside or above them.

    Raises:
        BadSample: nothing that is known is there, or something in it cannot be used; it is named.
        BadInput: see `ClassChoice.of` and the readers.
    """
    root, choice = Path(path), choice or ClassChoice()
    archives = archives_of(path)
    if archives is None and is_flat(root):
        return open_flat_folder(root, _labels(root, labels, choice), choice)
    if archives is not None and archives[0].suffix == ".parquet":
        return _with_class_folders(open_parquet(root, archives, choice), labels)
    if archives is not None:
        return _open_tars(root, archives, choice, labels)
    return _with_class_folders(open_tree(root, choice), labels)


def split_of(data_path: str, split: str) -> str:
    """Where the images of a split are below a folder that holds data as it was downloaded, or `data_path/split`.

    Args:
        split: "train" or "val".
    """
    root, long = Path(data_path), {"val": "validation"}.get(split, split)
    for place in (split, f"ILSVRC/Data/CLS-LOC/{split}", f"ILSVRC2012_img_{split}.tar"):
        if (root / place).exists():
            return str(root / place)
    for pattern in (f"{long}-*.parquet", f"data/{long}-*.parquet", f"imagenet1k-{long}-*.tar"):
        if next(root.glob(pattern), None):
            return str(root / pattern)
    return str(root / split)


def archives_of(path: str | Path) -> list[Path] | None:
    """The files that a path or a pattern names, in order of name; None: it is a folder without archives.

    Nothing is read: this is quick also where opening the source takes minutes.

    Raises:
        BadSample: nothing is there, a shard is missing, or what is there is of several kinds or splits.
    """
    root = Path(path)
    if root.is_file():
        return [_known(root)]
    if not root.exists():
        return _of_pattern(str(path))
    files = _archives_in(root)
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    if not files and "data" in folders:  # as repositories of Hugging Face have it
        files = [file for file in _archives_in(root / "data") if file.suffix == ".parquet"]
    elif files and folders:
        raise BadSample(
            root, f"holds folders ({folders[0]}) and archives ({files[0].name}); give the one or the others"
        )
    return _one_set(root, files, complete=True) if files else None


def _archives_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in KINDS and not file.name.startswith("."))


def _of_pattern(pattern: str) -> list[Path]:
    if not any(sign in pattern for sign in "*?[{"):
        raise BadSample(pattern, f"does not exist; give {FORMS}")
    files: list[Path] = []
    for name in _without_braces(pattern):
        found = sorted(glob.glob(name)) if any(sign in name for sign in "*?[") else [name]
        if not found or not Path(found[0]).is_file():
            raise BadSample(name, "does not exist: no such shard" if name != pattern else "fits no file")
        files += [_known(Path(file)) for file in found]
    return _one_set(Path(pattern), files, complete="*" in pattern)


def _without_braces(pattern: str) -> list[str]:
    """`a-{00..02}` -> a-00, a-01, a-02; `{a,b}` -> a, b; as shells and WebDataset understand them."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        if numbers:
            first, last = numbers.groups()
            width = len(first) if first.startswith("0") else 0
            choices.append([f"{n:0{width}d}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return ["".join(words) for words in itertools.product(*choices)]


def _known(file: Path) -> Path:
    if file.suffix.lower() not in KINDS:
        packed = file.name.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip"))
        unpack = (
            "is compressed, so that nothing in it can be found: unpack it to a .tar or to folders" if packed else ""
        )
        raise BadSample(file, unpack or f"is no source of images; give {FORMS}")
    return file


def _one_set(root: Path, files: list[Path], complete: bool) -> list[Path]:
    """The files, if they are of one kind and split, and (`complete`) no shard is missing among them."""
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise BadSample(root, f"holds {' and '.join(sorted(kinds))} files; give a pattern that names those of one kind")
    splits = {tuple(SPLITS.intersection(re.split(r"[\W\d_]+", file.stem.lower()))): file for file in files}
    if len(splits) > 1:
        one, other, *_ = (file.name for file in splits.values())
        raise BadSample(root, f"holds several splits ({one}, {other}); give a pattern that names the files of one")
    if complete:
        _refuse_gaps(root, files)
    return files


def _refuse_gaps(root: Path, files: list[Path]) -> None:
    """Shards `NAME-00000-of-00294` must all be there."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)(\d+)-of-(\d+)", file.stem):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, total), there in numbers.items():
        missing = sorted(set(range(total)) - there)
        if missing:
            raise BadSample(
                root, f"lacks {len(missing):,} of {total:,} shards of {name}, number {missing[0]} first; get them all"
            )


def _open_tars(root: Path, paths: list[Path], choice: ClassChoice, labels: str) -> Archived:
    with Progress(f"index of {root.name}", None, "members") as progress:
        indices = index_all(paths, progress.update)
    if is_webdataset(indices):
        if root.is_dir() or "*" in str(root):  # else the shards were named one by one
            refuse_gaps(root, paths)
        return _with_class_folders(open_webdataset(root, indices, choice), labels)
    images = [name for index in indices for name in index.names if is_image(name)]
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if "" in tops and len(tops) > 1:
        odd = next(name for name in images if "/" not in name)
        raise BadSample(root, f"holds images in class folders and beside them ({odd}); give an archive of either")
    if len(paths) == 1 and images and (tops == {""} or (labels and len(tops) == 1)):
        return open_flat_archive(indices[0], _labels(root, labels, choice), choice)
    below = ""
    if tops == {""}:
        unknown = [path for path in paths if not _is_class(path.stem, choice)]
        if unknown:
            raise BadSample(
                unknown[0], "holds images in no class folders; is its name their class? Then name it in cfg.class_list"
            )
    elif len(tops) == 1 and not min(tops).endswith(".tar") and not _is_class(min(tops), choice):
        (top,) = tops
        below = f"{top}/"
        inner = {name.split("/")[1] for name in images if name.count("/") > 1}
        if not inner or not all(_is_class(name, choice) for name in inner):
            raise BadSample(
                root, f"holds all images in the folder {top}; is it a class? Then name it in cfg.class_list; "
                "else give an archive of the class folders in it",
            )  # fmt: skip
    elif tops <= SPLITS:
        raise BadSample(root, f"holds the folders {', '.join(sorted(tops))}, which are no classes; extract one of them")
    return _with_class_folders(open_class_folders(root, indices, choice, below), labels)


def _is_class(name: str, choice: ClassChoice) -> bool:
    """Whether a name is surely a class's: it is listed, or a WordNet id."""
    name = name.removesuffix(".tar")
    return name in choice.given if choice.given is not None else WNID.fullmatch(name) is not None


def _labels(root: Path, given: str, choice: ClassChoice) -> ImageLabels:
    file = Path(given) if given else find_labels(root if root.is_dir() else root.parent)
    if file is None:
        raise BadSample(
            root, "holds images in no class folders; say what labels them as cfg.val_labels: "
            "ILSVRC2012_devkit_t12.tar.gz, Kaggle's LOC_val_solution.csv, or a list, NAME LABEL a line",
        )  # fmt: skip
    return read_labels(file, choice)


def _with_class_folders(source: S, labels: str) -> S:
    if labels:
        raise BadSample(source.root, f"says its images' classes itself ({source.what}); leave cfg.val_labels out")
    return source
