"""A small set in COCO's layout: bright rectangles of two kinds on noise, category ids that skip numbers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
CATEGORIES = [{"id": 90, "name": "tall"}, {"id": 7, "name": "wide"}]  # not in ascending order


def polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def write_coco(root: Path, name: str, count: int, seed: int = 0) -> dict:
    """`count` images with two objects each, and one without any; returns the annotations as they stand in the file."""
    rng, images, annotations = np.random.default_rng(seed), [], []
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(count + 1):
        pixels = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        images.append({"id": 1000 - i, "file_name": f"{i:03d}.png", "width": WIDTH, "height": HEIGHT})
        for category, (w, h), color in ((7, (36, 18), (250, 40, 40)), (90, (16, 40), (40, 250, 40))) * (i < count):
            x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
            pixels[y : y + h, x : x + w] = color
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 1000 - i, "category_id": category, "bbox": [x, y, w, h],
                 "area": w * h, "iscrowd": 0, "segmentation": [polygon(x, y, w, h)]}
            )  # fmt: skip
        Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_annotations(root, name, content)
    return content


def write_annotations(root: Path, name: str, content: dict) -> None:
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
