"""Writing a `.beton` in FFCV's own page format, by worker processes that may fail without harm.

FFCV's `DatasetWriter` waits forever for a worker that died, ignores short writes and writes to the final path.
Here the workers are watched, a bad sample is named, and the file appears under its name only when complete.
"""

import ctypes
import errno
import multiprocessing
import os
import shutil
import signal
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import cv2
import numpy as np
from ffcv.fields.base import Field
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType
from ffcv.utils import align_to_page
from ffcv.writer import DatasetWriter

from ..errors import BadInput, BadSample, WorkerFailed, listed
from ..files import atomic
from ..locks import exclusive
from ..progress import Progress
from .contents import Contents, SampleList, fields_checksum, write_contents
from .pages import Layout, Sample, SampleWriter, TooLarge

PAGE_SIZE = 8 << 20  # FFCV's default; no sample may be larger


@dataclass
class Packed:
    """What a conversion did: indices of the samples in the file, those left out, and what the workers counted."""

    kept: np.ndarray
    skipped: list[Any] = field(default_factory=list)
    notes: list[Any] = field(default_factory=list)
    checksums: dict[int, int] = field(default_factory=dict)  # by index in `samples`


Description = tuple[Contents, Sequence[str], Sequence[str]]  # and the names of samples kept, and left out


@dataclass(frozen=True)
class Workers:
    """`count` processes that take `chunk_size` samples at a time; `skip_bad`: they leave bad samples out."""

    count: int
    chunk_size: int
    skip_bad: bool = False


def write_beton(
    path: Path,
    fields: dict[str, Field],
    samples: Sequence[Any],
    load: Callable[[int], tuple],
    workers: Workers,
    note: Callable[[], Any] | None = None,
    describe: Callable[[Packed], Description] | None = None,
) -> Packed:
    """Write `samples` into the file `path`, which appears when complete and replaces one that is there.

    Args:
        path: the `.beton`; while it grows it is `PATH.part`.
        fields: FFCV fields by name, in the order of the values that `load` returns.
        samples: one entry a sample, for `load` by index; its name in messages.
        load: index -> the field values; raises BadSample. Runs in the worker processes.
        workers: how many processes, and what they do with a bad sample.
        note: what a worker has to report when it is done, collected in `Packed.notes`.
        describe: what the file is to know of itself: its contents, the names of samples kept and left out; may raise
            BadInput, which ends it. Without it nothing, as FFCV writes it.

    Raises:
        BadInput: another process writes the file.
        BadSample: the first bad sample, if they are not to be skipped; the first of all, if all are bad.
        WorkerFailed: a worker died or failed; the message says at which sample and why.
    """
    job = _Job(samples, load, note or (lambda: None), workers)
    with exclusive(path, "is being written"), atomic(path) as temporary:
        writer = DatasetWriter(str(temporary), fields, page_size=PAGE_SIZE, num_workers=workers.count)
        writer.num_samples = len(samples)
        with _shared_memory(writer), _one_thread_of_opencv():
            packed, allocations = _run_workers(writer, job)
            skipped = [index for index, _ in packed.skipped]
            packed.kept = np.setdiff1d(np.arange(len(samples)), skipped)
            packed.skipped = [bad for _, bad in packed.skipped]
            if len(packed.kept) == 0:
                raise _all_bad(packed.skipped)
            _finish(writer, allocations, packed, describe(packed) if describe else None)
    return packed


def _all_bad(skipped: list[BadSample]) -> BadInput:
    return BadInput(f"no sample could be used; nothing was written:{listed(skipped, 10)}")


@contextmanager
def _shared_memory(writer: DatasetWriter) -> Iterator[None]:
    """The writer's table of metadata, in memory that the workers share, for the time of the block."""
    needed = writer.num_samples * writer.metadata_type.itemsize
    try:
        writer.prepare()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _no_shared_memory(needed, error) from None
    memory = writer.metadata_sm
    memory.unlink()  # it lives on in the processes that have it, and ends with them, however they end
    try:
        os.posix_fallocate(memory._fd, 0, memory.size)  # a full /dev/shm would kill a worker at its first write
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or os.fstat(memory._fd).st_blocks * 512 >= needed:
            raise
        raise _no_shared_memory(needed, error) from None
    finally:
        with suppress(BufferError):  # a traceback may still hold an array of it
            memory.close()


def _no_shared_memory(needed: int, error: OSError) -> BadInput:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return BadInput(
        f"/dev/shm: {needed:,} bytes of shared memory are needed, {free:,} are free ({error.strerror}); delete what is "
        "left there, or enlarge it (mount -o remount,size=2G /dev/shm; docker run --shm-size=2g)"
    )


@dataclass(frozen=True)
class _Job:
    """What all workers have: see `write_beton`."""

    samples: Sequence[Any]
    load: Callable[[int], tuple]
    note: Callable[[], Any]
    workers: Workers


@dataclass(frozen=True)
class _Shared:
    """Shared by the workers: where data go, the next sample; of each worker how many it has done and which it is at."""

    layout: Layout
    next_sample: Any
    done: Any
    current: Any


@contextmanager
def _one_thread_of_opencv() -> Iterator[None]:
    """There is a worker for each core; and one that is forked beside OpenCV's threads would wait for them for ever."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _run_workers(writer: DatasetWriter, job: _Job) -> tuple[Packed, np.ndarray]:
    context, samples = multiprocessing.get_context("fork"), job.samples  # `load` and its tables are shared, not copied
    start = align_to_page(writer.data_region_start, writer.page_size)
    shared = _Shared(
        Layout(writer.page_size, context.Value(ctypes.c_int64, start), context.Value(ctypes.c_int64, 0)),
        context.Value(ctypes.c_int64, 0),
        context.RawArray(ctypes.c_int64, writer.num_workers),
        context.RawArray(ctypes.c_int64, [-1] * writer.num_workers),
    )
    workers: list[Any] = []
    receivers: dict[Any, int] = {}  # connection: rank
    packed, allocations = Packed(np.arange(0)), []
    try:
        for rank in range(writer.num_workers):
            incoming, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(rank, os.getpid(), sender, writer, job, shared), daemon=True)
            process.start()
            sender.close()
            workers.append(process)
            receivers[incoming] = rank
        with Progress(Path(writer.fname).stem, len(samples), "images") as progress:
            while receivers:
                for ready in wait(list(receivers), timeout=0.2):
                    receiver: Any = ready
                    rank = receivers[receiver]
                    try:
                        kind, value = receiver.recv()
                    except (EOFError, OSError):
                        raise WorkerFailed(_why_it_died(workers[rank], samples, shared.current[rank])) from None
                    if kind == "bad":
                        if not job.workers.skip_bad:
                            raise value[1]
                        packed.skipped.append(value)
                    elif kind == "failed":
                        raise WorkerFailed(f"a worker failed at {_name(samples, shared.current[rank])}:\n{value}")
                    else:
                        allocations.append(np.frombuffer(value[0], dtype=ALLOC_TABLE_TYPE))
                        packed.checksums |= value[1]
                        packed.notes.append(value[2])
                        del receivers[receiver]
                progress.update(sum(shared.done) - progress.done)
    finally:
        for process in workers:
            process.kill()
        for process in workers:
            process.join()
    os.truncate(writer.fname, align_to_page(shared.layout.end.value, writer.page_size))  # the last page is whole too
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
        metadata = np.frombuffer(writer.metadata_sm.buf, dtype=writer.metadata_type, count=total)
        columns = [metadata[name] for name in writer.metadata_type.names]
        encoders, checksums = list(writer.fields.values()), {}
        file = SampleWriter(writer.fname, shared.layout, columns, parent)
        while os.getppid() == parent:
            with shared.next_sample.get_lock():
                first = shared.next_sample.value
                shared.next_sample.value = last = min(first + job.workers.chunk_size, total)
            if first >= total:
                break
            file.begin(first, last)
            for index in range(first, last):
                shared.current[rank] = index
                sample = Sample(index, writer.page_size)
                try:
                    for column, encoder, value in zip(columns, encoders, job.load(index), strict=True):
                        encoder.encode(column[index : index + 1], value, sample.malloc)
                    checksums[index] = checksum_of(sample.pieces)
                    file.add(sample)
                except TooLarge as error:
                    sender.send(("bad", (index, BadSample(samples[index], str(error)))))
                except BadSample as bad:
                    sender.send(("bad", (index, bad)))
                shared.done[rank] += 1
            file.end()
        file.finish()
        table = np.array(file.allocations, dtype=ALLOC_TABLE_TYPE)
        sender.send(("done", (table.tobytes(), checksums, job.note())))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # no exit handlers of the parent's copied state


def checksum_of(stored: Iterable[np.ndarray]) -> int:
    """CRC-32 of a sample's data, field after field."""
    value = 0
    for data in stored:
        value = zlib.crc32(data.data, value)
    return value


def _finish(
    writer: DatasetWriter,
    allocations: np.ndarray,
    packed: Packed,
    described: tuple[Contents, Sequence[str], Sequence[str]] | None,
) -> None:
    """Metadata of the samples kept, contents, allocation table and header, on disk."""
    total = writer.num_samples
    rows = np.frombuffer(writer.metadata_sm.buf, f"V{writer.metadata_type.itemsize}", total)  # with what pads them
    metadata = rows[packed.kept]
    number = np.full(total, -1)
    number[packed.kept] = np.arange(len(packed.kept))
    allocations = allocations.copy()
    allocations["sample_id"] = number[allocations["sample_id"].astype(np.int64)]
    header = writer.header.copy()
    with open(writer.fname, "r+b") as file:
        file.seek(0, os.SEEK_END)
        if described:
            contents, names, left_out = described
            checksums = np.array([packed.checksums[i] for i in packed.kept.tolist()], np.uint32)
            fields_crc = fields_checksum(
                np.fromfile(writer.fname, FieldDescType, len(writer.fields), offset=HeaderType.itemsize)
            )
            samples = SampleList(tuple(names), checksums, zlib.crc32(metadata), fields_crc, tuple(left_out))
            write_contents(file, list(writer.fields).index("label"), contents, samples)
        header["num_samples"] = len(packed.kept)
        header["alloc_table_ptr"] = file.tell()
        file.write(allocations[np.argsort(allocations["ptr"])].tobytes())
        file.seek(writer.metadata_start)
        file.write(metadata.tobytes())
        file.seek(0)
        file.write(header.tobytes())
