"""Training with and without ReLabel on a small scale: `make demo`.

Composes Scenes, lets a machine annotator write label maps, packs both into .beton files, trains the same network
on single labels and on localized multi-labels (ReLabel), with three seeds each, evaluates all on the same validation
file, and prints one table.

What is finished is not repeated: delete the folder `runs/demo` for a fresh start.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
from ffcv_fields import CropSampler

from relabel.data.beton import labels_of, read_header
from relabel.data.contents import read_sample_list
from relabel.data.reading import Reading, training_loader
from relabel.processes import join, use_all_cores
from relabel.training.curves import draw_curves
from relabel.training.run_folder import read_log
from relabel.training.targets import soft_targets

from . import compose
from .data import Data, once
from .pictures import draw_crops
from .statistics import in_words
from .trainings import ARCH, Training, run_all

TRAIN_SCENES = 800
ROWS = {"single label": ("--data.relabel.use=False",), "ReLabel": ()}


def main(folder: Path, seeds: list[int]) -> None:
    """Run what is not done yet, for each seed, and print the table of all."""
    data, start = Data(folder / "data", TRAIN_SCENES), time.perf_counter()
    print(f"composing {TRAIN_SCENES:,} training scenes and the validation scenes, and annotating them", flush=True)
    data.make()
    print("the annotator's label maps: " + ", ".join(f"{name} {v:.1f} %" for name, v in data.quality().items()))
    trainings = [Training(row, data, seed, settings) for seed in seeds for row, settings in ROWS.items()]
    results = run_all(trainings, folder)
    first = {t.row: read_log(folder / t.name) for t in trainings[: len(ROWS)]}
    draw_curves(first, folder / "curves.png")
    once(folder / "crops.png", lambda: show_crops(data, folder / "crops.png"))
    table = make_table(results, seeds)
    (folder / "results.md").write_text(table)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"\n{table}\npictures: {folder}/curves.png, {folder}/crops.png")
    print(f"peak memory of one process {peak:.2f} GiB; {time.perf_counter() - start:.0f} s")


def make_table(results: dict[Training, dict[str, float]], seeds: list[int]) -> str:
    """Markdown: accuracy by row, mean and, with several seeds, standard error; time of a core."""
    lines = [
        f"| {ARCH}, seeds {', '.join(map(str, seeds))} | top-1 % | multi-label % | CPU s a training |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        found = [result for training, result in results.items() if training.row == row]
        cells = [in_words([result[key] for result in found]) for key in ("top_1", "multilabel")]
        seconds = np.mean([result["cpu_seconds"] for result in found])
        lines.append(f"| {row} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def show_crops(data: Data, file: Path) -> None:
    """A sheet of training scenes, their single labels, random crops, and the crops' pooled targets."""
    path, count, classes = data.train, 6, compose.CLASSES
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
    full = np.stack([compose.read_scene(data.root / "train" / samples.names[i]) for i in chosen])
    draw_crops(full, list(sheet.values()), [classes[labels[i]] for i in chosen], classes, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the trainings")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    use_all_cores()
    main(arguments.folder, arguments.seeds)
