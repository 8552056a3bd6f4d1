"""Packing a folder of images, and the label maps of its images, into one `.beton`."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields import LabelMapField, image_field, pack_label_map
from ffcv.fields import IntField

from ..errors import BadInput, BadSample
from ..processes import started_by_torchrun
from ..settings import Choice, Number, setting
from .images import find_images, read_image
from .label_map_files import (
    LabelMapFormat,
    Source,
    axis_order_of,
    find_label_maps,
    label_map_format,
    read_label_map,
)
from .sample_list import file_list_of, write_file_list
from .writer import Packed, write_beton

Image = tuple[Path, int]  # a file and its label


@dataclass(frozen=True, kw_only=True)
class Packing:
    """what to pack and how"""

    data_dir: str = setting(str, "folder of images, one folder a class")
    write_path: str = setting(str, "the .beton to write")
    label_map_dir: str = setting(
        str, "label maps, a folder of CLASS/IMAGE.pt or .p, or an archive .npy; empty: none", ""
    )
    axis_order: str = setting(
        Choice("auto", "xy", "yx"),
        "how maps are stored; auto: as their manifest says, else xy, the official pairing",
        "auto",
    )
    score_dtype: str = setting(Choice("float16", "float32"), "how scores are stored", "float16")
    write_mode: str = setting(
        Choice("jpg", "raw", "smart", "proportion"),
        "as FFCV's RGBImageField: jpg, raw pixels, smart (FFCV's; raw), or a proportion of jpg",
        "jpg",
    )
    compress_probability: float = setting(Number(0, 1), "share of jpg in write_mode=proportion", 0.5)
    max_resolution: int = setting(Number(0, 65535, whole=True), "longest side stored, in pixels; 0: unchanged", 500)
    jpeg_quality: int = setting(Number(1, 100, whole=True), "quality of stored JPEGs", 90)
    restart_interval: int = setting(
        Number(0, 65535, whole=True),
        "MCUs (16 x 16 pixels) between a JPEG's restart markers, where the decoding of crops begins; 0: none",
        4,
    )
    num_workers: int = setting(Number(1, whole=True), "worker processes", os.cpu_count() or 1)
    chunk_size: int = setting(Number(1, whole=True), "images a worker takes at a time", 100)
    subset: int = setting(Number(-1, whole=True), "pack the first so many images; -1: all", -1)
    on_error: str = setting(
        Choice("stop", "skip"), "at a bad image or label map: stop, or leave it out and list it", "stop"
    )
    overwrite: str = setting(Choice("no", "yes"), "replace an existing file", "no")


def pack(settings: Packing) -> None:
    """Write the `.beton`, the list of its samples beside it, and, where samples were left out, that list with reasons.

    Raises:
        BadInput: bad data or a path that cannot be used; nothing was written.
        WorkerFailed: a worker process died.
    """
    path, report = Path(settings.write_path), Path(settings.write_path + ".skipped.tsv")
    if path.exists() and settings.overwrite == "no":
        raise BadSample(path, "exists already; --cfg.overwrite=yes replaces it")
    if not path.parent.is_dir():
        raise BadSample(path.parent, "is not a folder; make it first")
    images, classes = find_images(Path(settings.data_dir))
    label_maps, format, problems = {}, None, []
    if settings.label_map_dir:
        images, label_maps, format, problems = _with_label_maps(images, classes, settings)
    images = images[: settings.subset] if settings.subset >= 0 else images
    if not images:
        raise BadSample(Path(settings.data_dir), "no image is left to pack")

    reader = _SampleReader(images, label_maps, format, settings)
    start = time.perf_counter()
    file_list_of(path).unlink(missing_ok=True)  # of a file that is replaced
    with _sigterm_unwinds():
        packed = write_beton(
            path,
            fields := _fields(settings, format),
            [file for file, _ in images],
            reader.load,
            reader.note,
            min(settings.num_workers, len(images)),
            min(settings.chunk_size, -(-len(images) // settings.num_workers)),
            settings.on_error == "skip",
        )
    names = [images[i][0].relative_to(settings.data_dir).as_posix() for i in packed.kept]
    write_file_list(path, classes, names)
    left_out = problems + packed.skipped
    report.unlink(missing_ok=True)
    if left_out:
        report.write_text("".join(f"{bad.file}\t{bad.reason}\n" for bad in left_out))
        print(f"left out: {len(left_out):,} files, listed with reasons in {report}")
    seconds = time.perf_counter() - start
    print(_summary(path, packed, fields, classes, len(images) / seconds))


def packed_once(split: str, path: str, data_path: str, label_map_dir: str = "") -> str:
    """The `.beton` to use: `path`, or one that is packed now from `data_path/split` if it does not exist yet.

    Args:
        split: "train" or "val".
        path: the file; empty: beside the images, `data_path/SPLIT.beton` (`SPLIT_relabel.beton` with label maps).
        data_path: the folder of `train/` and `val/`; empty: nothing is packed.
        label_map_dir: as in `Packing`; empty: none.

    Raises:
        BadInput: neither is given, or packing fails, or is needed by several processes at once.
    """
    if not path and not data_path:
        raise BadInput(f"data.{split}_dataset is not given: the .beton that write_datasets.py wrote")
    path = path or f"{data_path}/{split}{'_relabel' if label_map_dir else ''}.beton"
    if not data_path or Path(path).exists():
        return path
    if started_by_torchrun():
        raise BadInput(f"{path}: no such file; pack it first with write_datasets.py, or start with one process")
    print(f"packing {data_path}/{split} into {path}", flush=True)
    pack(Packing(data_dir=f"{data_path}/{split}", label_map_dir=label_map_dir, write_path=path))
    return path


class _SampleReader:
    """Reads a sample's field values in a worker process, and keeps the largest rounding error of a score there."""

    def __init__(
        self,
        images: list[Image],
        label_maps: dict[tuple[str, str], Source],
        format: LabelMapFormat | None,
        settings: Packing,
    ) -> None:
        self._images, self._label_maps, self._format, self._settings = images, label_maps, format, settings
        self._worst = (0.0, "")  # error, file

    def load(self, index: int) -> tuple:
        file, label = self._images[index]
        values = (read_image(file, self._settings.max_resolution, self._settings.write_mode), label)
        if self._settings.write_mode == "proportion":
            np.random.seed(index)  # FFCV draws from it: the choice must not depend on the worker
        return values if self._format is None else (*values, self._label_map(self._label_maps[key(file)]))

    def note(self) -> tuple[float, str]:
        return self._worst

    def _label_map(self, source: Source) -> np.ndarray:
        assert self._format is not None
        scores, classes = read_label_map(source, self._format)
        packed = pack_label_map(scores, classes, self._settings.score_dtype)
        if self._settings.score_dtype == "float16":
            stored = packed[0].view(np.float16).astype(np.float32)
            if not np.isfinite(stored).all():
                greatest = np.abs(scores).max()
                raise BadSample(source, f"score {greatest:g} is beyond float16; use cfg.score_dtype=float32")
            self._worst = max(self._worst, (float(np.abs(stored - scores).max()), str(source)))
        return packed


def key(file: Path) -> tuple[str, str]:
    """The key of an image's label map: its folder's name, and its own without the ending."""
    return file.parent.name, file.stem


def _with_label_maps(images, classes, settings):
    """The images that have a label map, the maps, their format, and a BadSample for whatever does not match."""
    root = Path(settings.label_map_dir)
    label_maps = find_label_maps(root, classes)
    images, problems = match(images, label_maps)
    if problems and settings.on_error == "stop":
        raise BadSample(
            problems[0].file, f"{problems[0].reason}{_others(problems)}; --cfg.on_error=skip leaves such files out"
        )
    if not images:
        raise BadSample(root, f"holds no label map of an image in {settings.data_dir}")
    axis_order = axis_order_of(root, settings.axis_order)
    return images, label_maps, label_map_format(label_maps[key(images[0][0])], len(classes), axis_order), problems


def match(images: list[Image], label_maps: dict[tuple[str, str], Source]) -> tuple[list[Image], list[BadSample]]:
    """The images that have a label map, and a BadSample for every image without and every map without image."""
    matched = [(file, label) for file, label in images if key(file) in label_maps]
    missing = [BadSample(file, "has no label map") for file, _ in images if key(file) not in label_maps]
    wanted = {key(file) for file, _ in images}
    orphans = [
        BadSample(file, "is a label map with no image") for k, file in sorted(label_maps.items()) if k not in wanted
    ]
    return matched, missing + orphans


def _others(problems):
    if len(problems) == 1:
        return ""
    names = "".join(f"\n  {bad}" for bad in problems[1:10])
    more = f"\n  and {len(problems) - 10:,} more" if len(problems) > 10 else ""
    return f"\nand {len(problems) - 1:,} other files do not match:{names}{more}\nnothing was written"


def _fields(settings: Packing, format: LabelMapFormat | None) -> dict[str, Any]:
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
    if format is not None:
        sizes = format.top_k, format.height, format.width, format.num_classes
        fields["label_map"] = LabelMapField(*sizes, settings.score_dtype, format.axis_order)
    return fields


def _summary(path: Path, packed: Packed, fields: dict[str, Any], classes: list[str], speed: float) -> str:
    error, file = max(packed.notes)
    rounded = (
        f"scores were rounded to float16: largest error {error:.3g} ({file}); "
        "--cfg.score_dtype=float32 keeps them bit for bit\n"
    )
    field = fields.get("label_map")
    label_bytes = 8 + (field.nbytes + field.metadata_type.itemsize + 24 if field else 0)
    count = len(packed.kept)
    return (
        f"{rounded if error > 0 else ''}{path}: {count:,} images of {len(classes):,} classes, "
        f"{count if field else 0:,} with label map, {0 if field else count:,} without, {path.stat().st_size:,} bytes, "
        f"{label_bytes:,} bytes an image for labels; {speed:,.0f} images/s"
    )


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the process through the `finally` clauses, so that nothing half-written stays."""

    def exit(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
