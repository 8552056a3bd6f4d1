"""The weak annotator of Scenes: trained on single objects, it has never seen a scene."""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .annotator import MAP_SIZE, Annotator
from .compose import ANNOTATOR_SHARE, CANVAS, CLASSES, OPAQUE_FROM, SIDE, background, photographs_of

LAYERS = [(24, 2), (48, 2), (48, 1), (96, 2), (96, 1)]  # channels, stride
CELL = 8  # pixels of its input
STEPS, BATCH_SIZE = 1000, 64  # of its training


class _SingleObjects:
    """Its training images: one object, or none, at the scale at which scenes are annotated."""

    EMPTY_SHARE = 0.2  # images of the background alone, whose target is even: it must not look like anything

    def __init__(self, rng: np.random.Generator) -> None:
        photographs, labels = photographs_of("annotator")
        self.photographs, self.labels = torch.from_numpy(photographs).float()[:, None], torch.from_numpy(labels)
        scenery = np.stack([background(rng, CANVAS) for _ in range(256)])
        self.scenery = torch.from_numpy(scenery).permute(0, 3, 1, 2)
        self.rng = rng

    def batch(self, indices: np.ndarray, empty_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `[B, 3, S, S]` and targets `[B, C]`. All objects of a batch have one size and position."""
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
        view = extent * MAP_SIZE * CELL // CANVAS
        images = F.interpolate(images, (view, view), mode="bicubic").clamp(0, 255)
        targets = F.one_hot(self.labels[indices], len(CLASSES)).float()
        return images, torch.where(shown[:, :, 0, 0], targets, 1 / len(CLASSES))


def weak_annotator(seed: int = 0) -> tuple[Annotator, float]:
    """Train the weak annotator; returns it and its accuracy in percent on unseen single objects."""
    torch.manual_seed(seed)
    rng, held_out = np.random.default_rng(seed), 2000
    objects = _SingleObjects(rng)
    model = Annotator(MAP_SIZE * CELL, LAYERS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="weak annotator", disable=None):
        images, targets = objects.batch(rng.integers(0, ANNOTATOR_SHARE - held_out, BATCH_SIZE), objects.EMPTY_SHARE)
        loss = F.cross_entropy(model(model.input.normalize(images)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    right = []
    with torch.inference_mode():
        for first in range(ANNOTATOR_SHARE - held_out, ANNOTATOR_SHARE, 100):
            images, targets = objects.batch(np.arange(first, first + 100), 0.0)
            right.append((model(model.input.normalize(images)).argmax(1) == targets.argmax(1)).double().mean().item())
    return model, 100 * float(np.mean(right))
