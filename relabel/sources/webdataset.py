"""WebDataset shards: tars in which the members `KEY.jpg`, `KEY.cls` and `KEY.json` are one sample.

The class is a number, in `KEY.cls` or as `label` in the JSON; its name is the folder of the JSON's `filename`
(`n02018795/n02018795_1761.JPEG`, as in timm's ImageNet shards), or the WordNet id that an official file name begins
with, or its place in the class list that is given.
"""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput, BadSample
from ..imagenet import IMAGENET_CLASSES, imagenet_classes
from ..progress import Progress
from .archived import Archived, Entry, archived
from .base import IMAGE_SUFFIXES, ClassChoice, in_order
from .tar import AT_ONCE, TarIndex

OFFICIAL = re.compile(r"(?:(n\d{8})_\d+|ILSVRC2012_val_\d{8})\.JPEG")
INFO = "_info.json"  # timm's, beside the shards
GREATEST = 1 << 20  # bytes of a .cls or a .json


@dataclass(frozen=True, slots=True)
class _Part:
    """A sample: its image's row in its shard, its class number, its file's name, its class's name ("": not said)."""

    row: int
    label: int
    name: str
    folder: str


def is_webdataset(indices: Sequence[TarIndex]) -> bool:
    """Whether the members are samples' parts: there are `.cls` files, or as many `.json` files as images."""
    endings = [os.path.splitext(name)[1].lower() for index in indices for name in index.names]
    images = sum(ending in IMAGE_SUFFIXES for ending in endings)
    return ".cls" in endings or 0 < images == endings.count(".json")


def open_webdataset(root: Path, indices: Sequence[TarIndex], choice: ClassChoice) -> Archived:
    """The samples of some shards, in their order.

    Raises:
        BadSample: a sample without image or class, or whose class is said in two ways; its member is named.
        BadInput: classes whose names are not said.
    """
    shards = []
    with ThreadPoolExecutor(AT_ONCE) as pool, Progress(f"labels of {root.name}", len(indices), "shards") as progress:
        for parts in pool.map(_parts, indices):
            shards.append(parts)
            progress.update(1)
    said = {name: count for split in _info(indices[0].path.parent).values() for name, count in split.items()}
    for index, parts in zip(indices, shards, strict=True):
        count = said.get(index.path.name, len(parts))
        if count != len(parts):
            raise BadSample(index.path, f"holds {len(parts):,} samples, {INFO} says {count:,}; get the shard again")
    of_label = _class_names(indices, shards)
    labels = {part.label for parts in shards for part in parts}
    unnamed = sorted(labels - of_label.keys())
    listed = choice.given or (imagenet_classes() if choice.num_classes == IMAGENET_CLASSES else ())
    if unnamed and not listed:
        raise BadInput(
            f"{root}: class {unnamed[0]} has a number and no name; give the classes' names, one a line, in the file "
            "cfg.class_list, or cfg.num_classes=1000 where they are ImageNet-1k's in order of their WordNet ids, from 0"
        )
    for label in sorted(labels) if listed else ():
        name = listed[label] if label < len(listed) else "not in it"
        if of_label.setdefault(label, name) != name or label >= len(listed):
            raise BadInput(f"{root}: its class {label} is {of_label[label]}, by the class list {name}; give their list")
    found = in_order({label: of_label[label] for label in labels})
    classes = choice.of(found, root)
    entries = [
        Entry(f"{of_label[part.label]}/{part.name}", index.names[part.row], number, index.offsets[part.row],
              index.sizes[part.row])
        for number, (index, parts) in enumerate(zip(indices, shards, strict=True)) for part in parts
    ]  # fmt: skip
    what = f"{len(indices):,} WebDataset shards"
    source = archived(root, what, [index.path for index in indices], entries, classes)
    source.partial = bool(listed) or len(classes) != len(found)
    return source


def refuse_gaps(root: Path, paths: Sequence[Path]) -> None:
    """Shards are numbered without gaps, and where timm's `_info.json` lists them all of a split are there.

    Raises:
        BadSample: one is missing; it is named.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*?)(\d+)", path.stem):
            numbers.setdefault((match[1], path.suffix), []).append(int(match[2]))
    for (name, _), there in numbers.items():
        missing = sorted(set(range(min(*there, 1), max(there))) - set(there))
        if missing:
            raise BadSample(root, f"lacks {len(missing):,} shards of {name}, number {missing[0]} first; get them all")
    names = {path.name for path in paths}
    for split in _info(paths[0].parent).values():
        missing_names = sorted(set(split) - names)
        if names & split.keys() and missing_names:
            raise BadSample(
                root, f"lacks {len(missing_names):,} shards of {INFO}, {missing_names[0]} first; get them all"
            )


def _info(folder: Path) -> dict[str, dict[str, int]]:
    """Of each split that timm's `_info.json` describes, the shards and how many samples each has; empty without one."""
    file = folder / INFO
    if not file.is_file():
        return {}
    try:
        splits = json.loads(file.read_text())["splits"].values()
        return {s["name"]: dict(zip(s["filenames"], map(int, s["shard_lengths"]), strict=True)) for s in splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSample(file, f"does not list shards as timm's does ({str(error)[:80]}); get it again") from None


def _class_names(indices: Sequence[TarIndex], shards: Sequence[list[_Part]]) -> dict[int, str]:
    """The name of each class number, where the samples say one."""
    of_label: dict[int, str] = {}
    of_name: dict[str, int] = {}
    for index, parts in zip(indices, shards, strict=True):
        for part in parts:
            if part.folder:
                name, label = of_label.setdefault(part.label, part.folder), of_name.setdefault(part.folder, part.label)
                if name != part.folder or label != part.label:
                    other = f"class {part.label} is {name}" if name != part.folder else f"{name} is class {label}"
                    raise BadSample(
                        index.member(part.row), f"is of class {part.label} and in {part.folder}; elsewhere {other}"
                    )
    return of_label


def _parts(index: TarIndex) -> list[_Part]:
    """The samples of a shard."""
    rows: dict[str, dict[str, int]] = {}
    for row, name in enumerate(index.names):
        folder, slash, file = name.rpartition("/")
        stem, dot, ending = file.partition(".")
        if file.startswith(".") or not dot:
            continue
        parts = rows.setdefault(folder + slash + stem, {})
        if ending.lower() in parts:
            raise BadSample(index.member(row), "is there twice; keys must differ within a shard")
        parts[ending.lower()] = row
    with open(index.path, "rb") as shard:
        return [_sample(shard.fileno(), index, key, parts) for key, parts in rows.items()]


def _sample(file: int, index: TarIndex, key: str, parts: dict[str, int]) -> _Part:
    where = f"{index.path}: sample {key}"
    images = [ending for ending in parts if f".{ending}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise BadSample(where, f"has {len(images) or 'no'} images among its members {', '.join(parts)}; one is needed")
    about = _json(file, index, parts["json"]) if "json" in parts else {}
    labels = [_label(about["label"], index.member(parts["json"]))] if about.get("label") is not None else []
    if "cls" in parts:
        labels.append(_label(_content(file, index, parts["cls"]), index.member(parts["cls"])))
    if not labels:
        raise BadSample(where, f"has no class: {key}.cls, or label in {key}.json")
    if len(set(labels)) > 1:
        raise BadSample(
            where, f"is of class {labels[1]} by its .cls, of class {labels[0]} by its .json; which is right?"
        )
    name = about.get("filename") or f"{key.rpartition('/')[2]}.{images[0]}"
    if not isinstance(name, str) or ".." in name.split("/") or not name.strip("/"):
        raise BadSample(index.member(parts["json"]), f"says filename {name!r}, which is none")
    folder, _, base = name.strip("/").rpartition("/")
    stem = base.removesuffix(f".{images[0]}")
    base = f"{stem}.JPEG" if OFFICIAL.fullmatch(f"{stem}.JPEG") else base  # the ending is that of the shard's form
    official = OFFICIAL.fullmatch(base)
    wnid = (official[1] or "") if official else ""
    if folder and wnid and folder.rpartition("/")[2] != wnid:
        raise BadSample(index.member(parts["json"]), f"says filename {name}: in a folder of another class")
    first, _, rest = f"{folder}/{base}".partition("/") if folder else (wnid, "", base)
    return _Part(parts[images[0]], labels[0], rest, first)


def _content(file: int, index: TarIndex, row: int) -> bytes:
    if index.sizes[row] > GREATEST:
        raise BadSample(index.member(row), f"has {index.sizes[row]:,} bytes, more than any label")
    return os.pread(file, index.sizes[row], index.offsets[row])


def _json(file: int, index: TarIndex, row: int) -> dict:
    try:
        about = json.loads(_content(file, index, row))
    except ValueError as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(index.member(row), f"is no JSON ({error})") from None
    if not isinstance(about, dict):
        raise BadSample(index.member(row), "is JSON, but no object with label and filename")
    return about


def _label(value: object, where: str) -> int:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    if isinstance(value, bool) or not text.strip().isdigit():
        raise BadSample(where, f"says class {text.strip()[:40]!r}, which is no number from 0")
    return int(text)
