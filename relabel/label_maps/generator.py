"""Writing a label map for each image of a folder: resumable, into the official tree or one archive."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from ffcv_fields.label_map import pack_label_map
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.label_map_files import manifest_of, open_archive, write_label_map
from ..errors import BadInput
from ..files import atomic, write_text
from ..precision import Precision
from ..processes import hide_progress
from .annotator import DenseAnnotator, Preprocessing, label_maps


@dataclass(frozen=True)
class Generation:
    """How maps are made: `top_k` classes at `size` x `size` cells, `batch_size` images at a time.

    `num_workers` processes decode; 0: this one does.
    """

    top_k: int = 5
    size: int = 15
    batch_size: int = 64
    num_workers: int = 0


class Store(Protocol):
    """Where maps go."""

    def write(self, index: int, scores: np.ndarray, classes: np.ndarray) -> None: ...


def generate(
    annotator: DenseAnnotator,
    preprocessing: Preprocessing,
    files: Sequence[Path],
    indices: Sequence[int],
    store: Store,
    generation: Generation,
    precision: Precision,
) -> float:
    """Write the label maps of `files`.

    Args:
        annotator: on the device of `precision`.
        preprocessing: from a file to the annotator's input.
        indices: of `files` in `store`.

    Returns:
        The fraction of the time that the network took.
    """
    device = precision.device
    loader = DataLoader(
        Images(files, preprocessing),
        generation.batch_size,
        num_workers=generation.num_workers,
        pin_memory=device.type == "cuda",
    )
    in_network, start, done = 0.0, time.perf_counter(), 0
    with tqdm(total=len(files), unit=" images", desc="label maps", disable=hide_progress()) as progress:
        for images in loader:
            asked = time.perf_counter()
            with precision.autocast():
                normalized = preprocessing.normalize(images.to(device))
                found = label_maps(annotator, normalized, generation.top_k, generation.size)
            scores, classes = (part.cpu().numpy() for part in found)
            in_network += time.perf_counter() - asked
            for i in range(len(images)):
                store.write(indices[done + i], scores[i], classes[i])
            done += len(images)
            progress.update(len(images))
    return in_network / (time.perf_counter() - start)


class Images(Dataset):
    """Files as the network's input before normalization, uint8 `[3, S, S]`."""

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.files, self.preprocessing = files, preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocessing.read(self.files[index])


class Tree:
    """The official tree: one file per image, each written completely or not at all."""

    def __init__(self, root: Path, names: list[str], manifest: dict[str, Any]) -> None:
        self.root, self.files, self.manifest = root, [root / Path(name).with_suffix(".pt") for name in names], manifest

    def prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        keep_manifest(manifest_of(self.root), self.manifest)

    def missing(self) -> list[int]:
        return [i for i, file in enumerate(self.files) if not file.exists()]

    def write(self, index: int, scores: np.ndarray, classes: np.ndarray) -> None:
        with atomic(self.files[index], sync=False) as temporary:
            write_label_map(temporary, scores, classes)

    def finish(self) -> None:
        pass


class Archive:
    """All maps in one file, which gets its name when it is complete; rows that are done are marked beside it."""

    def __init__(self, root: Path, names: list[str], manifest: dict[str, Any]) -> None:
        self.root, self.manifest = root, manifest | {"files": names}
        self.growing, self.marks = (root.with_name(root.name + end) for end in (".part", ".done"))
        self.shape = (len(names), 2, manifest["top_k"], manifest["size"], manifest["size"])

    def prepare(self) -> None:
        keep_manifest(manifest_of(self.root), self.manifest)
        if not self.root.exists() and not self.growing.exists():
            np.lib.format.open_memmap(self.growing, "w+", np.int16, self.shape).flush()
            np.lib.format.open_memmap(self.marks, "w+", np.uint8, self.shape[:1]).flush()

    def missing(self) -> list[int]:
        if self.root.exists():
            return []
        self._maps, self._done = open_archive(self.growing, "r+"), np.load(self.marks, mmap_mode="r+")
        return np.flatnonzero(self._done == 0).tolist()

    def write(self, index: int, scores: np.ndarray, classes: np.ndarray) -> None:
        self._maps[index] = pack_label_map(scores, classes, "float16")
        self._done[index] = 1

    def finish(self) -> None:
        if not self.root.exists():
            self._maps.flush()
            os.replace(self.growing, self.root)
            self.marks.unlink()


def keep_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or see that the maps that are there already were made in the same way.

    Raises:
        BadInput: they were not.
    """
    manifest = json.loads(json.dumps(manifest))
    if file.exists():
        there = json.loads(file.read_text())
        for key in manifest:
            if there.get(key) != manifest[key]:
                raise BadInput(f"{file}: the maps there have another {key}; use another maps.path, or delete them")
        return
    write_text(file, json.dumps(manifest, indent=1))
