"""The paper's claims on Scenes, each an experiment: what it trains, and the table and figure of what came out.

  everything, or some of the experiments (annotators, ablation, epochs, scenes, robustness, transposed, recipes):
    python -m scenes.suite
    python -m scenes.suite ablation robustness --seeds 0 1 2

Each training is kept in its own folder, so that a run that was stopped goes on with the next one, and experiments share
those that they have in common; delete the folder `runs/scenes` to begin again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from relabel.data.label_map_files import read_tensor
from relabel.label_maps.inspection import pool_one
from relabel.processes import use_all_cores

from . import compose, crop_study, figures, robustness
from .data import Data, once
from .statistics import in_words
from .trainings import ARCH, Training, run_all

SCENES, EPOCHS = 800, 60
SCENE_COUNTS = (200, 400, 800, 1600, 3200)  # at as many steps as 800 scenes in EPOCHS
EPOCH_COUNTS = (8, 15, 30, 60, 120, 240)
ANNOTATORS = ("weak", "strong")
SINGLE, LOCALIZED_SINGLE, RELABEL = "single label", "localized, single", "localized, multi (ReLabel)"
CUTMIX, TRANSPOSED = "ReLabel + CutMix", "ReLabel, transposed region"
NO_MAPS = "--data.relabel.use=False"
# Rows of the paper's tables 3 (kinds of supervision) and of its ablation (localized or global, single or multi).
ROWS: dict[str, tuple[str, ...]] = {
    SINGLE: (NO_MAPS,),
    "label smoothing 0.1": (NO_MAPS, "--optim.label_smoothing=0.1"),
    "label cleaning": (NO_MAPS, "--data.clean_labels={root}/clean_labels_{annotator}.tsv"),
    "global, single": ("--data.relabel.localized=False", "--data.relabel.multi=False"),
    "global, multi": ("--data.relabel.localized=False",),
    LOCALIZED_SINGLE: ("--data.relabel.multi=False",),
    RELABEL: (),
    CUTMIX: ("--data.cutmix.prob=1", "--data.cutmix.beta=1", "--data.cutmix.off_epoch=5"),
}
# Short recipes that go on from the paper, as in rn50_configs/: ReLabel with progressive resizing, and one change.
RESIZING = tuple(f"--resolution.{setting}" for setting in ("min_res=32", "max_res=48", "start_ramp=41", "end_ramp=49"))
RECIPES: dict[str, tuple[str, ...]] = {
    "progressive resizing": RESIZING,
    RELABEL: ROWS[RELABEL],  # of one size
    "progressive resizing, CutMix": (*RESIZING, "--data.cutmix.prob=1", "--data.cutmix.beta=1"),
    "progressive resizing, BCE": (*RESIZING, "--optim.loss=bce"),
    "progressive resizing, EMA": (*RESIZING, "--optim.ema_decay=0.9861"),  # a tenth of the run
}
SETTINGS = ROWS | RECIPES | {TRANSPOSED: ("--data.relabel.pairing=official",)}
KEYS = ("top_1", "multilabel", "train_top_1", "train_multilabel", "cpu_seconds")
WITHOUT_ANNOTATOR = (SINGLE, "label smoothing 0.1")


@dataclass(frozen=True)
class Suite:
    """Where everything goes, the seeds of the trainings, how many run at a time, and how long they are."""

    folder: Path
    seeds: tuple[int, ...]
    jobs: int = 0
    scenes: int = SCENES
    epochs: int = EPOCHS

    def data(self, scenes: int = 0, annotator: str = "strong") -> Data:
        return Data(self.folder / "data", scenes or self.scenes, annotator)

    def training(self, row: str, seed: int, data: Data, epochs: int = 0) -> Training:
        """Labels that no annotator has a part in are of data without label maps, whatever `data` is."""
        epochs, data = epochs or self.epochs, replace(data, annotator="none") if row in WITHOUT_ANNOTATOR else data
        settings = (*SETTINGS[row], f"--optim.epochs={epochs}", f"--validation.every={epochs}")
        return Training(row, data, seed, settings)

    def run(self, trainings: list[Training]) -> dict[Training, dict[str, float]]:
        return run_all(trainings, self.folder / "trainings", self.jobs)

    def save(self, name: str, text: str, results: object) -> None:
        """`name`.md and `name`.json; prints the text."""
        (self.folder / f"{name}.md").write_text(text)
        (self.folder / f"{name}.json").write_text(json.dumps({"seeds": self.seeds, "results": results}, indent=1))
        print(f"\n{text}", flush=True)


def annotators(suite: Suite) -> None:
    """How good the two annotators' label maps of the training scenes are, and what random crops of these hold."""
    results = {}
    for annotator in ANNOTATORS:
        data = suite.data(annotator=annotator)
        data.make()
        results[annotator] = data.quality()
        crops = crop_study.study(data.layout, data.label_maps)
        print(f"{annotator} annotator: {crop_study.summary(crops)}")
        crop_study.draw(crops, suite.folder / f"crop_study_{annotator}.png")
    lines = ["| annotator | top-1 % | multi-label % | localization % |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{v:.1f}' for v in found.values())} |" for name, found in results.items()]
    suite.save("annotators", "\n".join(lines) + "\n", results)


def ablation(suite: Suite) -> None:
    """Each kind of label, with each annotator."""
    trainings: list[Training] = []
    for annotator in ANNOTATORS:
        data = suite.data(annotator=annotator)
        data.make()
        clean = data.root / f"clean_labels_{annotator}.tsv"
        once(clean.with_suffix(".done"), partial(write_clean_labels, data, clean))
    for seed in suite.seeds:
        for annotator in ANNOTATORS:
            trainings += [suite.training(row, seed, suite.data(annotator=annotator)) for row in ROWS]
    table = by_row(suite.run(list(dict.fromkeys(trainings))), ROWS)
    suite.save("ablation", make_table(table, len(suite.seeds)), table)
    figures.ablation(table, suite.folder / "ablation.png")


def recipes(suite: Suite) -> None:
    """The short recipes that go on from the paper."""
    trainings = [suite.training(row, seed, suite.data()) for seed in suite.seeds for row in RECIPES]
    table = by_row(suite.run(trainings), RECIPES)
    suite.save("recipes", make_table(table, len(suite.seeds)), table)


Table = dict[str, dict[str, list[float]]]  # by "LABELS | ANNOTATOR", what was measured of each seed


def by_row(results: dict[Training, dict[str, float]], rows: Iterable[str]) -> Table:
    """In the order of `rows`."""
    table = {}
    for row, annotator in dict.fromkeys((t.row, t.data.annotator) for row in rows for t in results if t.row == row):
        found = [result for t, result in results.items() if (t.row, t.data.annotator) == (row, annotator)]
        table[f"{row} | {annotator}"] = {key: [result[key] for result in found] for key in KEYS}
    return table


def make_table(results: Table, seeds: int) -> str:
    """Markdown: accuracy of each row, and its difference to the first row, paired by seed; means and errors."""
    first, base = next((name.split(" | ")[0], values["multilabel"]) for name, values in results.items())
    lines = [
        f"| {ARCH}, {seeds} seeds | annotator | top-1 % | multi-label % | multi-label, difference to {first} "
        "| multi-label on the training scenes % | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, values in results.items():
        gain = [a - b for a, b in zip(values["multilabel"], base, strict=True)]
        cells = [in_words(values["top_1"]), in_words(values["multilabel"]), in_words(gain, "+") if any(gain) else ""]
        cells += [in_words(values["train_multilabel"]), f"{np.mean(values['cpu_seconds']):.0f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def epochs(suite: Suite) -> None:
    """What the labels gain by the length of the training, those that ask more of the network too."""
    rows = (SINGLE, LOCALIZED_SINGLE, RELABEL, CUTMIX)
    curves(suite, "epochs", {n: partial(suite.training, data=suite.data(), epochs=n) for n in EPOCH_COUNTS}, rows)


def scenes(suite: Suite) -> None:
    """What ReLabel gains by the number of training scenes, with the same number of steps."""
    steps = suite.epochs * suite.scenes
    points = {n: partial(suite.training, data=suite.data(n), epochs=steps // n) for n in SCENE_COUNTS}
    curves(suite, "scenes", points, (SINGLE, RELABEL))


def curves(
    suite: Suite, name: str, points: Mapping[int, Callable[[str, int], Training]], rows: tuple[str, ...]
) -> None:
    """Each of `rows` at each of `points`: a table and a figure; what the others gain over the first, paired by seed."""
    wanted = {(at, row, seed): make(row, seed) for seed in suite.seeds for at, make in points.items() for row in rows}
    results = suite.run(list(wanted.values()))

    def values(key: str, row: str, at: int) -> list[float]:
        return [results[wanted[at, row, seed]][key] for seed in suite.seeds]

    found = {row: {at: values("multilabel", row, at) for at in points} for row in rows}
    head = name, "labels", "multi-label %", f"difference to the {rows[0]}", "multi-label on the training scenes %"
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for at in points:
        for row in rows:
            gain = [a - b for a, b in zip(found[row][at], found[rows[0]][at], strict=True)]
            cells = [in_words(found[row][at]), in_words(gain, "+") if row != rows[0] else ""]
            lines.append(f"| {at:,} | {row} | {' | '.join(cells)} | {in_words(values('train_multilabel', row, at))} |")
    suite.save(name, "\n".join(lines) + "\n", found)
    figures.curves(found, name, suite.folder / f"{name}.png")


def transposed(suite: Suite) -> None:
    """What it costs to pool the transposed region of each crop: the official pairing, of maps stored rows first."""
    rows = (RELABEL, TRANSPOSED)
    trainings = {(row, seed): suite.training(row, seed, suite.data()) for seed in suite.seeds for row in rows}
    results = suite.run(list(trainings.values()))
    found = {row: [results[trainings[row, seed]]["multilabel"] for seed in suite.seeds] for row in rows}
    loss = in_words([a - b for a, b in zip(found[TRANSPOSED], found[RELABEL], strict=True)], "+")
    own, other = (in_words(found[row]) for row in rows)
    text = (
        f"multi-label accuracy, {len(suite.seeds)} seeds: the crop's own region {own} %, the transposed one {other} %"
    )
    suite.save("transposed", f"{text}; difference {loss}\n", found)


def robust(suite: Suite) -> None:
    """Networks of the ablation on damaged, attacked and foreign scenes."""
    rows = (SINGLE, "label smoothing 0.1", RELABEL, CUTMIX)
    trainings = [suite.training(row, seed, suite.data()) for seed in suite.seeds for row in rows]
    suite.run(trainings)
    found = robustness.study(trainings, suite.folder / "trainings")
    suite.save("robustness", robustness.make_table(found), found)
    figures.robustness(found, suite.folder / "robustness.png")


EXPERIMENTS: dict[str, Callable[[Suite], None]] = {
    "annotators": annotators, "ablation": ablation, "epochs": epochs, "scenes": scenes, "robustness": robust,
    "transposed": transposed, "recipes": recipes,
}  # fmt: skip


def write_clean_labels(data: Data, file: Path) -> None:
    """The list for the row "label cleaning": labels that the annotator, given the full scene, finds less
    likely than chance are left out.
    """
    layout = json.loads(data.layout.read_text())
    classes, lines = len(compose.CLASSES), []
    for name, objects in zip(layout["files"], layout["objects"], strict=True):
        scores, indices = read_tensor((data.label_maps / name).with_suffix(".pt")).numpy()
        whole = np.array([[0.0, 0, 1, 1]])
        target = pool_one(scores, indices.astype(np.int64), whole, classes, "float16")[0]
        if target[objects[0][0]] < 1 / classes:
            lines.append(f"{name}\t-\n")
    file.write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="which ones; all if none is named")
    parser.add_argument("--folder", type=Path, default=Path("runs/scenes"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the trainings")
    parser.add_argument("--jobs", type=int, default=0, help="trainings at a time [one on each core]")
    arguments = parser.parse_args()
    if unknown := set(arguments.experiments) - set(EXPERIMENTS):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    use_all_cores()
    for name in arguments.experiments or EXPERIMENTS:
        start = time.perf_counter()
        EXPERIMENTS[name](Suite(arguments.folder, tuple(arguments.seeds), arguments.jobs))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
