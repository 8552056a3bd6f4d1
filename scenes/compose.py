"""Scenes: ImageNet's problem at the size of a laptop.

Each scene shows two to four real objects (Fashion-MNIST's photographs of clothes) on one canvas and carries one
single label, that of one of its objects, as a person asked for one label would give: so a single label leaves out
what else is there, and a random crop often shows another object than its label says. Training and validation scenes
are made of disjoint photographs, and so is what the machine annotators learn from: nothing in their label maps comes
from the composer's knowledge of where things are.
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from relabel.errors import BadInput

PHOTOGRAPHS = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
FASHION_MNIST = ["top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# Without shirts and coats, which at this size are hard to tell from tops and pullovers even for a person. A class's
# index is its folder's position, as in ImageFolder.
CLASSES = sorted(set(FASHION_MNIST) - {"shirt", "coat"})
SPLITS = ("val", "train", "annotator")
CANVAS = 72  # pixels
SIDE = (22, 36)  # minimum and maximum side of an object, pixels
NUM_OBJECTS = (2, 4)
TRIES = 30  # of a place for an object, before the scene does without it
OPAQUE_FROM = 40  # gray level of a photograph
ANNOTATOR_SHARE = 24_000  # of the 48,000 training photographs: the annotators'; the rest make training scenes


def read_photographs(split: str, classes: Sequence[str] = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's `train` or `t10k` split: photographs uint8 `[N, 28, 28]`, indices `[N]` into `classes`.

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
            f"{error.filename}: no such file; apt-get install dataset-fashion-mnist, or set FASHION_MNIST to a folder "
            "with the four .gz files"
        ) from None
    index = np.array([classes.index(name) if name in classes else -1 for name in FASHION_MNIST])[labels]
    return images[index >= 0], index[index >= 0]


def photographs_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The photographs, and their classes, of the scenes of a split: "train", "val" or "annotator"; none is in two."""
    if split == "val":
        return read_photographs("t10k")
    share = slice(ANNOTATOR_SHARE) if split == "annotator" else slice(ANNOTATOR_SHARE, None)
    photographs, labels = read_photographs("train")
    return photographs[share], labels[share]


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dim, smooth, colored background: float32 `[size, size, 3]`, 0 to about 90."""
    coarse = rng.uniform(0, 90, (4, 4, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return smooth + rng.normal(0, 4, smooth.shape).astype(np.float32)


def paste(canvas: np.ndarray, photograph: np.ndarray, y: int, x: int, side: int, tint: np.ndarray) -> None:
    """Put a photograph, scaled to `side` pixels and tinted, on the canvas; its black surroundings stay clear."""
    resized = Image.fromarray(photograph).resize((side, side), Image.Resampling.BICUBIC)
    scaled = np.asarray(resized, np.float32)[..., None]
    opacity = (scaled / OPAQUE_FROM).clip(0, 1)
    region = canvas[y : y + side, x : x + side]
    region += opacity * (scaled * tint - region)


Scenery = Callable[[np.random.Generator, int], np.ndarray]


def compose(
    rng: np.random.Generator, photographs: np.ndarray, labels: np.ndarray, scenery: Scenery = background
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """One scene. The labeled object is drawn with probabilities in proportion to the objects' areas.

    Args:
        rng: on the same state, the same objects at the same places, whatever the scenery.
        photographs: uint8 `[N, 28, 28]`.
        labels: their classes, `[N]`.
        scenery: from a generator and a side in pixels to the background.

    Returns:
        uint8 `[CANVAS, CANVAS, 3]`, and its objects `(class, y, x, side)` in pixels, the labeled one first.
    """
    canvas = scenery(np.random.default_rng(rng.integers(2**63)), CANVAS)
    objects: list[tuple[int, int, int, int]] = []
    for y, x, side in arrange(rng):
        which = int(rng.integers(len(labels)))
        paste(canvas, photographs[which], y, x, side, rng.uniform(0.55, 1.0, 3).astype(np.float32))
        objects.append((int(labels[which]), y, x, side))
    area = np.array([side**2 for *_, side in objects], float)
    objects.insert(0, objects.pop(int(rng.choice(len(objects), p=area / area.sum()))))
    return canvas.clip(0, 255).astype(np.uint8), objects


def arrange(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """Frames `(y, x, side)` of a scene's objects, which may touch and overlap a little, as frames are not full."""
    while True:
        frames: list[tuple[int, int, int]] = []
        for side in rng.integers(*SIDE, rng.integers(*NUM_OBJECTS, endpoint=True), endpoint=True).tolist():
            for y, x in rng.integers(0, CANVAS - side, (TRIES, 2), endpoint=True).tolist():
                apart = (max(abs(2 * (y - b) + side - s), abs(2 * (x - c) + side - s)) for b, c, s in frames)
                if all(d > 0.84 * (side + s) for d, (*_, s) in zip(apart, frames, strict=True)):
                    frames.append((y, x, side))
                    break
        if len(frames) >= NUM_OBJECTS[0]:
            return frames


def read_scene(file: Path) -> np.ndarray:
    """The pixels of a scene, uint8 `[CANVAS, CANVAS, 3]`."""
    return np.asarray(Image.open(file))


def write_scenes(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` scenes as `root/split/CLASS/NAME.jpg`, and what they show as `root/split.json`.

    The JSON holds, in ImageFolder's order: `files`; `objects`, each `[class, y, x, side]`, the labeled one first;
    and `multilabels`, the sorted classes present; these are by name in `root/split_multilabels.json` too.
    """
    photographs, labels = photographs_of(split)
    rng = np.random.default_rng([seed, count, SPLITS.index(split)])
    scenes = []
    for name in CLASSES:
        (root / split / name).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), desc=f"{split} scenes", unit=" scenes", disable=None):
        pixels, objects = compose(rng, photographs, labels)
        file = f"{CLASSES[objects[0][0]]}/{i:06d}.jpg"
        Image.fromarray(pixels).save(root / split / file, quality=92)
        scenes.append((file, objects))
    scenes.sort()
    files = [file for file, _ in scenes]
    multilabels = [sorted({c for c, *_ in objects}) for _, objects in scenes]
    content = {"files": files, "objects": [objects for _, objects in scenes], "multilabels": multilabels}
    (root / f"{split}.json").write_text(json.dumps(content))
    present = {file: [CLASSES[c] for c in found] for file, found in zip(files, multilabels, strict=True)}
    (root / f"{split}_multilabels.json").write_text(json.dumps(present))
