"""What a run leaves in its folder, written so that it can be killed at any moment: checkpoints and logs.

config.yaml      every setting in force
log.jsonl        one line an epoch
steps.jsonl      one line every `util.print_freq` steps
curves.png       drawn after every epoch
checkpoint.pt    the state after the last step that was saved; checkpoint_before.pt: the one before
tensorboard/     with logging.tensorboard
"""

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .atomic import sync_folder, write_text
from .errors import BadInput

CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")
# What a run cannot change halfway: the order of samples, or what its state means.
FIXED = (
    "model.arch", "model.num_classes", "model.use_blurpool", "optim.optimizer", "optim.batch_size", "optim.bn.decay",
    "data.in_memory", "compute.seed",
)  # fmt: skip


@dataclass
class Run:
    """What training changes, and where it stands: the next step to do is `step` of `epoch`."""

    network: nn.Module
    model: nn.Module  # `network` as it is trained
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    losses: torch.Tensor | None = None  # float32 [steps], of this epoch so far, zero beyond
    seconds: float = 0.0  # of this epoch so far
    waited: float = 0.0  # of these, for the loader

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema:
            state |= {"ema": self.ema.module.state_dict(), "ema_steps": self.ema.n_averaged}
        return state | {name: getattr(self, name) for name in ("epoch", "step", "losses", "seconds", "waited")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, in place."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("ema", state["model"]))
            self.ema.n_averaged.copy_(state.get("ema_steps", torch.tensor(0)))
        for name in ("epoch", "step", "losses", "seconds", "waited"):
            setattr(self, name, state[name])

    def next_epoch(self) -> None:
        self.epoch, self.step, self.losses, self.seconds, self.waited = self.epoch + 1, 0, None, 0.0, 0.0


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str, tensorboard: bool) -> None:
        self.path = Path(path)
        self._make_writer: Callable[[], Any] | None = None
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("logging.tensorboard needs a package: pip install tensorboard") from None
            self._make_writer = partial(SummaryWriter, self.path / "tensorboard")

    def load(self, device: torch.device, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, if the settings ask to go on and there is one.

        Args:
            device: where its tensors go.
            settings: of the run that is about to go on; `logging.resume` or `optim.start_epoch` asks for it.

        Raises:
            BadInput: none is whole, or it is of other settings, or not at the start of `optim.start_epoch`.
        """
        files, start_epoch = [self.path / name for name in CHECKPOINTS], settings["optim.start_epoch"]
        if settings["logging.resume"] != "auto" and not start_epoch:
            return None
        for file in filter(Path.exists, files):
            try:
                state = torch.load(file, map_location=device, weights_only=True)
                if not isinstance(state, dict) or not {"model", "epoch", "step", "settings"} <= state.keys():
                    raise ValueError("it is no checkpoint of this command")
            except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AttributeError) as error:
                print(f"{file}: damaged, left out ({str(error).splitlines()[0][:120]})", file=sys.stderr)
                continue
            if start_epoch and (state["epoch"], state["step"]) != (start_epoch, 0):
                raise BadInput(
                    f"{file} stands at epoch {state['epoch']}, step {state['step']}; optim.start_epoch is {start_epoch}"
                )
            for name in FIXED:
                ours, theirs = settings[name], state["settings"][name]
                if ours != theirs and not (name == "compute.seed" and ours < 0):
                    raise BadInput(f"{self.path} is a run with {name}={theirs}; now it is {ours}: use another folder")
            return state
        if start_epoch or any(file.exists() for file in files):
            raise BadInput(
                f"{self.path}: holds no whole checkpoint to go on with; start anew in another logging.folder"
            )
        return None

    def begin(self, settings: dict[str, Any], saved: dict[str, Any] | None) -> None:
        """Make the folder ready for a fresh run, or for one that goes on from the checkpoint `saved`.

        Raises:
            BadInput: a fresh run would overwrite one that is there.
        """
        if saved is None and any((self.path / name).exists() for name in CHECKPOINTS):
            raise BadInput(
                f"{self.path} holds a run already: --resume=auto goes on with it, another --logging.folder keeps it"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        # What was written after the checkpoint is done again.
        epoch, step = (saved["epoch"], saved["step"]) if saved else (0, 0)
        self._keep("log", lambda line: line["epoch"] < epoch)
        self._keep("steps", lambda line: (line["epoch"], line["step"]) <= (epoch, step))
        if self._make_writer:
            self._writer = self._make_writer()

    def _keep(self, name, wanted):
        file = self.path / f"{name}.jsonl"
        kept = []
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                if wanted(json.loads(text)):
                    kept.append(text + "\n")
            except ValueError:  # a line cut off by a kill
                continue
        write_text(file, "".join(kept))

    def log(self, name: str, line: dict[str, Any], at: int) -> None:
        """Append a line to `name`.jsonl; its numbers also go to TensorBoard, at the steps done `at`."""
        with open(self.path / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer:
            for key, value in line.items():
                self._writer.add_scalar(f"{name}/{key}", value, at)
            self._writer.flush()

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: complete and on the disk before it takes the place of the one before."""
        temporary, (newest, before) = self.path / "checkpoint.pt.part", (self.path / name for name in CHECKPOINTS)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, before)
        os.replace(temporary, newest)
        sync_folder(self.path)


def seed_of(seed: int, saved: dict[str, Any] | None) -> int:
    """`compute.seed`, or where it is -1 that of the run that goes on, or a drawn one."""
    if seed >= 0:
        return seed
    return saved["settings"]["compute.seed"] if saved else int(np.random.SeedSequence().generate_state(1)[0] % 2**31)
