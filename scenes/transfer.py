"""Transfer on Scenes: detectors on backbones that were trained with single labels, with ReLabel, and not at all.

Fine-tunes Mask R-CNN, by `finetune_detector.py`, on the networks that the ablation of `scenes.suite` trains with single
labels and with ReLabel, on either annotator's maps (they are trained here if they are not there yet), and on random
weights; prints the average precision of boxes and masks on scenes of photographs that no training has seen.

  python -m scenes.transfer

What is finished is kept in `runs/scenes` and not repeated.
"""

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from relabel.files import write_text
from relabel.processes import use_all_cores

from .coco import write_coco_scenes
from .data import command, once
from .statistics import in_words, mean_and_error
from .suite import RELABEL, SINGLE, Suite
from .trainings import ARCH, Training

DETECTION_SCENES = 200  # to fine-tune on, and as many others to evaluate on
# The recipe at the size of Scenes: small images, objects, feature pyramid and heads.
SETTINGS = (
    "--data.train=train", "--data.val=val", "--data.min_size=96", "--data.num_workers=0", "--model.anchor_size=16",
    "--model.channels=32", "--model.rois=32", "--optim.batch_size=4", "--optim.epochs=6", "--optim.lr.drop=4",
    "--optim.warmup.steps=50", "--validation.every=6",
)  # fmt: skip
RANDOM = "random weights"
# What they are called here: the ablation's row, and whose label maps; None: nothing is trained before.
ROWS: dict[str, tuple[str, str] | None] = {
    RANDOM: None,
    SINGLE: (SINGLE, "strong"),
    "ReLabel, weak annotator": (RELABEL, "weak"),
    "ReLabel, strong annotator": (RELABEL, "strong"),
}
MEASURES = {"bbox": "boxes", "segm": "masks"}
Found = dict[str, list[dict[str, float]]]


def main(folder: Path, seeds: list[int]) -> None:
    """Run what is not done yet, for each seed; `folder`/transfer.md, transfer.json, transfer.png."""
    suite, coco, start = Suite(folder, tuple(seeds)), folder / "coco", time.perf_counter()
    for split in ("train", "val"):
        once(folder / f"coco_{split}.done", partial(write_coco_scenes, coco, split, DETECTION_SCENES, seed=1))
    backbones = {
        (name, seed): suite.training(row[0], seed, suite.data(annotator=row[1]))
        for name, row in ROWS.items() for seed in seeds if row
    }  # fmt: skip
    accuracies = suite.run(list(backbones.values()))
    found: Found = {name: [] for name in ROWS}
    for seed in seeds:
        for name in ROWS:
            backbone = backbones.get((name, seed))
            results = fine_tuned(folder, coco, seed, backbone)
            accuracy = accuracies[backbone]["multilabel"] if backbone else float("nan")
            found[name].append({kind: results[kind]["AP"] for kind in MEASURES} | {"multilabel": accuracy})
    table = make_table(found, seeds)
    write_text(folder / "transfer.md", table)
    write_text(folder / "transfer.json", json.dumps({"seeds": seeds, "results": found}, indent=1))
    draw(found, folder / "transfer.png")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{table}\n{folder}/transfer.md, transfer.json, transfer.png")
    print(f"{time.perf_counter() - start:.0f} s; {usage.ru_utime + usage.ru_stime:.0f} s of CPU time of the commands")


def fine_tuned(folder: Path, coco: Path, seed: int, backbone: Training | None) -> dict:
    """The results of the detector on a backbone, None: on random weights."""
    run = folder / "detectors" / (backbone.name if backbone else f"random_{seed}")
    trained = folder / "trainings" / backbone.name / "weights.safetensors" if backbone else None
    weights = [f"--model.weights={trained}"] if trained else ["--model.weights=random", f"--model.arch={ARCH}"]
    arguments = [f"--data.folder={coco}", *weights, *SETTINGS, f"--compute.seed={seed}", f"--logging.folder={run}"]
    if not (run / "results.json").exists():
        command("finetune_detector.py", *arguments, "--resume=auto")
    return json.loads((run / "results.json").read_text())


def make_table(found: Found, seeds: list[int]) -> str:
    """Markdown: of each row the backbone's accuracy, the average precision, and what it gains over the single label."""
    lines = [
        f"| backbone ({ARCH}), seeds {', '.join(map(str, seeds))} | its multi-label accuracy % | boxes, AP % "
        "| masks, AP % | boxes, difference to the single label | masks, the same |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in found.items():
        cells = ["" if name == RANDOM else in_words([result["multilabel"] for result in results])]
        cells += [in_words([result[kind] for result in results]) for kind in MEASURES]
        for kind in MEASURES:
            gains = [a[kind] - b[kind] for a, b in zip(results, found[SINGLE], strict=True)]
            cells.append("" if name == SINGLE else in_words(gains, "+"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: Found, file: Path) -> None:
    """Average precision of each row, mean and standard error; each seed a line from row to row."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    names = list(found)[::-1]
    for axis, (kind, title) in zip(axes, MEASURES.items(), strict=True):
        values = [[result[kind] for result in found[name]] for name in names]
        axis.plot(values, names, "-", color="C7", alpha=0.4)
        for name, of_seeds in zip(names, values, strict=True):
            mean, error = mean_and_error(of_seeds)
            axis.errorbar(
                mean, name, xerr=error, fmt="o", capsize=4, color="C1" if name.startswith("ReLabel") else "C0"
            )
        axis.set(title=f"average precision of {title}, %")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scenes"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    use_all_cores()
    main(arguments.folder, arguments.seeds)
