"""Images and annotations in COCO's format, every value checked.

    FOLDER/train2017/000000000009.jpg ...
    FOLDER/annotations/instances_train2017.json

A category is its id in the file, which may skip numbers (COCO's 80 run from 1 to 90); the network's label of it is its
place among the ids, counted from 1, as 0 is the background. A box is `[x, y, width, height]` there, `x1, y1, x2, y2`
here, in pixels. Annotations of crowds (`iscrowd`) are not trained on; the evaluation ignores what is detected in them.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, BadSample

SLACK = 1.0  # pixels that a box may exceed its image by: annotators' rounding
LEAST_SIDE = 1.0  # pixels: smaller boxes cannot be trained on
LEAST_OVERLAP = 0.5  # IoU of a box and its polygons' extent


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image and what is trained on it.

    `boxes`: float32 `[N, 4]`, x1, y1, x2, y2 in pixels, inside the image; `labels`: int64 `[N]`, from 1;
    `segmentations`: the N annotations' polygons or run lengths as JSON; `annotations`: their ids.
    """

    id: int
    file: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    annotations: tuple[int, ...] = ()
    segmentations: bytes = b"[]"


@dataclass(frozen=True)
class CocoSet:
    """A set's images in the file's order, and its `categories`, id -> name in ascending order.

    `content` is the annotation file as COCO's own evaluation takes it; `digest` its SHA-256; `remarks` say what is not
    trained on.
    """

    file: Path
    images: list[CocoImage]
    categories: dict[int, str]
    content: dict[str, Any]
    digest: str
    remarks: list[str] = field(default_factory=list)

    @property
    def annotated(self) -> np.ndarray:
        """Places in `images` of those with a box to train on, int64 `[N]`."""
        return np.flatnonzero([len(image.labels) > 0 for image in self.images])


def read_coco(folder: Path, name: str, masks: bool, evaluated: bool = False) -> CocoSet:
    """The set `name` of a folder in COCO's layout.

    Args:
        masks: each annotation must have a segmentation.
        evaluated: average precision is measured on it, which takes areas.

    Raises:
        BadInput: no such file; what is no number, names no image or category, or lies outside its image.
        BadSample: an image is missing.
    """
    file, images = folder / "annotations" / f"instances_{name}.json", folder / name
    if not file.is_file() or not images.is_dir():
        missing = images if file.is_file() else file
        raise BadInput(
            f"{missing}: is not there; data.folder must hold SET/ with the images and annotations/instances_SET.json, "
            "where data.train and data.val name each SET"
        )
    raw = file.read_bytes()
    try:
        content = json.loads(raw)
        parts = {key: _by_id(content[key], f"{file}: {key}") for key in ("categories", "images", "annotations")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file}: not COCO's annotations of instances ({type(error).__name__}: {error})") from None
    categories = _categories(parts["categories"], file)
    reader = _Reader(file, images, sorted(categories), masks, evaluated)
    found = reader.read(parts["images"], parts["annotations"])
    if not any(len(image.labels) for image in found):
        raise BadInput(f"{file}: no image has a box to train on ({'; '.join(reader.remarks) or 'no annotations'})")
    kept = content if evaluated else {}  # COCO's training annotations take gigabytes
    return CocoSet(file, found, categories, kept, hashlib.sha256(raw).hexdigest(), reader.remarks)


def check_same_categories(train: CocoSet, val: CocoSet) -> None:
    """Raise BadInput where a category id names something else, or nothing, in the other set."""
    for number in sorted(train.categories.keys() | val.categories.keys()):
        ours, theirs = train.categories.get(number), val.categories.get(number)
        if ours != theirs:
            raise BadInput(
                f"{val.file}: category {number} is {theirs!r}; in {train.file.name} it is {ours!r}: both must have the "
                "same categories"
            )


def _by_id(entries: Any, where: str) -> dict[int, dict[str, Any]]:
    if not isinstance(entries, list):
        raise BadInput(f"{where}: must be a list, found {type(entries).__name__}")
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadInput(f"{where}: {str(entry)[:80]} has no id that is an integer")
        if number in found:
            raise BadInput(f"{where}: two have the id {number}")
        found[number] = entry
    return found


def _categories(entries: dict[int, dict[str, Any]], file: Path) -> dict[int, str]:
    names = {number: str(entries[number].get("name", "")) for number in sorted(entries)}
    for number, name in names.items():
        if not name or list(names.values()).count(name) > 1:
            raise BadInput(f"{file}: category {number} is named {name!r}; each must have a name of its own")
    if not names:
        raise BadInput(f"{file}: has no categories")
    return names


class _Reader:
    """Reads a file's images and annotations, and counts what is left out of training."""

    def __init__(self, file: Path, folder: Path, categories: list[int], masks: bool, evaluated: bool) -> None:
        self.file, self.folder, self.masks, self.evaluated = file, folder, masks, evaluated
        self.labels = {number: 1 + place for place, number in enumerate(categories)}
        self.remarks: list[str] = []
        self.counts = dict.fromkeys(("crowd", "small", "shapeless", "beyond", "elsewhere"), 0)

    def read(self, images: dict[int, dict], annotations: dict[int, dict]) -> list[CocoImage]:
        files = self._files(images)
        of_image: dict[int, list[dict]] = {number: [] for number in images}
        for number, annotation in annotations.items():
            image, category = annotation.get("image_id"), annotation.get("category_id")
            if image not in of_image or category not in self.labels:
                key, value = ("image_id", image) if image not in of_image else ("category_id", category)
                raise BadInput(f"{self.file}: annotation {number}: {key} is {value!r}, which is not in the file")
            of_image[image].append(annotation)
        found = [self._image(entry, files[number], of_image[number]) for number, entry in images.items()]
        self._say(len(annotations), sum(not len(image.labels) for image in found), len(found))
        return found

    def _files(self, images):
        """Each image's file; all must be there."""
        there = {path.name for path in self.folder.iterdir()}
        files: dict[int, Path] = {}
        owners: dict[str, int] = {}
        for number, image in images.items():
            name = image.get("file_name")
            if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise BadInput(
                    f"{self.file}: image {number}: file_name is {name!r}; must be a path below {self.folder}"
                )
            if owners.setdefault(name, number) != number:
                raise BadInput(f"{self.file}: images {owners[name]} and {number} have one file_name, {name}")
            files[number] = self.folder / name
            if name not in there and not files[number].is_file():
                missing = sum(not (self.folder / str(i.get("file_name"))).is_file() for i in images.values())
                raise BadSample(files[number], f"is missing; so are {missing:,} of the {len(images):,} images that "
                                f"{self.file.name} names")  # fmt: skip
        return files

    def _image(self, entry: dict, file: Path, annotations: list[dict]) -> CocoImage:
        width, height = entry.get("width"), entry.get("height")
        if not all(isinstance(side, int) and side > 0 for side in (width, height)):
            raise BadInput(f"{self.file}: image {entry['id']}: is {width!r} x {height!r}; must be whole pixels")
        assert isinstance(width, int) and isinstance(height, int)
        kept: list[tuple[dict, list[float], Any]] = []
        for annotation in annotations:
            where = f"{self.file}: annotation {annotation['id']} of {file.name}"
            box = self._box(annotation.get("bbox"), width, height, where)
            crowd = annotation.get("iscrowd", 0)
            if crowd not in (0, 1):
                raise BadInput(f"{where}: iscrowd is {crowd!r}; must be 0 or 1")
            if self.evaluated:
                _check_area(annotation, where)
                annotation["iscrowd"] = crowd
            if crowd:
                self.counts["crowd"] += 1
            elif box[2] - box[0] < LEAST_SIDE or box[3] - box[1] < LEAST_SIDE:
                self.counts["small"] += 1
            else:
                shape = self._segmentation(annotation, box, (height, width), where) if self.masks else []
                if self.masks and not shape:
                    self.counts["shapeless"] += 1
                else:
                    kept.append((annotation, box, shape))
        return CocoImage(
            entry["id"], file, width, height,
            np.array([box for _, box, _ in kept], np.float32).reshape(-1, 4),
            np.array([self.labels[annotation["category_id"]] for annotation, _, _ in kept], np.int64),
            tuple(annotation["id"] for annotation, _, _ in kept),
            json.dumps([shape for _, _, shape in kept]).encode() if self.masks else b"[]",
        )  # fmt: skip

    def _box(self, box: Any, width: int, height: int, where: str) -> list[float]:
        """The corners, clipped to the image."""
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)) or min(box[2:]) < 0:
            raise BadInput(f"{where}: bbox is {box!r}; must be [x, y, width, height] in pixels")
        x, y, w, h = box
        if x > width or y > height or x + w < 0 or y + h < 0:
            raise BadInput(
                f"{where}: bbox is {box}, outside the image of {width} x {height}; must be [x, y, width, height] in "
                "pixels"
            )
        if max(-x, -y, x + w - width, y + h - height) > SLACK:
            self.counts["beyond"] += 1
        return [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]

    def _segmentation(self, annotation: dict, box: list[float], size: tuple[int, int], where: str) -> Any:
        """The polygons or run lengths of an annotation; empty: there is no area in them."""
        shape = annotation.get("segmentation")
        if isinstance(shape, dict):
            counts = shape.get("counts")
            whole = isinstance(counts, str) or (isinstance(counts, list) and sum(counts) == math.prod(size))
            if shape.get("size") != list(size) or not whole:
                raise BadInput(f"{where}: its run lengths are of a mask of {shape.get('size')}; must be {list(size)}")
            return shape
        if not isinstance(shape, list) or not all(isinstance(p, list) and all(map(_finite, p)) for p in shape):
            raise BadInput(
                f"{where}: segmentation is {str(shape)[:60]}; must be polygons or run lengths (without masks: "
                "--model.detector=faster_rcnn)"
            )
        polygons = [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if polygons:
            xs, ys = ([v for polygon in polygons for v in polygon[first::2]] for first in (0, 1))
            if _iou(box, [min(xs), min(ys), max(xs), max(ys)]) < LEAST_OVERLAP:
                self.counts["elsewhere"] += 1
        return polygons

    def _say(self, annotations: int, empty: int, images: int) -> None:
        counts = self.counts
        few = max(annotations // 100, min(10, annotations // 10))
        faults: list[tuple[str, str]] = [
            ("beyond", "boxes exceed their image by more than a pixel: bbox must be [x, y, width, height] in pixels"),
            ("small", "boxes are narrower than a pixel: bbox must be in pixels, not in fractions of the image"),
            ("elsewhere", "segmentations lie elsewhere than their bbox: polygons must be [x1, y1, x2, ...] in pixels"),
            ("shapeless", "segmentations have no polygon of three points or more"),
        ]  # fmt: skip
        for key, what in faults:
            if counts[key] > few:
                raise BadInput(f"{self.file}: {counts[key]:,} of {annotations:,} {what}")
        says: dict[str, Callable[[int], str]] = {
            "crowd": lambda n: f"{n:,} annotations of crowds are not trained on",
            "small": lambda n: f"{n:,} boxes narrower than a pixel are not trained on",
            "shapeless": lambda n: f"{n:,} annotations without a polygon are not trained on",
            "beyond": lambda n: f"{n:,} boxes are clipped to their image",
            "elsewhere": lambda n: f"{n:,} segmentations lie elsewhere than their boxes",
        }
        self.remarks += [f"{self.file.name}: {say(counts[key])}" for key, say in says.items() if counts[key]]
        if empty:
            self.remarks.append(f"{self.file.name}: {empty:,} of {images:,} images have no box to train on")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_area(annotation: dict, where: str) -> None:
    area = annotation.get("area")
    if not _finite(area) or area < 0:  # type: ignore[operator]
        raise BadInput(
            f"{where}: area is {area!r}; the average precision of small, medium and large objects needs it: the mask's "
            "pixels, or width x height"
        )


def _iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / max(areas - width * height, 1e-9)
