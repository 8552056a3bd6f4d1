"""Packing a folder of images, and the label maps of its images, into one `.beton`."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields import LabelMapField, image_field, pack_label_map
from ffcv.fields import IntField

from ..errors import BadInput, BadSample, listed
from ..processes import started_by_torchrun
from ..sources.base import ClassChoice, ImageSource, Sample, by_key
from ..sources.opening import open_source, split_of
from ..stopping import sigterm_unwinds
from .agreement import Agreement
from .apart import pack_apart
from .classes import read_class_list
from .contents import Contents
from .dataset import is_one_file
from .images import Stored, to_be_stored
from .label_map_files import Source
from .label_map_set import LabelMapSet, open_label_maps
from .parts import bounds_of, in_order, part_of, path_of
from .provenance import differences, provenance_of
from .settings import Packing
from .writer import Packed, Workers, write_beton

ALWAYS_SKIPPED = 10  # bad samples, or half of a small set, may be left out whatever share they are


def pack(settings: Packing) -> list[BadSample]:
    """Write the `.beton` and, where samples were left out, the list of these with reasons beside it, and return it.

    Its workers are forked from this process, which should have no threads (`cores.ONE_THREAD`); else `pack_apart`.

    Raises:
        BadInput: bad data or a path that cannot be used; nothing was written.
        WorkerFailed: a worker process died.
    """
    path = path_of(settings)
    if path.exists() and settings.overwrite == "no":
        raise BadSample(path, "exists already; --cfg.overwrite=yes replaces it")
    if not path.parent.is_dir():
        raise BadSample(path.parent, "is not a folder; make it first")
    given = read_class_list(settings.class_list) if settings.class_list else None
    source = open_source(settings.data_dir, ClassChoice(settings.num_classes, given), settings.val_labels)
    print(f"{source.root}: {source.what}, {len(source.samples):,} images of {len(source.classes):,} classes")
    samples, maps, problems = source.samples, None, list[BadSample]()
    if settings.label_map_dir:
        maps = open_label_maps(Path(settings.label_map_dir), source.classes, settings.axis_order, settings.scores)
        samples, problems = match(source, maps)
        if problems and settings.on_error == "stop":
            raise BadSample(
                problems[0].file, f"{problems[0].reason}{_others(problems)}; --cfg.on_error=skip leaves such files out"
            )
        if not samples:
            raise BadSample(maps.root, f"holds no label map of an image in {source.root}")
    for remark in source.remarks + (maps.remarks if maps else []):
        print(remark)
    whole = in_order(source, samples, settings)
    if not whole:
        raise BadSample(source.root, "no image is left to pack")
    first, end = bounds_of(len(whole), settings)
    samples, fields = whole[first:end], _fields(settings, maps, len(source.classes))
    part = part_of(settings, source, whole, maps, fields)

    def describe(packed: Packed) -> tuple[Contents, list[str], list[str]]:
        share = round(len(problems) * len(samples) / len(whole))  # of a shard, as many as it has of the samples
        _refuse_too_many(problems[:share] + packed.skipped, len(samples) + share, settings)
        if maps is not None:
            print(_notes_of(packed).agreement.check(settings.min_agreement, settings.label_map_dir, source.classes))
        provenance = provenance_of(settings, source)
        kept = [samples[i].name for i in packed.kept]
        left_out = {sample.name for sample in samples} - set(kept)
        if part.number == 1:  # what no shard holds is the first one's to say
            left_out |= {sample.name for sample in source.samples} - {sample.name for sample in whole}
        return Contents(source.classes, provenance, part), kept, sorted(left_out)

    reader = _SampleReader(source, samples, maps, settings, first)
    workers = Workers(
        min(settings.num_workers, len(samples)),
        min(settings.chunk_size, -(-len(samples) // settings.num_workers)),
        settings.on_error == "skip",
    )
    start, places = time.perf_counter(), _Places(source, samples)
    with sigterm_unwinds():
        packed = write_beton(path, fields, places, reader.load, workers, reader.note, describe)
    left_out = sorted(problems + packed.skipped, key=str)
    list_skipped(Path(f"{path}.skipped.tsv"), left_out)
    speed = len(samples) / (time.perf_counter() - start)
    print(_summary(path, settings, packed, fields, len(source.classes), speed))
    return left_out


def packed_once(split: str, path: str, data_path: str, label_map_dir: str = "", dry_run: bool = False) -> str:
    """The `.beton` to use: `path`, or one that is packed now from `data_path/split` if it does not exist yet.

    A file without a name of its own is packed again when it is of other images or label maps than asked for.

    Args:
        split: "train" or "val".
        path: the file, or the shards, which are not packed here; empty: beside the images, `data_path/SPLIT.beton`
            (`SPLIT_relabel.beton` with label maps), or below `runs/packed` where that place cannot be written.
        data_path: the folder of `train/` and `val/`, or of the archives that are these; empty: nothing is packed.
        label_map_dir: as in `Packing`; empty: none.
        dry_run: nothing is to be written.

    Raises:
        BadInput: neither is given; `path` was packed from something else; packing fails, or is needed by several
            processes at once or by a dry run.
    """
    if not path and not data_path:
        raise BadInput(f"data.{split}_dataset is not given: the .beton that write_datasets.py wrote")
    source = split_of(data_path, split)
    name = path or _place(data_path, f"{split}{'_relabel' if label_map_dir else ''}.beton")
    again = bool(data_path) and (Path(name).exists() or not is_one_file(name))
    others = differences(name, source, label_map_dir) if again else []
    if not data_path or (again and not others):
        return name
    if again and path:
        raise BadInput(f"{name}: {'; '.join(others)}. Give another data.{split}_dataset, or delete this file")
    if not Path(source).exists() and "*" not in source:
        raise BadInput(f"data.data_path is {data_path}: there is no {source} to pack, and no archive of it")
    if started_by_torchrun() or dry_run:
        why = "; ".join(others) if again else "no such file"
        raise BadInput(
            f"{name}: {why}; pack it first with write_datasets.py{'' if dry_run else ', or start with one process'}"
        )
    if not path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    reasons = "; ".join(others) if again else "there is none yet"
    print(f"packing {source} into {name}: {reasons}", flush=True)
    pack_apart(
        Packing(data_dir=source, label_map_dir=label_map_dir, write_path=name, overwrite="yes" if again else "no")
    )
    return name


def _place(data_path: str, name: str) -> str:
    """Beside the images, or where that cannot be written a place of this name below `runs/packed`."""
    if os.access(data_path, os.W_OK) or not Path(data_path).is_dir() or Path(data_path, name).exists():
        return os.path.join(data_path, name)
    digest = hashlib.sha256(os.path.realpath(data_path).encode()).hexdigest()[:8]
    folder = Path("runs") / "packed" / f"{Path(data_path).resolve().name}-{digest}"
    print(f"{data_path} cannot be written: packed files go to {folder}", flush=True)
    return str(folder / name)


@dataclass
class Notes:
    """What a worker noticed: the largest rounding error of a score and its file, what was stored, label agreement."""

    rounding: tuple[float, str] = (0.0, "")
    stored: Stored = field(default_factory=Stored)
    agreement: Agreement = field(default_factory=Agreement)


class _SampleReader:
    """Reads a sample's field values in a worker process."""

    def __init__(
        self, source: ImageSource, samples: list[Sample], maps: LabelMapSet | None, settings: Packing, first: int
    ) -> None:
        self._source, self._samples, self._maps, self._first = source, samples, maps, first
        self._settings, self._notes = settings, Notes()

    def load(self, index: int) -> tuple:
        sample, settings = self._samples[index], self._settings
        data, place = self._source.read(sample.index), self._source.place(sample.index)
        pixels = to_be_stored(data, place, settings, self._notes.stored)
        if settings.write_mode == "proportion":
            np.random.seed(self._first + index)  # FFCV draws from it: no worker and no shard may change the choice
        if self._maps is None:
            return pixels, sample.label
        return pixels, sample.label, self._label_map(self._maps, self._maps.sources[sample.key], sample.label)

    def note(self) -> Notes:
        return self._notes

    def _label_map(self, maps: LabelMapSet, source: Source, label: int) -> np.ndarray:
        scores, classes = maps.read(source)
        packed = pack_label_map(scores, classes, self._settings.score_dtype)
        if self._settings.score_dtype == "float16":
            stored = packed[0].view(np.float16).astype(np.float32)
            if not np.isfinite(stored).all():
                greatest = np.abs(scores).max()
                raise BadSample(source, f"score {greatest:g} is beyond float16; use cfg.score_dtype=float32")
            error = float(np.abs(stored - scores).max())
            self._notes.rounding = max(self._notes.rounding, (error, str(source)))
        there = classes >= 0
        self._notes.agreement.add(label, scores[there], classes[there])
        return packed


def _notes_of(packed: Packed) -> Notes:
    """The workers' notes together."""
    notes = Notes()
    for part in packed.notes:
        notes.rounding = max(notes.rounding, part.rounding)
        notes.stored.merge(part.stored)
        notes.agreement.merge(part.agreement)
    return notes


class _Places(Sequence[Any]):
    """Where each sample is, for messages."""

    def __init__(self, source: ImageSource, samples: list[Sample]) -> None:
        self._source, self._samples = source, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return self._source.place(self._samples[index].index)


def match(source: ImageSource, maps: LabelMapSet) -> tuple[list[Sample], list[BadSample]]:
    """The images that have a label map, and a BadSample for every image without and every map without image.

    Raises:
        BadSample: two images share a key.
    """
    keys, places = by_key(source), source.place
    with_images = {key.partition("/")[0] for key in keys}
    unused = {key for key in maps.sources if key.partition("/")[0] not in with_images} if source.partial else set()
    if unused:
        maps.remarks.append(f"{maps.root}: {len(unused):,} label maps of classes without images here are not used")
    with_map = [sample for key, sample in keys.items() if key in maps.sources]
    missing = [BadSample(places(s.index), "has no label map") for key, s in keys.items() if key not in maps.sources]
    part = "; for images of a part of the classes give cfg.num_classes or cfg.class_list"
    orphans = [
        BadSample(label_map, f"is a label map with no image{'' if key.partition('/')[0] in with_images else part}")
        for key, label_map in sorted(maps.sources.items())
        if key not in keys and key not in unused
    ]
    return with_map, missing + orphans


def _others(problems: list[BadSample]) -> str:
    if len(problems) == 1:
        return ""
    return f"\nand {len(problems) - 1:,} other files do not match:{listed(problems[1:], 9)}\nnothing was written"


def _refuse_too_many(bad: list[BadSample], total: int, settings: Packing) -> None:
    count = len(bad)
    allowed = max(int(settings.max_skipped * total), min(ALWAYS_SKIPPED, total // 2))
    if count > allowed:
        raise BadInput(
            f"{settings.data_dir}: {count:,} of {total:,} files are bad, more than cfg.max_skipped="
            f"{settings.max_skipped:g} allows; the first: {bad[0]}{_others(bad)}"
        )


def list_skipped(report: Path, bad: list[BadSample]) -> None:
    """Write the files that were left out, with reasons, one a line, or remove an older list."""
    report.unlink(missing_ok=True)
    if bad:
        lines = "".join(f"{entry.file}\t{entry.reason}\n" for entry in bad)
        report.write_text(lines, errors="surrogateescape")  # names as the file system has them
        print(f"left out: {len(bad):,} files, listed with reasons in {report}")


def _fields(settings: Packing, maps: LabelMapSet | None, num_classes: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "image": image_field(
            settings.restart_interval,
            write_mode=settings.write_mode,
            max_resolution=settings.max_resolution or None,
            jpeg_quality=settings.jpeg_quality,
            compress_probability=settings.compress_probability,
        ),
        "label": IntField(),
    }
    if maps is not None:
        form = maps.format
        sizes = form.top_k, form.height, form.width, num_classes
        fields["label_map"] = LabelMapField(*sizes, settings.score_dtype, form.axis_order, maps.scores)
    return fields


def _summary(
    path: Path, settings: Packing, packed: Packed, fields: dict[str, Any], num_classes: int, speed: float
) -> str:
    notes, lines = _notes_of(packed), list[str]()
    error, file = notes.rounding
    if error > 0:
        lines.append(
            f"scores were rounded to float16: largest error {error:.3g} ({file}); "
            "--cfg.score_dtype=float32 keeps them bit for bit"
        )
    lines += notes.stored.lines(settings)
    label_map = fields.get("label_map")
    label_bytes = 8 + (label_map.nbytes + label_map.metadata_type.itemsize + 24 if label_map else 0)
    count = len(packed.kept)
    lines.append(
        f"{path}: {count:,} images of {num_classes:,} classes, {count if label_map else 0:,} with label map, "
        f"{0 if label_map else count:,} without, {path.stat().st_size:,} bytes, "
        f"{label_bytes:,} bytes an image for labels; {speed:,.0f} images/s"
    )
    return "\n".join(lines)
