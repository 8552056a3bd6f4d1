"""Writing files that are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(file: Path, keep: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path, `FILE.part`, that takes the name `file` when the block ends without an error.

    Args:
        file: what is written; a reader sees the old content or the new one, never a part.
        keep: a name for the old content, which otherwise is replaced.
        sync: have the new content on the disk before it takes the name.
    """
    temporary = file.with_name(file.name + ".part")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        if keep is not None and file.exists():
            os.replace(file, keep)
        os.replace(temporary, file)
        if sync:
            _sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(file) as temporary:
        temporary.write_text(text)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
