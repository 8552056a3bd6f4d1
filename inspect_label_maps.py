"""Inspect label maps, and check their quality, before a long training run.

  a folder of images and its label maps (a tree or an archive):
    python inspect_label_maps.py --images ILSVRC/train --label-maps label_maps
  a .beton, and whether its axis order is right, by an annotator:
    python inspect_label_maps.py --beton train.beton --annotator efficientnet-lite0

Writes to --out one PNG per image (the image, where its best classes are, random crops with their pooled labels) and
index.html with all of them and the quality report, which is printed too: coverage, how often the single label is the
pooled map's top-1 or among its top-5, entropy, how many images have several labels.

Exit codes: 0 done; 1 bad data, or the axis order is wrong.
"""

from relabel.label_maps.settings import inspection_arguments

if __name__ == "__main__":  # the arguments are read first: the libraries take seconds to import
    arguments = inspection_arguments(__doc__)

import argparse
import html
from functools import partial
from pathlib import Path

import numpy as np
from ffcv_fields import CropSampler
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from relabel.commands import run_command
from relabel.data.orientation import orientation
from relabel.errors import BadInput
from relabel.imagenet import imagenet_classes, imagenet_names
from relabel.label_maps.annotator import DenseAnnotator, Preprocessing, annotator_network
from relabel.label_maps.inspection import Sample, Samples, axis_agreement, quality
from relabel.processes import use_all_cores

HEAT_MAPS, CROPS = 3, 4
AXIS_CHECK_IMAGES = 32


def main(arguments: argparse.Namespace) -> int:
    use_all_cores()
    samples = Samples(
        arguments.beton or arguments.images, arguments.label_maps or "", arguments.axis_order, arguments.num_classes
    )
    names = class_names(samples, arguments.class_names)
    arguments.out.mkdir(parents=True, exist_ok=True)

    figures = quality(samples, arguments.temperature, arguments.most)
    single = f"the pooled map's best class in {figures['top_1']:.1f} %, among its five best in {figures['top_5']:.1f} %"
    several = f"{figures['multi_label']:.1f} % have a second class that is best at a tenth of the cells or more"
    report = [
        f"label maps of {figures['coverage']:.1f} % of {samples.total:,} images, axis order {samples.axis_order}, "
        f"scores: {samples.scores}",
        f"of {figures['images']:,} inspected: the single label is {single}",
        f"mean entropy of the pooled target {figures['entropy']:.2f} bits; {several}",
        "the image's vertical is " + vertical(samples, arguments.most),
        *samples.remarks,
    ]
    if figures["entropy"] > 0.8 * np.log2(len(names)):
        report.append(
            "the targets are nearly uniform: the scores are small beside the zeros of classes that are not listed; "
            "train with a data.relabel.temperature under 1, and check it here with --temperature"
        )
    code = 0
    if arguments.annotator:
        network, statistics, _ = annotator_network(arguments.annotator, arguments.weights, len(names))
        size = samples[0].scores.shape[1] * 32
        as_read, transposed = axis_agreement(
            samples, DenseAnnotator(network, size), Preprocessing(size, **statistics), AXIS_CHECK_IMAGES
        )
        right = as_read >= transposed
        report.append(
            f"axis order {'right' if right else 'WRONG'}: an annotator gives the classes listed at each cell "
            f"{as_read:.4f} as the maps are read, {transposed:.4f} with rows and columns exchanged"
        )
        code = 0 if right else 1
    print("\n".join(report))

    chosen = np.linspace(0, len(samples) - 1, min(arguments.count, len(samples))).round().astype(int)
    pictures = []
    for number, index in enumerate(chosen):
        pictures.append(f"{number:03d}.png")
        sample = samples[int(index)]
        label = samples.label_of[sample.label]
        title = names[label] if label >= 0 else samples.classes[sample.label]
        draw(sample, int(index), names, title, arguments.temperature, arguments.out / pictures[-1])
    (arguments.out / "index.html").write_text(page(report, pictures))
    print(f"{arguments.out}/index.html: {len(pictures)} images")
    return code


def vertical(samples: Samples, most: int) -> str:
    """Which axis of the maps, as they are read, is the image's vertical, by their asymmetry."""
    found = orientation(samples[i].scores.max(0) for i in range(min(most, len(samples))))
    what = {
        "yx": "the maps' rows, as they are read",
        "xy": "WRONG: the maps' columns, as they are read; read them with the other --axis-order",
        None: "not to be told from these maps",
    }[found.order]
    return f"{what} ({found})"


def class_names(samples: Samples, file: str | None) -> list[str]:
    """Names for people of the classes that the maps name."""
    if file:
        names = Path(file).read_text().splitlines()
        if len(names) != len(samples.map_classes):
            raise BadInput(f"{file}: has {len(names)} names, the maps {len(samples.map_classes)} classes")
        return names
    return imagenet_names() if samples.map_classes == imagenet_classes() else list(samples.map_classes)


def draw(sample: Sample, index: int, names: list[str], label: str, temperature: float, file: Path) -> None:
    """One PNG: the image, heat maps of its best classes over it, random crops and their pooled labels."""
    crops = CropSampler(0, flip_prob=0.0)
    take, _ = crops.compile()
    width, height = sample.image.size
    boxes = []
    for crops.epoch in range(CROPS):
        y, x, h, w = take(index, height, width)
        boxes.append((x / width, y / height, (x + w) / width, (y + h) / height))
    whole = sample.targets(np.array([[0.0, 0, 1, 1]]), len(names), temperature)[0]
    targets = sample.targets(np.array(boxes), len(names), temperature)
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    axes = figure.subplots(2, 4)
    axes[0, 0].imshow(sample.image)
    axes[0, 0].set_title(f"{Path(sample.name).name}\nsingle label: {label}", fontsize=9)
    for axis, best in zip(axes[0, 1:], np.argsort(-whole)[:HEAT_MAPS], strict=True):
        heat = np.where(sample.classes == best, sample.scores, 0).sum(0)
        axis.imshow(sample.image)
        axis.imshow(heat, cmap="inferno", alpha=0.6, extent=(0, width, height, 0), vmin=0, interpolation="nearest")
        axis.set_title(f"{names[best]}\npooled over the image: {whole[best]:.2f}", fontsize=9)
    for i, (axis, (x1, y1, x2, y2)) in enumerate(zip(axes[1], boxes, strict=True)):
        axis.imshow(sample.image.crop((round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))))
        best = np.argsort(-targets[i])[:3]
        axis.set_title("\n".join(f"{names[c]} {targets[i, c]:.2f}" for c in best), fontsize=9, color=f"C{i}")
        frame = Rectangle(
            (x1 * width, y1 * height), (x2 - x1) * width, (y2 - y1) * height, fill=False, color=f"C{i}", linewidth=2
        )
        axes[0, 0].add_patch(frame)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(file, dpi=80)


def page(report: list[str], pictures: list[str]) -> str:
    """The HTML page."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report)
    images = "".join(
        f'<p><img src="{name}" alt="label maps of one image" style="max-width:100%"></p>' for name in pictures
    )
    return f"<!doctype html><meta charset='utf-8'><title>Label maps</title><h1>Label maps</h1><ul>{lines}</ul>{images}"


if __name__ == "__main__":
    run_command(partial(main, arguments), interrupted="interrupted; the pictures that were drawn are kept")
