"""The published accuracy tables: each row a config of rn50_configs/, printed as published | measured | difference.

  what is there so far (run folders below runs/tables; a row without a finished run reads "not run"):
    python reproduce_tables.py
  train and evaluate the rows that are missing, one after the other, on 8 GPUs; stop and resume at will:
    python reproduce_tables.py --run --gpus 8 --train-settings train.yaml --evaluate-settings evaluate.yaml
  or as an array of SLURM jobs (pip install submitit):
    python reproduce_tables.py --run --gpus 8 --cluster slurm --partition gpu --train-settings ...
  the kinds of labels on the Scenes of the demo, with two annotators and 5 seeds (70 trainings of a minute of a core):
    python reproduce_tables.py --suite scenes

train.yaml holds what train_imagenet.py needs to know of this machine (data.train_dataset, data.val_dataset, ...),
evaluate.yaml what evaluate_imagenet.py does (data.val, data.real, data.multilabel_records, data.imagenet_v2).

Exit codes: 0 done; 1 a row failed; 2 a bad setting; 75 stopped by a signal, --run resumes.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from relabel.commands import call, run_command
from relabel.settings import ROOT
from relabel.stopping import STOPPED

CONFIGS = ROOT / "rn50_configs"
# A column's set and measure in evaluation.json. The paper does not say which of ImageNetV2's variants it used; only on
# the top images are networks better than on ImageNet, as its figures are.
COLUMNS = {
    "ImageNet": ("ImageNet", "top-1 %"),
    "ImageNetV2": ("ImageNetV2 top-images", "top-1 %"),
    "ReaL": ("ReaL", "multi-label %"),
    "Shankar et al.": ("Shankar et al.", "multi-label %, mean of classes"),
}


@dataclass(frozen=True)
class Row:
    """A row: its name, its config, and the published figures, of the first of the `COLUMNS` in their order."""

    name: str
    config: str
    published: tuple[float, ...] = ()


SHORT = "Short recipes, ResNet-50 + ReLabel"
TABLES = {
    "ResNet-50, kinds of labels": [
        Row("ResNet-50", "baseline_rn50", (77.5, 79.0, 83.6, 85.3)),
        Row("+ label smoothing 0.1", "label_smoothing_rn50", (78.0, 79.5, 84.0, 84.7)),
        Row("+ label cleaning", "label_cleaning_rn50", (78.1, 79.1, 83.6, 85.2)),
        Row("+ ReLabel", "relabel_rn50", (78.9, 80.5, 85.0, 86.1)),
    ],
    "Architectures": [
        row
        for name, config, baseline, relabel in (
            ("ResNet-18", "rn18", 71.7, 72.5),
            ("ResNet-50", "rn50", 77.5, 78.9),
            ("ResNet-101", "rn101", 78.1, 80.7),
            ("ReXNet x1.0", "rexnet_x1", 77.9, 78.4),
            ("EfficientNet-B0", "efficientnet_b0", 77.4, 78.0),
            ("EfficientNet-B1", "efficientnet_b1", 79.2, 80.3),
            ("EfficientNet-B2", "efficientnet_b2", 80.3, 81.0),
            ("EfficientNet-B3", "efficientnet_b3", 81.7, 82.5),
        )
        for row in (
            Row(name, f"baseline_{config}", (baseline,)),
            Row(f"{name} + ReLabel", f"relabel_{config}", (relabel,)),
        )
    ],
    "With tricks": [
        Row("ResNet-18 + ReLabel + CutMix", "relabel_cutmix_rn18", (73.2,)),
        Row("ResNet-50 + ReLabel + CutMix", "relabel_cutmix_rn50", (80.2,)),
        Row("ResNet-50 + ReLabel + CutMix + ImageNet-21K", "relabel_cutmix_21k_rn50", (81.2,)),
        Row("ResNet-101 + ReLabel + CutMix", "relabel_cutmix_rn101", (81.6,)),
    ],
    SHORT: [
        Row("16 epochs", "rn50_16_epochs", (73.8,)),
        Row("16 epochs + BCE", "rn50_16_epochs_bce"),
        Row("16 epochs + EMA", "rn50_16_epochs_ema"),
        Row("24 epochs", "rn50_24_epochs", (75.6,)),
        Row("32 epochs", "rn50_32_epochs", (76.6,)),
        Row("40 epochs", "rn50_40_epochs", (77.2,)),
        Row("56 epochs", "rn50_56_epochs", (78.0,)),
        Row("88 epochs", "rn50_88_epochs", (78.4,)),
        Row("88 epochs + CutMix", "rn50_88_epochs_cutmix"),
    ],
}
PAPER = "Published: the paper's, of one center crop, without flip averaging; so is what is measured."
NOTES = {
    SHORT: "Published: ffcv-imagenet's, with label smoothing and without ReLabel, all with flip averaging at test "
    "(`validation.lr_tta`), at 256 px; so is what is measured."
}
ALL_ROWS = [row for rows in TABLES.values() for row in rows]
ALL_CONFIGS = sorted({row.config for row in ALL_ROWS})


def measured(folder: Path) -> dict[str, float]:
    """A finished run's value for each column that it has; empty for an unfinished run."""
    log, settings = folder / "log.jsonl", folder / "config.yaml"
    if not log.exists() or not settings.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if not lines or lines[-1]["epoch"] + 1 < yaml.safe_load(settings.read_text())["optim.epochs"]:
        return {}
    values = {"ImageNet": lines[-1]["top_1"]}
    if (folder / "evaluation.json").exists():
        results = json.loads((folder / "evaluation.json").read_text())["results"]
        found = {(result["set"], result["measure"]): result["value"] for result in results}
        values |= {column: found[key] for column, key in COLUMNS.items() if key in found}
    return values


def published_of(config: str) -> dict[str, float]:
    """The published value for each column that has one, of all tables."""
    found = [dict(zip(COLUMNS, row.published, strict=False)) for row in ALL_ROWS if row.config == config]
    return {column: value for figures in found for column, value in figures.items()}


def make_tables(runs: Path) -> str:
    """Markdown: each table, as published | measured | difference in each column that has a figure of either kind."""
    text = []
    for title, rows in TABLES.items():
        values = {row.config: measured(runs / row.config) for row in rows}
        published = {row.config: published_of(row.config) for row in rows}
        columns = [c for c in COLUMNS if any(c in values[row.config] | published[row.config] for row in rows)]
        heads = [f"{column}: published | measured | difference" for column in columns]
        text += [f"\n### {title}\n", f"{NOTES.get(title, PAPER)}\n"]
        text += [f"| | {' | '.join(heads)} |", "|---|" + "---|" * 3 * len(columns)]
        for row in rows:
            cells = [c for column in columns for c in _cells(published[row.config], values[row.config], column)]
            text.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _cells(published: dict[str, float], values: dict[str, float], column: str) -> tuple[str, str, str]:
    """A row's figures of a column: empty where nothing is published, "not run" where nothing is measured."""
    theirs, ours = published.get(column), values.get(column)
    return (
        "" if theirs is None else f"{theirs:.1f}",
        "not run" if ours is None else f"{ours:.1f}",
        "" if theirs is None or ours is None else f"{ours - theirs:+.1f}",
    )


def run_row(config: str, runs: Path, gpus: int, train_settings: list[Path], evaluate_settings: list[Path]) -> int:
    """Train (or resume) a row and evaluate it. Returns the exit code of what failed, or 0."""
    folder, command = runs / config, partial(call, processes=gpus)
    if not measured(folder):
        files = [word for file in [CONFIGS / f"{config}.yaml", *train_settings] for word in ("--config-file", file)]
        if code := command("train_imagenet.py", *files, f"--logging.folder={folder}", "--resume=auto"):
            return code
    if evaluate_settings and not (folder / "evaluation.json").exists():
        files = [word for file in evaluate_settings for word in ("--config-file", file)]
        trained = yaml.safe_load((folder / "config.yaml").read_text())
        same = [f"--{key}={trained[key]}" for key in ("model.arch", "model.num_classes", "model.use_blurpool")]
        same += [f"--data.image_size={trained['validation.resolution'] or trained['data.image_size']}"]
        same += [f"--data.crop_ratio={trained['data.crop_ratio']}", f"--data.lr_tta={trained['validation.lr_tta']}"]
        return command(
            "evaluate_imagenet.py",
            *files,
            *same,
            f"--model.weights={folder}/checkpoint.pt",
            f"--output.folder={folder}",
        )
    return 0


def run_missing(arguments: argparse.Namespace) -> int:
    """Run the requested rows: here, one after the other, or as jobs on a cluster. Returns an exit code."""
    common = (arguments.runs, arguments.gpus, arguments.train_settings, arguments.evaluate_settings)
    if arguments.cluster == "here":
        failed = []
        for config in arguments.rows:
            code = run_row(config, *common)
            if code == STOPPED:
                return code
            if code:
                failed.append(config)
        if failed:
            print(f"reproduce_tables.py: these rows failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0
    try:
        import submitit
    except ImportError:
        print("reproduce_tables.py: --cluster needs a package: pip install submitit", file=sys.stderr)
        return 2
    executor = submitit.AutoExecutor(folder=arguments.runs / "jobs", cluster=arguments.cluster)
    executor.update_parameters(
        name="relabel", timeout_min=arguments.hours * 60, gpus_per_node=arguments.gpus, tasks_per_node=1,
        slurm_partition=arguments.partition, slurm_array_parallelism=len(arguments.rows),
    )  # fmt: skip
    jobs = executor.map_array(lambda config: run_row(config, *common), arguments.rows)
    print("\n".join(f"{config}: job {job.job_id}" for config, job in zip(arguments.rows, jobs, strict=True)))
    if arguments.cluster == "slurm":
        print(
            f"logs in {arguments.runs}/jobs; print the tables with python reproduce_tables.py --runs {arguments.runs}"
        )
        return 0
    return max(job.result() for job in jobs)


def main(arguments: argparse.Namespace) -> int:
    if arguments.suite == "scenes":
        seeds = [str(seed) for seed in arguments.seeds]
        return subprocess.run(
            [sys.executable, "-m", "scenes.suite", "ablation", f"--folder={arguments.runs}", "--seeds", *seeds],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        ).returncode
    code = run_missing(arguments) if arguments.run else 0
    tables = make_tables(arguments.runs)
    print(tables)
    if arguments.runs.is_dir():
        (arguments.runs / "tables.md").write_text(tables)
    return code


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("imagenet", "scenes"), default="imagenet", help="which comparisons")
    parser.add_argument("--runs", type=Path, help="folder of the run folders [runs/tables, runs/scenes]")
    parser.add_argument("--run", action="store_true", help="train and evaluate the rows that are missing")
    parser.add_argument("--rows", nargs="+", choices=ALL_CONFIGS, default=ALL_CONFIGS, help="only these", metavar="ROW")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs (processes) per training run [1]")
    parser.add_argument("--train-settings", type=Path, action="append", default=[], help="YAML for train_imagenet.py")
    parser.add_argument(
        "--evaluate-settings", type=Path, action="append", default=[], help="YAML for evaluate_imagenet.py"
    )
    parser.add_argument("--cluster", choices=("here", "slurm", "local"), default="here", help="where rows run [here]")
    parser.add_argument("--partition", help="SLURM partition")
    parser.add_argument("--hours", type=int, default=48, help="time limit of a job [48]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of --suite scenes")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or Path("runs") / ("scenes" if arguments.suite == "scenes" else "tables")
    return arguments


if __name__ == "__main__":
    run_command(partial(main, read_arguments()), interrupted="interrupted; the same command resumes")
