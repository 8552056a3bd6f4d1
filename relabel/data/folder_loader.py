"""Images to evaluate on, from a `.beton` or from a folder of class folders, behind one interface."""

from collections.abc import Generator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..decoding import decoding
from ..errors import BadSample
from ..sources.base import ImageSource
from ..sources.opening import KINDS, open_source
from .classes import align
from .loader import Batch, Loader
from .names import Identity
from .order import share_of
from .reading import Reading, validation_loader


class FolderLoader:
    """A folder of class folders, read by torchvision; to be used as `Loader` is, for one pass in order.

    Args:
        path: the folder; its classes are aligned with those of the network by name, which a line says.
        reading: what the network's classes are, the processes and the workers.
        batch_size: samples of a batch over all processes.
        size: side of the center crop in pixels.
        crop_ratio: `size` over the side that the shorter side is resized to.

    Raises:
        BadInput: a class that the network does not know; while iterating: an image that cannot be decoded.
    """

    def __init__(self, path: str, reading: Reading, batch_size: int, size: int, crop_ratio: float) -> None:
        source = open_source(path)
        index, line = align(source.classes, reading.classes, reading.num_classes, path)
        for said in [*source.remarks, *([line] if line else [])]:
            reading.processes.say(said)
        self.num_classes, self.num_workers = reading.num_classes, reading.num_workers
        self.batch_size = -(-batch_size // reading.processes.world_size)
        self.labels = index[[sample.label for sample in source.samples]]
        self.identity = Identity(source.classes, index, [sample.name for sample in source.samples], reading.classes)
        self._images, self._processes = _Images(source, size, crop_ratio), reading.processes

    def order_of(self, epoch: int) -> np.ndarray:
        order, processes = np.arange(len(self.labels)), self._processes
        return share_of(order, self.batch_size, processes.rank, processes.world_size, drop_last=False)

    def __len__(self) -> int:
        return -(-len(self.order_of(0)) // self.batch_size)

    def epoch(self, epoch: int) -> Generator[Batch]:
        """Batches of images uint8 `[B, S, S, 3]` and labels int64 `[B]`, on the CPU."""
        order = self.order_of(epoch)
        subset = torch.utils.data.Subset(self._images, order.tolist())
        batches = torch.utils.data.DataLoader(subset, self.batch_size, num_workers=self.num_workers, collate_fn=list)
        done = 0
        for parts in batches:
            if problem := next((part for part in parts if isinstance(part, BadSample)), None):
                raise problem
            labels = torch.from_numpy(self.labels[order[done : done + len(parts)]])
            yield Batch(torch.stack(parts).permute(0, 2, 3, 1), labels)
            done += len(parts)


class _Images(torch.utils.data.Dataset):
    """Center crops, uint8 `[3, S, S]`, as torchvision makes them; a BadSample for one that cannot be decoded."""

    def __init__(self, source: ImageSource, size: int, crop_ratio: float) -> None:
        self._source = source
        self._transform = v2.Compose(
            [v2.Resize(round(size / crop_ratio), antialias=True), v2.CenterCrop(size), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self._source.samples)

    def __getitem__(self, index: int) -> torch.Tensor | BadSample:
        try:
            data = BytesIO(self._source.read(index))
            with decoding(self._source.place(index)), Image.open(data) as image:  # as torchvision's loader does
                return self._transform(image.convert("RGB"))
        except BadSample as problem:  # handed on: torch would make another error of one that a worker raises
            return problem


def evaluation_loader(
    path: str, reading: Reading, batch_size: int, image_size: int, crop_ratio: float
) -> tuple[Loader | FolderLoader, list[str]]:
    """A loader of the center crops of `path` in order, and the samples' names (empty: not known).

    Args:
        path: a `.beton`, or its shards (see `dataset.files_of`), or images as `open_source` reads them: a folder, or a
            file or pattern of archives.
        reading, batch_size, image_size, crop_ratio: as for `validation_loader`.

    Raises:
        BadInput: as `validation_loader` and `FolderLoader` do.
    """
    if Path(path).is_dir() or Path(path).suffix in KINDS:
        folder = FolderLoader(path, reading, batch_size, image_size, crop_ratio)
        return folder, folder.identity.names
    loader = validation_loader(path, reading, batch_size, image_size, crop_ratio)
    return loader, loader.identity.names if loader.dataset.contents else []
