"""SIGTERM and SIGINT, which ask a training to stop: what they do before its first step, and after."""

import os
import signal
from typing import NoReturn

STOPPED = 75  # exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL)
NUMBERS = (signal.SIGTERM, signal.SIGINT)


def stop_at_once() -> None:
    """While a command starts (it packs, compiles, reads), a signal ends it with STOPPED, as there is nothing to save.

    It leaves through the `finally` clauses, so that nothing half-written stays; then further signals are ignored.
    """
    for number in NUMBERS:
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    for other in NUMBERS:
        signal.signal(other, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0":
        print("stopped while starting, nothing to save; the same command starts again", flush=True)
    raise SystemExit(STOPPED)


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
