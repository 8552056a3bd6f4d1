"""LabelPooling written from its formula: dense scatter, torchvision's roi_align, softmax. And inputs to try it on."""

import numpy as np
import torch
from ffcv_fields.label_map import pack_label_map
from hypothesis import strategies as st
from torchvision.ops import roi_align


def reference(label_maps: np.ndarray, boxes: np.ndarray, num_classes: int, temperature: float = 1.0) -> np.ndarray:
    """Targets `[B, C]` of packed maps `[B, 2, k, H, W]`, float32 throughout, as the official code computes them."""
    return torch.softmax(pooled_scores(label_maps, boxes, num_classes, 1).flatten(1) / temperature, 1).numpy()


def pooled_scores(label_maps: np.ndarray, boxes: np.ndarray, num_classes: int, output_size: int) -> torch.Tensor:
    """RoIAlign of the dense maps, `[B, C, output_size, output_size]`."""
    half = label_maps.dtype == np.int16
    batch, _, _, height, width = label_maps.shape
    scores = torch.from_numpy(np.ascontiguousarray(label_maps[:, 0]).view(np.float16 if half else np.float32)).float()
    classes = torch.from_numpy(label_maps[:, 1].astype(np.int64))
    dense = torch.zeros(batch, num_classes + 1, height, width)  # the last one takes the empty cells
    dense.scatter_(1, torch.where(classes < 0, num_classes, classes), scores)
    grid = torch.from_numpy(boxes) * torch.tensor([width, height, width, height]) - 0.5
    rois = torch.cat([torch.arange(batch)[:, None].float(), grid], 1)
    return roi_align(dense[:, :num_classes].contiguous(), rois, (output_size, output_size), 1.0, -1, False)


def random_maps(rng, batch, num_classes, top_k, height, width, score_dtype, empty=0.1):
    """Packed maps with distinct classes in each cell and a share of empty entries."""
    maps = []
    for _ in range(batch):
        scores = rng.normal(2, 5, (top_k, height, width)).astype(np.float32)
        classes = rng.random((num_classes, height, width)).argsort(0)[:top_k].astype(np.int64)
        classes[rng.random(classes.shape) < empty] = -1
        maps.append(pack_label_map(scores, classes, score_dtype))
    return np.stack(maps)


EDGES = [-0.3, -0.05, 0.0, 1e-6, 0.03, 1 / 15, 0.25, 0.5, 0.9667, 1 - 1e-6, 1.0, 1.05, 1.4]
coordinate = st.one_of(st.sampled_from(EDGES), st.floats(-0.5, 1.5, width=32))


@st.composite
def boxes(draw, batch):
    """Boxes anywhere at and over the borders, also of zero area and under one cell."""
    rows = []
    for _ in range(batch):
        (x1, x2), (y1, y2) = (sorted((draw(coordinate), draw(coordinate))) for _ in range(2))
        if draw(st.booleans()) and draw(st.booleans()):
            x2 = x1
        rows.append([x1, y1, x2, y2])
    return np.array(rows, np.float32)


@st.composite
def problems(draw):
    """(packed maps, boxes, num_classes)."""
    top_k = draw(st.sampled_from([1, 2, 5, 32]))
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    num_classes = draw(st.sampled_from([top_k, 40, 1000])) if top_k < 40 else 1000
    num_classes = max(num_classes, 2, top_k)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    score_dtype = draw(st.sampled_from(["float16", "float32"]))
    maps = random_maps(rng, 3, num_classes, top_k, height, width, score_dtype, draw(st.sampled_from([0.0, 0.3, 1.0])))
    return maps, draw(boxes(3)), num_classes
