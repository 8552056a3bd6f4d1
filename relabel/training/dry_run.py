"""A dry run: what a run will take, by a few steps of each image size and one validation batch; nothing is written."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import torch

from ..data.loader import Batch, Loader
from ..errors import BadInput
from .run import Plan, Run, peak_memory
from .run_folder import RunFolder
from .settings import Settings

STEPS, SECONDS = 20, 10.0  # timed of each image size, whichever is less, after one to warm up


def dry_run(
    settings: Settings,
    run: Run,
    folder: RunFolder,
    plan: Plan,
    loader: Loader,
    step: Callable[[Iterator[Batch]], None],
    validate: partial,
) -> int:
    """Say what the rest of a run will take: time, disk, memory. `run` and the loaders are of no use after it.

    Args:
        step: one training step from an iterator of batches.
        validate: `evaluate` with its loader.

    Returns:
        The exit code: 0; 1 without room for the run's files.

    Raises:
        BadInput: the loss is not finite; the run would overwrite another one.
    """
    epochs, size = range(run.epoch, plan.epochs), settings.data.image_size
    steps = Counter({settings.resolution.at(run.epoch, size): -run.step})
    for epoch in epochs:
        steps[settings.resolution.at(epoch, size)] += plan.steps
    validations = sum(settings.validation.due(epoch, plan.epochs) for epoch in epochs)
    seconds = {size: _seconds_per_step(run, loader, plan, size, step) for size in sorted(steps)}
    validation = _seconds_of_validation(run, validate)
    training = sum(seconds[size] * count for size, count in steps.items())
    parts = ", ".join(f"{steps[size]:,} of {seconds[size]:.3g} s at {size} px" for size in seconds)
    line, enough = folder.room(*run.sizes())
    total = timedelta(seconds=round(training + validation * validations))
    run.processes.say(
        f"{line}\ntime about {total}; steps: {parts}; validations: {validations:,} of {validation:.3g} s\n"
        f"{peak_memory(run.processes.device)}\ndry run: nothing was written"
    )
    return int(not enough)


def _seconds_per_step(
    run: Run, loader: Loader, plan: Plan, size: int, step: Callable[[Iterator[Batch]], None]
) -> float:
    """Seconds of a step on images of side `size`, loading included."""
    run.step, run.losses = 0, torch.zeros(plan.steps, device=run.processes.device)
    loader.set_image_size(size)
    run.network.train()
    batches = loader.epoch(run.epoch)
    seconds = _seconds_of(partial(step, batches), run)
    count = run.processes.agree(min(STEPS, plan.steps - 1, max(1, int(SECONDS / seconds))))
    if count:
        seconds = _seconds_of(partial(_repeat, count, partial(step, batches)), run) / count
    batches.close()
    losses = run.losses[: run.step]
    if not torch.isfinite(losses).all():
        raise BadInput(f"the losses of the first {run.step} steps at {size} px are not finite: {losses.tolist()}")
    return seconds


def _seconds_of_validation(run: Run, validate: partial) -> float:
    """Seconds of a whole validation, by those of its first batch."""
    loader = validate.keywords["loader"]
    batches = len(loader)
    loader.samples = loader.samples[: loader.batch_size * loader.world_size]
    validate(run.to_validate())  # to warm up
    return batches * _seconds_of(lambda: validate(run.to_validate()), run)


def _repeat(count: int, step: Callable[[], object]) -> None:
    for _ in range(count):
        step()


def _seconds_of(work: Callable[[], object], run: Run) -> float:
    start = time.perf_counter()
    work()
    if run.processes.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
