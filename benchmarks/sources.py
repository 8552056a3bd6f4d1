"""Reading images and label maps from an archive against a tree of files, in one interleaved run.

    python -m benchmarks.sources

Files are in the page cache: what is compared is the work, not the disk. Images: files of ImageNet's mean size, read
whole. Label maps: of the official size, read and checked as `write_datasets.py` does it, in the format of torch before
1.6, which the official archive has, and in today's; "torch.load" is torch's own loader on the tree, without checks.
"""

import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from relabel.data.label_map_files import LabelMapFormat, find_label_maps, read_label_map, read_tensor
from relabel.sources.base import ClassChoice
from relabel.sources.opening import open_source

COUNT, BYTES, ROUNDS = 2000, 110_000, 7
CLASSES = ("n01440764", "n01443537")
FORM = LabelMapFormat(5, 15, 15, 1000, "yx")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        rows = [("images, whole files", *images(root))]
        for old in (True, False):
            rows.append((f"label maps, torch {'before 1.6' if old else 'since 1.6'}", *label_maps(root, old)))
    print("| what | tree, torch.load | tree | tar | tar over tree | tar over torch.load |")
    print("|---|---|---|---|---|---|")
    for what, stock, tree, tar in rows:
        of_stock = f"{per_second(stock)} | " if stock else "| "
        ratio = f"{ratio_of(stock, tar)}" if stock else ""
        print(f"| {what} | {of_stock}{per_second(tree)} | {per_second(tar)} | {ratio_of(tree, tar)} | {ratio} |")


def images(root: Path) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each round: none for torch, tree, tar."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        folder = root / "images" / CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.JPEG").write_bytes(rng.bytes(BYTES))
    sources = [open_source(root / "images"), open_source(pack(root / "images"), ClassChoice(given=CLASSES))]
    order = rng.permutation(COUNT).tolist()
    tree, tar = interleaved([lambda source=source: [source.read(i) for i in order] for source in sources])
    return [], tree, tar


def label_maps(root: Path, old: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each round: torch's loader on a tree, tree, tar."""
    rng, maps = np.random.default_rng(0), root / "maps"
    shutil.rmtree(maps, ignore_errors=True)
    for i in range(COUNT):
        folder = maps / CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        classes = rng.integers(0, 990, (1, 15, 15)) + np.arange(5)[:, None, None]
        tensor = torch.from_numpy(np.stack([rng.normal(5, 3, (5, 15, 15)), classes]).astype(np.float32))
        torch.save(tensor, folder / f"{i}.pt", _use_new_zipfile_serialization=not old)
    tree, tar = find_label_maps(maps, CLASSES), find_label_maps(pack(maps), CLASSES)
    keys = [list(tree)[i] for i in rng.permutation(COUNT).tolist()]
    assert all(torch.equal(read_tensor(tree[key]), read_tensor(tar[key])) for key in keys)
    stock, ours, packed = interleaved([
        lambda: [torch.load(tree[key], weights_only=True) for key in keys],
        lambda: [read_label_map(tree[key], FORM) for key in keys],
        lambda: [read_label_map(tar[key], FORM) for key in keys],
    ])  # fmt: skip
    return stock, ours, packed


def pack(folder: Path) -> Path:
    """A tar of a tree of class folders."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)
    return path


def interleaved(jobs: list[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each job in each round; a first round of all is not counted."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in range(ROUNDS + 1):
        for job, times in zip(jobs, seconds, strict=True):
            start = time.perf_counter()
            job()
            if number:
                times.append(time.perf_counter() - start)
    return seconds


def per_second(seconds: list[float]) -> str:
    return f"{COUNT / statistics.median(seconds):,.0f}/s"


def ratio_of(slow: list[float], fast: list[float]) -> str:
    """The median of the rounds' ratios, and their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
