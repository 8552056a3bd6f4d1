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

from ..data.label_map_files import manifest_of, open_archive, read_manifest, write_label_map
from ..errors import BadInput, BadSample
from ..files import atomic, write_text
from ..precision import Precision
from ..processes import hide_progress
from ..progress import Progress
from ..sources.base import ImageSource, key_of
from .annotator import DenseAnnotator, Preprocessing, label_maps


@dataclass(frozen=True)
class Generation:
    """How maps are made: `top_k` classes at `size` x `size` cells, `batch_size` images at a time.

    `num_workers` processes decode; 0: this one does. `skip_bad`: images that cannot be decoded get no map.
    """

    top_k: int = 5
    size: int = 15
    batch_size: int = 64
    num_workers: int = 0
    skip_bad: bool = False


class Store(Protocol):
    """Where maps go."""

    def prepare(self) -> None: ...

    def missing(self) -> list[int]: ...

    def finish(self) -> None: ...

    def write(self, index: int, scores: np.ndarray, classes: np.ndarray) -> None: ...


def generate(
    annotator: DenseAnnotator,
    preprocessing: Preprocessing,
    source: ImageSource,
    indices: Sequence[int],
    store: Store,
    generation: Generation,
    precision: Precision,
) -> tuple[float, list[BadSample]]:
    """Write the label maps of some images of `source`.

    Args:
        annotator: on the device of `precision`.
        preprocessing: from a file to the annotator's input.
        indices: of the images, in `source` and in `store`.

    Returns:
        The share of the time that the network took, and the images that cannot be decoded.

    Raises:
        BadSample: the first of these, unless they are to be skipped.
    """
    device, bad = precision.device, list[BadSample]()
    loader = DataLoader(
        Images(source, indices, preprocessing),
        generation.batch_size,
        num_workers=generation.num_workers,
        collate_fn=list,
    )
    in_network, start, done = 0.0, time.perf_counter(), 0
    with Progress("label maps", len(indices), "images", hidden=bool(hide_progress())) as progress:
        for parts in loader:
            problems = [part for part in parts if isinstance(part, BadSample)]
            if problems and not generation.skip_bad:
                raise problems[0]
            bad += problems
            good = [i for i, part in enumerate(parts) if not isinstance(part, BadSample)]
            if good:
                asked = time.perf_counter()
                images = torch.stack([parts[i] for i in good]).to(device)
                with precision.autocast():
                    found = label_maps(annotator, preprocessing.normalize(images), generation.top_k, generation.size)
                scores, classes = (part.cpu().numpy() for part in found)
                in_network += time.perf_counter() - asked
                for row, i in enumerate(good):
                    store.write(indices[done + i], scores[row], classes[row])
            done += len(parts)
            progress.update(len(parts))
    return in_network / (time.perf_counter() - start), bad


class Images(Dataset):
    """Images as the network's input before normalization, uint8 `[3, S, S]`; a BadSample for one that is damaged."""

    def __init__(self, source: ImageSource, indices: Sequence[int], preprocessing: Preprocessing) -> None:
        self.source, self.indices, self.preprocessing = source, indices, preprocessing

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor | BadSample:
        index = self.indices[index]
        try:
            return self.preprocessing.read(self.source.read(index), self.source.place(index))
        except BadSample as problem:  # handed on: torch would make another error of one that a worker raises
            return problem


class Tree:
    """The official tree: one file per image, each complete or absent."""

    def __init__(self, root: Path, names: list[str], manifest: dict[str, Any]) -> None:
        self.root, self.files, self.manifest = root, [root / f"{key_of(name)}.pt" for name in names], manifest

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
        skipped = set(read_manifest(self.root).get("skipped") or [])
        if self.root.exists() and skipped:  # they may have been repaired since
            os.replace(self.root, self.growing)
            marks = np.lib.format.open_memmap(self.marks, "w+", np.uint8, self.shape[:1])
            marks[:] = [name not in skipped for name in self.manifest["files"]]
            marks.flush()
            write_text(manifest_of(self.root), json.dumps(self.manifest, indent=1))
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
            skipped = [self.manifest["files"][row] for row in np.flatnonzero(self._done == 0)]
            if skipped:
                write_text(manifest_of(self.root), json.dumps(self.manifest | {"skipped": skipped}, indent=1))
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
