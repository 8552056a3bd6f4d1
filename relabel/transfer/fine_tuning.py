"""A detector's training run: its learning rate, its curves, and what it hands on."""

import json
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import atomic, write_text
from ..training.monitor import Monitor, summary
from .average_precision import MEASURES
from .coco import CocoSet
from .detectors import save_detector

DETECTOR, RESULTS = "detector.pth", "results.json"
# What a run cannot change halfway: the order of images, or what its state means.
FIXED = (
    "model.detector", "model.trainable_layers", "model.channels", "model.anchor_size", "optim.batch_size",
    "data.flip_prob", "compute.seed",
)  # fmt: skip


def learning_rate(step: int, epoch: int, peak: float, drop: tuple[int, ...], warmup_steps: int) -> float:
    """The learning rate of a step: a linear warm-up from a thousandth of `peak`, and a tenth after each of `drop`.

    Args:
        step: steps done since the start of the run.
        epoch: epochs done.
    """
    warm = 1.0 if step >= warmup_steps else 1e-3 + (1 - 1e-3) * step / warmup_steps
    return peak * warm * 0.1 ** sum(epoch >= at for at in drop)


def check_same_made_of(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise BadInput where a run would go on with other annotations, or from another backbone, than it began with."""
    for name, value in now.items():
        if saved["data"][name] != value:
            raise BadInput(f"{folder}: is a run with another {name}; use the former one, or another logging.folder")


def in_short(line: dict[str, Any]) -> str:
    """A log line for people: of the measures AP alone."""
    return summary({k: v for k, v in line.items() if v is not None and k.rpartition("_")[2] not in MEASURES[1:]})


class FineTuning(Monitor):
    """Monitor of a detector's training; at the end detector.pth, for torchvision, and results.json."""

    kinds: tuple[str, ...] = ("bbox",)
    coco: CocoSet

    def draw(self, log: list[dict[str, Any]]) -> None:
        from matplotlib.figure import Figure  # not before the first step, which it would keep waiting

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([line["epoch"] + 1 for line in log], [line["train_loss"] for line in log])
        left.set(xlabel="epoch", title="training loss")
        for kind, name in (("bbox", "boxes"), ("segm", "masks")):
            points = [(line["epoch"] + 1, line[f"{kind}_AP"]) for line in log if f"{kind}_AP" in line]
            if points:
                right.plot(*zip(*points, strict=True), "o-", label=name)
                right.legend()
        right.set(xlabel="epoch", title="average precision, %")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        with atomic(self.folder.path / "curves.png", sync=False) as temporary:
            figure.savefig(temporary, dpi=110, format="png")

    def hand_on(self, last: dict[str, Any]) -> tuple[str, ...]:
        path = self.folder.path
        with atomic(path / DETECTOR) as temporary:
            save_detector(self.run.network, temporary)
        results = {
            "settings": self.folder.settings,
            "categories": [{"label": i, "id": number, "name": name}
                           for i, (number, name) in enumerate(self.coco.categories.items(), 1)],
            "images": len(self.coco.images),
            "epochs": last["epoch"] + 1,
        }  # fmt: skip
        for kind in self.kinds:
            results[kind] = {key.removeprefix(f"{kind}_"): v for key, v in last.items() if key.startswith(f"{kind}_")}
        write_text(path / RESULTS, json.dumps(results, indent=1))
        return (DETECTOR, RESULTS, *(f"detections_{kind}.json" for kind in self.kinds))
