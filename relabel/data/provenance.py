"""What a `.beton` was packed from, and whether that is still what a run asks for."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadSample
from ..sources.base import ImageSource
from ..sources.opening import archives_of, open_source
from .contents import Contents
from .dataset import open_dataset
from .label_map_files import find_label_maps, manifest_of

# Settings that say where and how fast, not what is packed; two folders stand in the provenance by their real names.
_NOT_OF_THE_FILE = ("write_path", "overwrite", "num_workers", "chunk_size", "data_dir", "label_map_dir")


def provenance_of(settings: Any, source: ImageSource) -> dict[str, Any]:
    """Where a `.beton` is packed from: folders, number of files, a digest of names and times, label maps, settings.

    Args:
        settings: `packing.Packing`.
    """
    maps = settings.label_map_dir
    return {
        "source": source.what,
        "data_dir": os.path.realpath(settings.data_dir),
        "files": len(source.samples),
        "digest": _digest(source.files()),
        "labels": [os.path.realpath(file) for file in source.labels],
        "label_map_dir": os.path.realpath(maps) if maps else "",
        "label_maps": _label_maps(maps, source.classes),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in _NOT_OF_THE_FILE},
    }


def differences(path: str, data_dir: str, label_map_dir: str) -> list[str]:
    """What of the provenance of a `.beton`, or of its shards, is not what is asked for; empty: nothing.

    Folders that are gone since are not missed: what counts is that they are the ones named.
    """
    contents = open_dataset(path).contents
    if contents is None:
        return ["it does not say what it was packed from"]
    was, found = contents.provenance, []
    if was.get("data_dir") != os.path.realpath(data_dir):
        found.append(f"its images are those of {was.get('data_dir')}, not of {data_dir}")
    else:
        found += _changed(data_dir, contents)
    if was.get("settings", {}).get("subset", -1) >= 0:
        found.append(f"it holds a part of the images, cfg.subset={was['settings']['subset']}")
    asked = os.path.realpath(label_map_dir) if label_map_dir else ""
    if was.get("label_map_dir") != asked:
        found.append(f"its label maps are {was.get('label_map_dir') or 'none'}, not {label_map_dir or 'none'}")
    elif asked and Path(asked).exists() and _label_maps(asked, contents.classes) != was.get("label_maps"):
        found.append(f"the label maps in {label_map_dir} have changed since")
    return found


def _changed(data_dir: str, contents: Contents) -> list[str]:
    """What is different of images that are where they were; of archives, which are not read again, the files."""
    was = contents.provenance
    try:
        archives = archives_of(data_dir)
    except BadSample:  # gone since, or a part of them
        return []
    if archives is not None:
        labels = was.get("labels") or []
        files = [(path.name, path) for path in (*archives, *map(Path, labels)) if path.exists()]
        return [] if _digest(files) == was.get("digest") else [f"the archives {data_dir} have been changed since"]
    source = open_source(data_dir, labels=(was.get("labels") or [""])[0])
    if len(source.samples) != was.get("files"):
        return [f"{data_dir} held {was.get('files'):,} images, it holds {len(source.samples):,} now"]
    if source.classes != contents.classes:
        return [f"the class folders in {data_dir} are others now"]
    if _digest(source.files()) != was.get("digest"):
        return [f"images in {data_dir} have been moved, renamed or changed since"]
    return []


def _label_maps(root: str, classes: Sequence[str]) -> str:
    """A digest of the label maps' names and times, and of their manifest."""
    if not root:
        return ""
    files = [(path.name, path) for path in (Path(root), manifest_of(Path(root))) if path.is_file()]
    if Path(root).is_dir():
        files += [
            (key, source) for key, source in find_label_maps(Path(root), classes).items() if isinstance(source, Path)
        ]
    return _digest(files)


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    """Of names and times of change."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0{os.stat(path).st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
