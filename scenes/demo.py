"""Training with and without ReLabel on a small scale: `make demo`.

Composes Scenes, lets a machine annotator write label maps, packs both into .beton files, trains the same network
twice, on single labels and on localized multi-labels (ReLabel), evaluates both on the same validation file, and
prints one table. Packing and training are the top-level commands, called as a user calls them.

What is finished is not repeated: delete the folder `runs/demo` for a fresh start.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from ffcv_fields import CropSampler

from relabel.commands import call
from relabel.data.beton import labels_of, read_header
from relabel.data.contents import read_sample_list
from relabel.data.reading import Reading, training_loader
from relabel.processes import join, use_all_cores
from relabel.settings import ROOT
from relabel.training.curves import draw_curves
from relabel.training.run_folder import read_log
from relabel.training.targets import soft_targets

from . import annotator, compose
from .pictures import draw_crops

CONFIG = ROOT / "rn50_configs" / "demo.yaml"
TRAIN_SCENES, VAL_SCENES = 800, 2000
ROWS = {"single label": ["--data.relabel.use=False"], "ReLabel": []}


def main(folder: Path, seeds: list[int]) -> None:
    """Run what is not done yet, for each seed, and print the table of all."""
    data, start = folder / "data", time.perf_counter()
    prepare(data)
    runs = {}
    for seed in seeds:
        for row, settings in ROWS.items():
            run = runs[row, seed] = folder / f"{row.replace(' ', '_')}_{seed}"
            once(run / "finished", partial(train, data, run, seed, *settings))
    draw_curves({row: read_log(runs[row, seeds[0]]) for row in ROWS}, folder / "curves.png")
    once(folder / "crops.png", lambda: show_crops(data, folder / "crops.png"))
    table = make_table(runs, seeds)
    (folder / "results.md").write_text(table)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"\n{table}\npictures: {folder}/curves.png, {folder}/crops.png")
    print(f"peak memory of one process {peak:.2f} GiB; {time.perf_counter() - start:.0f} s")


def once(mark: Path, step: Callable[[], None]) -> None:
    """Do `step` unless the file `mark` exists, then create it."""
    if not mark.exists():
        step()
        mark.touch()


def command(name: str, *arguments: object) -> None:
    """Run a command; if it fails, exit with its exit code."""
    if code := call(name, *arguments):
        sys.exit(code)


def prepare(data: Path) -> None:
    """Scenes, their label maps and the two `.beton` in the folder `data`, as far as they are not there."""
    once(data / "scenes.done", lambda: make_scenes(data))
    once(data / "label_maps.done", lambda: make_label_maps(data))
    maps = [f"--cfg.label_map_dir={data}/label_maps"]
    encoded = "--cfg.jpeg=encode"  # as when docs/results.md was measured
    for split, more in (("train", [*maps, encoded]), ("val", [encoded])):
        path = data / f"{split}.beton"
        if not path.exists():
            # In order of names, as when docs/results.md was measured: a sample's number decides its crops.
            order = "--cfg.order=sorted"
            command("write_datasets.py", f"--cfg.data_dir={data}/{split}", f"--cfg.write_path={path}", order, *more)


def make_scenes(data: Path) -> None:
    print(f"composing {TRAIN_SCENES:,} training and {VAL_SCENES:,} validation scenes", flush=True)
    compose.write_scenes(data, "train", TRAIN_SCENES, seed=0)
    compose.write_scenes(data, "val", VAL_SCENES, seed=0)


def make_label_maps(data: Path) -> None:
    network, accuracy = annotator.train_annotator(seed=0)
    print(f"annotator: {accuracy:.1f} % on single objects that it has not seen", flush=True)
    annotator.annotate(network, data / "train", data / "label_maps")


def train(data: Path, run: Path, seed: int, *settings: str) -> None:
    command(
        "train_imagenet.py", f"--config-file={CONFIG}", f"--data.train_dataset={data}/train.beton",
        f"--data.val_dataset={data}/val.beton", f"--validation.multilabel_file={data}/val_multilabels.json",
        f"--compute.seed={seed}", f"--logging.folder={run}", "--resume=auto", *settings,
    )  # fmt: skip


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for one value)."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def make_table(runs: dict[tuple[str, int], Path], seeds: list[int]) -> str:
    """Markdown: accuracy by row, mean and, with several seeds, standard error; training speed."""
    lines = [
        f"| {yaml.safe_load(CONFIG.read_text())['model']['arch']}, seeds {', '.join(map(str, seeds))} "
        "| top-1 % | multi-label % | images/s |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        logs = [read_log(runs[row, seed]) for seed in seeds]
        cells = []
        for key in ("top_1", "multilabel"):
            mean, error = mean_and_error([log[-1][key] for log in logs])
            cells.append(f"{mean:.1f} ± {error:.1f}" if len(logs) > 1 else f"{mean:.1f}")
        speed = np.median([line["images_per_second"] for log in logs for line in log[1:]])
        lines.append(f"| {row} | {' | '.join(cells)} | {speed:,.0f} |")
    return "\n".join(lines) + "\n"


def show_crops(data: Path, file: Path) -> None:
    """A sheet of training scenes, their single labels, random crops, and the crops' pooled targets."""
    path, count, classes = data / "train.beton", 6, compose.CLASSES
    labels = labels_of(str(path))
    chosen = np.random.default_rng([3, 0]).permutation(len(labels))[:count].tolist()
    crops, reading = CropSampler(seed=0, flip_prob=0.0), Reading(len(classes), join(-1, "gloo"), num_workers=1)
    only = np.full_like(labels, -1)
    only[chosen] = labels[chosen]
    loader = training_loader(str(path), reading, count, crops, 64, normalize=False, labels=only)
    sheet: dict[int, list] = {sample: [] for sample in chosen}
    for epoch in range(4):  # the same scenes, with the crops of four epochs
        batch = next(loader.epoch(epoch))
        assert batch.crop_boxes is not None
        targets = soft_targets(batch, len(classes)).numpy()
        for i, sample in enumerate(loader.order_of(epoch)):
            sheet[sample].append((batch.images[i].numpy().copy(), batch.crop_boxes[i].numpy().copy(), targets[i]))
    samples = read_sample_list(read_header(str(path)))
    assert samples is not None
    full = np.stack([compose.read_scene(data / "train" / samples.names[i]) for i in chosen])
    draw_crops(full, list(sheet.values()), [classes[labels[i]] for i in chosen], classes, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the trainings")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    use_all_cores()
    main(arguments.folder, arguments.seeds)
