"""The machine annotators of Scenes: their network, the label maps that they make, and how good these are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from relabel.data.label_map_files import read_tensor
from relabel.label_maps.annotator import DenseAnnotator, Preprocessing
from relabel.label_maps.generator import Generation, Tree, generate
from relabel.label_maps.inspection import pool_one
from relabel.precision import precision_of
from relabel.sources.opening import open_source

from .compose import CANVAS, CLASSES

MAP_SIZE = 15


class Annotator(nn.Module):
    """A small network, images `[B, 3, S, S]` -> logits `[B, C]`: convolutions, global average pooling, a linear layer.

    Args:
        image_size: side of the images in pixels that it was made for.
        layers: channels and stride of each convolution.
    """

    def __init__(self, image_size: int, layers: list[tuple[int, int]]) -> None:
        super().__init__()
        inputs = [3, *(channels for channels, _ in layers)]
        self.input = AnnotatorInput(image_size)
        self.features = nn.Sequential(
            *(_Convolution(n, *layer) for n, layer in zip(inputs, layers, strict=False)),
        )
        self.head = nn.Linear(inputs[-1], len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


class _Convolution(nn.Module):
    """3x3 convolution, batch norm, ReLU; with the input added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # Zero padding would let the network see the border; a scene's border means nothing.
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class AnnotatorInput(Preprocessing):
    """Pixels 0..255 `[B, 3, S, S]` as an annotator takes them."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        return (images / 128 - 0.5).contiguous(memory_format=torch.channels_last)


def annotate(annotator: Annotator, images: Path, out: Path) -> None:
    """Write a label map for each image of a folder, by the product's own generator."""
    source = open_source(images)
    manifest: dict[str, Any] = {"model": "Scenes' annotator", "axis_order": "yx", "top_k": 5, "size": MAP_SIZE}
    manifest |= {"scores": "logits", "classes": CLASSES}
    store = Tree(out, [sample.name for sample in source.samples], manifest)
    store.prepare()
    dense, precision = DenseAnnotator(annotator, annotator.input.image_size), precision_of("fp32", torch.device("cpu"))
    todo = store.missing()
    if todo:
        generate(dense, annotator.input, source, todo, store, Generation(size=MAP_SIZE), precision)


def quality(layout_file: Path, label_maps: Path) -> dict[str, float]:
    """How good the label maps of a split are, in percent, by what the composer knows.

    Args:
        layout_file: the split's JSON.
        label_maps: the folder of its label maps.

    Returns:
        `top_1`: whole scenes whose best class, pooled over the map, is the single label; `multilabel`: is the class of
        any object; `localization`: of the cells whose center is in the middle half of an object's frame, those whose
        best class is that object's.
    """
    layout, whole = json.loads(layout_file.read_text()), np.array([[0.0, 0.0, 1.0, 1.0]])
    centers = (np.arange(MAP_SIZE) + 0.5) * CANVAS / MAP_SIZE
    top_1, multilabel, cells = list[bool](), list[bool](), list[np.ndarray]()
    for file, objects in zip(layout["files"], layout["objects"], strict=True):
        scores, indices = read_tensor((label_maps / file).with_suffix(".pt")).numpy()
        classes = indices.astype(np.int64)
        best = pool_one(scores, classes, whole, len(CLASSES), "float16")[0].argmax()
        top_1.append(best == objects[0][0])
        multilabel.append(best in [c for c, *_ in objects])
        for c, y, x, side in objects:
            rows, columns = (np.abs(centers - start - side / 2) < side / 4 for start in (y, x))
            cells.append(classes[0][rows][:, columns].ravel() == c)
    shares = {"top_1": np.mean(top_1), "multilabel": np.mean(multilabel), "localization": np.concatenate(cells).mean()}
    return {name: 100 * float(share) for name, share in shares.items()}
