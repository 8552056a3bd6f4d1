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
from PIL import Image
from tqdm import tqdm

from relabel.errors import BadInput

PHOTOGRAPHS = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
FASHION_MNIST = ["top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# Without shirts and coats, which at this size are hard to tell from tops and pullovers even for a person. A class's
# index is its folder's position, as in ImageFolder.
CLASSES = sorted(set(FASHION_MNIST) - {"shirt", "coat"})
CANVAS = 72  # pixels
SIDE = (26, 44)  # minimum and maximum side of an object, pixels
NUM_OBJECTS = (2, 4)
OPAQUE_FROM = 40  # gray level of a photograph
ANNOTATOR_SHARE = 24_000  # of the 48,000 training photographs: the annotator's; the rest make scenes


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
            f"{error.filename}: no such file; apt-get install dataset-fashion-mnist, or set FASHION_MNIST to a folder "
            "with the four .gz files"
        ) from None
    index = np.array([CLASSES.index(name) if name in CLASSES else -1 for name in FASHION_MNIST])[labels]
    return images[index >= 0], index[index >= 0]


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dim, smooth, colored background: float32 `[size, size, 3]`, 0 to about 90."""
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
    """One scene. The labeled object is drawn with probabilities in proportion to the objects' areas.

    Returns:
        uint8 `[CANVAS, CANVAS, 3]`, and its objects `(class, y, x, side)` in pixels, the labeled one first.
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

    The JSON holds, in ImageFolder's order: `files`; `objects`, each `[class, y, x, side]`, the labeled one first;
    and `multilabels`, the sorted classes present; these are by name in `root/split_multilabels.json` too.
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
    files = [file for file, _ in scenes]
    multilabels = [sorted({c for c, *_ in objects}) for _, objects in scenes]
    content = {"files": files, "objects": [objects for _, objects in scenes], "multilabels": multilabels}
    (root / f"{split}.json").write_text(json.dumps(content))
    present = {file: [CLASSES[c] for c in found] for file, found in zip(files, multilabels, strict=True)}
    (root / f"{split}_multilabels.json").write_text(json.dumps(present))
