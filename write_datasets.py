"""Pack a folder of images, and a folder of label maps, into one .beton file.

  training set, with the label maps of the official archive:
    python write_datasets.py --cfg.data_dir=ILSVRC/train --cfg.label_map_dir=relabel_imagenet \\
        --cfg.write_path=train.beton
  validation set, which has none:
    python write_datasets.py --cfg.data_dir=ILSVRC/val --cfg.write_path=val.beton

Exit codes: 0 written; 1 bad data or a failure, and nothing was written; 2 a bad setting.
"""

import os
import signal
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
from ffcv_fields import LabelMapField, image_field, pack_label_map
from fastargs import Param, Section
from fastargs.decorators import param, section
from ffcv.fields import IntField
from PIL import Image, UnidentifiedImageError

from relabel.commands import run_command
from relabel.errors import BadSample
from relabel.file_list import file_list_of, find_images, write_file_list
from relabel.label_map_files import axis_order_of, find_label_maps, label_map_format, read_label_map
from relabel.packing import PAGE_SIZE, write_beton
from relabel.settings import Choice, Number, load_settings

Section("cfg", "what to pack and how").params(
    data_dir=Param(str, "folder of images, one folder a class", required=True),
    write_path=Param(str, "the .beton to write", required=True),
    label_map_dir=Param(
        str, "label maps, a folder of CLASS/IMAGE.pt or .p, or an archive .npy; empty: none", default=""
    ),
    axis_order=Param(
        Choice("auto", "xy", "yx"),
        "how maps are stored; auto: as their manifest says, else xy, the official pairing",
        default="auto",
    ),
    score_dtype=Param(Choice("float16", "float32"), "how scores are stored", default="float16"),
    write_mode=Param(
        Choice("jpg", "raw", "smart", "proportion"),
        "as FFCV's RGBImageField: jpg, raw pixels, smart (FFCV's; raw), or a proportion of jpg",
        default="jpg",
    ),
    compress_probability=Param(Number(0, 1), "share of jpg in write_mode=proportion", default=0.5),
    max_resolution=Param(Number(0, 65535, whole=True), "longest side stored, in pixels; 0: as it is", default=500),
    jpeg_quality=Param(Number(1, 100, whole=True), "quality of stored JPEGs", default=90),
    restart_interval=Param(
        Number(0, 65535, whole=True),
        "MCUs (16 x 16 pixels) between a JPEG's restart markers, where the decoding of crops begins; 0: none",
        default=4,
    ),
    num_workers=Param(Number(1, whole=True), "worker processes", default=os.cpu_count()),
    chunk_size=Param(Number(1, whole=True), "images a worker takes at a time", default=100),
    subset=Param(Number(-1, whole=True), "pack the first so many images; -1: all", default=-1),
    on_error=Param(
        Choice("stop", "skip"), "at a bad image or label map: stop, or leave it out and list it", default="stop"
    ),
    overwrite=Param(Choice("no", "yes"), "replace a file that is there", default="no"),
)


@section("cfg")
@param("data_dir")
@param("write_path")
@param("label_map_dir")
@param("axis_order")
@param("score_dtype")
@param("write_mode")
@param("compress_probability")
@param("max_resolution")
@param("jpeg_quality")
@param("restart_interval")
@param("num_workers")
@param("chunk_size")
@param("subset")
@param("on_error")
@param("overwrite")
def main(
    data_dir,
    write_path,
    label_map_dir,
    axis_order,
    score_dtype,
    write_mode,
    compress_probability,
    max_resolution,
    jpeg_quality,
    restart_interval,
    num_workers,
    chunk_size,
    subset,
    on_error,
    overwrite,
):
    path, report = Path(write_path), Path(write_path + ".skipped.tsv")
    if path.exists() and overwrite == "no":
        raise BadSample(path, "exists already; --cfg.overwrite=yes replaces it")
    if not path.parent.is_dir():
        raise BadSample(path.parent, "is not a folder; make it first")

    images, classes = find_images(Path(data_dir))
    fields = {
        "image": image_field(
            restart_interval,
            write_mode=write_mode,
            max_resolution=max_resolution or None,
            jpeg_quality=jpeg_quality,
            compress_probability=compress_probability,
        ),
        "label": IntField(),
    }
    format, label_maps, problems = None, {}, []
    if label_map_dir:
        axis_order = axis_order_of(Path(label_map_dir), axis_order)
        label_maps = find_label_maps(Path(label_map_dir), classes)
        images, problems = match(images, label_maps, classes)
        if problems and on_error == "stop":
            raise BadSample(problems[0].file, f"{problems[0].reason}{others(problems)}; --cfg.on_error=skip goes on")
        if not images:
            raise BadSample(Path(label_map_dir), f"holds no label map of an image in {data_dir}")
        format = label_map_format(label_maps[key(images[0][0])], len(classes), axis_order)
        fields["label_map"] = LabelMapField(
            format.top_k, format.height, format.width, len(classes), score_dtype, axis_order
        )
    if subset >= 0:
        images = images[:subset]
    if not images:
        raise BadSample(Path(data_dir), "no image is left to pack")

    worst = (0.0, "")  # largest rounding error of a score in this worker, and its file

    def load(index):
        nonlocal worst
        file, label = images[index]
        values = (read_image(file, max_resolution, write_mode), label)
        if write_mode == "proportion":
            np.random.seed(index)  # FFCV draws from it: the choice must not depend on the worker
        if format is None:
            return values
        map_file = label_maps[key(file)]
        scores, indices = read_label_map(map_file, format)
        packed = pack_label_map(scores, indices, score_dtype)
        if score_dtype == "float16":
            stored = packed[0].view(np.float16).astype(np.float32)
            if not np.isfinite(stored).all():
                raise BadSample(
                    map_file, f"score {np.abs(scores).max():g} is beyond float16; use cfg.score_dtype=float32"
                )
            error = float(np.abs(stored - scores).max())
            worst = max(worst, (error, str(map_file)))
        return *values, packed

    start = time.perf_counter()
    file_list_of(path).unlink(missing_ok=True)  # of a file that is replaced
    packed = write_beton(
        path,
        fields,
        [file for file, _ in images],
        load,
        lambda: worst,
        min(num_workers, len(images)),
        min(chunk_size, -(-len(images) // num_workers)),
        on_error == "skip",
    )

    write_file_list(path, classes, [images[i][0].relative_to(data_dir).as_posix() for i in packed.kept])
    left_out = problems + packed.skipped
    report.unlink(missing_ok=True)
    if left_out:
        report.write_text("".join(f"{bad.file}\t{bad.reason}\n" for bad in left_out))
        print(f"left out: {len(left_out):,} files, listed with reasons in {report}")
    error, file = max(packed.notes)
    if error > 0:
        print(
            f"scores were rounded to float16: largest error {error:.3g} ({file}); "
            "--cfg.score_dtype=float32 keeps them bit for bit"
        )
    with_map = len(packed.kept) if format else 0
    label_bytes = fields["label_map"].nbytes + fields["label_map"].metadata_type.itemsize + 24 if format else 0
    print(
        f"{path}: {len(packed.kept):,} images of {len(classes):,} classes, {with_map:,} with label map, "
        f"{len(packed.kept) - with_map:,} without, {path.stat().st_size:,} bytes, "
        f"{label_bytes + 8:,} bytes an image for labels; {len(images) / (time.perf_counter() - start):,.0f} images/s"
    )


def key(file: Path) -> tuple[str, str]:
    """The key of an image's label map: its folder's name, and its own without the ending."""
    return file.parent.name, file.stem


def match(images, label_maps, classes):
    """The images that have a label map, and a BadSample for every image without and every map without image."""
    matched = [(file, label) for file, label in images if key(file) in label_maps]
    missing = [BadSample(file, "has no label map") for file, _ in images if key(file) not in label_maps]
    wanted = {key(file) for file, _ in images}
    orphans = [
        BadSample(file, "is a label map with no image") for k, file in sorted(label_maps.items()) if k not in wanted
    ]
    return matched, missing + orphans


def others(problems):
    if len(problems) == 1:
        return ""
    names = "".join(f"\n  {bad}" for bad in problems[1:10])
    more = f"\n  and {len(problems) - 10:,} more" if len(problems) > 10 else ""
    return f"\nand {len(problems) - 1:,} other files do not match:{names}{more}\nnothing was written"


def read_image(file: Path, max_resolution: int, write_mode: str) -> Image.Image:
    """The image as torchvision's loader shows it: RGB, first frame, EXIF rotation not applied."""
    try:
        with Image.open(file) as image:
            pixels = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(file, f"cannot be decoded ({str(error)[:120]}); is it damaged?") from None
    longest = min(max(pixels.size), max_resolution or max(pixels.size))
    if longest > 65535:
        raise BadSample(file, f"is {pixels.width} x {pixels.height}; store at most 65535 with cfg.max_resolution")
    scale = longest / max(pixels.size)
    if min(pixels.size) * scale < 1:
        raise BadSample(file, f"is {pixels.width} x {pixels.height}: no pixel is left at cfg.max_resolution={longest}")
    if write_mode != "jpg" and pixels.width * pixels.height * scale**2 * 3 > PAGE_SIZE - (1 << 20):
        raise BadSample(file, f"is {pixels.width} x {pixels.height}, too large for raw; lower cfg.max_resolution")
    return pixels


def terminated(signum, frame):
    raise SystemExit(128 + signum)  # through the `finally` clauses: nothing half-written stays


def run() -> NoReturn:
    """The command line."""
    load_settings(__doc__)
    signal.signal(signal.SIGTERM, terminated)
    run_command(main, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    run()
