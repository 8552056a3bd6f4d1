"""What a `.beton` was packed from, and whether that is still what a run asks for."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from .beton import read_header
from .contents import read_contents
from .images import ImageFile, find_images, newest_change
from .label_map_files import manifest_of


def provenance_of(settings: Any, images: list[ImageFile]) -> dict[str, Any]:
    """Where a `.beton` is packed from: folders, number of files and their newest change, label maps, settings.

    Args:
        settings: `packing.Packing`.
        images: all images of the folder.
    """
    maps = settings.label_map_dir
    return {
        "data_dir": os.path.realpath(settings.data_dir),
        "files": len(images),
        "newest": newest_change(images),
        "label_map_dir": os.path.realpath(maps) if maps else "",
        "manifest": _manifest(maps),
        "settings": dataclasses.asdict(settings),
    }


def differences(path: str, data_dir: str, label_map_dir: str) -> list[str]:
    """What of a `.beton`'s provenance is not what is asked for; empty: nothing.

    Folders that are gone since are not missed: what counts is that they are the ones named.
    """
    contents = read_contents(read_header(path))
    if contents is None:
        return ["it does not say what it was packed from"]
    was, found = contents.provenance, []
    if was.get("data_dir") != os.path.realpath(data_dir):
        found.append(f"its images are those of {was.get('data_dir')}, not of {data_dir}")
    elif Path(data_dir).is_dir():
        images = find_images(Path(data_dir), contents.classes).images
        if len(images) != was.get("files"):
            found.append(f"{data_dir} held {was.get('files'):,} images, it holds {len(images):,} now")
        elif newest_change(images) != was.get("newest"):
            found.append(f"images in {data_dir} have changed since")
    asked = os.path.realpath(label_map_dir) if label_map_dir else ""
    if was.get("label_map_dir") != asked:
        found.append(f"its label maps are {was.get('label_map_dir') or 'none'}, not {label_map_dir or 'none'}")
    elif asked and Path(asked).exists() and _manifest(asked) != was.get("manifest"):
        found.append(f"the manifest of {label_map_dir} has changed since")
    return found


def _manifest(label_map_dir: str) -> str:
    file = manifest_of(Path(label_map_dir)) if label_map_dir else None
    return file.read_text() if file is not None and file.is_file() else ""
