"""Train and evaluate a network on .beton files, with ReLabel's localized multi-labels or with single labels.

  the paper's ResNet-50 + ReLabel, on one GPU (or, without any, on the CPU):
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml \\
        --data.train_dataset=train.beton --data.val_dataset=val.beton --logging.folder=runs/relabel_rn50
  on 8 GPUs, with the same total batch size:
    torchrun --standalone --nproc-per-node=8 train_imagenet.py --config-file ... (as above)
  on 2 machines of 8 GPUs, on each of them:
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_imagenet.py ...
  resume a run that was stopped or killed, also with another number of GPUs:
    (the same command) --resume=auto
  what that will take, by a few steps: time, disk, memory; nothing is written:
    (the same command) --util.dry_run
  the accuracy of a checkpoint, also one of the official project:
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml --data.val_dataset=val.beton \\
        --util.test_only=True --util.test_weight_file=rn50_relabel_78.9.pth

Everything a run writes is in `logging.folder`: config.yaml (every setting in force), log.jsonl (one line per epoch),
steps.jsonl, curves.png, checkpoint.pt and the one before it; at the end weights.safetensors and weights.pth.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting; 75 stopped by SIGTERM or SIGINT, state saved.
"""

from relabel.official import OFFICIAL
from relabel.settings import as_dict, load_settings
from relabel.stopping import stop_at_once, stop_while_importing
from relabel.training.settings import Settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    stop_while_importing()
    settings = load_settings(Settings, __doc__, OFFICIAL)

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from ffcv_fields import CropSampler
from torch.nn import Module

from relabel.checkpoints import saved_classes
from relabel.commands import run_command
from relabel.data.classes import network_classes
from relabel.data.cleaning import cleaned_labels
from relabel.data.loader import Batch, Loader
from relabel.data.packing import packed_once
from relabel.data.reading import Reading, check_batch, classes_of, training_loader, validation_loader
from relabel.data.verification import verify
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.evaluation.predictions import evaluate
from relabel.models import build_model, check_input, compiled, load_weights, set_prior, start_from
from relabel.precision import Precision, precision_of
from relabel.processes import Processes, decoding_threads, join, start_one_process_a_gpu, use_all_cores
from relabel.training.augment import augment, cutmix, rng_of_step
from relabel.training.dry_run import dry_run
from relabel.training.monitor import Monitor, summary
from relabel.training.optim import build_optimizer, learning_rate, set_learning_rate
from relabel.training.run import Plan, Run, average_of
from relabel.training.run_folder import RunFolder, seed_of
from relabel.training.targets import soft_loss, soft_targets

# --- the run --------------------------------------------------------------------------------------------------


def main(settings: Settings) -> int | None:
    """Set everything up in the order of its use, then train, or only evaluate."""
    compute, logging, optim = settings.compute, settings.logging, settings.optim
    if settings.util.dry_run and settings.util.test_only:
        raise BadInput("util.dry_run tries a training; leave it out with util.test_only, which writes nothing either")
    if compute.distributed.use and compute.gpu < 0:
        start_one_process_a_gpu(compute.distributed.url, first=partial(packed, settings))
    processes = join(compute.gpu, compute.distributed.backend, compute.distributed.timeout)
    say = processes.say
    use_all_cores(processes.local_size)
    torch.backends.cudnn.benchmark = True
    precision = precision_of(compute.precision, processes.device)

    train_path, val_path = packed(settings)
    classes = classes_of_network(settings, train_path)
    folder = RunFolder(logging.folder, as_dict(settings), logging.tensorboard, classes)
    saved = folder.load(processes.device, logging.resume == "auto", optim.start_epoch)
    seed = folder.settings["compute.seed"] = processes.agree(seed_of(compute.seed, saved))
    settings = replace(settings, compute=replace(compute, seed=seed))
    torch.manual_seed(seed)
    network = make_network(settings, processes)
    reading = make_reading(settings, processes, classes)
    validate = make_validate(settings, reading, val_path, precision)
    if settings.util.test_only:
        if said := load_weights(network, settings.util.test_weight_file):
            say(f"{settings.util.test_weight_file}: {said}")
        say(summary(validate(network)))
        return None
    loader = make_train_loader(settings, reading, train_path)
    if settings.model.weights and not saved:
        say(start_from(network, settings.model.weights, classes))
    run = make_run(settings, network, processes, precision)
    plan = Plan(optim.epochs, len(loader) // optim.accumulate, optim.batch_size)
    if saved:
        if said := folder.check_data(saved, loader.data(), plan.steps):
            say(said)
        run.restore(saved)
    targets = f"label maps, pairing {reading.pairing}" if settings.data.relabel.use else "single labels"
    say(
        f"{folder.path}: {settings.model.arch}, {processes.world_size} x {processes.device.type}, targets from "
        f"{targets}, seed {seed}, epoch {run.epoch}, step {run.step} of {plan.epochs} epochs of {plan.steps:,} steps, "
        f"{plan.epochs * plan.steps:,} in all"
    )
    if settings.util.dry_run:
        folder.check_free(saved)
        return dry_run(settings, run, folder, plan, loader, partial(train_step, settings, run), validate)
    monitor = Monitor(run, folder, loader, processes, plan, settings.util.print_freq, logging.checkpoint_minutes)
    with folder.begin(saved) if processes.first else nullcontext():
        while run.epoch < optim.epochs:
            line = train_epoch(settings, run, loader, monitor)
            if settings.validation.due(run.epoch, optim.epochs):
                line |= validate(run.to_validate())
            say(summary(line))
            monitor.end_epoch(line)
        monitor.end_run()
    return None


def packed(settings: Settings) -> tuple[str, str]:
    """The `.beton` to train on and to validate on, packed if need be; to evaluate only, the latter alone."""
    data, relabel, train, dry = settings.data, settings.data.relabel, "", settings.util.dry_run
    if not settings.util.test_only:
        train = packed_once("train", data.train_dataset, data.data_path, relabel.path if relabel.use else "", dry)
    return train, packed_once("val", data.val_dataset, data.data_path, dry_run=dry)


def classes_of_network(settings: Settings, train_path: str) -> tuple[str, ...] | None:
    """The training data's, which is checked first if asked for; to evaluate only, the checkpoint's."""
    util, num_classes = settings.util, settings.model.num_classes
    if util.test_only:
        return network_classes(saved_classes(util.test_weight_file), num_classes)
    if settings.data.verify:
        verify(train_path)
    return classes_of(train_path, num_classes)


def make_network(settings: Settings, processes: Processes) -> Module:
    """With random weights, on this process's device; what it does not take is refused before the first step."""
    model, optim, size = settings.model, settings.optim, settings.data.image_size
    network = build_model(model.arch, model.num_classes, 1 - optim.bn.momentum, optim.bn.eps, model.use_blurpool)
    if optim.loss == "bce":
        set_prior(network, model.num_classes)
    check_input(network.eval(), model.arch, 1, [settings.validation.resolution or size])
    if not settings.util.test_only:
        batch = processes.share(optim.batch_size, optim.accumulate) * (processes.world_size if model.sync_bn else 1)
        check_input(network.train(), model.arch, batch, settings.resolution.sizes(optim.epochs, size))
    network = processes.sync_batch_norm(network) if model.sync_bn else network
    return network.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_reading(settings: Settings, processes: Processes, classes: tuple[str, ...] | None) -> Reading:
    data, threads = settings.data, decoding_threads(settings.data.num_workers, processes)
    return Reading(
        settings.model.num_classes, processes, threads, data.in_memory, data.decode, classes, data.relabel.pairing
    )


def make_train_loader(settings: Settings, reading: Reading, path: str) -> Loader:
    data, optim, size = settings.data, settings.optim, settings.resolution.at(0, settings.data.image_size)
    labels = cleaned_labels(data.clean_labels, path, say=reading.processes.first) if data.clean_labels else None
    loader = training_loader(
        path, reading, reading.processes.share(optim.batch_size, optim.accumulate),
        CropSampler(settings.compute.seed, scale=(data.rrc_minimum, 1.0)), size, label_maps=data.relabel.use,
        normalize=not (data.color_jitter or data.lighting), labels=labels,
    )  # fmt: skip
    return check_batch(loader, optim.batch_size, optim.accumulate)


def make_validate(settings: Settings, reading: Reading, path: str, precision: Precision) -> partial[dict]:
    data, validation, size = settings.data, settings.validation, settings.validation.resolution
    loader = validation_loader(path, reading, validation.batch_size, size or data.image_size, data.crop_ratio)
    file = validation.multilabel_file
    classes = settings.model.num_classes
    right = read_multilabels(file, loader.identity, classes, loader.labels) if file else None
    return partial(evaluate, loader=loader, precision=precision, flip_average=validation.lr_tta, multilabels=right)


def make_run(settings: Settings, network: Module, processes: Processes, precision: Precision) -> Run:
    """The network, as it is trained (parallel, compiled), its optimizer and its average; no step done yet."""
    optim, model = settings.optim, processes.parallel(network)
    if settings.model.compile:
        model = compiled(model, len(settings.resolution.sizes(optim.epochs, settings.data.image_size)))
    optimizer = build_optimizer(
        network, optim.optimizer, optim.lr.init, optim.momentum, optim.nesterov, optim.wd.base, optim.bn.decay
    )
    return Run(network, model, optimizer, precision, processes, average_of(network, optim.ema_decay))


# --- the loop -------------------------------------------------------------------------------------------------


def train_epoch(settings: Settings, run: Run, loader: Loader, monitor: Monitor) -> dict[str, Any]:
    """The remaining steps of `run.epoch`. Returns the training part of the log line."""
    optim, size = settings.optim, settings.resolution.at(run.epoch, settings.data.image_size)
    loader.set_image_size(size)
    run.network.train()
    monitor.begin_epoch()
    batches = monitor.timed(loader.epoch(run.epoch, first_batch=run.step * optim.accumulate))
    while run.step < monitor.plan.steps:
        at = run.epoch + run.step / monitor.plan.steps
        lr = learning_rate(at, optim.epochs, optim.lr.init, optim.lr.decay_type, optim.warmup.lr, optim.warmup.epochs)
        set_learning_rate(run.optimizer, lr)
        train_step(settings, run, batches)
        monitor.step_done(lr)
    batches.close()
    return {"epoch": run.epoch, "image_size": size} | monitor.of_epoch()


def train_step(settings: Settings, run: Run, batches: Iterator[Batch]) -> None:
    """One step: batch -> soft targets -> augmentation -> forward -> backward -> optimizer."""
    data, optim, relabel = settings.data, settings.optim, settings.data.relabel
    for part in range(optim.accumulate):
        batch = next(batches)
        targets = soft_targets(
            batch, settings.model.num_classes, localized=relabel.localized, multi=relabel.multi,
            temperature=relabel.temperature,
        )  # fmt: skip
        rng = rng_of_step(settings.compute.seed, run.epoch, run.step * optim.accumulate + part, run.processes.rank)
        images = augment(batch.images, rng, data.color_jitter, data.lighting, run.precision.dtype)
        if run.epoch < optim.epochs - data.cutmix.off_epoch:
            images, targets = cutmix(images, targets, rng, data.cutmix.prob, data.cutmix.beta)

        with run.processes.exchange_gradients(run.model, last=part + 1 == optim.accumulate):
            with run.precision.autocast():
                logits = run.model(images)
            loss = soft_loss(logits.float(), targets, optim.loss, optim.label_smoothing) / optim.accumulate
            run.scaler.scale(loss).backward()
        run.add_loss(loss.detach())
    run.optimizer_step()


if __name__ == "__main__":
    stop_at_once()
    run_command(partial(main, settings))
