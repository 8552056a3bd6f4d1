"""How far a long job is: a bar on a terminal; elsewhere, in a log say, a line every few seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

FIRST, LEAST, MOST = 5.0, 5.0, 60.0  # seconds before the first line, and between lines: a tenth of the time so far


class Progress:
    """A count of `unit`s done, with speed and the time that is left, on stderr.

    Args:
        what: is done, in a word or a file's name.
        total: how many there are; None: not known.
        unit: what is counted: "images".
        hidden: nothing is shown.
    """

    def __init__(self, what: str, total: int | None, unit: str, hidden: bool = False) -> None:
        self.what, self.total, self.unit, self.hidden = what, total, unit, hidden
        self.done, self._start = 0, time.monotonic()
        self._next = self._start + FIRST
        bar = sys.stderr.isatty() and not hidden
        self._bar = tqdm(total=total, unit=f" {unit}", desc=what, dynamic_ncols=True) if bar else None

    def update(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif not self.hidden and now >= self._next:
            self._next = now + min(MOST, max(LEAST, (now - self._start) / 10))
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What is printed where there is no terminal, `seconds` after the start."""
        speed = self.done / seconds
        if self.total is None:
            return f"{self.what}: {self.done:,} {self.unit}, {speed:,.0f}/s"
        left = f", {in_words((self.total - self.done) / speed)} left" if speed else ""
        share = 100 * self.done / max(1, self.total)
        return f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f} %), {speed:,.0f}/s{left}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def in_words(seconds: float) -> str:
    """A time for people: "1 h 9 min", "3 min", "20 s"."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
