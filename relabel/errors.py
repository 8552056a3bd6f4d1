"""Errors that a user can fix: a command prints their message alone, without a traceback."""

from collections.abc import Sequence
from typing import Any


class BadInput(ValueError):
    """A file, folder or setting that cannot be used; the message names it, the value and the fix."""


class BadSample(BadInput):
    """An image or a label map that cannot be used: `file`, and `reason` with the value and the fix."""

    def __init__(self, file: Any, reason: str) -> None:
        super().__init__(str(file), reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def listed(entries: Sequence[Any], most: int) -> str:
    """A line each of the first `most`, indented, and how many more there are; for the end of a message."""
    more = f"\n  and {len(entries) - most:,} more" if len(entries) > most else ""
    return "".join(f"\n  {entry}" for entry in entries[:most]) + more


class WorkerFailed(RuntimeError):
    """A worker process died or raised; the message names the sample it was at."""
