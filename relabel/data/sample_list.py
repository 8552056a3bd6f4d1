"""The names of a `.beton`'s samples and classes, in `FILE.beton.files.json` beside it.

FFCV's format has no place for names. They are needed to say which image broke a run, to look up human labels of an
image, and to clean labels.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput
from ..files import write_text


def file_list_of(beton: str | Path) -> Path:
    return Path(f"{beton}.files.json")


def write_file_list(beton: Path, classes: Sequence[str], files: Sequence[str]) -> None:
    """Write the list: class names by label, and each sample's path below the image folder, in the samples' order."""
    write_text(file_list_of(beton), json.dumps({"classes": list(classes), "files": list(files)}, indent=0))


def read_file_list(beton: str | Path, num_samples: int) -> tuple[list[str], list[str]]:
    """`(classes, files)` as `write_file_list` wrote them.

    Raises:
        BadInput: there is no list, or it is not of this file.
    """
    path = file_list_of(beton)
    try:
        content = json.loads(path.read_text())
        classes, files = content["classes"], content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}); write {beton} again with write_datasets.py, which makes this list"
        ) from None
    if len(files) != num_samples:
        raise BadInput(f"{path}: lists {len(files):,} files; {beton} holds {num_samples:,} samples")
    return classes, files
