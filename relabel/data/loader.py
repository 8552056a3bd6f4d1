"""FFCV's loader with what long runs need: any epoch on demand, errors that surface, threads that end.

Stock FFCV counts epochs itself, leaves the consumer waiting forever when its thread fails, and keeps the thread
of an epoch that was left early.
"""

import zlib
from collections.abc import Generator
from dataclasses import dataclass
from queue import Full, Queue
from threading import Event
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import numba
import numpy as np
import torch
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler

from ..errors import BadInput
from .beton import CUSTOM_FIELDS, column, read_header
from .names import Identity
from .order import near_sequential_order, random_order, share_of


@dataclass
class Batch:
    """What the network's step begins with, on the loader's device; B samples.

    The tensors are views of the loader's memory: they hold until the next batch is asked for, of this epoch or of the
    next one. Whatever the loader was not asked for is None.
    """

    images: torch.Tensor  # uint8 [B, S, S, 3] RGB, or float32, normalized
    labels: torch.Tensor  # int64 [B], the single labels
    label_maps: torch.Tensor | None = None  # int16 or int32 [B, 2, top_k, H, W], see ffcv_fields.label_map
    crop_boxes: torch.Tensor | None = None  # float32 [B, 4], (x1, y1, x2, y2): the part of the label map to pool, 0..1
    scores: str = "logits"  # what the label maps hold: "logits" or "probabilities"


_FIELDS = {"image": "images", "label": "labels", "label_map": "label_maps", "crop_box": "crop_boxes"}


class Loader(FFCVLoader):
    """An FFCV loader whose epochs are asked for by number, as `Batch`es.

    Its constructor has FFCV's own arguments besides these.

    Args:
        path: the `.beton`.
        num_classes: of the network; no label in the file may be outside.
        order: "random"; "near_sequential" for a file larger than memory; "sequential".
        num_workers: threads that decode; no more are started than numba may use (one a core).
        seed: of the order.
        rank, world_size: this process's number and how many there are. Each global batch, `world_size * batch_size`
            samples of the one order that all processes compute, is cut into their batches; without `drop_last` the
            last ones are cut evenly, so that no sample comes twice or not at all.
        labels: int64 `[num_samples]`, in place of the file's; -1: the sample is left out.
        keywords: as FFCV's Loader takes them: `batch_size`, `pipelines`, `os_cache`, `drop_last`. The pipelines of
            "image", "label", "label_map" and "crop_box" become the fields of `Batch`.

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
        labels: np.ndarray | None = None,
        **keywords: Any,
    ) -> None:
        threads = torch.get_num_threads()
        self.header = read_header(path)
        self.labels = column(self.header, "label").copy() if labels is None else labels
        self.samples = np.arange(len(self.labels)) if labels is None else np.flatnonzero(labels >= 0)
        self.label_map = self.header.handlers.get("label_map")
        self.transposed = False  # the crop boxes, see `Reading.pairing`
        self.memory: tuple[Any, Any] | None = None  # of the last epoch, for the next one: see _EpochIterator
        self.identity = Identity(None, np.arange(num_classes), [])  # see `aligned`
        self._check(path, num_classes, keywords["pipelines"])
        self._decoders = [_first(pipeline) for pipeline in keywords["pipelines"].values() if pipeline is not None]
        self._samplers = {decoder.crops for decoder in self._decoders if hasattr(decoder, "crops")}
        custom = CUSTOM_FIELDS if "label_map" in self.header.handlers else {}
        num_workers = min(num_workers, numba.config.NUMBA_NUM_THREADS)
        super().__init__(path, custom_fields=custom, num_workers=num_workers, seed=seed, **keywords)
        self.num_classes, self.order, self.rank, self.world_size = num_classes, order, rank, world_size
        if labels is not None:
            self._replace_labels(labels)
        torch.set_num_threads(threads)

    def _check(self, path, num_classes, pipelines):
        if len(self.samples) == 0:
            raise BadInput(f"{path}: no sample is left to load")
        labels = self.labels[self.samples]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise BadInput(f"{path}: holds labels {labels.min()} to {labels.max()}; model.num_classes is {num_classes}")
        label_map = self.label_map
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

    def data(self) -> dict[str, Any]:
        """What the samples of an epoch and their order depend on: how many, the file's metadata, `order`; its path."""
        crc = zlib.crc32(self.header.metadata.view(np.uint8))
        return {"samples": len(self.samples), "metadata_crc": crc, "order": self.order, "path": self.header.file_name}

    def set_image_size(self, size: int) -> None:
        """The side in pixels of the next epochs' images; nothing is compiled again."""
        for decoder in self._decoders:
            if hasattr(decoder, "output_size"):
                decoder.output_size = size

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch]:
        """The batches of one epoch from `first_batch` on; order and crops depend on the seed and `epoch` alone.

        Raises:
            Exception: whatever was raised while a batch was made, in the thread that makes them.
        """
        for sampler in self._samplers:
            sampler.epoch = epoch
        iterator = _EpochIterator(self, self.order_of(epoch)[first_batch * self.batch_size :])
        try:
            for tensors in iterator:
                yield self._batch(tensors)
        finally:
            iterator.close()

    def order_of(self, epoch: int) -> np.ndarray:
        """This process's samples of an epoch in the order in which they come, int64."""
        count = len(self.samples)
        if self.order == "random":
            order = random_order(count, self.seed, epoch)
        elif self.order == "near_sequential":
            image = column(self.header, "image")[self.samples]
            order = near_sequential_order(image["data_ptr"] // self.header.page_size, self.seed, epoch)
        else:
            order = np.arange(count)
        return share_of(self.samples[order], self.batch_size, self.rank, self.world_size, self.drop_last)

    def __len__(self) -> int:
        """Batches of an epoch, the same for every process but for the last one's size."""
        whole, rest = divmod(len(self.samples), self.batch_size * self.world_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Generator[Batch]:
        return self.epoch(0)

    def _batch(self, tensors: tuple[torch.Tensor, ...]) -> Batch:
        names = [_FIELDS[name] for name in self.pipeline_specs]
        found: dict[str, Any] = dict.fromkeys(_FIELDS.values()) | dict(zip(names, tensors, strict=True))
        if found["labels"] is not None:
            found["labels"] = found["labels"].view(-1)
        boxes = found["crop_boxes"]
        if boxes is not None and self.transposed:
            found["crop_boxes"] = boxes.view(-1, 2, 2).flip(2).reshape(-1, 4)
        return Batch(**found, scores=self.label_map.scores if self.label_map is not None else "logits")


def _first(pipeline):
    return pipeline.decoder if isinstance(pipeline, PipelineSpec) else pipeline[0]


class _EpochIterator(EpochIterator):
    """FFCV's thread, with failures handed to the consumer, an end to waiting once that has left, and safe copies.

    A slot is where a batch is decoded: on CUDA pinned memory, from which a stream of its own copies the batch to the
    slot's memory on the device. FFCV keeps a batch from being copied over one that is still in use, but not from being
    decoded over one whose copy has not begun (the CPU may be many steps ahead): that wait is added here. And the slots
    are the last epoch's where their sizes are the same, and the stream in whose order they are used.
    """

    closed, memory = False, None

    def __init__(self, loader: Loader, order: np.ndarray) -> None:
        super(EpochIterator, self).__init__(daemon=True)  # not FFCV's, which allocates and starts at once
        self.loader, self.metadata, self.slots = loader, loader.reader.metadata, loader.batches_ahead + 2
        batches = [order[i : i + loader.batch_size] for i in range(0, len(order), loader.batch_size)]
        self.iter_ixes = iter(batches)
        self.output_queue: Queue[Any] = Queue(loader.batches_ahead)
        self.terminate_event = Event()
        self.device = torch.cuda.current_device() if IS_CUDA else None
        self.current_stream: Any = torch.cuda.current_stream() if IS_CUDA else None
        self.cuda_streams: list[Any] = [torch.cuda.Stream() if IS_CUDA else None for _ in range(self.slots)]
        self.memory_context = loader.memory_manager.schedule_epoch(batches)
        self.memory_context.__enter__()
        self.storage_state = self.memory_context.state
        self.memory = self._take_memory()
        self.memory_allocations = self.memory[1]
        self.start()

    def _take_memory(self) -> tuple[Any, Any]:
        """`(what it is for, memory of each operation)`, as long as this epoch lasts no other's."""
        graph, sizes = self.loader.graph, (self.loader.batch_size, self.slots)
        wanted = graph.collect_requirements()[0], sizes, self.current_stream
        memory, self.loader.memory = self.loader.memory, None
        if memory is None or memory[0] != wanted:
            memory = None  # is freed before more is allocated
            memory = wanted, graph.allocate_memory(*sizes)
        return memory

    def run(self) -> None:
        try:
            if IS_CUDA:
                torch.cuda.set_device(self.device)  # a thread begins with GPU 0
                for stream in self.cuda_streams:  # what had the buffers' memory before may still be in use there
                    stream.wait_stream(self.current_stream)
            # Not Compiler.set_num_threads: that sets torch's threads too, MKL's for the whole process, at a moment
            # that no one knows; sums would then depend on it.
            Compiler.num_threads = self.loader.num_workers
            numba.set_num_threads(self.loader.num_workers)
            self._make_batches()
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _make_batches(self):
        slots = self.slots
        used, copied = [None] * slots, [None] * slots
        for number, indices in enumerate(self.iter_ixes):
            slot = number % slots
            if copied[slot]:
                copied[slot].synchronize()
            result = self.run_pipeline(number, indices, slot, used[slot])
            if IS_CUDA:
                copied[slot] = torch.cuda.Event(blocking=True)  # sleeps in `synchronize`: the decoders need the cores
                copied[slot].record(self.cuda_streams[slot])
            if not self._put((slot, result)):
                return
            if IS_CUDA:
                # The consumer has asked for batch number - batches_ahead: all work on the batch before that has
                # been submitted. Its slot must not be copied to before that work is done.
                event = torch.cuda.Event()
                event.record(self.current_stream)
                used[(slot - self.loader.batches_ahead - 1) % slots] = event

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
        """End the thread and wait for it and its copies; after that the memory may go, or be the next epoch's."""
        if self.closed:
            return
        self.closed = True
        self.terminate_event.set()
        if self.is_alive():
            self.join()
        if IS_CUDA:
            for stream in self.cuda_streams:
                stream.synchronize()
        self.memory_context.__exit__(None, None, None)
        self.loader.memory = self.memory
