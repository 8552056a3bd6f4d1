"""Errors that a user can fix: a command prints their message alone, without a traceback."""

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


class WorkerFailed(RuntimeError):
    """A worker process died or raised; the message names the sample it was at."""
