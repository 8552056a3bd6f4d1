"""Scenes: ImageNet's problem at the size of a laptop.

Each scene shows two to four real objects (Fashion-MNIST's photographs of clothes) on one canvas and carries one
single label, that of one of its objects, as a person asked for one label would give: so a single label leaves out
what else is there, and a random crop often shows another object than its label says. Training and validation scenes
are made of disjoint photographs. The label maps come from a machine annotator, a small network trained on single
objects from photographs that occur in no scene: nothing in them comes from the composer's knowledge of where things
are.
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
# Without shirts and coats, which at this size are hard to tell from tops and pullovers even for a person. A class's
# index is its folder's place, as in ImageFolder.
CLASSES = sorted(set(FASHION_MNIST) - {"shirt", "coat"})
CANVAS = 72  # pixels
SIDE = (26, 44)  # least and greatest side of an object, pixels
NUM_OBJECTS = (2, 4)
OPAQUE_FROM = 40  # gray level of a photograph
ANNOTATOR_SHARE = 24_000  # of the 48,000 training photographs: the annotator's; the rest make scenes
MAP_SIZE = 15
STRIDE = 8  # pixels of the annotator's input a place
TOP_K = 5


def read_photographs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's `train` or `t10k` split: photographs uint8 `[N, 28, 28]`, indices `[N]` into `CLASSES`.

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
    index = np.array([CLASSES.index(name) if name in CLASSES else -1 for name in FASHION_MNIST])[labels]
    return images[index >= 0], index[index >= 0]


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dim, smooth, coloured background: float32 `[size, size, 3]`, 0 to about 90."""
    coarse = rng.uniform(0, 90, (4, 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return smooth + rng.normal(0, 4, smooth.shape).astype(np.float32)


def paste(canvas: np.ndarray, photograph: np.ndarray, y: int, x: int, side: int, rng: np.random.Generator) -> None:
    """Put a photograph, scaled to `side` pixels and tinted, on the canvas; its black surroundings stay clear."""
    resized = Image.fromarray(photograph).resize((side, side), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized, np.float32)[..., None]
    opacity = (scaled / OPAQUE_FROM).clip(0, 1)
    region = canvas[y : y + side, x : x + side]
    region += opacity * (scaled * rng.uniform(0.55, 1.0, 3).astype(np.float32) - region)


def compose(
    rng: np.random.Generator, photographs: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """One scene. The labelled object is drawn with probabilities in proportion to the objects' areas.

    Returns:
        uint8 `[CANVAS, CANVAS, 3]`, and its objects `(class, y, x, side)` in pixels, the labelled one first.
    """
    sides = rng.integers(*SIDE, rng.integers(*NUM_OBJECTS, endpoint=True), endpoint=True)
    canvas = background(rng, CANVAS)
    objects: list[tuple[int, int, int, int]] = []
    for side in sides:
        for _ in range(30):
            y, x = (int(v) for v in rng.integers(0, CANVAS - side, 2, endpoint=True))
            # Objects may touch and overlap a little, as their square frames are not full.
            apart = (max(abs(y - b + (side - s) / 2), abs(x - c + (side - s) / 2)) for _, b, c, s in objects)
            if all(d > 0.42 * (side + s) for d, (*_, s) in zip(apart, objects, strict=True)):
                which = int(rng.integers(len(labels)))
                paste(canvas, photographs[which], y, x, side, rng)
                objects.append((int(labels[which]), y, x, int(side)))
                break
    area = np.array([side**2 for *_, side in objects], float)
    objects.insert(0, objects.pop(int(rng.choice(len(objects), p=area / area.sum()))))
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
        self.features = nn.Sequential(
            _Convolution(3, 24, 2), _Convolution(24, 48, 2), _Convolution(48, 48), _Convolution(48, 96, 2),
            _Convolution(96, 96),
        )  # fmt: skip
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """Logits before the pooling: `[B, C, S / STRIDE, S / STRIDE]`; their spatial mean is `forward`'s."""
        return F.conv2d(self.features(images), self.head.weight[:, :, None, None], self.head.bias)


class _Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU; with the input added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        # Zero padding would tell the border from the middle; a scene's border means nothing.
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


def _to_input(images: torch.Tensor) -> torch.Tensor:
    """Pixels 0..255 `[B, 3, S, S]` as the annotator takes them."""
    return (images / 128 - 0.5).contiguous(memory_format=torch.channels_last)


class _SingleObjects:
    """The annotator's training images: one object, or none, at the scale at which scenes are annotated."""

    EMPTY_SHARE = 0.2  # images of the background alone, whose target is even: it must not look like anything

    def __init__(self, rng: np.random.Generator) -> None:
        photographs, labels = (a[:ANNOTATOR_SHARE] for a in read_photographs("train"))
        self.photographs, self.labels = torch.from_numpy(photographs).float()[:, None], torch.from_numpy(labels)
        scenery = np.stack([background(rng, CANVAS) for _ in range(256)])
        self.scenery = torch.from_numpy(scenery).permute(0, 3, 1, 2)
        self.rng = rng

    def batch(self, indices: np.ndarray, empty_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[B, 3, S, S]` and targets `[B, C]`. All objects of a batch have one size and place."""
        rng, count, extent = self.rng, len(indices), SIDE[1]
        side = int(rng.integers(*SIDE, endpoint=True))
        y, x = rng.integers(0, extent - side, 2, endpoint=True)
        top, left = rng.integers(0, CANVAS - extent, 2, endpoint=True)
        images = self.scenery[rng.integers(0, len(self.scenery), count), :, top : top + extent, left : left + extent]
        scaled = F.interpolate(self.photographs[indices], (side, side), mode="bicubic", antialias=True).clamp(0, 255)
        tint = torch.from_numpy(rng.uniform(0.55, 1.0, (count, 3, 1, 1)).astype(np.float32))
        shown = torch.from_numpy(rng.random((count, 1, 1, 1)) >= empty_share)
        region = images[:, :, y : y + side, x : x + side]
        region += (scaled / OPAQUE_FROM).clamp(0, 1) * shown * (scaled * tint - region)
        view = extent * MAP_SIZE * STRIDE // CANVAS
        images = F.interpolate(images, (view, view), mode="bicubic").clamp(0, 255)
        targets = F.one_hot(self.labels[indices], len(CLASSES)).float()
        return _to_input(images), torch.where(shown[:, :, 0, 0], targets, 1 / len(CLASSES))


def train_annotator(seed: int, steps: int = 1000, batch: int = 64) -> tuple[Annotator, float]:
    """Train the annotator on single objects; returns it and its accuracy in percent on unseen ones."""
    torch.manual_seed(seed)
    rng, held_out = np.random.default_rng(seed), 2000
    objects = _SingleObjects(rng)
    model = Annotator().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="annotator", disable=None):
        images, targets = objects.batch(rng.integers(0, ANNOTATOR_SHARE - held_out, batch), objects.EMPTY_SHARE)
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    right = []
    with torch.inference_mode():
        for first in range(ANNOTATOR_SHARE - held_out, ANNOTATOR_SHARE, 100):
            images, targets = objects.batch(np.arange(first, first + 100), 0.0)
            right.append((model(images).argmax(1) == targets.argmax(1)).double().mean().item())
    return model, 100 * float(np.mean(right))


@torch.inference_mode()
def annotate(annotator: Annotator, root: Path, out: Path) -> None:
    """Write a label map in the official format for each image `root/CLASS/NAME.jpg`, rows = y.

    The image is resized, whole, to the size at which the annotator's grid is `MAP_SIZE` x `MAP_SIZE`.
    """
    files = sorted(root.glob("*/*.jpg"))
    side = MAP_SIZE * STRIDE
    for first in tqdm(range(0, len(files), 64), desc="label maps", unit=" batches", disable=None):
        batch = files[first : first + 64]
        images = np.stack([np.asarray(Image.open(f).resize((side, side), Image.Resampling.BICUBIC)) for f in batch])
        logits = annotator.dense(_to_input(torch.from_numpy(images).permute(0, 3, 1, 2)))
        scores, classes = logits.topk(TOP_K, dim=1)
        for i, file in enumerate(batch):
            write_label_map(out / file.parent.name / f"{file.stem}.pt", scores[i].numpy(), classes[i].numpy())
