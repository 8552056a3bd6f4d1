"""One process at a time: locks that the kernel releases when their owner ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadInput


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of `path` for the time of the block.

    The lock is a POSIX record lock (which NFS knows too) on a file beside it, `PATH.lock`, that nothing else opens: the
    process would lose it when it closed any other handle of that file. The file is removed at the end; one that a
    killed owner left behind is not locked, and is used again.

    Args:
        what: is done to `path`, for the message: "is being written".

    Raises:
        BadInput: another process holds it; the message names that process.
    """
    file = path.with_name(path.name + ".lock")
    handle = _lock(file, path, what)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while the lock is held: a later owner's file is never removed
        os.close(handle)


def _lock(file: Path, path: Path, what: str) -> int:
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error.strerror}: {file.parent}); give another path") from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise BadInput(f"{path}: {what} by {owner}; wait for its end, or give another path") from None
        try:
            ours = os.path.samestat(os.fstat(handle), os.stat(file))
        except FileNotFoundError:
            ours = False
        if ours:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return handle
        os.close(handle)  # its last owner removed the file between our opening and locking it: again
