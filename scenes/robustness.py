"""Robustness on Scenes: validation scenes that are damaged, attacked, or stand before another background.

The damages are six of ImageNet-C's, with its parameters at severities 1, 3 and 5 (Hendrycks and Dietterich, ICLR 2019),
lengths in pixels scaled from its 224 to the scene's side. Backgrounds say nothing of what stands before them here, in
training as in validation: the foreign ones are of kinds that no network has seen.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

from relabel.evaluation.adversarial import Fgsm
from relabel.normalization import normalize

from .compose import CANVAS, CLASSES, FASHION_MNIST, SPLITS, Scenery, compose, photographs_of, read_photographs
from .data import VAL_SCENES
from .statistics import in_words
from .trainings import IMAGE_SIZE, Training, network_of

SEVERITIES = (1, 3, 5)
UNCHANGED = "as in training"
EPSILONS = (1, 4, 8)  # of the attacks, gray levels of 255
Pixels = np.ndarray  # uint8 `[H, W, 3]`


def gaussian_noise(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 255 * {1: 0.08, 3: 0.18, 5: 0.38}[severity], image.shape)


def blur(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    radius = {1: 1, 3: 3, 5: 6}[severity] * CANVAS / 224
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def brightness(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    return image + 255 * {1: 0.1, 3: 0.3, 5: 0.5}[severity]


def contrast(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1))
    return (image - mean) * {1: 0.4, 3: 0.2, 5: 0.05}[severity] + mean


def jpeg(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality={1: 25, 3: 15, 5: 7}[severity])
    return np.asarray(Image.open(file))


def pixelate(image: Pixels, severity: int, rng: np.random.Generator) -> np.ndarray:
    side = int(CANVAS * {1: 0.6, 3: 0.4, 5: 0.25}[severity])
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((CANVAS, CANVAS), Image.Resampling.NEAREST))


DAMAGES = {f.__name__.replace("_", " "): f for f in (gaussian_noise, blur, brightness, contrast, jpeg, pixelate)}


def bright(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth as the scenes' own, but light."""
    coarse = rng.uniform(120, 255, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32).copy()


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Parallel stripes of two colors, of any direction, 4 to 16 pixels a period."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
    y, x = np.mgrid[:size, :size]
    wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)[..., None]
    first, second = rng.uniform(0, 160, (2, 3))
    return np.where(wave > 0, first, second).astype(np.float32)


def clutter() -> Scenery:
    """Photographs of the two classes that no scene shows, in halves of their brightness, side by side."""
    photographs, _ = read_photographs("t10k", [name for name in FASHION_MNIST if name not in CLASSES])

    def scenery(rng: np.random.Generator, size: int) -> np.ndarray:
        count = -(-size // 24)
        chosen = photographs[rng.integers(0, len(photographs), (count, count))][:, :, 2:26, 2:26]
        tiled = chosen.transpose(0, 2, 1, 3).reshape(count * 24, count * 24)[:size, :size, None]
        return (tiled / 2 * rng.uniform(0.55, 1.0, 3)).astype(np.float32)

    return scenery


@dataclass(frozen=True)
class Scenes:
    """Scenes uint8 `[N, CANVAS, CANVAS, 3]`, their single labels `[N]`, and the classes present, bool `[N, C]`."""

    pixels: np.ndarray
    labels: np.ndarray
    present: np.ndarray


def scenes_before(scenery: Scenery | None = None, count: int = VAL_SCENES) -> Scenes:
    """The validation scenes, the same objects at the same places, before the backgrounds of `scenery`."""
    photographs, labels = photographs_of("val")
    rng = np.random.default_rng([0, count, SPLITS.index("val")])
    more = () if scenery is None else (scenery,)
    scenes = [compose(rng, photographs, labels, *more) for _ in range(count)]
    present = np.zeros((count, len(CLASSES)), bool)
    for row, (_, objects) in zip(present, scenes, strict=True):
        row[[c for c, *_ in objects]] = True
    return Scenes(np.stack([p for p, _ in scenes]), np.array([o[0][0] for _, o in scenes]), present)


def damaged(clean: Scenes, damage: Callable, severity: int) -> Scenes:
    rng = np.random.default_rng(severity)
    pixels = np.stack([damage(image, severity, rng).clip(0, 255).astype(np.uint8) for image in clean.pixels])
    return Scenes(pixels, clean.labels, clean.present)


def all_sets(count: int) -> Iterator[tuple[str, Scenes]]:
    """The sets by what was done to them; several of one name are its severities."""
    clean = scenes_before(count=count)
    yield UNCHANGED, clean
    for name, damage in DAMAGES.items():
        for severity in SEVERITIES:
            yield name, damaged(clean, damage, severity)
    for name, scenery in (("bright background", bright), ("stripes", stripes), ("clutter", clutter())):
        yield name, scenes_before(scenery, count)


def study(trainings: list[Training], runs: Path, count: int = VAL_SCENES) -> dict[str, dict[str, list[float]]]:
    """The accuracy in percent by kind of test set and row, of each seed; the mean over severities.

    Multi-label accuracy; under attack, which goes against the single label, top-1 accuracy.
    """
    networks = {training: network_of(runs / training.name) for training in trainings}
    found: dict[str, dict[Training, list[float]]] = {}

    def note(kind: str, measure: Callable[[nn.Module], float]) -> None:
        for training, network in networks.items():
            found.setdefault(kind, {}).setdefault(training, []).append(measure(network))
        print(f"robustness: {kind}", flush=True)

    for name, scenes in all_sets(count):
        images = as_inputs(scenes.pixels)
        note(name, partial(accuracy, images=images, right=scenes.present))
        if name == UNCHANGED:
            single = np.eye(len(CLASSES), dtype=bool)[scenes.labels]
            note("as in training, top-1", partial(accuracy, images=images, right=single))
            for epsilon in EPSILONS:
                attack = Fgsm(epsilon / 255)
                note(f"{attack}, top-1", partial(accuracy, images=images, right=single, attack=attack))
    rows = list(dict.fromkeys(training.row for training in trainings))
    return {
        kind: {row: [float(np.mean(v)) for t, v in values.items() if t.row == row] for row in rows}
        for kind, values in found.items()
    }


def as_inputs(pixels: np.ndarray) -> torch.Tensor:
    """Whole scenes at the network's size, normalized, float32 `[N, 3, S, S]`."""
    images, size = torch.from_numpy(pixels).permute(0, 3, 1, 2), (IMAGE_SIZE, IMAGE_SIZE)
    parts = [F.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in images.split(500)]
    return normalize(torch.cat(parts).round().clamp(0, 255).byte().permute(0, 2, 3, 1))


def accuracy(network: nn.Module, images: torch.Tensor, right: np.ndarray, attack: Fgsm | None = None) -> float:
    """The share of predictions, in percent, that are among the classes of `right`, bool `[N, C]`.

    An attack goes against the first of them.
    """
    best = []
    labels = torch.from_numpy(right.argmax(1))
    with torch.inference_mode():
        for part, label in zip(images.split(250), labels.split(250), strict=True):
            best.append(network(attack(network, part, label) if attack else part).argmax(1))
    return 100 * float(right[np.arange(len(right)), torch.cat(best).numpy()].mean())


def make_table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: by kind of test set, each row's accuracy."""
    rows = list(next(iter(found.values())))
    lines = [f"| multi-label % (FGSM: top-1 %) | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
    lines += [f"| {kind} | {' | '.join(in_words(values[row]) for row in rows)} |" for kind, values in found.items()]
    return "\n".join(lines) + "\n"
