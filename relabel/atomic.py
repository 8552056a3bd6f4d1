"""Writing files that are whole or not there."""

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write `text` beside `file` and put it in its place when complete."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, file)


def sync_folder(folder: Path) -> None:
    """Have the disk know of the folder's renames."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
