"""Writing files that are either complete or absent."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadInput

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic(file: Path, keep: Path | None = None, sync: bool = True, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path, `FILE.part`, that takes the name `file` when the block ends without an error.

    Args:
        file: what is written; a reader sees the old content or the new one, never a part.
        keep: a name for the old content, which otherwise is replaced.
        sync: have the new content on the disk before it takes the name.
        size: about how many bytes it takes, for the message.

    Raises:
        BadInput: there is no room for it; the old content is still there.
    """
    temporary = file.with_name(file.name + ".part")
    with needs_room(file, size):
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


@contextmanager
def needs_room(file: Path, size: int = 0) -> Iterator[None]:
    """Say in one message that the disk is full, where writing about `size` bytes to `file` fails for that."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer has its own error, with the system's behind it
        cause: BaseException | None = error
        while cause and getattr(cause, "errno", None) not in NO_ROOM:
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError):
            raise
        takes = f", which takes {in_units(size)}" if size else ""
        free = in_units(shutil.disk_usage(file.parent).free)
        raise BadInput(
            f"{file.parent}: no room for {file.name}{takes}; {free} free ({cause.strerror}). "
            "What was written before is kept"
        ) from None


def in_units(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


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
