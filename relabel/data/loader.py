"""FFCV's loader with what long runs need: any epoch on demand, errors that surface, threads that end, several files.

Stock FFCV counts epochs itself, leaves the consumer waiting forever when its thread fails, keeps the thread of an epoch
that was left early, and reads one file.
"""

import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from queue import Full, Queue
from threading import Event
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.graph import Graph

from ..errors import BadInput
from .dataset import open_dataset
from .names import Identity
from .order import near_sequential_order, random_order, share_of
from .storage import MappedFiles, PagedFiles


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


class Loader:
    """A loader of FFCV's operations, of one `.beton` or its shards, whose epochs are asked for by number, as `Batch`es.

    Args:
        path: the `.beton`, or its shards: a pattern, or several with commas between.
        num_classes: of the network; no label in the file may be outside.
        batch_size: samples of a batch in this process.
        pipelines: as FFCV's Loader takes them; those of "image", "label", "label_map" and "crop_box" become the fields
            of `Batch`. A field of the file that is not named has FFCV's default one, None: it is not read.
        order: "random"; "near_sequential" for a file larger than memory; "sequential".
        num_workers: threads that decode; no more are started than numba may use (one a core).
        os_cache: the file is mapped, and stays in the system's cache; else its pages are read as they are needed.
        drop_last: leave out the samples that are no whole batch.
        batches_ahead: batches that are made before they are asked for.
        seed: of the order.
        rank, world_size: this process's number and how many there are. Each global batch, `world_size * batch_size`
            samples of the one order that all processes compute, is cut into their batches; without `drop_last` the
            last ones are cut evenly, so that no sample comes twice or not at all.
        labels: int64 `[num_samples]`, in place of the file's; -1: the sample is left out.

    Raises:
        BadInput: see `open_dataset`; also a class outside `num_classes`, and label maps that are asked for in
            `pipelines` and not there.
    """

    def __init__(
        self,
        path: str,
        num_classes: int,
        batch_size: int,
        pipelines: Mapping[str, Any],
        order: str,
        num_workers: int,
        os_cache: bool = True,
        drop_last: bool = True,
        batches_ahead: int = 3,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        self.dataset = open_dataset(path)
        self.labels = self.dataset.column("label").copy() if labels is None else labels
        self.samples = np.arange(len(self.labels)) if labels is None else np.flatnonzero(labels >= 0)
        self.label_map: Any = self.dataset.handlers.get("label_map")
        self.transposed = False  # the crop boxes, see `Reading.pairing`
        self.memory: tuple[Any, Any] | None = None  # of the last epoch, for the next one: see _EpochIterator
        self.identity = Identity(None, np.arange(num_classes), [])  # see `aligned`
        self._check(path, num_classes, pipelines)
        self._decoders = [_first(pipeline) for pipeline in pipelines.values() if pipeline is not None]
        self._samplers = {decoder.crops for decoder in self._decoders if hasattr(decoder, "crops")}
        self.num_classes, self.batch_size, self.batches_ahead = num_classes, batch_size, batches_ahead
        self.order, self.seed, self.drop_last, self.rank, self.world_size = order, seed, drop_last, rank, world_size
        self.metadata = self.dataset.metadata
        if labels is not None:
            self._replace_labels(labels)
        self.num_workers = min(num_workers, numba.config.NUMBA_NUM_THREADS)
        # Not Compiler.set_num_threads: that sets torch's threads too, MKL's for the whole process, at a moment that no
        # one knows; sums would then depend on it.
        Compiler.num_threads = self.num_workers
        numba.set_num_threads(self.num_workers)
        self.storage = MappedFiles(self.dataset) if os_cache else PagedFiles(self.dataset)
        self.pipeline_specs = _specs(pipelines, self.dataset.field_names)
        numbers = {name: i for i, name in enumerate(self.dataset.field_names)}
        self.graph = Graph(
            self.pipeline_specs, self.dataset.handlers, numbers, self.metadata, self.storage.compile_reader()
        )
        self.code = self.graph.codegen_all(self.graph.collect_requirements()[1])

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
        self.metadata = self.metadata.copy()
        self.metadata[f"f{self.dataset.field_names.index('label')}"] = labels
        self.metadata.setflags(write=False)  # decoders are compiled for an array that is not writeable

    def data(self) -> dict[str, Any]:
        """What the samples of an epoch and their order depend on: how many, the files' metadata, `order`; their path.

        `names`, a digest of the names and labels in the files' order, is there where they say it.
        """
        crc = zlib.crc32(self.dataset.metadata.view(np.uint8).data)
        data = {"samples": len(self.samples), "metadata_crc": crc, "order": self.order, "path": self.dataset.name}
        contents = self.dataset.contents
        return data | ({"names": contents.part.samples} if contents and contents.part else {})

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
        order = self.order_of_all(epoch)
        return share_of(order, self.batch_size, self.rank, self.world_size, self.drop_last)

    def order_of_all(self, epoch: int) -> np.ndarray:
        """The samples of an epoch over all processes, in one order, int64 `[len(samples)]`."""
        count = len(self.samples)
        if self.order == "random":
            order = random_order(count, self.seed, epoch)
        elif self.order == "near_sequential":
            image = self.dataset.column("image")[self.samples]
            order = near_sequential_order(image["data_ptr"] // np.uint64(self.dataset.page_size), self.seed, epoch)
        else:
            order = np.arange(count)
        return self.samples[order]

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


def _specs(pipelines: Mapping[str, Any], field_names: Sequence[str]) -> dict[str, PipelineSpec]:
    """Each pipeline as FFCV's graph takes it, those of the file's fields first and in their order."""
    found = {}
    for name in [*field_names, *(name for name in pipelines if name not in field_names)]:
        pipeline = pipelines.get(name, PipelineSpec(name))
        if pipeline is not None:
            is_spec = isinstance(pipeline, PipelineSpec)
            found[name] = pipeline if is_spec else PipelineSpec(name, decoder=None, transforms=pipeline)
    return found


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
        self.loader, self.metadata, self.slots = loader, loader.metadata, loader.batches_ahead + 2
        batches = [order[i : i + loader.batch_size] for i in range(0, len(order), loader.batch_size)]
        self.iter_ixes = iter(batches)
        self.output_queue: Queue[Any] = Queue(loader.batches_ahead)
        self.terminate_event = Event()
        self.device = torch.cuda.current_device() if IS_CUDA else None
        self.current_stream: Any = torch.cuda.current_stream() if IS_CUDA else None
        self.cuda_streams: list[Any] = [torch.cuda.Stream() if IS_CUDA else None for _ in range(self.slots)]
        self.memory_context = loader.storage.schedule_epoch(batches)
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
