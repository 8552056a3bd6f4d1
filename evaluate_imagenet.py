"""Accuracy of a network on ImageNet's validation set with single and multiple labels, and on ImageNet's variants.

  a checkpoint (ours, the official project's, any state dict) on everything that is there:
    python evaluate_imagenet.py --model.arch=resnet50 --model.weights=runs/relabel_rn50/checkpoint.pt \\
        --data.val=val.beton --data.real=real.json --data.multilabel_records=human_accuracy_v3.0.0.json \\
        --data.imagenet_v2=imagenetv2 --data.imagenet_a=imagenet-a --data.imagenet_c=ImageNet-C
  its robustness: FGSM of epsilon 8/255 on the validation images, and ImageNet-9's backgrounds:
    python evaluate_imagenet.py --model.arch=resnet50 --model.weights=runs/relabel_rn50/checkpoint.pt \\
        --data.val=val.beton --data.fgsm=8 --data.imagenet_9=bg_challenge --data.in9_map=in_to_in9.json
  a network with the weights that torchvision or timm publish for it:
    python evaluate_imagenet.py --model.arch=timm/resnet50.a1_in1k --model.weights=published --data.val=ILSVRC/val

Each set is a .beton of write_datasets.py or a folder of class folders. Each set's images are evaluated once for all of
its labels. Prints a table; with --output.folder also evaluation.json and evaluation.csv there. Under torchrun the
images are split among the processes.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting.
"""

from relabel.evaluation.settings import Model, Settings
from relabel.settings import as_dict, load_settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    settings = load_settings(Settings, __doc__)

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from relabel.checkpoints import saved_classes
from relabel.commands import run_command
from relabel.data.classes import network_classes
from relabel.data.folder_loader import FolderLoader, evaluation_loader
from relabel.data.loader import Loader
from relabel.data.reading import Reading
from relabel.errors import BadInput
from relabel.evaluation.adversarial import LEVELS, Fgsm
from relabel.evaluation.backgrounds import find_variations, read_in9_map, variation_classes
from relabel.evaluation.label_sets import ALEXNET_ERRORS, read_multilabel_records, read_real
from relabel.evaluation.predictions import Attack, Predictions, average_precision, predict
from relabel.models import build_model, check_input, load_weights, published_model
from relabel.precision import precision_of
from relabel.processes import Processes, decoding_threads, join, use_all_cores

PUBLISHED = "published"
V2_VARIANTS = ("matched-frequency", "threshold0.7", "top-images")
NEEDS = {"real": "val", "multilabel_records": "val", "imagenet_o": "val", "fgsm": "val", "imagenet_9": "in9_map"}

Row = tuple[str, str, float, int]  # set, measure, value, images


def main(settings: Settings) -> None:
    data = settings.data
    for name, other in NEEDS.items():
        if getattr(data, name) and not getattr(data, other):
            raise BadInput(f"data.{name} needs data.{other}")
    processes = join(settings.compute.gpu, "nccl")
    use_all_cores(processes.local_size)
    sets = Sets(settings, processes)
    groups = read_in9_map(data.in9_map, sets.num_classes, sets.classes) if data.imagenet_9 else None
    rows: list[Row] = []
    names: list[str] = []
    if data.val:
        loader, names = sets.open(data.val)
        val = sets.predict(loader)
        rows += [("ImageNet", f"top-{k} %", val.top(k), len(val.labels)) for k in (1, 5)]
    if data.fgsm:
        attack = Fgsm(data.fgsm / LEVELS)
        rows.append((f"ImageNet, {attack}", "top-1 %", sets.predict(loader, attack=attack).top(1), len(val.labels)))
    for name in ("real", "multilabel_records"):
        if getattr(data, name) and not names:
            raise BadInput(f"data.{name} needs the file names of data.val: write the .beton again, it has none")
    if data.real:
        right = read_real(data.real, names, loader.num_classes, sets.classes)
        rows.append(("ReaL", "multi-label %", val.multilabel(right), int(right.any(1).sum())))
    if data.multilabel_records:
        records = data.multilabel_records
        right, counts, line = read_multilabel_records(records, names, loader.num_classes, sets.classes)
        processes.say(line)
        accuracy = val.class_averaged_multilabel(right, counts)
        rows.append(("Shankar et al.", "multi-label %, mean of classes", accuracy, int(counts.sum())))
    if data.imagenet_v2:
        for variant, path in v2_variants(data.imagenet_v2):
            v2 = sets.predict(sets.open(path)[0])
            rows.append((f"ImageNetV2 {variant}".strip(), "top-1 %", v2.top(1), len(v2.labels)))
    for letter, path in (("A", data.imagenet_a), ("R", data.imagenet_r)):
        if path:
            subset, _ = sets.open(path)
            classes = np.unique(subset.labels)
            found = sets.predict(subset, classes)
            rows.append((f"ImageNet-{letter}", f"top-1 % of {len(classes)} classes", found.top(1), len(found.labels)))
    if data.imagenet_o:
        rows.append(out_of_distribution_row(sets, data.imagenet_o, loader))
    if data.imagenet_c:
        rows += corruption_rows(sets, data.imagenet_c)
    if groups is not None:
        rows += background_rows(sets, data.imagenet_9, groups)
    if not rows:
        raise BadInput("nothing to evaluate on: give data.val or one of the other sets")
    if processes.first:
        report(rows, settings)


class Sets:
    """The network, and how sets of images are opened and run through it."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        data = settings.data
        saved = None if settings.model.weights == PUBLISHED else saved_classes(settings.model.weights)
        self.num_classes = settings.model.num_classes
        self.classes = network_classes(saved, self.num_classes)
        model = make_model(settings.model, say=processes.first).eval()
        check_input(model, settings.model.arch, 1, [data.image_size])
        self._model = model.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        threads = decoding_threads(data.num_workers, processes)
        self._reading = Reading(self.num_classes, processes, threads, classes=self.classes)
        self._precision = precision_of(settings.compute.precision, processes.device)
        self._data, self._batch_size = data, data.batch_size * processes.world_size

    def open(
        self, path: str, crop_ratio: float = 0, classes: tuple[str, ...] | None = None
    ) -> tuple[Loader | FolderLoader, list[str]]:
        """The loader of a set, and its samples' file names.

        Args:
            path: of the set.
            crop_ratio: 0: that of the settings.
            classes: what the labels are indices of; None: the network's classes.
        """
        reading = replace(self._reading, classes=classes) if classes else self._reading
        ratio = crop_ratio or self._data.crop_ratio
        return evaluation_loader(path, reading, self._batch_size, self._data.image_size, ratio)

    def predict(
        self, loader: Loader | FolderLoader, classes: np.ndarray | None = None, attack: Attack | None = None
    ) -> Predictions:
        return predict(self._model, loader, self._precision, self._data.lr_tta, classes, attack)


def make_model(settings: Model, say: bool) -> torch.nn.Module:
    if settings.weights == PUBLISHED:
        return published_model(settings.arch, settings.num_classes)
    model = build_model(settings.arch, settings.num_classes, use_blurpool=settings.use_blurpool)
    said = load_weights(model, settings.weights)
    if said and say:
        print(f"{settings.weights}: {said}", file=sys.stderr)
    return model


def out_of_distribution_row(sets: Sets, path: str, val: Loader | FolderLoader) -> Row:
    """ImageNet-O: how well low confidence finds its images among the validation images of its classes."""
    outside, _ = sets.open(path)
    classes = np.unique(outside.labels)
    out, inside = sets.predict(outside, classes).confidence, sets.predict(val, classes).confidence
    inside = inside[np.isin(val.labels, classes)]
    scores, is_out = -np.concatenate([out, inside]), np.arange(len(out) + len(inside)) < len(out)
    return "ImageNet-O", "AUPR %", 100 * average_precision(scores, is_out), len(scores)


def v2_variants(path: str) -> list[tuple[str, str]]:
    """`[(variant, path)]`: the three official folders or their .beton below `path`, or `path` itself.

    Raises:
        BadInput: a variant stands there twice, say as a folder and as a .beton.
    """
    sets = [p for p in sorted(Path(path).glob("*")) if p.is_dir() or p.suffix == ".beton"]
    found = [(v, str(p)) for v in V2_VARIANTS for p in sets if v in p.name]
    for (variant, first), (other, second) in pairwise(found):
        if variant == other:
            raise BadInput(f"{path}: holds {variant} twice, {first} and {second}; give one of them")
    return found or [("", path)]


def corruption_rows(sets: Sets, path: str) -> list[Row]:
    """ImageNet-C: each corruption's error over AlexNet's, and their mean, in percent."""
    rows: list[Row] = []
    images = 0
    folders = {folder.name: folder for folder in sorted(Path(path).rglob("*")) if folder.name in ALEXNET_ERRORS}
    if not folders:
        raise BadInput(f"{path}: holds no folder named as a corruption ({', '.join(list(ALEXNET_ERRORS)[:3])}, ...)")
    for name in filter(folders.get, ALEXNET_ERRORS):
        severities = sorted(entry for entry in folders[name].iterdir() if entry.is_dir() or entry.suffix == ".beton")
        results = [sets.predict(sets.open(str(severity), crop_ratio=1.0)[0]) for severity in severities]
        count = sum(len(result.labels) for result in results)
        images += count
        error = float(np.mean([100 - result.top(1) for result in results]))
        rows.append((f"ImageNet-C {name}", "error over AlexNet's, %", error / ALEXNET_ERRORS[name], count))
    whole = len(rows) == len(ALEXNET_ERRORS)
    title = "mean corruption error, %" if whole else f"mean over {len(rows)} of {len(ALEXNET_ERRORS)} corruptions, %"
    return [*rows, ("ImageNet-C", title, float(np.mean([value for _, _, value, _ in rows])), images)]


def background_rows(sets: Sets, path: str, groups: np.ndarray) -> list[Row]:
    """ImageNet-9: accuracy on each variation that is there, and the BG-Gap, mixed_same's less mixed_rand's.

    Args:
        groups: int64, each class's class of ImageNet-9, of `read_in9_map`.
    """
    rows: list[Row] = []
    for variation, place in find_variations(path).items():
        names, numbers = variation_classes(place)
        found = sets.predict(sets.open(place, crop_ratio=1.0, classes=names)[0])
        accuracy = found.grouped(groups, numbers[found.labels])
        rows.append((f"ImageNet-9 {variation}", "top-1 % of 9 classes", accuracy, len(found.labels)))
    results = {title.removeprefix("ImageNet-9 "): (value, images) for title, _, value, images in rows}
    if {"mixed_same", "mixed_rand"} <= results.keys():
        (same, first), (rand, second) = results["mixed_same"], results["mixed_rand"]
        rows.append(("ImageNet-9 BG-Gap", "mixed_same - mixed_rand, points", same - rand, first + second))
    return rows


def report(rows: list[Row], settings: Settings) -> None:
    """Print the table; write JSON and CSV if requested."""
    print(f"\n| {settings.model.arch}, {settings.model.weights} | measure | value | images |\n|---|---|---|---|")
    for title, measure, value, images in rows:
        print(f"| {title} | {measure} | {value:.2f} | {images:,} |")
    if not settings.output.folder:
        return
    folder = Path(settings.output.folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("set", "measure", "value", "images")
    results = [dict(zip(keys, row, strict=True)) for row in rows]
    (folder / "evaluation.json").write_text(json.dumps({"settings": as_dict(settings), "results": results}, indent=1))
    with open(folder / "evaluation.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([keys, *rows])
    print(f"\n{folder}/evaluation.json, evaluation.csv")


if __name__ == "__main__":
    run_command(partial(main, settings))
