"""Writing a `.beton` in FFCV's own page format, by worker processes that may fail without harm.

FFCV's `DatasetWriter` waits forever for a worker that died, ignores short writes and writes to the final path.
Here the workers are watched, a bad sample is named, and the file appears under its name only when complete.
"""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields.base import Field
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE
from ffcv.writer import DatasetWriter
from tqdm import tqdm

from ..errors import BadInput, BadSample, WorkerFailed
from ..files import atomic

PAGE_SIZE = 8 << 20  # FFCV's default; no sample may be larger


@dataclass
class Packed:
    """What a conversion did: indices of the samples in the file, those left out, and what the workers counted."""

    kept: np.ndarray
    skipped: list[BadSample] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)


class _TooLarge(Exception):
    """A sample that does not fit a page."""


class _PageAllocator(MemoryAllocator):
    """FFCV's allocator, writing each page to its own place in the file, whole, in any order."""

    def malloc(self, size: int) -> tuple[int, np.ndarray]:
        if size > self.page_size:
            raise _TooLarge(f"takes {size:,} bytes, more than a page ({self.page_size:,}); lower cfg.max_resolution")
        return super().malloc(size)

    def __enter__(self) -> None:
        self.fp = open(self.fname, "r+b", buffering=0)

    def flush_page(self) -> None:
        if self.my_page < 0:
            return
        rest, at = memoryview(self.page_data), self.offset + self.my_page * self.page_size
        while rest:
            written = os.pwrite(self.fp.fileno(), rest, at)
            rest, at = rest[written:], at + written

    def forget_sample(self) -> None:
        """Give up the space of the current sample, whose encoding failed."""
        while self.allocations and self.allocations[-1][0] == self.current_sample_id:
            self.allocations.pop()


def write_beton(
    path: Path,
    fields: dict[str, Field],
    samples: Sequence[Any],
    load: Callable[[int], tuple],
    note: Callable[[], Any],
    num_workers: int,
    chunk_size: int,
    skip_bad: bool,
) -> Packed:
    """Write `samples` into the file `path`, which appears when complete and replaces one that is there.

    Args:
        path: the `.beton`; while it grows it is `PATH.part`.
        fields: FFCV fields by name, in the order of the values that `load` returns.
        samples: one entry a sample, for `load` by index; its name in messages.
        load: index -> the field values; raises BadSample. Runs in the worker processes.
        note: what a worker has to report when it is done, collected in `Packed.notes`.
        num_workers: processes; `chunk_size` samples are taken at a time.
        skip_bad: leave bad samples out and list them; else the first one ends it.

    Raises:
        BadSample: the first bad sample, if they are not to be skipped.
        WorkerFailed: a worker died or failed; the message says at which sample and why.
    """
    with atomic(path) as temporary:
        writer = DatasetWriter(str(temporary), fields, page_size=PAGE_SIZE, num_workers=num_workers)
        writer.num_samples = len(samples)
        writer.prepare()
        writer.metadata_sm.unlink()  # it lives on in the processes that have it, and ends with them, however they end
        try:
            packed, allocations = _run_workers(writer, _Job(samples, load, note, chunk_size), skip_bad)
            packed.kept = _finish(writer, allocations, [bad_index for bad_index, _ in packed.skipped])
            packed.skipped = [bad for _, bad in packed.skipped]
        finally:
            writer.metadata_sm.close()
    return packed


@dataclass(frozen=True)
class _Job:
    """What all workers have: see `write_beton`."""

    samples: Sequence[Any]
    load: Callable[[int], tuple]
    note: Callable[[], Any]
    chunk_size: int


@dataclass(frozen=True)
class _Shared:
    """Shared by the workers: the pages, the next sample; of each worker how many it has done and which it is at."""

    allocator: _PageAllocator
    next_sample: Any
    done: Any
    current: Any


def _run_workers(writer, job, skip_bad):
    context, samples = multiprocessing.get_context("fork"), job.samples  # `load` and its tables are shared, not copied
    shared = _Shared(
        _PageAllocator(writer.fname, writer.data_region_start, writer.page_size),
        context.Value(ctypes.c_int64, 0),
        context.RawArray(ctypes.c_int64, writer.num_workers),
        context.RawArray(ctypes.c_int64, [-1] * writer.num_workers),
    )
    workers, receivers = [], {}
    packed, allocations = Packed(np.arange(0)), []
    try:
        for rank in range(writer.num_workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(rank, os.getpid(), sender, writer, job, shared), daemon=True)
            process.start()
            sender.close()
            workers.append(process)
            receivers[receiver] = rank
        with tqdm(total=len(samples), unit=" images", desc=Path(writer.fname).stem, dynamic_ncols=True) as progress:
            while receivers:
                for receiver in wait(list(receivers), timeout=0.2):
                    rank = receivers[receiver]
                    try:
                        kind, value = receiver.recv()
                    except (EOFError, OSError):
                        raise WorkerFailed(_why_it_died(workers[rank], samples, shared.current[rank])) from None
                    if kind == "bad":
                        if not skip_bad:
                            raise value[1]
                        packed.skipped.append(value)
                    elif kind == "failed":
                        raise WorkerFailed(f"a worker failed at {_name(samples, shared.current[rank])}:\n{value}")
                    else:
                        allocations.append(np.frombuffer(value[0], dtype=ALLOC_TABLE_TYPE))
                        packed.notes.append(value[1])
                        del receivers[receiver]
                progress.update(sum(shared.done) - progress.n)
    finally:
        for process in workers:
            process.kill()
        for process in workers:
            process.join()
    packed.skipped.sort(key=lambda item: item[0])
    return packed, np.concatenate(allocations)


def _name(samples, index):
    return samples[index] if index >= 0 else "its start"


def _why_it_died(process, samples, index):
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    else:
        why = f"left with exit code {code}"
    return f"a worker {why} while it was at {_name(samples, index)}; nothing was written"


def _work(rank: int, parent: int, sender: Connection, writer: DatasetWriter, job: _Job, shared: _Shared) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        total, samples = len(job.samples), job.samples
        allocator = shared.allocator
        metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type, count=total)
        columns = [metadata[name] for name in writer.metadata_type.names]
        encoders = list(writer.fields.values())
        with allocator:
            while os.getppid() == parent:
                with shared.next_sample.get_lock():
                    first = shared.next_sample.value
                    shared.next_sample.value = first + job.chunk_size
                if first >= total:
                    break
                for index in range(first, min(first + job.chunk_size, total)):
                    shared.current[rank] = index
                    allocator.set_current_sample(index)
                    try:
                        _encode(index, job.load(index), encoders, columns, allocator)
                    except _TooLarge as error:
                        allocator.forget_sample()
                        sender.send(("bad", (index, BadSample(samples[index], str(error)))))
                    except BadSample as bad:
                        allocator.forget_sample()
                        sender.send(("bad", (index, bad)))
                    shared.done[rank] += 1
        table = np.array(allocator.allocations, dtype=ALLOC_TABLE_TYPE)
        sender.send(("done", (table.tobytes(), job.note())))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # no exit handlers of the parent's copied state


def _encode(index, values, encoders, columns, allocator):
    for attempt in range(2):
        try:
            for column, encoder, value in zip(columns, encoders, values, strict=True):
                encoder.encode(column[index : index + 1], value, allocator.malloc)
            return
        except MemoryError:  # the page was full: once more, on a fresh one
            if attempt == 1:
                raise


def _finish(writer, allocations, skipped):
    """Metadata without the skipped samples, allocation table and header, all on disk. Returns the indices kept."""
    total = writer.num_samples
    metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type, count=total)
    keep = np.ones(total, dtype=bool)
    keep[skipped] = False
    kept = int(keep.sum())
    if kept == 0:
        raise BadInput("no sample could be used; nothing was written")
    allocations = allocations.copy()
    allocations["sample_id"] = (np.cumsum(keep) - 1)[allocations["sample_id"].astype(np.int64)]
    header = writer.header.copy()
    with open(writer.fname, "r+b") as file:
        header["num_samples"] = kept
        header["alloc_table_ptr"] = file.seek(0, os.SEEK_END)
        file.write(allocations[np.argsort(allocations["ptr"])].tobytes())
        file.seek(writer.metadata_start)
        file.write(metadata[keep].tobytes())
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return np.flatnonzero(keep)
