"""Scenes in COCO's format, with the boxes and masks that the composer knows: for detectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from relabel.files import write_text

from .compose import CANVAS, CLASSES, OPAQUE_FROM, SPLITS, compose, photographs_of

CATEGORIES = [{"id": 1 + i, "name": name} for i, name in enumerate(CLASSES)]


def write_coco_scenes(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` scenes of a split as `root/SPLIT/*.png` and `root/annotations/instances_SPLIT.json`.

    An object's mask is where its photograph is at least half opaque, also where another object lies over it; its box
    is the mask's.
    """
    photographs, labels = photographs_of(split)
    rng = np.random.default_rng([seed, count, SPLITS.index(split)])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for folder in (root / split, root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels, objects = compose(
            rng, photographs, np.arange(len(labels))
        )  # the photographs' numbers for their classes
        Image.fromarray(pixels).save(root / split / f"{i:06d}.png")
        images.append({"id": i, "file_name": f"{i:06d}.png", "width": CANVAS, "height": CANVAS})
        for which, y, x, side in objects:
            mask = np.zeros((CANVAS, CANVAS), np.uint8, order="F")
            resized = Image.fromarray(photographs[which]).resize((side, side), Image.Resampling.BICUBIC)
            mask[y : y + side, x : x + side] = np.asarray(resized) >= OPAQUE_FROM / 2
            rle = coco_mask.encode(mask)
            annotations.append({
                "id": 1 + len(annotations), "image_id": i, "category_id": 1 + int(labels[which]), "iscrowd": 0,
                "bbox": coco_mask.toBbox(rle).tolist(), "area": int(coco_mask.area(rle)),
                "segmentation": {"size": [CANVAS, CANVAS], "counts": rle["counts"].decode()},
            })  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content))
