"""Everything around the training steps: progress bar, logs, checkpoints, signals, losses that are not finite."""

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ..errors import BadInput
from ..processes import Processes, all_reduce_sum, barrier, hide_progress
from ..stopping import STOPPED, StopSignals, leave
from .background import on_cpu
from .curves import draw_curves
from .export import WEIGHTS, export_weights
from .run import Plan, Run, peak_memory
from .run_folder import RunFolder, read_log

CURVES_EVERY = 10  # seconds; drawing takes a third of one, which is longer than an epoch of a small training
B = TypeVar("B")


class Order(Protocol):
    """Of a loader: what a checkpoint keeps of the data, and the samples of this process in an epoch."""

    def data(self) -> dict[str, Any]: ...

    def order_of(self, epoch: int) -> np.ndarray: ...


class Monitor:
    """Reports on the training of `run`, and saves it.

    The first process saves, in a thread, while all of them train on.

    Reading the losses synchronizes the device, so it is done every `print_freq` steps (and at an epoch's end, and, in
    a single process, when a checkpoint is due or a signal has come); several processes agree at these steps whether
    to stop.

    Args:
        print_freq: steps between reports.
        checkpoint_minutes: between checkpoints within an epoch; 0: only at its end.
    """

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        loader: Order,
        processes: Processes,
        plan: Plan,
        print_freq: int,
        checkpoint_minutes: float,
    ) -> None:
        self.run, self.folder, self.loader, self.processes, self.plan = run, folder, loader, processes, plan
        self.print_freq, self.minutes, self.stop = print_freq, checkpoint_minutes, StopSignals()
        self._saved, self._data, self._reports = time.monotonic(), loader.data(), 0
        self._drawn = -float("inf")
        if processes.first:
            print(folder.room(*run.sizes())[0], flush=True)

    def begin_epoch(self) -> None:
        """Before the first step, of an epoch or of what is left of it."""
        run, batch = self.run, self.plan.batch_size
        if run.losses is None:
            run.losses = torch.zeros(self.plan.steps, device=self.processes.device)
        self._reported_at, self._reported, self._waited = time.perf_counter(), run.step, run.waited
        self._progress = tqdm(
            desc=f"epoch {run.epoch + 1}/{self.plan.epochs}", total=self.plan.steps * batch, initial=run.step * batch,
            unit="img", leave=False, disable=hide_progress(), dynamic_ncols=True,
        )  # fmt: skip

    def timed(self, batches: Generator[B]) -> Generator[B]:
        """`batches`, with the time that training waits for each of them added up; closes them when it is closed."""
        with closing(batches):
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.run.waited += time.perf_counter() - asked
                if batch is None:
                    return
                yield batch

    def step_done(self, lr: float) -> None:
        """After each step, with its learning rate.

        Raises:
            BadInput: a loss since the last report is not finite; names the samples. Or the last save has failed.
            SystemExit: code 75: a signal has come and the state is saved.
        """
        step = self.run.step
        due = self.minutes > 0 and time.monotonic() - self._saved >= 60 * self.minutes
        alone = self.processes.world_size == 1 and (due or self.stop.asked)
        if step % self.print_freq == 0 or step == self.plan.steps or alone:
            self.report(lr, due)

    def report(self, lr: float, save: bool) -> None:
        """Read the losses since the last report, log them, and save or stop where that is due."""
        run, first = self.run, self._reported
        assert run.losses is not None
        window = run.losses[first : run.step]
        own = window.clone()
        window /= self.processes.world_size
        all_reduce_sum(window)
        stopping = all_reduce_sum(torch.tensor(float(self.stop.asked), device=window.device)).item() > 0
        if not torch.isfinite(window).all():
            self._not_finite(first, own)
        now = time.perf_counter()
        seconds, waited, steps = now - self._reported_at, run.waited - self._waited, run.step - first
        run.seconds += seconds
        self._reported_at, self._reported, self._waited = now, run.step, run.waited
        line = {
            "epoch": run.epoch,
            "step": run.step,
            "loss": window.mean().item(),
            "lr": lr,
            "images_per_second": steps * self.plan.batch_size / seconds,
            "data_wait": waited / seconds,
        }
        left = timedelta(seconds=round((self.plan.steps * (self.plan.epochs - run.epoch) - run.step) * seconds / steps))
        self._progress.set_postfix_str(
            f"loss {line['loss']:.3f}, waiting for data {line['data_wait']:.0%}, run done in {left}", refresh=False
        )
        self._progress.update(steps * self.plan.batch_size)
        self._reports += 1
        if self.processes.first:
            if self._reports == 2:  # by the first, everything is compiled and allocated
                self._progress.clear()
                print(f"about {left} of training left; {peak_memory(self.processes.device)}", flush=True)
            self.folder.background.check()
            self.folder.log("steps", line, at=run.epoch * self.plan.steps + run.step)
            if save or stopping:
                self._save()
        if stopping:
            self._progress.close()
            self.folder.background.wait()
            barrier()
            leave()
            if self.processes.first:
                print(f"stopped at epoch {run.epoch}, step {run.step}, state saved; --resume=auto resumes", flush=True)
            sys.exit(STOPPED)

    def _not_finite(self, first: int, own: torch.Tensor) -> None:
        run = self.run
        bad = (~torch.isfinite(own)).nonzero().flatten().tolist()
        if not bad:
            raise BadInput(f"the loss of another process is not finite at epoch {run.epoch}, step {first} or later")
        step, share = first + bad[0], self.plan.batch_size // self.processes.world_size
        samples = self.loader.order_of(run.epoch)[step * share : (step + 1) * share].tolist()
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
        run, images = self.run, self.plan.steps * self.plan.batch_size
        assert run.losses is not None
        return {
            "train_loss": run.losses.mean().item(),
            "lr": run.optimizer.param_groups[0]["lr"],
            "seconds": run.seconds,
            "images_per_second": images / run.seconds,
            "data_wait": run.waited / run.seconds,
        }

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Log an epoch; have it saved and, every `CURVES_EVERY` seconds and at the end, the curves drawn."""
        self.run.next_epoch()
        if self.processes.first:
            self.folder.log("log", line, at=self.run.epoch * self.plan.steps)
            if self.run.epoch < self.plan.epochs and time.monotonic() - self._drawn < CURVES_EVERY:
                return self._save()
            self._drawn = time.monotonic()
            self._save(partial(self.draw, read_log(self.folder.path)))

    def draw(self, log: list[dict[str, Any]]) -> None:
        """Draw the curves of a run with this log."""
        draw_curves({self.folder.path.name: log}, self.folder.path / "curves.png")

    def end_run(self) -> None:
        """After the last epoch: leave what the run hands on."""
        if not self.processes.first:
            return
        self.folder.background.wait()
        path = self.folder.path
        names = ", ".join(self.hand_on(read_log(path)[-1]))
        peak = peak_memory(self.processes.device)
        print(f"done: {path}/log.jsonl, curves.png, checkpoint.pt, {names}; {peak}")

    def hand_on(self, last: dict[str, Any]) -> tuple[str, ...]:
        """Write the validated weights for other programs; `last` is the log's last line. Returns the files' names."""
        export_weights(self.run.validated, self.folder.path, self.folder.settings, last, self.folder.classes)
        return WEIGHTS

    def _save(self, then: Callable[[], None] = lambda: None) -> None:
        """Have the state as it is now written, and `then` done, while training goes on; wait for the save before."""
        self.folder.background.wait()  # before there is another copy
        state = on_cpu(self.run.state()) | {"data": self._data}

        def write() -> None:
            try:
                self.folder.save(state)
            except BadInput as error:
                raise BadInput(f"{error}; once there is room, --resume=auto resumes") from None
            then()

        self.folder.background.start(write)
        self._saved = time.monotonic()


def summary(line: dict[str, Any]) -> str:
    """A log line for people."""
    units = {"top_1": "%", "top_5": "%", "multilabel": "%", "seconds": " s", "image_size": " px"}
    values = {k: f"{v:.0%}" if k == "data_wait" else f"{v:.4g}{units.get(k, '')}" for k, v in line.items()}
    return "  ".join(f"{k} {v}" for k, v in values.items())
