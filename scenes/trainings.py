"""Trainings on Scenes, several at a time, each on one core; what is finished is kept in its folder and not repeated.

A small network gains little from a second core, and starting the command takes longer than a tenth of the training: so
each process calls the `main` of `train_imagenet.py` for one training after the other.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml

import train_imagenet
from relabel.cores import ONE_THREAD, usable_cores
from relabel.data.reading import Reading, validation_loader
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.evaluation.predictions import evaluate
from relabel.files import write_text
from relabel.models import build_model, load_weights
from relabel.official import OFFICIAL
from relabel.precision import precision_of
from relabel.processes import join
from relabel.settings import ROOT, load_settings
from relabel.training.run_folder import read_log
from relabel.training.settings import Settings

from .compose import CLASSES
from .data import Data

CONFIG = ROOT / "rn50_configs" / "demo.yaml"
ARCH = yaml.safe_load(CONFIG.read_text())["model"]["arch"]
IMAGE_SIZE = yaml.safe_load(CONFIG.read_text())["data"]["image_size"]


@dataclass(frozen=True)
class Training:
    """One training: `row` names it, `settings` are what differs from the demo's config."""

    row: str
    data: Data
    seed: int
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder: for people, and by a hash of every setting."""
        content = [self.data.scenes, self.data.annotator, self.settings, CONFIG.read_text()]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        return f"{''.join(c if c.isalnum() else '_' for c in self.row)}_{digest}_{self.seed}"

    def arguments(self, run: Path) -> list[str]:
        """Of train_imagenet.py; in a setting `{root}` is the folder of the training scenes, `{annotator}` its name."""
        data = self.data
        return [
            f"--config-file={CONFIG}", f"--data.train_dataset={data.train}", f"--data.val_dataset={data.val}",
            f"--validation.multilabel_file={data.folder}/val_multilabels.json", f"--compute.seed={self.seed}",
            f"--logging.folder={run}", "--resume=auto",
            *(setting.format(root=data.root, annotator=data.annotator) for setting in self.settings),
        ]  # fmt: skip


def run_all(trainings: list[Training], runs: Path, jobs: int = 0) -> dict[Training, dict[str, float]]:
    """Run what is not finished yet, `jobs` at a time (0: one on each core).

    Returns:
        Of each training: `top_1` and `multilabel` on the validation scenes, `train_top_1` and `train_multilabel` on
        the training scenes as they are, uncropped, all in percent; `cpu_seconds`, of all its threads.

    Raises:
        BadInput: one has failed; names the file with its output.
    """
    missing = [training for training in trainings if not (runs / training.name / "result.json").exists()]
    for data in dict.fromkeys(training.data for training in trainings):
        data.make()
    if missing:
        jobs = min(jobs or usable_cores(), len(missing))
        print(f"\n{len(missing)} trainings, {jobs} at a time; the output of each is in {runs}/*/output.txt", flush=True)
        start = time.perf_counter()
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            with _one_thread():  # the processes start as they are given work
                futures = {pool.submit(_run, training, runs / training.name): training for training in missing}
            for done, future in enumerate(as_completed(futures), 1):
                if error := future.exception():
                    pool.shutdown(cancel_futures=True)
                    raise error
                result, training = future.result(), futures[future]
                left = (time.perf_counter() - start) / done * (len(missing) - done)
                print(
                    f"{done}/{len(missing)} {training.row}, seed {training.seed}: top-1 {result['top_1']:.1f} %, "
                    f"multi-label {result['multilabel']:.1f} %; about {left:.0f} s left",
                    flush=True,
                )
    return {training: json.loads((runs / training.name / "result.json").read_text()) for training in trainings}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The environment of processes that compute with one thread; then this one's own again, which numba rereads."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _run(training: Training, run: Path) -> dict[str, float]:
    """One training in this process, its output into a file; leaves `result.json` in its folder."""
    run.mkdir(parents=True, exist_ok=True)
    output = run / "output.txt"
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["train_imagenet.py", *training.arguments(run)]
    print(f"$ python {' '.join(sys.argv)}", flush=True)
    start = time.process_time()
    try:
        train_imagenet.main(load_settings(Settings, "", OFFICIAL))
    except (BadInput, SystemExit) as error:
        raise BadInput(f"{training.row}, seed {training.seed}, failed: {error}; see {output}") from None
    log = read_log(run)
    result = {key: log[-1][key] for key in ("top_1", "multilabel")}
    result["cpu_seconds"] = time.process_time() - start
    found = on_training_scenes(run, training.data)
    result |= {f"train_{key}": found[key] for key in ("top_1", "multilabel")}
    write_text(run / "result.json", json.dumps(result | {"settings": training.settings, "row": training.row}))
    return result


def network_of(run: Path) -> torch.nn.Module:
    """The network of a finished training."""
    network = build_model(ARCH, len(CLASSES))
    load_weights(network, str(run / "weights.pth"))
    return network.eval()


def on_training_scenes(run: Path, data: Data) -> dict[str, float]:
    """The accuracy of a finished training on its own training scenes, read as for validation."""
    reading = Reading(len(CLASSES), join(-1, "gloo"), num_workers=1)
    loader = validation_loader(str(data.train), reading, 250, IMAGE_SIZE, crop_ratio=1.0)
    present = read_multilabels(str(data.root / "train_multilabels.json"), loader.identity, len(CLASSES))
    return evaluate(network_of(run), loader, precision_of("fp32", torch.device("cpu")), multilabels=present)
