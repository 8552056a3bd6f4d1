"""The paper's comparisons on Scenes: each kind of training label, the same network, several seeds.

`python reproduce_tables.py --suite scenes` starts it. What is finished is kept; delete a run's folder to repeat it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from relabel.data.label_map_files import read_tensor
from relabel.label_maps.inspection import pool_one
from relabel.processes import use_all_cores
from relabel.training.run_folder import read_log

from . import compose, crop_study
from .demo import mean_and_error, once, prepare, train

EPOCHS = 60
# Rows of the paper's tables 3 (kinds of supervision) and of its ablation (localized or global, single or multi).
ROWS: dict[str, list[str]] = {
    "single label": ["--data.relabel.use=False"],
    "label smoothing 0.1": ["--data.relabel.use=False", "--optim.label_smoothing=0.1"],
    "label cleaning": ["--data.relabel.use=False", "--data.clean_labels={data}/clean_labels.tsv"],
    "annotator: global, single": ["--data.relabel.localized=False", "--data.relabel.multi=False"],
    "annotator: global, multi": ["--data.relabel.localized=False"],
    "annotator: localized, single": ["--data.relabel.multi=False"],
    "annotator: localized, multi (ReLabel)": [],
    "ReLabel + CutMix": ["--data.cutmix.prob=1", "--data.cutmix.beta=1", "--data.cutmix.off_epoch=5"],
}


def main(folder: Path, seeds: list[int]) -> None:
    """Do what is missing, then print the table and draw it: `folder`/scenes.md, scenes.png."""
    data = folder / "data"
    prepare(data)
    once(data / "clean_labels.done", lambda: write_clean_labels(data))
    runs: dict[str, list[Path]] = {row: [] for row in ROWS}
    for seed in seeds:
        for row, settings in ROWS.items():
            run = folder / f"{''.join(c if c.isalnum() else '_' for c in row)}_{seed}"
            given = [setting.format(data=data) for setting in settings]
            given += [f"--optim.epochs={EPOCHS}", f"--validation.every={EPOCHS}"]
            once(run / "finished", partial(train, data, run, seed, *given))
            runs[row].append(run)
    results = {row: {key: [read_log(r)[-1][key] for r in runs[row]] for key in ("top_1", "multilabel")} for row in ROWS}
    (folder / "scenes.json").write_text(json.dumps({"seeds": seeds, "results": results}, indent=1))
    table = make_table(results, len(seeds))
    (folder / "scenes.md").write_text(table)
    draw(results, folder / "scenes.png")
    crops = crop_study.study(data)
    crop_study.draw(crops, folder / "crop_study.png")
    print(f"\n{table}\n{crop_study.summary(crops)}\n\n{folder}/scenes.md, scenes.json, scenes.png, crop_study.png")


def write_clean_labels(data: Path) -> None:
    """The list for the row "label cleaning": labels that the annotator, given the full scene, finds less
    likely than chance are left out.
    """
    layout = json.loads((data / "train.json").read_text())
    classes, lines = len(compose.CLASSES), []
    for file, objects in zip(layout["files"], layout["objects"], strict=True):
        scores, indices = read_tensor((data / "label_maps" / file).with_suffix(".pt")).numpy()
        whole = np.array([[0.0, 0, 1, 1]])
        target = pool_one(scores, indices.astype(np.int64), whole, classes, "float16")[0]
        if target[objects[0][0]] < 1 / classes:
            lines.append(f"{file}\t-\n")
    (data / "clean_labels.tsv").write_text("".join(lines))


def make_table(results: dict[str, dict[str, list[float]]], seeds: int) -> str:
    """Markdown: accuracy of each row, and its difference to the single label paired by seed, means and errors."""
    lines = [
        f"| Scenes, {seeds} seeds | top-1 % | multi-label % | top-1, difference to the single label |",
        "|---|---|---|---|",
    ]
    for row, values in results.items():
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error(values[key])) for key in ("top_1", "multilabel")]
        gain = [a - b for a, b in zip(values["top_1"], results["single label"]["top_1"], strict=True)]
        cells.append("" if row == "single label" else "{:+.1f} ± {:.1f}".format(*mean_and_error(gain)))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Each row's seeds as points, means and standard errors as error bars."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    for axis, (key, title) in zip(axes, (("top_1", "top-1 %"), ("multilabel", "multi-label %")), strict=True):
        for y, name in enumerate(names):
            values = results[name][key]
            mean, error = mean_and_error(values)
            color = "C1" if "annotator" in name or "ReLabel" in name else "C0"
            axis.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=4)
            axis.plot(values, np.full(len(values), y), "|", color=color, alpha=0.5)
        axis.set(title=title, yticks=range(len(names)), yticklabels=names)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scenes"), help="folder of everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the trainings")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    use_all_cores()
    main(arguments.folder, arguments.seeds)
