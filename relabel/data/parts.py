"""Which samples a `.beton` holds, in which order, and what tells one packing's shards from another's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, BadSample
from ..sources.base import ImageSource, Sample
from .contents import Part
from .label_map_set import LabelMapSet
from .names import path_order
from .order import packing_order
from .settings import Packing

PROBES = 64  # samples whose contents stand for all: other maps or images of the same names are other ones throughout
# Settings that may differ from shard to shard: where, how fast, and how strictly.
_OWN = (
    "data_dir", "val_labels", "label_map_dir", "class_list", "write_path", "overwrite", "num_workers", "chunk_size",
    "on_error", "max_skipped", "min_agreement", "shard",
)  # fmt: skip


def number_of(settings: Packing) -> tuple[int, int]:
    """`cfg.shard` as number and count; 1 of 1 where all is packed into one file."""
    number, _, count = settings.shard.partition("/")
    return (int(number), int(count)) if number else (1, 1)


def path_of(settings: Packing) -> Path:
    """The file to write: of a shard, say the third of 16, `NAME-03-of-16.beton`."""
    path, (number, count) = Path(settings.write_path), number_of(settings)
    return path.with_name(f"{path.stem}-{number:0{len(str(count))}}-of-{count}{path.suffix}") if count > 1 else path


def in_order(source: ImageSource, samples: list[Sample], settings: Packing) -> list[Sample]:
    """The samples of all shards, in the order that comes from their names, and the source's groups, alone."""
    samples = sorted(samples, key=lambda sample: path_order(sample.name))
    samples = samples[: settings.subset] if settings.subset >= 0 else samples
    if settings.order == "sorted":
        return samples
    groups = None if source.groups is None else source.groups[[sample.index for sample in samples]]
    return [samples[i] for i in packing_order(len(samples), settings.seed, groups).tolist()]


def bounds_of(total: int, settings: Packing) -> tuple[int, int]:
    """The first of `total` samples that belong to this shard, and the first of the next.

    Raises:
        BadInput: there are fewer samples than shards.
    """
    number, count = number_of(settings)
    if total < count:
        raise BadInput(f"{settings.data_dir}: has {total:,} images, fewer than cfg.shard={settings.shard} has shards")
    return total * (number - 1) // count, total * number // count


def part_of(
    settings: Packing, source: ImageSource, samples: list[Sample], maps: LabelMapSet | None, fields: dict[str, Any]
) -> Part:
    """Which part this file is, with the digests that all parts share.

    Args:
        samples: of all parts, in order.
        fields: FFCV's, by name.
    """
    number, count = number_of(settings)
    listed = hashlib.sha256(json.dumps(source.classes).encode())
    for sample in samples:
        listed.update(f"{sample.name}\0{sample.label}\n".encode(errors="surrogateescape"))
    whole = hashlib.sha256(listed.digest())
    shared = {key: value for key, value in vars(settings).items() if key not in _OWN}
    whole.update(json.dumps(shared, sort_keys=True).encode())
    for name, field in fields.items():
        whole.update(name.encode() + field.to_binary().tobytes())
    for i in np.linspace(0, len(samples) - 1, min(PROBES, len(samples)) if count > 1 else 0).astype(int).tolist():
        whole.update(_contents(source, samples[i], maps))
    return Part(number, count, listed.hexdigest(), whole.hexdigest())


def _contents(source: ImageSource, sample: Sample, maps: LabelMapSet | None) -> bytes:
    try:
        data = source.read(sample.index)
        return data if maps is None else data + b"".join(a.tobytes() for a in maps.read(maps.sources[sample.key]))
    except BadSample:
        return b""  # whoever packs it says so
