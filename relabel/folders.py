"""Images to evaluate on, from a `.beton` or from a folder of class folders, behind one interface."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv_fields import CenterCropDecoder
from ffcv.fields.decoders import IntDecoder
from ffcv.transforms import ToTensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from .beton import labels_of
from .distributed import Processes
from .errors import BadInput
from .file_list import file_list_of, read_file_list
from .label_sets import class_indices
from .loading import Loader
from .order import share_of


class FolderLoader:
    """A folder of class folders, read by torchvision; to be used as `Loader` is, for one pass in order.

    Args:
        path: the folder; corrupt images end the pass with torchvision's error.
        num_classes: of the network; the folders' names say which of them they are (`class_indices`).
        size: side of the centre crop in pixels.
        crop_ratio: `size` over the side that the shorter side is resized to.
    """

    def __init__(
        self, path: str, num_classes: int, size: int, crop_ratio: float, batch_size: int, num_workers: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        transform = v2.Compose(
            [v2.Resize(round(size / crop_ratio), antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        )
        try:
            folder = ImageFolder(path, transform)
        except FileNotFoundError as error:
            raise BadInput(f"{path}: {error}") from None
        index = class_indices(folder.classes, num_classes, path)
        self.num_classes, self.batch_size, self.num_workers = num_classes, batch_size, num_workers
        self.labels = index[[label for _, label in folder.samples]]
        self.files = [str(Path(file).relative_to(path)) for file, _ in folder.samples]
        folder.target_transform = partial(_lookup, index)
        self._folder, self._share = folder, partial(share_of, rank=rank, world_size=world_size, drop_last=False)

    def order_of(self, epoch: int) -> np.ndarray:
        return self._share(np.arange(len(self.labels)), self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.order_of(0)) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images uint8 `[B, S, S, 3]` and labels int64 `[B, 1]`."""
        subset = torch.utils.data.Subset(self._folder, self.order_of(epoch).tolist())
        for images, labels in torch.utils.data.DataLoader(subset, self.batch_size, num_workers=self.num_workers):
            yield images.permute(0, 2, 3, 1), labels[:, None]


def _lookup(index, label):
    return int(index[label])


def images_of(
    path: str, num_classes: int, size: int, crop_ratio: float, batch_size: int, num_workers: int, processes: Processes
) -> tuple[Loader | FolderLoader, list[str]]:
    """A loader of the centre crops of `path` in order, and the samples' file names (empty: not known).

    The labels of a `.beton` that was packed from ImageNetV2's or a variant's folders are put right by the folders'
    names, which stand in the list beside it.

    Raises:
        BadInput: as `Loader`, `FolderLoader` and `class_indices` do.
    """
    common: dict[str, Any] = {"num_classes": num_classes, "batch_size": batch_size, "num_workers": num_workers}
    common |= {"rank": processes.rank, "world_size": processes.world_size}
    if Path(path).is_dir():
        loader = FolderLoader(path, size=size, crop_ratio=crop_ratio, **common)
        return loader, loader.files
    labels = labels_of(path)
    files: list[str] = []
    if file_list_of(path).exists():
        classes, files = read_file_list(path, len(labels))
        labels = class_indices(classes, num_classes, path)[labels]
    pipelines = {
        "image": [CenterCropDecoder(size, crop_ratio), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
        "label_map": None,
    }
    return Loader(path, order="sequential", drop_last=False, labels=labels, pipelines=pipelines, **common), files
