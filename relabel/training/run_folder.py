"""What a run leaves in its folder, written so that it can be killed at any moment: checkpoints and logs.

config.yaml      every setting in force
log.jsonl        one line per epoch
steps.jsonl      one line every `util.print_freq` steps
curves.png       drawn after an epoch, but not more often than every ten seconds
checkpoint.pt    the state after the last step that was saved; checkpoint_before.pt: the one before
weights.*        at the end, the validated weights for other programs (export.py)
tensorboard/     with logging.tensorboard
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..checkpoints import read_file
from ..errors import BadInput
from ..files import atomic, in_units, needs_room, write_text
from ..locks import exclusive
from .background import Background
from .export import WEIGHTS

CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")
# What a run cannot change halfway: the order of samples, or what its state means.
FIXED = (
    "model.arch", "model.num_classes", "model.use_blurpool", "optim.optimizer", "optim.batch_size", "optim.bn.decay",
    "data.in_memory", "compute.seed",
)  # fmt: skip


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder.
        settings: of the run, by dotted name.
        classes: the network's class list, kept with its checkpoints; None: not known.
        tensorboard: also write events for TensorBoard.
        fixed: the settings that a resumed run must have as before.
    """

    def __init__(
        self, path: str, settings: dict[str, Any], tensorboard: bool = False, classes: Sequence[str] | None = None,
        fixed: Sequence[str] = FIXED,
    ) -> None:  # fmt: skip
        self.path, self.settings, self.classes, self.fixed = Path(path), settings, classes, fixed
        self.background = Background()  # where checkpoints are written and curves drawn
        self._make_writer: Callable[[], Any] | None = None
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("logging.tensorboard needs a package: pip install tensorboard") from None
            self._make_writer = partial(SummaryWriter, self.path / "tensorboard")

    def load(self, device: torch.device, resume: bool, start_epoch: int) -> dict[str, Any] | None:
        """The newest checkpoint that is complete, if the run is to be resumed and there is one.

        Args:
            device: where its tensors go.
            resume: whether to look for one.
            start_epoch: not 0: it must be there, at the start of this epoch.

        Raises:
            BadInput: none is complete, or it is of other settings, or not at the start of `start_epoch`.
        """
        files = [self.path / name for name in CHECKPOINTS]
        if not resume and not start_epoch:
            return None
        for file in filter(Path.exists, files):
            try:
                state = read_file(file, device)
                if not isinstance(state, dict) or not {"model", "epoch", "step", "settings"} <= state.keys():
                    raise BadInput(f"{file}: no checkpoint of this command")
            except BadInput as error:
                print(f"{file}: damaged, not used ({str(error).removeprefix(f'{file}: ')})", file=sys.stderr)
                continue
            if start_epoch and (state["epoch"], state["step"]) != (start_epoch, 0):
                raise BadInput(
                    f"{file} is at epoch {state['epoch']}, step {state['step']}; optim.start_epoch is {start_epoch}"
                )
            for name in self.fixed:
                ours, theirs = self.settings[name], state["settings"].get(name)
                if ours != theirs and not (name == "compute.seed" and ours < 0):
                    raise BadInput(f"{self.path} is a run with {name}={theirs}; now it is {ours}: use another folder")
            self._check_classes(file, state.get("classes"))
            return state
        if start_epoch or any(file.exists() for file in files):
            raise BadInput(
                f"{self.path}: holds no complete checkpoint to resume from; start again in another logging.folder"
            )
        return None

    def _check_classes(self, file: Path, saved: Sequence[str] | None) -> None:
        now = None if self.classes is None else list(self.classes)
        was = None if saved is None else list(saved)
        if was == now:
            return
        pairs = zip_longest(was or [], now or [])
        at, (before, after) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise BadInput(
            f"{file}: was trained on other classes than those of the data now: class {at} was {before!r}, it is "
            f"{after!r}; use the data of that run, or another logging.folder"
        )

    def check_data(self, saved: dict[str, Any], now: dict[str, Any], steps: int) -> str:
        """Whether a checkpoint's epoch can go on with the training data of now; a line where they have changed.

        Args:
            saved: the checkpoint.
            now: `Loader.data()`.
            steps: of an epoch, now.

        Raises:
            BadInput: it is within an epoch, whose order of samples is another now.
        """
        was = saved.get("data") or {}
        changed = [name for name in was if was[name] != now.get(name)]
        before = steps if saved["losses"] is None else len(saved["losses"])
        again = before != steps or bool({"samples", "names"} & set(changed))
        again |= "metadata_crc" in changed and now["order"] != "random"
        if saved["step"] and again:
            count = f" of {was['samples']:,} samples" if was else ""
            raise BadInput(
                f"{self.path}: is at step {saved['step']} of {before} of an epoch{count}; {now['path']} is packed "
                f"otherwise now, {now['samples']:,} samples, {steps} steps. Use the .beton of that run; or begin "
                f"another logging.folder, from its weights with --model.weights={self.path / CHECKPOINTS[0]}"
            )
        if not {"samples", "names", "metadata_crc"} & set(changed):
            return ""
        return f"{now['path']}: not the file of the checkpoint; {was['samples']:,} samples then, {now['samples']:,} now"

    @contextmanager
    def begin(self, saved: dict[str, Any] | None) -> Iterator[None]:
        """The time of a run, fresh or resumed from the checkpoint `saved`, in which the folder is its own.

        Its end, also by an error or a signal, waits for what is done in the background.

        Raises:
            BadInput: another process trains in it, or a fresh run would overwrite one that is there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / "run", "is in use"):
            self._prepare(saved)
            with self.background:
                yield

    def check_free(self, saved: dict[str, Any] | None) -> None:
        """Raise BadInput where a fresh run (`saved` is None) would overwrite one that is there."""
        if saved is None and any((self.path / name).exists() for name in CHECKPOINTS):
            raise BadInput(
                f"{self.path} holds a run already: --resume=auto resumes it, another --logging.folder keeps it"
            )

    def _prepare(self, saved: dict[str, Any] | None) -> None:
        self.check_free(saved)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        # What was logged after the checkpoint will be repeated.
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
            except ValueError:  # a line truncated by a kill
                continue
        write_text(file, "".join(kept))

    def log(self, name: str, line: dict[str, Any], at: int) -> None:
        """Append a line to `name`.jsonl; its numbers also go to TensorBoard, at the steps done `at`."""
        path = self.path / f"{name}.jsonl"
        with needs_room(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer:
            for key, value in line.items():
                self._writer.add_scalar(f"{name}/{key}", value, at)
            self._writer.flush()

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: complete and on disk before it replaces the last one, which is kept too.

        Raises:
            BadInput: there is no room for it; the last one is kept.
        """
        newest, before = (self.path / name for name in CHECKPOINTS)
        with atomic(newest, keep=before, size=bytes_of(state)) as temporary, open(temporary, "wb") as file:
            torch.save(state | {"settings": self.settings, "classes": self.classes and list(self.classes)}, file)

    def room(self, checkpoint: int, weights: int) -> tuple[str, bool]:
        """What the run's files will take, in words, and whether there is room for them.

        Args:
            checkpoint: bytes of one; the newest, the one before and the next while it is written are there at once.
            weights: bytes of what the run hands on, in each of two files.
        """
        folder = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        there = sum(f.stat().st_size for f in (self.path / name for name in (*CHECKPOINTS, *WEIGHTS)) if f.exists())
        needed, free = 3 * checkpoint + 2 * weights - there, shutil.disk_usage(folder).free
        line = (
            f"{self.path}: checkpoints of {in_units(checkpoint)}; at most {in_units(max(needed, 0))} more with the "
            f"weights at the end, {in_units(free)} free{': NOT ENOUGH ROOM' if needed > free else ''}"
        )
        return line, needed <= free


def bytes_of(state: Any) -> int:
    """Of the tensors in nested dicts and lists."""
    if isinstance(state, dict | list | tuple):
        return sum(map(bytes_of, state.values() if isinstance(state, dict) else state))
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's `log.jsonl`, one dict per epoch."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def seed_of(seed: int, saved: dict[str, Any] | None) -> int:
    """`compute.seed`, or where it is -1 that of the resumed run, or a drawn one."""
    if seed >= 0:
        return seed
    return saved["settings"]["compute.seed"] if saved else int(np.random.SeedSequence().generate_state(1)[0] % 2**31)
