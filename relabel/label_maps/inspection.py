"""Inspecting label maps: samples with their maps from a folder or a `.beton`, a quality report, an axis-order check."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv_fields import label_pooling
from ffcv_fields.label_map import pack_label_map, unpack_label_map
from ffcv.fields.rgb_image import IMAGE_MODES
from PIL import Image

from ..data.classes import IMAGENET_CLASSES, imagenet_classes
from ..data.dataset import open_dataset
from ..data.label_map_files import read_manifest
from ..data.label_map_set import open_label_maps
from ..data.storage import map_files
from ..errors import BadInput
from ..sources.opening import open_source
from .annotator import DenseAnnotator, Preprocessing

MULTI_LABEL_SHARE = 0.1  # of the cells that a second class must be best at


@dataclass(frozen=True)
class Sample:
    """An image, where it comes from, its single label, and its label map.

    `scores` float32 and `classes` int64 are `[top_k, H, W]`, rows = y; `kind` of scores: "logits" or "probabilities".
    """

    name: str
    label: int
    image: Image.Image
    scores: np.ndarray
    classes: np.ndarray
    kind: str = "logits"

    def targets(self, crop_boxes: np.ndarray, num_classes: int, temperature: float) -> np.ndarray:
        """The pooled soft targets of crops, `(x1, y1, x2, y2)` in fractions: float32 `[N, num_classes]`."""
        return pool_one(
            self.scores, self.classes, crop_boxes, num_classes, "float32", temperature, softmax=self.kind == "logits"
        )


def pool_one(
    scores: np.ndarray, classes: np.ndarray, crop_boxes: np.ndarray, num_classes: int, score_dtype: str,
    temperature: float = 1.0, softmax: bool = True,
) -> np.ndarray:  # fmt: skip
    """The pooled soft targets of several crops of one image: float32 `[N, num_classes]`.

    Args:
        scores, classes: the image's label map, float32 and int64 `[top_k, H, W]`, rows = y.
        crop_boxes: `[N, 4]`, `(x1, y1, x2, y2)` in fractions.
        score_dtype: as the map is stored for training, "float16" or "float32".
    """
    packed = torch.from_numpy(pack_label_map(scores, classes, score_dtype))
    maps = packed.expand(len(crop_boxes), *packed.shape).contiguous()
    boxes = torch.from_numpy(crop_boxes.astype(np.float32))
    return label_pooling(maps, boxes, num_classes, temperature=temperature, softmax=softmax).numpy()


class Samples:
    """The images with label maps of a source, or of a `.beton` or its shards, in order.

    `classes` are the folders'; `map_classes` those that the maps name; `label_of` is the index in `map_classes` of each
    of `classes` (-1: it has none); `names` are the samples' paths below the folder that they come from, `numbers` their
    places among all of the folder's or the file's; `packed`: they are of a `.beton`, whose single labels are `labels`
    and may be replaced; `remarks` say what was found out of the maps.

    Args:
        images: the image folder (with `label_maps`), or a `.beton`.
        label_maps: the tree or archive; empty for a `.beton`.
        axis_order: of the tree or archive: "auto", "xy" or "yx".
        num_classes: of the annotator, where the maps' manifest does not name its classes.

    Raises:
        BadInput: as the readers of either do.
    """

    def __init__(
        self, images: str, label_maps: str = "", axis_order: str = "auto", num_classes: int = IMAGENET_CLASSES
    ) -> None:
        self.remarks: list[str] = []
        self.packed = not label_maps
        if label_maps:
            self._open_source(images, Path(label_maps), axis_order, num_classes)
        else:
            self._open_beton(images)
        index = {name: i for i, name in enumerate(self.map_classes)}
        self.label_of = np.array([index.get(name, -1) for name in self.classes], np.int64)

    def _open_source(self, images: str, label_maps: Path, axis_order: str, num_classes: int) -> None:
        source = open_source(images)
        self.classes, named = source.classes, read_manifest(label_maps).get("classes")
        if named is None:
            unnamed = tuple(f"class {i}" for i in range(num_classes))
            named = self.classes if len(self.classes) == num_classes else unnamed
            named = imagenet_classes() if num_classes == IMAGENET_CLASSES else named
        self.map_classes = tuple(named)
        maps = open_label_maps(label_maps, self.map_classes, axis_order, folders=self.classes)
        self._maps, self.axis_order, self.scores = maps, maps.format.axis_order, maps.scores
        self.total, self.remarks = len(source.samples), maps.remarks
        self.numbers = [i for i, sample in enumerate(source.samples) if sample.key in maps.sources]
        self._entries: list[Any] = [source.samples[i] for i in self.numbers]
        self.names = [sample.name for sample in self._entries]
        if not self._entries:
            raise BadInput(f"{label_maps}: holds no label map of an image in {images}")
        self._source, self._read = source, self._from_source

    def _open_beton(self, path: str) -> None:
        dataset = open_dataset(path)
        field = dataset.handlers.get("label_map")
        if field is None:
            raise BadInput(f"{path}: holds no label maps")
        self._field, self.axis_order, self.scores = field, field.imported_axis_order, field.scores
        self._data, self.total = map_files(dataset), dataset.num_samples
        self._columns = {name: dataset.column(name) for name in dataset.field_names}
        self.labels = self._columns["label"]
        self._entries = self.numbers = np.flatnonzero(self._columns["label_map"]["present"] == 1).tolist()
        contents, samples = dataset.contents, dataset.sample_list()
        self.classes = contents.classes if contents else tuple(f"class {i}" for i in range(field.num_classes))
        self.map_classes = self.classes
        self._names = samples.names if samples else tuple(f"sample {i}" for i in range(self.total))
        self.names = [self._names[i] for i in self.numbers]
        self._sizes = dict(zip(dataset.addresses.tolist(), dataset.sizes.tolist(), strict=True))
        self._read = self._from_beton

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        return self._read(self._entries[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _from_source(self, entry):
        scores, classes = self._maps.read(self._maps.sources[entry.key])
        name = str(self._source.place(entry.index))
        with Image.open(BytesIO(self._source.read(entry.index))) as image:
            return Sample(name, entry.label, image.convert("RGB"), scores, classes, self.scores)

    def _from_beton(self, index):
        image, label_map = self._columns["image"][index], self._columns["label_map"][index]
        start = int(image["data_ptr"])
        pixels = self._data[start : start + self._sizes[start]].tobytes()
        if image["mode"] == IMAGE_MODES["raw"]:
            picture = Image.frombytes("RGB", (int(image["width"]), int(image["height"])), pixels)
        else:
            picture = Image.open(BytesIO(pixels)).convert("RGB")
        start, field = int(label_map["data_ptr"]), self._field
        packed = np.array(self._data[start : start + field.nbytes]).view(field.packed_dtype).reshape(field.packed_shape)
        scores, classes = unpack_label_map(packed)
        return Sample(self._names[index], int(self.labels[index]), picture, scores, classes, self.scores)


def quality(samples: Samples, temperature: float, most: int) -> dict[str, float]:
    """Figures about the maps of the first `most` samples.

    Args:
        temperature: of the pooled targets.

    Returns:
        `coverage`, `top_1`, `top_5` (fraction of images whose single label is the pooled whole image's best class,
        among its five best), `multi_label` (a second class is best at a tenth of the cells or more): percent;
        `entropy` of the pooled target, in bits; `images` inspected.
    """
    hits, entropies, several = np.zeros((0, 2)), [], []
    whole = np.array([[0.0, 0, 1, 1]])
    for i in range(min(most, len(samples))):
        sample = samples[i]
        target = sample.targets(whole, len(samples.map_classes), temperature)[0].astype(np.float64)
        best, label = np.argsort(-target)[:5], samples.label_of[sample.label]
        if label >= 0:
            hits = np.append(hits, [[best[0] == label, label in best]], axis=0)
        entropies.append(-(target * np.log2(target.clip(1e-30))).sum())
        counts = np.sort(np.unique(sample.classes[sample.scores.argmax(0), *np.indices(sample.scores.shape[1:])],
                                   return_counts=True)[1])  # fmt: skip
        several.append(len(counts) > 1 and counts[-2] >= MULTI_LABEL_SHARE * counts.sum())
    top_1, top_5 = 100 * hits.mean(0) if len(hits) else (float("nan"),) * 2
    return {
        "coverage": 100 * len(samples) / samples.total,
        "top_1": float(top_1),
        "top_5": float(top_5),
        "multi_label": 100 * float(np.mean(several)),
        "entropy": float(np.mean(entropies)),
        "images": len(entropies),
    }


@torch.inference_mode()
def axis_agreement(
    samples: Samples, annotator: DenseAnnotator, preprocessing: Preprocessing, most: int
) -> tuple[float, float]:
    """How well the maps fit an annotator's, as they are read and transposed: a wrong axis order is the other way round.

    Returns:
        The mean probability that the annotator gives, in each cell, to the classes that the map lists there: of
        the maps as read, and of the maps with rows and columns exchanged.
    """
    fits = []
    for i in range(min(most, len(samples))):
        sample = samples[i]
        side = (preprocessing.image_size,) * 2
        pixels = np.array(sample.image.resize(side, Image.Resampling.BICUBIC))
        logits = annotator(preprocessing.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        for classes in (sample.classes, sample.classes.swapaxes(1, 2)):
            probabilities = torch.nn.functional.adaptive_avg_pool2d(logits, classes.shape[1:])[0].softmax(0)
            listed = torch.from_numpy(np.ascontiguousarray(classes)).clamp(0, len(probabilities) - 1)
            fits.append(probabilities.gather(0, listed).sum(0).mean().item())
    as_read, transposed = np.reshape(fits, (-1, 2)).mean(0)
    return float(as_read), float(transposed)
