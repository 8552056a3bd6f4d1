"""What decoders read from: the files of a data set in one space of addresses, mapped, or page by page.

FFCV's readers take an address in one file. Here the files of a `Dataset` follow one another, each from a multiple of
the page size on, so that the same code reads any number of them. Of the two kinds of storage FFCV asks the same:
`compile_reader` once, `schedule_epoch` for each epoch; and of what that returns `state`, which the compiled reader is
given, and `start_batch` before each batch.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from queue import Queue
from threading import Event, Thread
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import numpy as np
from ffcv.memory_managers.process_cache.schedule import compute_schedule
from ffcv.pipeline.compiler import Compiler

from ..errors import BadInput
from .dataset import Dataset

PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000  # Linux's, which Python's mmap does not name
READERS = 12  # threads that read pages: a disk is fast when much is asked of it at once


class MappedFiles:
    """The files mapped into memory: what was read once stays in the system's cache while there is room."""

    def __init__(self, dataset: Dataset) -> None:
        self.state = map_files(dataset), dataset.addresses, dataset.sizes

    def compile_reader(self) -> Callable:
        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        return Compiler.compile(read)

    def schedule_epoch(self, batches: Sequence[np.ndarray]) -> "MappedFiles":
        return self

    def __enter__(self) -> "MappedFiles":
        return self

    def start_batch(self, batch: int) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


class PagedFiles:
    """Pages are read before their samples' batches, and forgotten after the last: for files larger than memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, pages = dataset, []
        for name in dataset.field_names:
            column = dataset.column(name)
            if column.dtype.names and "data_ptr" in column.dtype.names:
                page = (column["data_ptr"] // np.uint64(dataset.page_size)).astype(np.int64)
                absent = column["present"] != 1 if "present" in column.dtype.names else np.zeros(len(page), bool)
                pages.append(np.where(absent, -1, page))
        self.pages = np.stack(pages, 1) if pages else np.full((dataset.num_samples, 1), -1)  # -1: none

    def compile_reader(self) -> Callable:
        shift = np.uint64(int(self.dataset.page_size).bit_length() - 1)

        def read(address, state):
            size = state[2][np.searchsorted(state[1], address)]
            page = address >> shift
            offset = address - (page << shift)
            return state[0][state[3][page], offset : offset + size]

        return Compiler.compile(read)

    def schedule_epoch(self, batches: Sequence[np.ndarray]) -> "_PagedEpoch":
        return _PagedEpoch(self, batches)


class _PagedEpoch:
    """The pages of an epoch's batches, in as few places of memory as hold those that are needed at once."""

    def __init__(self, files: PagedFiles, batches: Sequence[np.ndarray]) -> None:
        needed = [[page for page in np.unique(files.pages[batch]).tolist() if page >= 0] for batch in batches]
        self._schedule, self._dataset = compute_schedule(needed), files.dataset
        slots, page_size = self._schedule.page_to_slot, int(files.dataset.page_size)
        self._memory = np.empty((max(self._schedule.num_slots, 1), page_size), np.uint8)
        slot_of = np.zeros(max(slots, default=0) + 1, np.uint32)
        slot_of[list(slots)] = list(slots.values())
        self.state = self._memory, files.dataset.addresses, files.dataset.sizes, slot_of
        self._wanted: Queue[Any] = Queue()
        self._done: Queue[Any] = Queue()
        self._loaded: set[int] = set()
        self._left = Event()
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(READERS)]

    def __enter__(self) -> "_PagedEpoch":
        for thread in self._threads:
            thread.start()
        return self

    def start_batch(self, batch: int) -> None:
        """Wait until the batch's pages are there; the next batches' are asked for.

        Raises:
            BadInput: a page cannot be read, or its file has become shorter.
        """
        for page in self._schedule.can_prefetch_at[batch]:
            self._wanted.put(page)
        waiting = self._schedule.entering_at[batch] - self._loaded
        while waiting:
            page, error = self._done.get()
            if error:
                raise error
            self._loaded.add(page)
            waiting.discard(page)

    def __exit__(self, *exception: Any) -> None:
        self._left.set()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self):
        while (page := self._wanted.get()) is not None:
            if self._left.is_set():
                continue
            try:
                self._read(page, self._memory[self._schedule.page_to_slot[page]])
                self._done.put((page, None))
            except BaseException as error:
                self._done.put((page, error))

    def _read(self, page: int, place: np.ndarray) -> None:
        address = page * int(self._dataset.page_size)
        number = int(np.searchsorted(self._dataset.starts, address, "right")) - 1
        path, at = self._dataset.headers[number].file_name, address - int(self._dataset.starts[number])
        rest = place.data[: min(len(place), self._dataset.lengths[number] - at)]
        try:
            with open(path, "rb", buffering=0) as file:
                while rest:
                    count = os.preadv(file.fileno(), [rest], at)
                    if count == 0:
                        raise BadInput(f"{path}: has become shorter while it is read; write or copy it again")
                    rest, at = rest[count:], at + count
        except OSError as error:
            raise BadInput(f"{path}: cannot be read at byte {at:,} ({error.strerror})") from None


def map_files(dataset: Dataset) -> np.ndarray:
    """The bytes of a data set's files at their addresses, uint8, not writeable; nothing is to be read between them.

    Raises:
        BadInput: a file cannot be mapped.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

    def mapped(at, size, protection, flags, descriptor, name):
        found = libc.mmap(at, size, protection, flags, descriptor, 0)
        if found == ctypes.c_void_p(-1).value:
            why = os.strerror(ctypes.get_errno())
            raise BadInput(f"{name}: {size:,} bytes cannot be mapped into memory ({why}); see ulimit -v")
        return found

    total = int(dataset.starts[-1]) + dataset.lengths[-1]
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    base = mapped(None, total, PROT_NONE, reserve, -1, dataset.name)
    buffer = (ctypes.c_uint8 * total).from_address(base)
    weakref.finalize(buffer, libc.munmap, base, total)
    for header, start, size in zip(dataset.headers, dataset.starts.tolist(), dataset.lengths, strict=True):
        with open(header.file_name, "rb") as file:
            if os.fstat(file.fileno()).st_size < size:
                raise BadInput(f"{header.file_name}: has become shorter; write or copy it again")
            flags = mmap.MAP_SHARED | MAP_FIXED
            mapped(base + start, size, mmap.PROT_READ, flags, file.fileno(), header.file_name)
    memory = np.ctypeslib.as_array(buffer)
    memory.setflags(write=False)
    return memory
