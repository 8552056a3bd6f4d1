"""Images to evaluate on, from a `.beton` or from a folder of class folders, behind one interface."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ..errors import BadInput
from .beton import labels_of
from .classes import class_indices
from .loader import Batch, Loader, Reading, validation_loader
from .order import share_of
from .sample_list import file_list_of, read_file_list


class FolderLoader:
    """A folder of class folders, read by torchvision; to be used as `Loader` is, for one pass in order.

    Args:
        path: the folder; corrupt images end the pass with torchvision's error.
        reading: the folders' names say which of its classes they are (`class_indices`).
        batch_size: samples of a batch over all processes.
        size: side of the center crop in pixels.
        crop_ratio: `size` over the side that the shorter side is resized to.
    """

    def __init__(self, path: str, reading: Reading, batch_size: int, size: int, crop_ratio: float) -> None:
        transform = v2.Compose(
            [v2.Resize(round(size / crop_ratio), antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        )
        try:
            folder = ImageFolder(path, transform)
        except FileNotFoundError as error:
            raise BadInput(f"{path}: {error}") from None
        index = class_indices(folder.classes, reading.num_classes, path)
        self.num_classes, self.batch_size, self.num_workers = (
            reading.num_classes,
            -(-batch_size // reading.processes.world_size),
            reading.num_workers,
        )
        self.labels = index[[label for _, label in folder.samples]]
        self.files = [str(Path(file).relative_to(path)) for file, _ in folder.samples]
        folder.target_transform = partial(_lookup, index)
        self._folder, self._processes = folder, reading.processes

    def order_of(self, epoch: int) -> np.ndarray:
        order, processes = np.arange(len(self.labels)), self._processes
        return share_of(order, self.batch_size, processes.rank, processes.world_size, drop_last=False)

    def __len__(self) -> int:
        return -(-len(self.order_of(0)) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of images uint8 `[B, S, S, 3]` and labels int64 `[B]`, on the CPU."""
        subset = torch.utils.data.Subset(self._folder, self.order_of(epoch).tolist())
        for images, labels in torch.utils.data.DataLoader(subset, self.batch_size, num_workers=self.num_workers):
            yield Batch(images.permute(0, 2, 3, 1), labels)


def _lookup(index, label):
    return int(index[label])


def evaluation_loader(
    path: str, reading: Reading, batch_size: int, image_size: int, crop_ratio: float
) -> tuple[Loader | FolderLoader, list[str]]:
    """A loader of the center crops of `path` in order, and the samples' file names (empty: not known).

    The labels of a `.beton` that was packed from ImageNetV2's or a variant's folders are put right by the folders'
    names, which stand in the list beside it.

    Args:
        path: a `.beton`, or a folder of class folders.
        reading, batch_size, image_size, crop_ratio: as for `validation_loader`.

    Raises:
        BadInput: as `Loader`, `FolderLoader` and `class_indices` do.
    """
    if Path(path).is_dir():
        loader = FolderLoader(path, reading, batch_size, image_size, crop_ratio)
        return loader, loader.files
    labels = labels_of(path)
    files: list[str] = []
    if file_list_of(path).exists():
        classes, files = read_file_list(path, len(labels))
        labels = class_indices(classes, reading.num_classes, path)[labels]
    return validation_loader(path, reading, batch_size, image_size, crop_ratio, labels), files
