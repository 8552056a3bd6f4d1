"""The loaders of training and validation, and whose classes their labels are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ffcv_fields import CenterCropDecoder, CropBoxDecoder, CropSampler, LabelMapDecoder, RandomResizedCropDecoder
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import ToDevice, ToTensor
from ffcv_fields.cuda import import_cupy

from ..errors import BadInput
from ..normalization import IMAGENET_MEAN, IMAGENET_STD
from ..processes import Processes, hide_progress
from .classes import align
from .dataset import Dataset, open_dataset
from .loader import Loader
from .names import Identity
from .order import classes_in_a_batch, random_order

STATISTICS = (IMAGENET_MEAN, IMAGENET_STD)
Pipelines = dict[str, Any]  # name -> a list of operations, a PipelineSpec, or None: not read


@dataclass(frozen=True)
class Reading:
    """How a `.beton` is read, for training as for validation.

    Args:
        num_classes: of the network; no label in the file may be outside.
        processes: among which each batch is shared, and this one's device.
        num_workers: threads that decode in this process.
        in_memory: the file fits in memory; else training reads it near-sequentially, and nothing is cached.
        decode: "fast" or "exact", as in `ffcv_fields.RandomResizedCropDecoder`.
        classes: the network's class list; None: not known (see `classes`).
        pairing: which part of its label map belongs to a crop. "image": the crop's own region. "official": the region
            that the official code pools: it takes `(y1, x1, y2, x2)` for the box, so of maps that were stored rows
            first it pools the transposed region, of maps that were stored columns first the crop's own.
    """

    num_classes: int
    processes: Processes
    num_workers: int
    in_memory: bool = True
    decode: str = "fast"
    classes: tuple[str, ...] | None = None
    pairing: str = "image"

    def statistics(self, normalize: bool = True) -> tuple | None:
        """Mean and standard deviation for a decoder that normalizes; on a GPU that is done after the transfer."""
        on_cpu = self.processes.device.type == "cpu"
        return STATISTICS if normalize and on_cpu and self.decode == "fast" else None

    def to_device(self) -> list:
        device = self.processes.device
        return [ToTensor(), *([ToDevice(device, non_blocking=True)] if device.type == "cuda" else [])]

    def loader(self, path: str, batch_size: int, pipelines: Pipelines, **keywords: Any) -> Loader:
        """A `Loader` of this process's `batch_size` samples of each batch."""
        return Loader(
            path, self.num_classes, batch_size, pipelines, num_workers=self.num_workers,
            rank=self.processes.rank, world_size=self.processes.world_size, os_cache=self.in_memory, **keywords,
        )  # fmt: skip


def training_loader(
    path: str,
    reading: Reading,
    batch_size: int,
    crops: CropSampler,
    image_size: int,
    *,
    label_maps: bool = True,
    normalize: bool = True,
    labels: np.ndarray | None = None,
) -> Loader:
    """Random crops in random order, with label maps and crop boxes if asked for; raises as `Loader`.

    Raises BadInput also where CuPy is missing: pooling and augmentation run on the GPU by its help.

    Args:
        path: the `.beton`, or its shards: a pattern, or several with commas between.
        batch_size: samples of a batch in this process.
        crops: of images and crop boxes; its seed is that of the order too.
        image_size: side of the crop in pixels; `Loader.set_image_size` changes it between epochs.
        label_maps: hand out label maps and crop boxes.
        normalize: on the CPU the decoder normalizes; False where augmentation comes first.
        labels: int64 `[num_samples]`, in place of the file's; -1 leaves a sample out.
    """
    if reading.processes.device.type == "cuda" and (label_maps or not normalize):
        try:
            import_cupy()
        except ImportError as error:
            raise BadInput(str(error)) from None
    image = RandomResizedCropDecoder(image_size, crops, reading.decode, reading.statistics(normalize))
    pipelines: Pipelines = {"image": [image, *reading.to_device()], "label": [IntDecoder(), *reading.to_device()]}
    pipelines["label_map"] = [LabelMapDecoder(), *reading.to_device()] if label_maps else None
    if label_maps:
        pipelines["crop_box"] = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=reading.to_device())
    order = "random" if reading.in_memory else "near_sequential"
    loader = reading.loader(path, batch_size, pipelines, order=order, seed=crops.seed, labels=labels, drop_last=True)
    if not reading.in_memory and (line := _sorted_by_class(loader)):
        reading.processes.say(line)
    loader.transposed = label_maps and reading.pairing == "official" and loader.label_map.imported_axis_order == "yx"
    return loader


def _sorted_by_class(loader: Loader) -> str:
    """A line where near-sequential reading mixes too few classes for batch norm; else empty."""
    batch_size, shuffled = loader.batch_size * loader.world_size, random_order(len(loader.samples), loader.seed, 0)
    near = classes_in_a_batch(loader.labels, loader.order_of_all(0), batch_size)
    best = classes_in_a_batch(loader.labels, loader.samples[shuffled], batch_size)
    if not near < best / 2:
        return ""
    return (
        f"WARNING: {loader.dataset.name} is sorted by class: read near-sequentially, a batch of {batch_size:,} has "
        f"{near:.0f} classes, in a random order {best:.0f}; pack it again with write_datasets.py, which mixes them, or "
        "give --data.in_memory=True"
    )


def check_batch(loader: Loader, batch_size: int, accumulate: int) -> Loader:
    """A training loader that has samples for one batch of `batch_size` over all processes.

    Raises:
        BadInput: it has not; names the greatest batch that it has samples for.
    """
    if len(loader) >= accumulate:
        return loader
    count, parts = len(loader.samples), loader.world_size * accumulate
    works = f"{count // parts * parts} is the most" if count >= parts else "start fewer processes"
    raise BadInput(
        f"{loader.dataset.name}: its {count:,} samples are fewer than optim.batch_size={batch_size}, of which only "
        f"whole batches are trained on; {works}"
    )


def validation_loader(path: str, reading: Reading, batch_size: int, image_size: int, crop_ratio: float) -> Loader:
    """Center crops in the file's order, each sample once over all processes; arguments as in `training_loader`.

    Labels are the network's: the file's classes are aligned with `reading.classes` by name.

    Args:
        batch_size: samples of a batch over all processes.
        crop_ratio: side of the crop, share of the image's shorter side.
    """
    image = CenterCropDecoder(image_size, crop_ratio, reading.decode, reading.statistics())
    pipelines: Pipelines = {"image": [image, *reading.to_device()], "label": [IntDecoder(), *reading.to_device()]}
    pipelines["label_map"] = None
    share = -(-batch_size // reading.processes.world_size)
    dataset = open_dataset(path)
    identity = aligned(dataset, reading)
    labels = identity.index[dataset.column("label")]
    loader = reading.loader(path, share, pipelines, order="sequential", labels=labels, drop_last=False)
    loader.identity = identity
    return loader


def classes_of(path: str, num_classes: int) -> tuple[str, ...] | None:
    """The class list of a training `.beton`; None: not known. A line says where the network has outputs to spare.

    Raises:
        BadInput: there are more classes than `num_classes`.
    """
    contents = open_dataset(path).contents
    if contents is None:
        return None
    if len(contents.classes) > num_classes:
        raise BadInput(f"{path}: has {len(contents.classes):,} classes; model.num_classes is {num_classes}")
    if len(contents.classes) < num_classes and not hide_progress():
        print(f"{path}: has {len(contents.classes):,} classes; the network's other outputs are not used")
    return contents.classes


def aligned(dataset: Dataset, reading: Reading) -> Identity:
    """How a data set's classes are the network's, and its samples' names; a line says what was done.

    Raises:
        BadInput: see `align`.
    """
    contents, samples, labels = dataset.contents, dataset.sample_list(), dataset.column("label")
    index, line = align(contents.classes if contents else None, reading.classes, reading.num_classes, dataset.name)
    if line:
        reading.processes.say(line)
    if labels.min() < 0 or labels.max() >= len(index):
        raise BadInput(f"{dataset.name}: holds labels {labels.min()} to {labels.max()}, of {len(index):,} classes")
    names = list(samples.names) if samples else [f"sample {i}" for i in range(len(labels))]
    return Identity(contents.classes if contents else None, index, names, reading.classes)
