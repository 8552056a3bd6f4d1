"""Watching a run: progress line, logs, checkpoints at the right time, signals, losses that are no numbers."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm

from .distributed import Processes, quiet, total, wait_for_all
from .errors import BadInput
from .loading import Loader
from .plots import draw_curves, read_log
from .run_folder import Run, RunFolder

STOPPED = 75  # exit code of a run that a signal ended and that can be continued (EX_TEMPFAIL)


class StopSignals:
    """Catches SIGTERM and SIGINT: `asked` turns true, and the loop saves and leaves. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Watch:
    """What happens beside the training of `run`, at its steps.

    A look at the losses waits for the device, so it is taken every `util.print_freq` steps (and at an epoch's end,
    and, in a single process, when a checkpoint is due or a signal has come); with several processes they agree at
    these looks whether to stop.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        loader: Loader,
        processes: Processes,
        stop: StopSignals,
        settings: dict[str, Any],
    ) -> None:
        self.run, self.folder, self.loader = run, folder, loader
        self.processes, self.stop, self.settings = processes, stop, settings
        self.accumulate, self.every = settings["optim.accumulate"], settings["util.print_freq"]
        self.minutes = settings["logging.checkpoint_minutes"]
        self.steps = len(loader) // self.accumulate  # of an epoch
        self._saved = time.monotonic()

    def begin_epoch(self) -> None:
        run, batch = self.run, self.settings["optim.batch_size"]
        self._at, self._looked, self._waited = time.perf_counter(), run.step, run.waited
        self._progress = tqdm(
            desc=f"epoch {run.epoch + 1}/{self.settings['optim.epochs']}", total=self.steps * batch,
            initial=run.step * batch, unit="img", leave=False, disable=quiet(), dynamic_ncols=True,
        )  # fmt: skip

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what stands in it as waiting for the loader."""
        asked = time.perf_counter()
        yield
        self.run.waited += time.perf_counter() - asked

    def step_done(self, lr: float) -> None:
        """After each step, with its learning rate.

        Raises:
            BadInput: a loss since the last look is no finite number; names the samples.
            SystemExit: code 75: a signal has come and the state is saved.
        """
        step = self.run.step
        due = self.minutes > 0 and time.monotonic() - self._saved >= 60 * self.minutes
        if (
            step % self.every == 0
            or step == self.steps
            or (self.processes.world_size == 1 and (due or self.stop.asked))
        ):
            self._look(lr, due)

    def _look(self, lr, due):
        run, first = self.run, self._looked
        window = run.losses[first : run.step]
        own = window.clone()
        window /= self.processes.world_size
        total(window)
        stopping = total(torch.tensor(float(self.stop.asked), device=window.device)).item() > 0
        if not torch.isfinite(window).all():
            self._not_finite(first, own)
        now = time.perf_counter()
        seconds, waited, steps = now - self._at, run.waited - self._waited, run.step - first
        run.seconds += seconds
        self._at, self._looked, self._waited = now, run.step, run.waited
        line = {
            "epoch": run.epoch,
            "step": run.step,
            "loss": window.mean().item(),
            "lr": lr,
            "images_per_second": steps * self.settings["optim.batch_size"] / seconds,
            "data_wait": waited / seconds,
        }
        left = self.steps * (self.settings["optim.epochs"] - run.epoch) - run.step
        self._progress.set_postfix_str(
            f"loss {line['loss']:.3f}, waiting for data {line['data_wait']:.0%}, "
            f"run done in {timedelta(seconds=round(left * seconds / steps))}",
            refresh=False,
        )
        self._progress.update(steps * self.settings["optim.batch_size"])
        if self.processes.first:
            self.folder.log("steps", line, at=run.epoch * self.steps + run.step)
            if due or stopping:
                self._save()
        if stopping:
            self._progress.close()
            wait_for_all()
            if self.processes.first:
                print(f"stopped at epoch {run.epoch}, step {run.step}, state saved; --resume=auto goes on", flush=True)
            sys.exit(STOPPED)

    def _not_finite(self, first, own):
        run, batch = self.run, self.loader.batch_size * self.accumulate
        bad = (~torch.isfinite(own)).nonzero().flatten().tolist()
        if not bad:
            raise BadInput(f"the loss of another process is not finite at epoch {run.epoch}, step {first} or later")
        step = first + bad[0]
        samples = self.loader.order_of(run.epoch)[step * batch : (step + 1) * batch].tolist()
        file = self.folder.path / f"not_finite_{self.processes.rank}.json"
        file.write_text(json.dumps({"epoch": run.epoch, "step": step, "samples": samples}))
        raise BadInput(
            f"the loss is {own[bad[0]].item()} at epoch {run.epoch}, step {step}; its batch: samples "
            f"{', '.join(map(str, samples[:8]))}, ... (all in {file}). Nothing was saved since. If it comes again "
            "with another compute.seed, look at these samples; else lower optim.lr.init, or use compute.precision=bf16"
        )

    def of_epoch(self) -> dict[str, float]:
        """What the log says of the training of an epoch that is done."""
        self._progress.close()
        run, images = self.run, self.steps * self.settings["optim.batch_size"]
        assert run.losses is not None  # there was a step
        return {
            "train_loss": run.losses.mean().item(),
            "lr": run.optimizer.param_groups[0]["lr"],
            "seconds": run.seconds,
            "images_per_second": images / run.seconds,
            "data_wait": run.waited / run.seconds,
        }

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Log an epoch, save, draw the curves."""
        self.run.next_epoch()
        if self.processes.first:
            self.folder.log("log", line, at=self.run.epoch * self.steps)
            self._save()
            draw_curves({self.folder.path.name: read_log(self.folder.path)}, self.folder.path / "curves.png")

    def _save(self):
        self.folder.save(self.run.state() | {"settings": self.settings})
        self._saved = time.monotonic()


def summary(line: dict[str, Any]) -> str:
    """A log line for people."""
    units = {"top_1": "%", "top_5": "%", "multilabel": "%", "seconds": " s", "image_size": " px"}
    values = {k: f"{v:.0%}" if k == "data_wait" else f"{v:.4g}{units.get(k, '')}" for k, v in line.items()}
    return "  ".join(f"{k} {v}" for k, v in values.items())
