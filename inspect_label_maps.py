"""Inspect label maps, and check their quality, before a long training run.

  a folder of images and its label maps (a tree or an archive):
    python inspect_label_maps.py --images ILSVRC/train --label-maps label_maps
  a .beton, and whether its axis order is right, by an annotator:
    python inspect_label_maps.py --beton train.beton --annotator efficientnet-lite0
  a run: its curves, and the training images that are hardest for its network or most relabelled:
    python inspect_label_maps.py --run runs/relabel_rn50

Writes one HTML page, --out, that needs no network and no other file: choose an image, drag and resize a crop on it, and
see its pooled target; with the label map over the image, both axis orders, random crops as training draws them, and
the quality report, which is printed too: coverage, how often the single label is the pooled map's top-1 or among its
top-5, entropy, how many images have several labels.

Of a run, --most training images, drawn by its seed, go through its network as validation crops them, and half of the
--count on the page are the hardest of them: those whose loss is highest above the entropy of their target. The others
are those whose single label has least of the pooled target.

Exit codes: 0 done; 1 bad data, or the axis order is wrong.
"""

from relabel.label_maps.settings import inspection_arguments

if __name__ == "__main__":  # the arguments are read first: the libraries take seconds to import
    arguments = inspection_arguments(__doc__)

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields import CropSampler

from relabel.commands import run_command
from relabel.data.orientation import orientation
from relabel.errors import BadInput
from relabel.files import in_units
from relabel.imagenet import imagenet_classes, imagenet_names
from relabel.label_maps.annotator import DenseAnnotator, Preprocessing, annotator_network
from relabel.label_maps.inspection import Samples, axis_agreement, quality
from relabel.label_maps.page import page_data, write_page
from relabel.processes import join, use_all_cores
from relabel.training.finished import FinishedRun

AXIS_CHECK_IMAGES = 32


def main(arguments: argparse.Namespace) -> int:
    use_all_cores()
    run = FinishedRun(arguments.run, join(-1, "gloo")) if arguments.run else None
    source = run.data if run else arguments.beton or arguments.images
    samples = Samples(source, arguments.label_maps or "", arguments.axis_order, arguments.num_classes)
    names = class_names(samples, arguments.class_names)
    temperature = run.settings["data.relabel.temperature"] if run else arguments.temperature or 1.0

    figures = quality(samples, temperature, arguments.most)
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
    if figures["entropy"] > 0.8 * np.log2(len(names)) and not run:
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

    if run:
        data = page_of_run(run, samples, names, report, arguments)
    else:
        chosen = np.linspace(0, len(samples) - 1, min(arguments.count, len(samples))).round().astype(int).tolist()
        data = page_data(samples, chosen, names, len(names), temperature, CropSampler(0))
        data |= {"title": f"Label maps of {source}", "report": report}
    size = write_page(arguments.out, data)
    print(f"{arguments.out}: {len(data['images'])} images, {in_units(size)}")
    return code


def page_of_run(
    run: FinishedRun, samples: Samples, names: list[str], report: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the page of a run shows: the hardest and the most relabelled of some training images, and the curves."""
    setting, seed = run.settings, run.settings["compute.seed"]
    samples.labels = run.labels
    kept = [place for place, number in enumerate(samples.numbers) if run.labels[number] >= 0]
    drawn = np.random.default_rng(seed).permutation(kept)[: arguments.most].tolist()
    found = run.difficulties([samples.numbers[place] for place in drawn])
    by_excess = sorted(drawn, key=lambda place: -found[samples.numbers[place]].excess)
    by_share = sorted(drawn, key=lambda place: found[samples.numbers[place]].share)
    chosen = list(dict.fromkeys(place for pair in zip(by_excess, by_share, strict=True) for place in pair))
    crops = CropSampler(seed, scale=(setting["data.rrc_minimum"], 1.0))
    temperature = setting["data.relabel.temperature"]
    data = page_data(samples, chosen[: arguments.count], names, run.num_classes, temperature, crops)
    for image in data["images"]:
        one = found[image["number"]]
        image |= {"loss": one.loss, "excess": one.excess, "predicted": one.best, "seen": one.seen}
    validated = [line["top_1"] for line in run.lines if "top_1" in line]
    measured = f", top-1 {validated[-1]:.2f} %" if validated else ""
    lines = [
        f"{setting['model.arch']}, {run.epoch} of {setting['optim.epochs']} epochs{measured}; {run.trained_on()}",
        f"of {len(drawn):,} training images, drawn by seed {seed}: those that are hardest for the network, and those "
        "whose single label has least of the target",
        "loss: the cross-entropy of the network's prediction for the region that validation crops with that region's "
        "target, without augmentation, CutMix and label smoothing; above its target's entropy: what could be avoided",
        *([f"{run.data} is not the file that the run was trained on: it was packed again"] if run.packed_again else []),
        *report,
    ]
    return data | {
        "title": f"Run {run.path}",
        "report": lines,
        "exchanged": run.exchanged,
        "run": {"lines": run.lines},
    }


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


if __name__ == "__main__":
    run_command(partial(main, arguments))
