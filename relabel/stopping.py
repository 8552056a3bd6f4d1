"""How a process stops: by SIGTERM or SIGINT, which ask a training to, or because it or another one has failed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

STOPPED = 75  # exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL)
NUMBERS = (signal.SIGTERM, signal.SIGINT)
SOON = 0.01  # seconds


def stop_while_importing() -> None:
    """While the libraries are imported, where not every exception comes through: a signal ends the process itself."""
    for number in NUMBERS:
        signal.signal(number, _exit)


def stop_at_once() -> None:
    """While a command starts (it packs, compiles, reads), a signal ends it with STOPPED, as there is nothing to save.

    It leaves through the `finally` clauses, so that nothing half-written stays; then further signals are ignored.
    """
    for number in NUMBERS:
        signal.signal(number, _leave)


def _exit(number: int, frame: object) -> NoReturn:
    print("stopped while starting, nothing to save", flush=True)
    os._exit(STOPPED)


def _leave(number: int, frame: object) -> NoReturn:
    for other in NUMBERS:
        signal.signal(other, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0":
        print("stopped while starting, nothing to save; the same command starts again", flush=True)
    _unwind(STOPPED)


def _unwind(code: int) -> NoReturn:
    """Raise SystemExit, again where Python drops it: from finalizers, and after a fork, no exception comes through."""

    def again(number: int, frame: object) -> NoReturn:
        raise SystemExit(code)

    def dropped(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, SystemExit):
            signal.signal(signal.SIGALRM, again)
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = dropped
    raise SystemExit(code)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the process through the `finally` clauses, so that nothing half-written stays.

    A command that handles it itself does so in its own way.
    """

    def exit(number: int, frame: object) -> NoReturn:
        _unwind(128 + number)

    ours = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """From the first step on: `asked` turns true, and the loop saves and exits. A second SIGINT exits now."""

    def __init__(self) -> None:
        self.asked = False
        for number in NUMBERS:
            signal.signal(number, self._catch)

    def _catch(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def leave() -> None:
    """Destroy the process group that `relabel.processes.join` made, when all processes have come to their end."""
    if in_group():
        _distributed().destroy_process_group()


def lost_another(error: Exception) -> bool:
    """Whether an error only says that another process has left, or cannot be reached."""
    signs = ("closed by peer", "reset by peer", "Timed out waiting")
    distributed = _distributed()
    return (distributed and isinstance(error, distributed.DistError)) or any(sign in str(error) for sign in signs)


def abandon(message: str, code: int = 1) -> NoReturn:
    """End this process, which has failed, with a message and an exit code.

    Where there are others they are not waited for: tearing the process group down, as Python's own end does, is a
    collective that they may never come to. The launcher (or the connection that breaks) ends them.
    """
    if message:
        print(message, file=sys.stderr, flush=True)
    if not in_group():
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


def in_group() -> bool:
    """Whether this process has joined others."""
    distributed = _distributed()
    return bool(distributed) and distributed.is_initialized()


def _distributed() -> Any:
    """torch.distributed, if anything has imported it: a command that needs no torch is not to wait for it."""
    return sys.modules.get("torch.distributed")
