"""FFCV's loader with what long runs need: any epoch on demand, errors that surface, threads that end.

Stock FFCV counts epochs itself, leaves the consumer waiting forever when its thread fails, and keeps the thread
of an epoch that was left early.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Full

import numba
import numpy as np
import torch
from ffcv_fields import CropSampler
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
from ffcv.pipeline.compiler import Compiler

from .beton import CUSTOM_FIELDS, column, read_header
from .commands import pack
from .distributed import Processes, started_by_torchrun
from .errors import BadInput
from .order import near_sequential_order, random_order, share_of


def use_all_cores(processes: int = 1) -> None:
    """Give torch and numba their cores back: importing FFCV leaves both with one thread.

    `OMP_NUM_THREADS` (which torchrun sets) is respected for torch.

    Args:
        processes: among which this machine's cores are divided.
    """
    cores = max(1, numba.config.NUMBA_NUM_THREADS // processes)
    numba.set_num_threads(cores)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cores))


def decoding_threads(asked: int, processes: Processes) -> int:
    """How many threads of this process decode: its share of the machine's `asked`.

    0 stands for all cores, and on the CPU for one: the network needs the cores there, and OpenMP's threads, once there
    are more of them than cores, sleep instead of waiting awake (two in the place of one cost a third of the speed).
    """
    threads = asked or (1 if processes.device.type == "cpu" else os.cpu_count() or 1)
    return -(-threads // processes.local_size)


def packed_once(split: str, path: str, data_path: str, label_map_dir: str) -> str:
    """The `.beton` to use: `path`, or one that is packed now from `data_path/split` if it is not there yet.

    Args:
        split: "train" or "val".
        path: the file; empty: beside the images, `data_path/SPLIT.beton` (`SPLIT_relabel.beton` with label maps).
        data_path: the folder of `train/` and `val/`; empty: nothing is packed.
        label_map_dir: for `write_datasets.py`; empty: none.

    Raises:
        BadInput: neither is given, or packing fails, or is needed by several processes at once.
    """
    if not path and not data_path:
        raise BadInput(f"data.{split}_dataset is not given: the .beton that write_datasets.py wrote")
    path = path or f"{data_path}/{split}{'_relabel' if label_map_dir else ''}.beton"
    if not data_path or Path(path).exists():
        return path
    if started_by_torchrun():
        raise BadInput(f"{path}: no such file; pack it first with write_datasets.py, or start with one process")
    pack(f"{data_path}/{split}", label_map_dir, path)
    return path


class Loader(FFCVLoader):
    """An FFCV loader whose epochs are asked for by number.

    Args:
        path: the `.beton`.
        num_classes: of the network; no label in the file may be outside.
        order: "random"; "near_sequential" for a file larger than memory; "sequential".
        seed: of the order.
        rank, world_size: this process's number and how many there are. Each global batch, `world_size * batch_size`
            samples of the one order that all processes compute, is cut into their batches; without `drop_last` the
            last ones are cut evenly, so that no sample comes twice or not at all.
        num_workers: threads that decode; no more are started than numba may use (one a core).
        finish: applied to each batch in the loader's own thread, say to pool label maps there.
        crops: the sampler of this loader's decoders, if any; its epoch follows the loader's.
        labels: int64 `[num_samples]`, in place of the file's; -1: the sample is left out.
        keywords: as FFCV's Loader takes them.

    Raises:
        BadInput: see `read_header`; also a class outside `num_classes`, and label maps that are asked for in
            `pipelines` and not there.
    """

    def __init__(
        self,
        path: str,
        num_classes: int,
        order: str,
        num_workers: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        finish: Callable[[tuple], tuple] | None = None,
        crops: CropSampler | None = None,
        labels: np.ndarray | None = None,
        **keywords,
    ) -> None:
        threads = torch.get_num_threads()
        self.header = read_header(path)
        self.labels = column(self.header, "label").copy()
        self.kept = np.arange(len(self.labels))
        if labels is not None:
            self.kept, self.labels = np.flatnonzero(labels >= 0), labels
        self._check(path, num_classes, keywords["pipelines"])
        custom = CUSTOM_FIELDS if "label_map" in self.header.handlers else {}
        num_workers = min(num_workers, numba.config.NUMBA_NUM_THREADS)
        super().__init__(path, custom_fields=custom, num_workers=num_workers, seed=seed, **keywords)
        self.num_classes = num_classes
        self.order, self.rank, self.world_size, self.finish = order, rank, world_size, finish
        self.crops = crops
        if labels is not None:
            self._replace_labels(labels)
        torch.set_num_threads(threads)

    def _check(self, path, num_classes, pipelines):
        if len(self.kept) == 0:
            raise BadInput(f"{path}: no sample is left to load")
        labels = self.labels[self.kept]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise BadInput(f"{path}: holds labels {labels.min()} to {labels.max()}; model.num_classes is {num_classes}")
        label_map = self.header.handlers.get("label_map")
        if pipelines.get("label_map") is None:
            return
        if label_map is None:
            raise BadInput(
                f"{path}: holds no label maps; pack them with write_datasets.py --cfg.label_map_dir=..., "
                "or train on single labels with --data.relabel.use=False"
            )
        if label_map.num_classes > num_classes:
            raise BadInput(
                f"{path}: its label maps name {label_map.num_classes} classes; model.num_classes is {num_classes}"
            )

    def _replace_labels(self, labels):
        metadata = self.reader.metadata  # FFCV's decoders hold views of it, compiled for an array that is not writeable
        metadata.setflags(write=True)
        column(self.reader, "label")[:] = labels
        metadata.setflags(write=False)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """The batches of one epoch from `first_batch` on; order and crops depend on the seed and `epoch` alone.

        Raises:
            Exception: whatever was raised while a batch was made, in the thread that makes them.
        """
        if self.crops is not None:
            self.crops.epoch = epoch
        iterator = _EpochIterator(self, self.order_of(epoch)[first_batch * self.batch_size :])
        try:
            yield from iterator
        finally:
            iterator.close()
            iterator.join()

    def order_of(self, epoch: int) -> np.ndarray:
        """This process's samples of an epoch in the order in which they come, int64."""
        count = len(self.kept)
        if self.order == "random":
            order = random_order(count, self.seed, epoch)
        elif self.order == "near_sequential":
            image = column(self.header, "image")[self.kept]
            order = near_sequential_order(image["data_ptr"] // self.header.page_size, self.seed, epoch)
        else:
            order = np.arange(count)
        return share_of(self.kept[order], self.batch_size, self.rank, self.world_size, self.drop_last)

    def __len__(self) -> int:
        """Batches of an epoch, the same for every process but for the last one's size."""
        whole, rest = divmod(len(self.kept), self.batch_size * self.world_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return self.epoch(0)


class _EpochIterator(EpochIterator):
    """FFCV's thread, with failures handed to the consumer and an end to waiting once that has left."""

    closed: bool

    def run(self) -> None:
        try:
            # Not Compiler.set_num_threads: that sets torch's threads too, MKL's for the whole process, at a moment
            # that no one knows; sums would then depend on it.
            Compiler.num_threads = self.loader.num_workers
            numba.set_num_threads(self.loader.num_workers)
            self._make_batches()
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _make_batches(self):
        slots = self.loader.batches_ahead + 2
        events = [None] * slots
        for number, indices in enumerate(self.iter_ixes):
            slot = number % slots
            result = self.run_pipeline(number, indices, slot, events[slot])
            if self.loader.finish is not None:
                result = self.loader.finish(result)
            if not self._put((slot, result)):
                return
            if IS_CUDA:
                # The consumer has asked for batch number - batches_ahead: all work on the batch before that has
                # been submitted. Its slot must not be written before that work is done.
                event = torch.cuda.Event()
                event.record(self.current_stream)
                events[(slot - self.loader.batches_ahead - 1) % slots] = event

    def _put(self, item):
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                pass
        return False

    def __next__(self):
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        slot, result = item
        if IS_CUDA:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return result

    def close(self) -> None:
        self.terminate_event.set()
        if not self.closed:
            self.closed = True
            self.memory_context.__exit__(None, None, None)
