"""All label maps of a folder of images: how they are stored is found out, or said, before any is used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import BadInput, BadSample
from .label_lists import Row
from .label_map_files import (
    LabelMapFormat,
    Source,
    find_label_maps,
    label_map_format,
    manifest_of,
    read_label_map,
    read_manifest,
    read_tensor,
)
from .orientation import orientation

LOOKED_AT = 4000  # maps from which the axis order and the kind of scores are found
FOR_SHAPE = 100
TOLERANCE = 2e-3  # of probabilities that were rounded to float16


@dataclass
class LabelMapSet:
    """The maps by key, and how to read them.

    `scores` is "logits" or "probabilities"; `index` gives, where the maps follow another class list, the index of each
    of their classes in the data's (None: they are the same); `remarks` say what was found out.
    """

    root: Path
    sources: dict[str, Source]
    format: LabelMapFormat
    scores: str
    index: np.ndarray | None = None
    remarks: list[str] = field(default_factory=list)

    def read(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and class indices int64 of the data's list, `[top_k, H, W]`, rows = the image's y.

        Raises:
            BadSample: see `read_label_map`.
        """
        if isinstance(source, Row):
            scores, indices = read_tensor(source).numpy()
            return scores, indices.astype(np.int64)
        scores, classes = read_label_map(source, self.format)
        return scores, classes if self.index is None else self.index[classes]


def open_label_maps(
    root: Path,
    classes: Sequence[str],
    axis_order: str = "auto",
    scores: str = "auto",
    folders: Sequence[str] | None = None,
) -> LabelMapSet:
    """Find the maps of a tree or an archive, and how they are stored.

    Args:
        classes: the class list of the images.
        axis_order: "yx", "xy", or "auto": as their manifest says, else as their asymmetry shows (`orientation`), else
            "yx".
        scores: "logits", "probabilities", or "auto": as their manifest says, else as their values show.
        folders: the class folders' names, where they are others than `classes`.

    Raises:
        BadSample: see `find_label_maps` and `label_map_format`.
        BadInput: what is said contradicts the manifest, or the maps name a class that `classes` does not have.
    """
    sources = find_label_maps(root, folders or classes)
    if root.suffix == ".tsv" and root.is_file():
        return _of_list(root, sources, len(classes))
    manifest = read_manifest(root) if root.is_dir() or root.is_file() else {}
    for name, said in (("axis_order", axis_order), ("scores", scores)):
        if said != "auto" and manifest.get(name, said) != said:
            raise BadSample(manifest_of(root), f"says {name} {manifest[name]}, not {said}; leave cfg.{name} at auto")
    looked_at = _read_some(list(sources.values()))
    order, remarks = _axis_order(root, looked_at, manifest.get("axis_order"), axis_order)
    kind = manifest.get("scores", scores) if scores == "auto" else scores
    if kind == "auto":
        kind = _kind_of_scores(root, looked_at)
        remarks.append(f"{root}: the scores are {kind}, as their values show")
    index = _class_index(manifest_of(root), manifest.get("classes"), classes)
    count = len(classes) if index is None else len(index)
    form = label_map_format(_spread(list(sources.values()), FOR_SHAPE), count, order)
    return LabelMapSet(root, sources, form, kind, index, remarks)


def _of_list(root: Path, sources: dict[str, Source], num_classes: int) -> LabelMapSet:
    """The maps of 1 x 1 cell of a list, whose classes were checked as it was read."""
    labels = next(source for source in sources.values() if isinstance(source, Row)).labels
    remarks = (
        [f"{root}: {labels.single:,} images without a class there keep their single label"] if labels.single else []
    )
    return LabelMapSet(
        root, sources, LabelMapFormat(labels.top_k, 1, 1, num_classes, "yx"), "probabilities", None, remarks
    )


def _spread(values: list, most: int) -> list:
    """At most so many of the values, from everywhere among them."""
    return [values[i] for i in np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)]


def _read_some(sources: list[Source]) -> list[np.ndarray]:
    """Scores `[top_k, first axis, second axis]` of some maps; those that cannot be read are left to the packing."""
    found = []
    for source in _spread(sources, LOOKED_AT):
        try:
            tensor = read_tensor(source)
        except BadSample:
            continue
        if tensor.dim() == 4 and tensor.shape[0] == 2 and tensor.is_floating_point() and tensor.numel():
            scores = tensor[0].detach().float().numpy()
            if np.isfinite(scores).all():
                found.append(scores)
    return found


def _axis_order(root: Path, maps: list[np.ndarray], in_manifest: str | None, given: str) -> tuple[str, list[str]]:
    """The axis order, and what there is to say of it."""
    shapes = [scores.shape for scores in maps]
    usual = max(set(shapes), key=shapes.count) if shapes else None
    found = orientation(scores.max(0) for scores in maps if scores.shape == usual)
    said = in_manifest or (given if given != "auto" else None)
    if said is None:
        if found.order is not None:
            return found.order, [f"{root}: axis order {found.order}, found from the maps ({found})"]
        return "yx", [
            f"{root}: the axis order cannot be told from the maps ({found}); they are read as yx, rows first; where "
            "they are stored transposed, say --cfg.axis_order=xy"
        ]
    if found.order not in (None, said):
        where = "their manifest says" if in_manifest else "was given"
        return said, [f"{root}: WARNING: axis order {said} {where}, but the maps look like {found.order} ({found})"]
    return said, []


def _kind_of_scores(root: Path, maps: list[np.ndarray]) -> str:
    """The kind that all maps of the usual shape have."""
    shapes = [scores.shape for scores in maps]
    usual = [scores for scores in maps if scores.shape == max(set(shapes), key=shapes.count)]
    logits = sum(bool(scores.min() < 0 or scores.max() > 1 + TOLERANCE) for scores in usual)
    if 2 * logits >= len(usual):
        return "logits"
    above = sum(bool(scores.sum(0).max() > 1 + TOLERANCE * len(scores)) for scores in usual)
    if logits or above:
        what = (
            f"{logits} of {len(usual)} maps hold logits" if logits else "all scores lie in 0..1, but sum to more than 1"
        )
        raise BadInput(f"{root}: {what}; say what they are: --cfg.scores=logits or --cfg.scores=probabilities")
    return "probabilities"


def _class_index(manifest: Path, of_maps: Sequence[str] | None, classes: Sequence[str]) -> np.ndarray | None:
    """The index in `classes` of each class of the maps; None: the same list, or not known."""
    if of_maps is None or tuple(of_maps) == tuple(classes):
        return None
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in of_maps if name not in index]
    if unknown:
        raise BadInput(
            f"{manifest}: the maps name {len(of_maps):,} classes, of which {unknown[0]!r} is none of the images' "
            f"{len(classes):,}; give the whole list as cfg.class_list, or for ImageNet-1k cfg.num_classes=1000"
        )
    return np.array([index[name] for name in of_maps], np.int64)
