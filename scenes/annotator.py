"""The machine annotator of Scenes: a small network trained on single objects, and the label maps that it makes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from relabel.label_maps.annotator import DenseAnnotator, Preprocessing
from relabel.label_maps.generator import Generation, Tree, generate
from relabel.precision import precision_of
from relabel.sources.opening import open_source

from .compose import ANNOTATOR_SHARE, CANVAS, CLASSES, OPAQUE_FROM, SIDE, background, read_photographs

MAP_SIZE = 15
STEPS, BATCH_SIZE = 1000, 64  # of its training
STRIDE = 8  # pixels of the annotator's input per cell


class Annotator(nn.Module):
    """A small network for single objects, images `[B, 3, S, S]` -> logits: convolutions, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _Convolution(3, 24, 2), _Convolution(24, 48, 2), _Convolution(48, 48), _Convolution(48, 96, 2),
            _Convolution(96, 96),
        )  # fmt: skip
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


class _Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU; with the input added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        # Zero padding would let the network see the border; a scene's border means nothing.
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class _Input(Preprocessing):
    """Pixels 0..255 `[B, 3, S, S]` as the annotator takes them."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return (images / 128 - 0.5).contiguous(memory_format=torch.channels_last)


PREPROCESSING = _Input(MAP_SIZE * STRIDE)


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
        """Images `[B, 3, S, S]` and targets `[B, C]`. All objects of a batch have one size and position."""
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
        return PREPROCESSING.normalize(images), torch.where(shown[:, :, 0, 0], targets, 1 / len(CLASSES))


def train_annotator(seed: int) -> tuple[Annotator, float]:
    """Train the annotator on single objects; returns it and its accuracy in percent on unseen ones."""
    torch.manual_seed(seed)
    rng, held_out = np.random.default_rng(seed), 2000
    objects = _SingleObjects(rng)
    model = Annotator().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="annotator", disable=None):
        images, targets = objects.batch(rng.integers(0, ANNOTATOR_SHARE - held_out, BATCH_SIZE), objects.EMPTY_SHARE)
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


def annotate(annotator: Annotator, images: Path, out: Path) -> None:
    """Write a label map for each image of a folder, by the product's own generator."""
    source = open_source(images)
    manifest: dict[str, Any] = {"model": "Scenes' annotator", "axis_order": "yx", "top_k": 5, "size": MAP_SIZE}
    manifest |= {"scores": "logits", "classes": CLASSES}
    store = Tree(out, [sample.name for sample in source.samples], manifest)
    store.prepare()
    dense, precision = DenseAnnotator(annotator, PREPROCESSING.image_size), precision_of("fp32", torch.device("cpu"))
    todo = store.missing()
    if todo:
        generate(dense, PREPROCESSING, source, todo, store, Generation(size=MAP_SIZE), precision)
