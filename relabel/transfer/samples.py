"""Images and their targets as torchvision's detectors take them, read by worker processes, in an order of our own."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..data.order import random_order, share_of
from ..decoding import decoding
from ..errors import BadInput, BadSample
from ..processes import Processes
from .coco import CocoImage, CocoSet

ORIENTATION = 0x0112  # EXIF's tag; 1: upright
Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]  # image, target


def read_pixels(image: CocoImage) -> torch.Tensor:
    """An image's pixels, uint8 `[3, H, W]` RGB, as its annotations see it.

    COCO's annotations are of the pixels as they are stored. Where EXIF says that these lie on their side, and it is the
    upright image that has the annotations' size, they are turned.

    Raises:
        BadSample: it cannot be decoded, or is of another size than its entry says.
    """
    with decoding(image.file), Image.open(image.file) as opened:
        stored, turned = opened.size, opened.getexif().get(ORIENTATION, 1) != 1
        upright = ImageOps.exif_transpose(opened) if turned else opened
        use_upright = upright.size != stored and upright.size == (image.width, image.height)
        pixels = np.array((upright if use_upright else opened).convert("RGB"))
    if pixels.shape[:2] != (image.height, image.width):
        raise BadSample(
            image.file,
            f"is {pixels.shape[1]} x {pixels.shape[0]}; its entry (id {image.id}) says {image.width} x {image.height}: "
            "annotations of another version of the image would not fit",
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_masks(image: CocoImage) -> torch.Tensor:
    """The masks of an image's boxes, uint8 `[N, H, W]`, 1 where the object is.

    Raises:
        BadSample: run lengths that are none.
    """
    from pycocotools import mask as coco_mask

    size = (image.height, image.width)
    masks = np.zeros((len(image.labels), *size), np.uint8)
    for i, shape in enumerate(json.loads(image.segmentations)):
        try:
            if isinstance(shape, dict):
                rle = coco_mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
            else:
                rle = coco_mask.merge(coco_mask.frPyObjects(shape, *size))
            masks[i] = coco_mask.decode(rle)
        except (ValueError, TypeError) as error:
            raise BadSample(
                image.file, f"the segmentation of annotation {image.annotations[i]} cannot be read ({error})"
            ) from None
    return torch.from_numpy(masks)


@dataclass(frozen=True)
class Flip:
    """Whether an image is flipped in an epoch: a pure function of seed, epoch and image."""

    prob: float
    seed: int
    epoch: int

    def of(self, image: CocoImage) -> bool:
        return np.random.default_rng([self.seed, self.epoch, image.id]).random() < self.prob


def read_sample(image: CocoImage, masks: bool, flip: bool) -> Sample:
    """An image, uint8 `[3, H, W]`, and its target: `boxes` float32 `[N, 4]` in pixels, `labels` int64 `[N]`, with
    `masks` uint8 `[N, H, W]`.

    Args:
        flip: mirror all of them from left to right.

    Raises:
        BadSample: as `read_pixels` and `read_masks` do.
    """
    pixels, boxes = read_pixels(image), torch.from_numpy(image.boxes.copy())
    target = {"boxes": boxes, "labels": torch.from_numpy(image.labels)}
    if masks:
        target["masks"] = read_masks(image)
    if flip:
        pixels = pixels.flip(2)
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        if masks:
            target["masks"] = target["masks"].flip(2)
    return pixels, target


class Samples(Dataset):
    """Some images of a set; a BadSample for one that cannot be read.

    Args:
        images: places in `coco.images`.
        flip: None: no image is, and it comes without target.
    """

    def __init__(self, coco: CocoSet, images: Sequence[int], masks: bool, flip: Flip | None = None) -> None:
        self.images, self.masks, self.flip = [coco.images[i] for i in images], masks, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | BadSample:
        image = self.images[index]
        try:
            if self.flip is None:
                return read_pixels(image), {}
            return read_sample(image, self.masks, self.flip.of(image))
        except BadSample as problem:  # handed on: torch would make another error of one that a worker raises
            return problem


def batches_of(samples: Samples, batch_size: int, num_workers: int) -> Generator[list[Sample]]:
    """Batches of `samples` in their order.

    Raises:
        BadSample: one cannot be read.
    """
    for batch in DataLoader(samples, batch_size, num_workers=num_workers, collate_fn=list):
        for sample in batch:
            if isinstance(sample, BadSample):
                raise sample
        yield batch


class TrainingSamples:
    """Batches of one process's share of a set's annotated images, in random order.

    Args:
        batch_size: images of a step, over all processes.
        made_of: what a run cannot change halfway, for its checkpoints.
    """

    def __init__(
        self, coco: CocoSet, masks: bool, batch_size: int, flip_prob: float, seed: int, num_workers: int,
        processes: Processes, made_of: dict[str, Any],
    ) -> None:  # fmt: skip
        self._coco, self._images, self._masks = coco, coco.annotated, masks
        self._share, self._processes = processes.share(batch_size, 1), processes
        self._flip_prob, self._seed, self._num_workers, self._made_of = flip_prob, seed, num_workers, made_of
        self.steps = len(self._images) // batch_size
        if not self.steps:
            raise BadInput(
                f"{coco.file}: has {len(self._images)} images to train on; optim.batch_size is {batch_size}: lower it"
            )

    def data(self) -> dict[str, Any]:
        """What is kept in a checkpoint about the data."""
        return self._made_of

    def order_of(self, epoch: int) -> np.ndarray:
        """The ids of this process's images in an epoch, int64 `[steps * share]`."""
        return np.array([self._coco.images[i].id for i in self._places(epoch)])

    def _places(self, epoch):
        order = self._images[random_order(len(self._images), self._seed, epoch)]
        return share_of(order, self._share, self._processes.rank, self._processes.world_size, drop_last=True)

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[list[Sample]]:
        """The batches of an epoch, from the `first_batch`-th on."""
        flip = Flip(self._flip_prob, self._seed, epoch)
        samples = Samples(self._coco, self._places(epoch)[first_batch * self._share :].tolist(), self._masks, flip)
        yield from batches_of(samples, self._share, self._num_workers)


def on(device: torch.device, batch: list[Sample]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images, float32 in 0..1 (the detector normalizes them), and targets of a batch, on `device`."""
    images = [image.to(device, non_blocking=True) / 255 for image, _ in batch]
    return images, [{key: value.to(device, non_blocking=True) for key, value in target.items()} for _, target in batch]
