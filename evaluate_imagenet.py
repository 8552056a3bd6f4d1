"""Accuracy of a network on ImageNet's validation set with single and multiple labels, and on ImageNet's variants.

  a checkpoint (ours, the official project's, any state dict) on everything that is there:
    python evaluate_imagenet.py --model.arch=resnet50 --model.weights=runs/relabel_rn50/checkpoint.pt \\
        --data.val=val.beton --data.real=real.json --data.multilabel_records=imagenet2012_multilabel.json \\
        --data.imagenet_v2=imagenetv2 --data.imagenet_a=imagenet-a --data.imagenet_c=ImageNet-C
  a network with the weights that torchvision or timm publish for it:
    python evaluate_imagenet.py --model.arch=timm/resnet50.a1_in1k --model.weights=published --data.val=ILSVRC/val

Each set is a .beton of write_datasets.py or a folder of class folders. The images of a set are seen once for all of
its labels. Prints a table; with --output.folder also evaluation.json and evaluation.csv there. Under torchrun the
images are shared among the processes.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting.
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from fastargs import Param, Section
from fastargs.decorators import param

from relabel import distributed
from relabel.commands import run_command
from relabel.errors import BadInput
from relabel.evaluate import average_precision, predict
from relabel.folders import images_of
from relabel.label_sets import ALEXNET_ERRORS, read_multilabel_records, read_real
from relabel.loading import decoding_threads, use_all_cores
from relabel.models import build_model, load_weights, published_model
from relabel.precision import precision_of
from relabel.settings import Choice, Flag, Number, load_settings, resolved

V2_VARIANTS = ("matched-frequency", "threshold0.7", "top-images")

Section("model", "the network").params(
    arch=Param(str, "a torchvision classifier, or timm/NAME", default="resnet50"),
    weights=Param(str, "its checkpoint, or published: torchvision's or timm's own", required=True),
    num_classes=Param(Number(2, 32767, whole=True), "classes", default=1000),
    use_blurpool=Param(Flag(), "it was trained with BlurPool", default=False),
)
Section("data", "what to evaluate on: .beton files or folders; empty: not").params(
    val=Param(str, "ImageNet's validation set: top-1, top-5", default=""),
    real=Param(str, "ReaL's real.json, for the images of data.val", default=""),
    multilabel_records=Param(str, "Shankar et al.'s records as JSON, for the images of data.val", default=""),
    imagenet_v2=Param(str, "ImageNetV2: a variant, or the folder of the three variants", default=""),
    imagenet_a=Param(str, "ImageNet-A: accuracy among its 200 classes", default=""),
    imagenet_r=Param(str, "ImageNet-R: the same", default=""),
    imagenet_o=Param(str, "ImageNet-O: AUPR of finding its images among data.val's of its classes", default=""),
    imagenet_c=Param(str, "ImageNet-C, CORRUPTION/SEVERITY/...: mean corruption error", default=""),
    image_size=Param(Number(8, whole=True), "side of the centre crop in pixels", default=224),
    crop_ratio=Param(Number(0.1, 1), "side of the crop, share of the shorter side (1 for ImageNet-C)", default=0.875),
    lr_tta=Param(Flag(), "average with the mirrored image", default=False),
    batch_size=Param(Number(1, whole=True), "images in a step of a process", default=256),
    num_workers=Param(Number(0, whole=True), "decoding threads of a machine; 0: all cores, 1 on the CPU", default=0),
)
Section("compute", "numbers").params(
    precision=Param(Choice("fp32", "bf16", "fp16"), "of the forward pass", default="fp32"),
    gpu=Param(Number(-1, whole=True), "number of the GPU; -1: the first, or the process's", default=-1),
)
Section("output", "what is left behind").params(folder=Param(str, "for evaluation.json and .csv", default=""))


def main(config) -> None:
    settings = resolved(config)
    processes = distributed.join(settings["compute.gpu"], "nccl")
    use_all_cores(processes.local_size)
    model = make_model().to(processes.device, memory_format=torch.channels_last)
    open_set, look = make_tools(model, processes)
    rows = []  # (set, measure, value, images)

    said, names = {}, []
    if settings["data.val"]:
        loader, names = open_set(settings["data.val"])
        val = said["val"] = look(loader)
        rows += [("ImageNet", f"top-{k} %", val.top(k), len(val.labels)) for k in (1, 5)]
    for name in ("real", "multilabel_records", "imagenet_o"):
        if settings[f"data.{name}"] and not names:
            raise BadInput(f"data.{name} needs data.val, with its file names (write the .beton again if it has none)")
    if settings["data.real"]:
        right = read_real(settings["data.real"], names, loader.num_classes)
        rows.append(("ReaL", "multi-label %", val.multilabel(right), int(right.any(1).sum())))
    if settings["data.multilabel_records"]:
        right, counts = read_multilabel_records(settings["data.multilabel_records"], names, loader.num_classes)
        accuracy = val.class_averaged_multilabel(right, counts)
        rows.append(("Shankar et al.", "multi-label %, mean of classes", accuracy, int(counts.sum())))
    if settings["data.imagenet_v2"]:
        for variant, path in v2_variants(settings["data.imagenet_v2"]):
            v2 = look(open_set(path)[0])
            rows.append((f"ImageNetV2 {variant}".strip(), "top-1 %", v2.top(1), len(v2.labels)))
    for letter in "ar":
        if path := settings[f"data.imagenet_{letter}"]:
            subset, _ = open_set(path)
            found = look(subset, classes=np.unique(subset.labels))
            title = f"ImageNet-{letter.upper()}"
            rows.append((title, f"top-1 % of {len(np.unique(subset.labels))} classes", found.top(1), len(found.labels)))
    if settings["data.imagenet_o"]:
        outside, _ = open_set(settings["data.imagenet_o"])
        classes = np.unique(outside.labels)
        out, inside = look(outside, classes=classes).confidence, look(loader, classes=classes).confidence
        inside = inside[np.isin(loader.labels, classes)]
        scores, is_out = -np.concatenate([out, inside]), np.arange(len(out) + len(inside)) < len(out)
        rows.append(("ImageNet-O", "AUPR %", 100 * average_precision(scores, is_out), len(scores)))
    if settings["data.imagenet_c"]:
        rows += corruption_rows(settings["data.imagenet_c"], partial(open_set, crop_ratio=1.0), look)
    if not rows:
        raise BadInput("nothing to evaluate on: give data.val or one of the other sets")
    if processes.first:
        report(rows, settings)


@param("model.arch")
@param("model.weights")
@param("model.num_classes")
@param("model.use_blurpool")
def make_model(arch, weights, num_classes, use_blurpool):
    if weights == "published":
        return published_model(arch, num_classes)
    model = build_model(arch, num_classes, use_blurpool=use_blurpool)
    load_weights(model, weights)
    return model


@param("model.num_classes")
@param("data.image_size", "size")
@param("data.crop_ratio")
@param("data.batch_size")
@param("data.num_workers")
@param("data.lr_tta", "flip_average")
@param("compute.precision")
def make_tools(model, processes, num_classes, size, crop_ratio, batch_size, num_workers, flip_average, precision):
    """Functions that open a set of images and that run the model over one."""
    threads = decoding_threads(num_workers, processes)
    common = {"batch_size": batch_size, "num_workers": threads, "processes": processes}
    open_set = partial(images_of, num_classes=num_classes, size=size, crop_ratio=crop_ratio, **common)
    _, autocast = precision_of(precision, processes.device)
    look = partial(predict, model, device=processes.device, autocast=autocast, flip_average=flip_average)
    return open_set, look


def v2_variants(path):
    """`[(variant, path)]`: the three official folders or their .beton below `path`, or `path` itself."""
    found = [(v, str(p)) for v in V2_VARIANTS for p in sorted(Path(path).glob(f"*{v}*")) if p.suffix != ".json"]
    return found or [("", path)]


def corruption_rows(path, open_set, look):
    """ImageNet-C: each corruption's error over AlexNet's, and their mean, in percent."""
    rows, images = [], 0
    folders = {folder.name: folder for folder in sorted(Path(path).rglob("*")) if folder.name in ALEXNET_ERRORS}
    if not folders:
        raise BadInput(f"{path}: holds no folder named as a corruption ({', '.join(list(ALEXNET_ERRORS)[:3])}, ...)")
    for name in filter(folders.get, ALEXNET_ERRORS):
        severities = sorted(entry for entry in folders[name].iterdir() if entry.is_dir() or entry.suffix == ".beton")
        results = [look(open_set(str(severity))[0]) for severity in severities]
        count = sum(len(result.labels) for result in results)
        images += count
        error = float(np.mean([100 - result.top(1) for result in results]))
        rows.append((f"ImageNet-C {name}", "error over AlexNet's, %", error / ALEXNET_ERRORS[name], count))
    whole = len(rows) == len(ALEXNET_ERRORS)
    title = "mean corruption error, %" if whole else f"mean over {len(rows)} of {len(ALEXNET_ERRORS)} corruptions, %"
    return [*rows, ("ImageNet-C", title, float(np.mean([value for _, _, value, _ in rows])), images)]


def report(rows, settings):
    """The table on the screen, and JSON and CSV where asked for."""
    print(f"\n| {settings['model.arch']}, {settings['model.weights']} | measure | value | images |\n|---|---|---|---|")
    for title, measure, value, images in rows:
        print(f"| {title} | {measure} | {value:.2f} | {images:,} |")
    if not settings["output.folder"]:
        return
    folder = Path(settings["output.folder"])
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("set", "measure", "value", "images")
    results = [dict(zip(keys, row, strict=True)) for row in rows]
    (folder / "evaluation.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    with open(folder / "evaluation.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([keys, *rows])
    print(f"\n{folder}/evaluation.json, evaluation.csv")


def run() -> NoReturn:
    """The command line."""
    config = load_settings(__doc__)
    run_command(partial(main, config))


if __name__ == "__main__":
    run()
