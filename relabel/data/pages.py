"""Where samples' data lie in a `.beton` that several processes write: one after the other, whoever was faster.

FFCV's allocator hands out pages to whichever process asks first. Here a sample has its place when all samples before it
have theirs, by their sizes alone: the same samples make the same file, byte for byte, whatever the number of processes.
"""

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WorkerFailed

RELATIVE = 1 << 62  # added to a pointer that counts from the start of its own sample, whose place is not known yet
MOST_HELD = 64 << 20  # bytes that a process holds back before it waits for its turn


class TooLarge(Exception):
    """A sample that does not fit a page."""


@dataclass(frozen=True)
class Layout:
    """Shared by the processes: the address where the next sample may begin, and which sample that is."""

    page_size: int
    end: Any
    turn: Any

    def place(self, size: int) -> int:
        """The address of a sample of `size` bytes, which lies in one page; for the process whose turn it is."""
        start = int(self.end.value)
        if start % self.page_size + size > self.page_size:
            start += -start % self.page_size
        self.end.value = start + size
        return start


class Sample:
    """A sample's data while it is encoded: `malloc` is what FFCV's fields ask for memory by."""

    def __init__(self, index: int, page_size: int) -> None:
        self.index, self.pieces, self.size, self._page_size = index, list[np.ndarray](), 0, page_size

    def malloc(self, size: int) -> tuple[int, np.ndarray]:
        pointer, self.size = RELATIVE + self.size, self.size + size
        if self.size > self._page_size:
            raise TooLarge(
                f"takes {self.size:,} bytes, more than a page ({self._page_size:,}); lower cfg.max_resolution"
            )
        self.pieces.append(np.empty(size, np.uint8))
        return pointer, self.pieces[-1]


@dataclass
class _Chunk:
    """Samples from `first` up to `last`, of which `samples` wait to be written; no more come when it is `whole`."""

    first: int
    last: int
    samples: list[Sample] = field(default_factory=list)
    whole: bool = False


class SampleWriter:
    """Writes one process's samples to their places, as soon as those are known.

    Args:
        path: the file, which is there.
        layout: shared with the other processes.
        columns: the fields' metadata, one entry a sample; pointers in it are made addresses in the file.
        parent: the process without which this one is to end.
    """

    def __init__(self, path: str | Path, layout: Layout, columns: Iterable[np.ndarray], parent: int) -> None:
        self.allocations: list[tuple[int, int, int]] = []  # sample, address, bytes of each piece
        self._file, self._layout, self._parent = os.open(path, os.O_WRONLY), layout, parent
        self._pointers = [c["data_ptr"] for c in columns if c.dtype.names and "data_ptr" in c.dtype.names]
        self._chunks: deque[_Chunk] = deque()
        self._held = 0

    def begin(self, first: int, last: int) -> None:
        """The samples from `first` up to `last` are this process's to write, in order; some may be left out."""
        self._chunks.append(_Chunk(first, last))

    def add(self, sample: Sample) -> None:
        self._chunks[-1].samples.append(sample)
        self._held += sample.size
        self._write(MOST_HELD)

    def end(self) -> None:
        self._chunks[-1].whole = True
        self._write(MOST_HELD)

    def finish(self) -> None:
        """Wait until all samples are written."""
        self._write(-1)
        os.close(self._file)

    def _write(self, most: int) -> None:
        """Write what may be written; wait while more than `most` bytes are held."""
        while self._chunks:
            chunk = self._chunks[0]
            if self._layout.turn.value != chunk.first:
                if self._held <= most:
                    return
                if os.getppid() != self._parent:
                    raise WorkerFailed("the packing process is gone")
                time.sleep(0.001)
                continue
            for sample in chunk.samples:
                self._write_sample(sample)
            chunk.samples.clear()
            if not chunk.whole:
                return
            self._chunks.popleft()
            self._layout.turn.value = chunk.last

    def _write_sample(self, sample: Sample) -> None:
        start = at = self._layout.place(sample.size)
        for pointers in self._pointers:
            if pointers[sample.index] >= RELATIVE:
                pointers[sample.index] = int(pointers[sample.index]) - RELATIVE + start
        for piece in sample.pieces:
            self.allocations.append((sample.index, at, piece.nbytes))
            rest = piece.data
            while rest:
                written = os.pwrite(self._file, rest, at)
                rest, at = rest[written:], at + written
        self._held -= sample.size
