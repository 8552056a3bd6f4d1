"""Small data in the official formats, made for each test."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["NUMBA_NUM_THREADS"] = "8"  # more workers than cores, on any machine

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(command: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the top-level commands as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / command), *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def label_map_tensor(rng: np.random.Generator, num_classes: int, top_k: int = 5, height: int = 15, width: int = 15):
    """A label map in the official layout, rows = y: scores representable in float16, distinct classes a place."""
    scores = rng.normal(3, 4, (top_k, height, width)).astype(np.float16).astype(np.float32)
    classes = rng.random((num_classes, height, width)).argsort(0)[:top_k]
    return torch.from_numpy(np.stack([scores, classes.astype(np.float32)]))


def write_images(root: Path, count: int, num_classes: int = 8, seed: int = 0) -> list[Path]:
    """`root/classN/imgN.jpg`, photographs' sizes in miniature. Returns the files in ImageFolder's order."""
    rng = np.random.default_rng(seed)
    for c in range(num_classes):
        (root / f"class{c}").mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(count):
        height, width = (int(v) for v in rng.integers(40, 90, 2))
        coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        file = root / f"class{i % num_classes}" / f"img{i:03d}.jpg"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=95)
        files.append(file)
    return sorted(files)


def write_label_maps(root: Path, files: list[Path], num_classes: int = 8, suffix: str = ".pt", seed: int = 1) -> dict:
    """A map for each image; returns them by (class folder, stem)."""
    rng = np.random.default_rng(seed)
    maps = {}
    for file in files:
        tensor = label_map_tensor(rng, num_classes)
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        torch.save(tensor, root / file.parent.name / f"{file.stem}{suffix}")
        maps[file.parent.name, file.stem] = tensor.numpy()
    return maps


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(image folder, label-map folder, files, maps): 48 images of 8 classes, maps with rows = y."""
    base = tmp_path_factory.mktemp("data")
    files = write_images(base / "images", 48)
    maps = write_label_maps(base / "maps", files)
    return base / "images", base / "maps", files, maps


@pytest.fixture(scope="session")
def beton(folders, tmp_path_factory):
    """The `.beton` of `folders`, in jpg mode, written by the command."""
    images, maps, _, _ = folders
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    result = run(
        "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.label_map_dir={maps}", f"--cfg.write_path={path}",
        "--cfg.axis_order=yx", "--cfg.num_workers=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return path
