"""Fine-tune a detector on the backbone of a trained network, and measure its average precision.

  Mask R-CNN on COCO from a finished run, 1x schedule, on 8 GPUs (data/coco holds train2017/, val2017/, annotations/):
    torchrun --standalone --nproc-per-node=8 finetune_detector.py --data.folder=data/coco \\
        --model.weights=runs/relabel_rn50/weights.safetensors --logging.folder=runs/coco_relabel_rn50
  boxes alone, by Faster R-CNN, from the official project's weights:
    (the same) --model.detector=faster_rcnn --model.arch=resnet50 --model.weights=rn50_relabel_78.9.pth
  your own images, with annotations/instances_train.json and instances_val.json in COCO's format:
    python finetune_detector.py --data.folder=cells --data.train=train --data.val=val --optim.batch_size=2 \\
        --optim.lr.init=0.0025 --model.weights=runs/cells/weights.safetensors --logging.folder=runs/cells_detector
  resume a run that was stopped or killed:
    (the same command) --resume=auto

Prints COCO's average precision of boxes and masks. Everything a run writes is in `logging.folder`: config.yaml,
log.jsonl (a line per epoch), steps.jsonl, curves.png, checkpoint.pt and the one before it, detections_bbox.json and
detections_segm.json (the last evaluation's, as COCO's tools take them); at the end results.json and detector.pth
(torchvision's names). The learning rate is for the whole batch: scale both together.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting; 75 stopped by SIGTERM or SIGINT, state saved.
"""

from relabel.dialects import Dialect, OtherName
from relabel.settings import as_dict, load_settings
from relabel.stopping import stop_at_once, stop_while_importing
from relabel.transfer.settings import Settings

if __name__ == "__main__":  # the settings are read first: the libraries take seconds to import
    stop_while_importing()
    settings = load_settings(Settings, __doc__, Dialect({"resume": OtherName("logging.resume")}))

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relabel.commands import run_command
from relabel.precision import precision_of
from relabel.processes import join, use_all_cores
from relabel.training.augment import rng_of_step
from relabel.training.optim import build_optimizer, set_learning_rate
from relabel.training.run import Plan, Run
from relabel.training.run_folder import RunFolder, read_log, seed_of
from relabel.transfer.average_precision import check_pycocotools, evaluate, table
from relabel.transfer.coco import CocoSet, check_same_categories, read_coco
from relabel.transfer.detectors import build_detector, load_backbone
from relabel.transfer.fine_tuning import FIXED, FineTuning, check_same_made_of, in_short, learning_rate
from relabel.transfer.samples import Sample, TrainingSamples, on

KINDS = {"faster_rcnn": ("bbox",), "mask_rcnn": ("bbox", "segm")}


def main(settings: Settings) -> None:
    """Set everything up in the order of its use, then train and evaluate."""
    model, data, optim, logging = settings.model, settings.data, settings.optim, settings.logging
    check_pycocotools()
    processes = join(settings.compute.gpu, "nccl")
    say = processes.say
    use_all_cores(processes.local_size)
    folder = RunFolder(logging.folder, as_dict(settings), fixed=FIXED)
    saved = folder.load(processes.device, logging.resume == "auto", start_epoch=0)
    seed = folder.settings["compute.seed"] = processes.agree(seed_of(settings.compute.seed, saved))
    settings = replace(settings, compute=replace(settings.compute, seed=seed))
    torch.manual_seed(seed)  # of the weights that no checkpoint has
    backbone = load_backbone(model.weights, model.arch)
    folder.settings["model.arch"] = backbone.arch
    say(backbone.said)
    train, val = read_sets(settings, say=processes.first)
    detector = build_detector(model, data, backbone.network, len(train.categories)).to(processes.device)
    precision = precision_of(settings.compute.precision, processes.device)
    optimizer = build_optimizer(detector, "sgd", optim.lr.init, optim.momentum, False, optim.wd.base, True)
    run = Run(detector, processes.parallel(detector), optimizer, precision, processes)
    samples = TrainingSamples(
        train, model.detector == "mask_rcnn", optim.batch_size, data.flip_prob, seed, data.num_workers, processes,
        {"data.train": train.digest, "backbone": backbone.digest, "categories": train.categories},
    )  # fmt: skip
    plan = Plan(optim.epochs, samples.steps, optim.batch_size)
    if saved:
        check_same_made_of(folder.path, saved, samples.data())
        run.restore(saved)
    say(
        f"{folder.path}: {model.detector}, {processes.world_size} x {processes.device.type}, "
        f"{len(train.annotated):,} images to train on, {len(val.images):,} to evaluate, "
        f"{len(train.categories)} categories, seed {seed}, epoch {run.epoch}, "
        f"step {run.step} of {plan.epochs} epochs of {plan.steps:,} steps"
    )
    kinds = KINDS[model.detector]
    measure = partial(evaluate, detector, val, kinds, folder.path, precision, data.num_workers, processes)
    monitor = FineTuning(run, folder, samples, processes, plan, logging.print_freq, logging.checkpoint_minutes)
    monitor.kinds, monitor.coco = kinds, val
    with folder.begin(saved) if processes.first else nullcontext():
        while run.epoch < optim.epochs:
            line: dict[str, Any] = train_epoch(settings, run, samples, monitor)
            if settings.validation.due(run.epoch, optim.epochs):
                line |= measure()
            say(in_short(line))
            monitor.end_epoch(line)
        monitor.end_run()
        if processes.first:
            print(f"\n{table(read_log(folder.path)[-1], kinds)}")


def read_sets(settings: Settings, say: bool) -> tuple[CocoSet, CocoSet]:
    """The sets to train on and to evaluate on."""
    data, masks = settings.data, settings.model.detector == "mask_rcnn"
    train = read_coco(Path(data.folder), data.train, masks)
    val = read_coco(Path(data.folder), data.val, masks, evaluated=True)
    check_same_categories(train, val)
    for remark in (*train.remarks, *val.remarks) if say else ():
        print(remark)
    return train, val


def train_epoch(settings: Settings, run: Run, samples: TrainingSamples, monitor: FineTuning) -> dict[str, Any]:
    """The remaining steps of `run.epoch`. Returns the training part of the log line."""
    optim, steps = settings.optim, monitor.plan.steps
    run.network.train()
    monitor.begin_epoch()
    batches = monitor.timed(samples.epoch(run.epoch, first_batch=run.step))
    while run.step < steps:
        done = run.epoch * steps + run.step
        lr = learning_rate(done, run.epoch, optim.lr.init, optim.lr.drop, optim.warmup.steps)
        set_learning_rate(run.optimizer, lr)
        train_step(settings, run, batches)
        monitor.step_done(lr)
    batches.close()
    return {"epoch": run.epoch} | monitor.of_epoch()


def train_step(settings: Settings, run: Run, batches: Iterator[list[Sample]]) -> None:
    """One step: images and targets -> the detector's losses -> backward -> optimizer."""
    images, targets = on(run.processes.device, next(batches))
    rng_of_step(settings.compute.seed, run.epoch, run.step, run.processes.rank)  # the detector draws boxes to train on
    with run.precision.autocast():
        losses = run.model(images, targets)
    loss = sum(part.float() for part in losses.values())
    run.scaler.scale(loss).backward()
    run.add_loss(loss.detach())
    run.optimizer_step()


if __name__ == "__main__":
    stop_at_once()
    run_command(partial(main, settings))
