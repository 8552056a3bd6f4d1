"""Scenes: ImageNet's problem at the size of a laptop.

Each scene shows several real objects (Fashion-MNIST's photographs of clothes) on one canvas and carries one single
label, that of the largest object, so a random crop often shows another object than its label says. Training and
validation scenes are made of disjoint photographs. The label maps come from a machine annotator, a small network
trained on single objects from photographs that occur in no scene: nothing in them comes from the composer's
knowledge of where things are.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from .errors import BadInput
from .label_map_files import write_label_map

PHOTOGRAPHS = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
FASHION_MNIST = ["top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CLASSES = sorted(FASHION_MNIST)  # a class's index is its folder's place, as in ImageFolder
CANVAS = 96  # pixels
MAIN_SIDE = (44, 56)  # side of the labelled object, pixels, inclusive
OTHER_SIDE = (20, 30)
NUM_OTHERS = (1, 3)
ANNOTATOR_SHARE = 30_000  # of the 60,000 training photographs: the annotator's; the rest make scenes
MAP_SIZE = 15
VIEW = 60  # pixels: side of the annotator's training images
TOP_K = 5


def read_photographs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's `train` or `t10k` split: uint8 `[N, 28, 28]` and indices `[N]` into `CLASSES`.

    Raises:
        BadInput: the files are not there.
    """
    try:
        with gzip.open(PHOTOGRAPHS / f"{split}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(PHOTOGRAPHS / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
    except FileNotFoundError as error:
        raise BadInput(
            f"{error.filename}: not there; apt-get install dataset-fashion-mnist, or set FASHION_MNIST to a folder "
            "with the four .gz files"
        ) from None
    return images, np.array([CLASSES.index(name) for name in FASHION_MNIST])[labels]


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dim, smooth, coloured background: float32 `[size, size, 3]`, 0 to about 90."""
    coarse = rng.uniform(0, 90, (4, 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return smooth + rng.normal(0, 4, smooth.shape).astype(np.float32)


def paste(canvas: np.ndarray, photograph: np.ndarray, y: int, x: int, side: int, rng: np.random.Generator) -> None:
    """Put a photograph, scaled to `side` pixels and tinted, on the canvas, where it is brighter than that."""
    scaled = np.asarray(Image.fromarray(photograph).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    tinted = scaled[:, :, None] * rng.uniform(0.55, 1.0, 3).astype(np.float32)
    region = canvas[y : y + side, x : x + side]
    np.maximum(region, tinted, out=region)


def compose(
    rng: np.random.Generator, photographs: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """One scene.

    Returns:
        uint8 `[CANVAS, CANVAS, 3]`, and its objects `(class, y, x, side)` in pixels, the labelled one first.
    """
    sides = [int(rng.integers(*MAIN_SIDE, endpoint=True))]
    sides += [int(s) for s in rng.integers(*OTHER_SIDE, rng.integers(*NUM_OTHERS, endpoint=True), endpoint=True)]
    canvas, objects = background(rng, CANVAS), []
    for side in sides:
        for _ in range(30):
            y, x = (int(v) for v in rng.integers(0, CANVAS - side, 2, endpoint=True))
            # Objects may touch and overlap a little, as their square frames are not full.
            apart = (max(abs(y - b + (side - s) / 2), abs(x - c + (side - s) / 2)) for _, b, c, s in objects)
            if all(d > 0.42 * (side + s) for d, (*_, s) in zip(apart, objects, strict=True)):
                which = int(rng.integers(len(labels)))
                paste(canvas, photographs[which], y, x, side, rng)
                objects.append((int(labels[which]), y, x, side))
                break
    return canvas.clip(0, 255).astype(np.uint8), objects


def read_scene(file: Path) -> np.ndarray:
    """The pixels of a scene, uint8 `[CANVAS, CANVAS, 3]`."""
    return np.asarray(Image.open(file))


def write_scenes(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` scenes as `root/split/CLASS/NAME.jpg`, and what they show as `root/split.json`.

    The JSON holds, in ImageFolder's order: `files`; `objects`, each `[class, y, x, side]`, the labelled one first;
    and `multilabels`, the sorted classes present.
    """
    if split == "train":
        photographs, labels = (a[ANNOTATOR_SHARE:] for a in read_photographs("train"))
    else:
        photographs, labels = read_photographs("t10k")
    rng = np.random.default_rng([seed, count, split == "train"])
    scenes = []
    for name in CLASSES:
        (root / split / name).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc=f"{split} scenes", unit=" scenes", disable=None):
        pixels, objects = compose(rng, photographs, labels)
        file = f"{CLASSES[objects[0][0]]}/{i:06d}.jpg"
        Image.fromarray(pixels).save(root / split / file, quality=92)
        scenes.append((file, objects))
    scenes.sort()
    content = {
        "files": [file for file, _ in scenes],
        "objects": [objects for _, objects in scenes],
        "multilabels": [sorted({c for c, *_ in objects}) for _, objects in scenes],
    }
    (root / f"{split}.json").write_text(json.dumps(content))
    (root / f"{split}_multilabels.json").write_text(json.dumps(content["multilabels"]))


class Annotator(nn.Module):
    """A small network for single objects, images `[B, 3, S, S]` -> logits; `dense` gives them at every place."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs, outputs, stride):
            return [
                # Zero padding would tell the border from the middle; a scene's border means nothing.
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="reflect"),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]

        self.features = nn.Sequential(
            *block(3, 24, 2), *block(24, 48, 2), *block(48, 48, 1), *block(48, 96, 2), *block(96, 96, 1)
        )
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """Logits before the pooling: `[B, C, S/8, S/8]`; their spatial mean is `forward`'s."""
        return F.conv2d(self.features(images), self.head.weight[:, :, None, None], self.head.bias)


def _single_objects(rng, photographs, labels, indices):
    """Single objects of all the scenes' sizes, whole or cut off, at the scale at which scenes are annotated."""
    images = np.empty((len(indices), VIEW, VIEW, 3), np.uint8)
    for i, index in enumerate(indices):
        canvas = background(rng, MAIN_SIDE[1])
        side = int(rng.integers(OTHER_SIDE[0], MAIN_SIDE[1], endpoint=True))
        y, x = rng.integers(0, MAIN_SIDE[1] - side, 2, endpoint=True)
        paste(canvas, photographs[index], y, x, side, rng)
        extent = VIEW * CANVAS // (MAP_SIZE * 8)
        top, left = rng.integers(0, MAIN_SIDE[1] - extent, 2, endpoint=True)
        view = Image.fromarray(canvas[top : top + extent, left : left + extent].clip(0, 255).astype(np.uint8))
        images[i] = np.asarray(view.resize((VIEW, VIEW), Image.Resampling.BICUBIC))
    return _to_input(images), torch.from_numpy(labels[indices].astype(np.int64))


def _to_input(images):
    return torch.from_numpy(images).float().permute(0, 3, 1, 2) / 128 - 0.5


def train_annotator(seed: int, steps: int = 1200, batch: int = 64) -> tuple[Annotator, float]:
    """Train the annotator on single objects; returns it and its accuracy in percent on unseen ones."""
    torch.manual_seed(seed)
    photographs, labels = (a[:ANNOTATOR_SHARE] for a in read_photographs("train"))
    rng, held_out = np.random.default_rng(seed), 2000
    model = Annotator().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="annotator", disable=None):
        indices = rng.integers(0, len(labels) - held_out, batch)
        images, targets = _single_objects(rng, photographs, labels, indices)
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, targets = _single_objects(rng, photographs, labels, np.arange(len(labels) - held_out, len(labels)))
    with torch.inference_mode():
        return model, 100 * (model(images).argmax(1) == targets).double().mean().item()


@torch.inference_mode()
def annotate(annotator: Annotator, root: Path, out: Path) -> None:
    """Write a label map in the official format for each image `root/CLASS/NAME.jpg`, rows = y.

    The image is resized, whole, to the size at which the annotator's grid is `MAP_SIZE` x `MAP_SIZE`.
    """
    files = sorted(root.glob("*/*.jpg"))
    side = MAP_SIZE * 8
    for first in tqdm(range(0, len(files), 64), desc="label maps", unit=" batches", disable=None):
        batch = files[first : first + 64]
        images = np.stack([np.asarray(Image.open(f).resize((side, side), Image.Resampling.BICUBIC)) for f in batch])
        logits = annotator.dense(_to_input(images))
        scores, classes = logits.topk(TOP_K, dim=1)
        for i, file in enumerate(batch):
            write_label_map(out / file.parent.name / f"{file.stem}.pt", scores[i].numpy(), classes[i].numpy())
