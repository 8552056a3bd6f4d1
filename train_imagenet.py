"""Train and evaluate a network on .beton files, with ReLabel's localized multi-labels or with single labels.

  the paper's ResNet-50 + ReLabel, on one GPU (or, without any, on the CPU):
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml \\
        --data.train_dataset=train.beton --data.val_dataset=val.beton --logging.folder=runs/relabel_rn50
  on 8 GPUs, the same batch in all:
    torchrun --standalone --nproc-per-node=8 train_imagenet.py --config-file ... (as above)
  on 2 machines of 8 GPUs, on each of them:
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_imagenet.py ...
  resume a run that was stopped or killed, also with another number of GPUs:
    (the same command) --resume=auto
  the accuracy of a checkpoint, also one of the official project:
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml --data.val_dataset=val.beton \\
        --util.test_only=True --util.test_weight_file=rn50_relabel_78.9.pth

Everything a run leaves is in `logging.folder`: config.yaml (every setting in force), log.jsonl (one line an epoch),
steps.jsonl, curves.png, checkpoint.pt and the one before it.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting; 75 stopped by SIGTERM or SIGINT, state saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from ffcv_fields import CropSampler
from torch.nn.functional import cross_entropy

from relabel.commands import run_command
from relabel.data.cleaning import cleaned_labels
from relabel.data.loader import Batch, Loader, Reading, training_loader, validation_loader
from relabel.data.packing import packed_once
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.evaluation.predictions import evaluate
from relabel.models import build_model, load_weights
from relabel.precision import Precision, precision_of
from relabel.processes import Processes, decoding_threads, join, start_one_process_a_gpu, use_all_cores
from relabel.settings import OFFICIAL_NAMES, Choice, Flag, Number, as_dict, group, load_settings, setting
from relabel.training.augment import augment, cutmix, rng_of_step
from relabel.training.environment import Compute, Logging, Util, Validation
from relabel.training.monitor import Monitor, peak_memory, summary
from relabel.training.optim import Resolution, build_optimizer, learning_rate, set_learning_rate
from relabel.training.run import Plan, Run, average_of
from relabel.training.run_folder import RunFolder, seed_of
from relabel.training.targets import soft_targets

# --- settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """the network"""

    arch: str = setting(str, "a torchvision classifier, or timm/NAME", "resnet50")
    num_classes: int = setting(Number(2, 32767, whole=True), "classes", 1000)
    use_blurpool: bool = setting(Flag(), "blur before strided convolutions", False)
    weights: str = setting(str, "checkpoint to start from; a head of another size is re-initialized", "")
    sync_bn: bool = setting(Flag(), "batch norm over the whole batch of all GPUs", False)
    compile: bool = setting(Flag(), "torch.compile", False)


@dataclass(frozen=True, kw_only=True)
class Relabel:
    use: bool = setting(Flag(), "targets pooled from label maps; else single labels", True)
    localized: bool = setting(Flag(), "pool over the crop; else over the whole image", True)
    multi: bool = setting(Flag(), "soft targets; else the best class of each alone", True)
    temperature: float = setting(Number(1e-3), "scores are divided by it before the softmax", 1.0)
    softmax: bool = setting(Flag(), "maps hold logits; False: probabilities (TokenLabeling's)", True)
    path: str = setting(str, "folder of label maps, to pack from", "")


@dataclass(frozen=True, kw_only=True)
class CutMix:
    prob: float = setting(Number(0, 1), "share of batches with CutMix", 0.0)
    beta: float = setting(Number(0), "parameter of its Beta distribution", 0.0)
    off_epoch: int = setting(Number(0, whole=True), "last epochs without CutMix", 5)


@dataclass(frozen=True, kw_only=True)
class Data:
    """what is trained on, and how images are cropped and augmented"""

    train_dataset: str = setting(str, "the training .beton; packed from data.data_path if missing", "")
    val_dataset: str = setting(str, "the validation .beton; the same", "")
    data_path: str = setting(str, "ImageNet's folder with train/ and val/, to pack from", "")
    num_workers: int = setting(Number(0, whole=True), "decoding threads of a machine; 0: all cores, 1 on the CPU", 0)
    in_memory: bool = setting(Flag(), "the file fits in memory: any order; else near-sequential reading", True)
    decode: str = setting(Choice("fast", "exact"), "fast: only what is needed; exact: stock FFCV's pixels", "fast")
    relabel: Relabel = group(Relabel)
    clean_labels: str = setting(str, "list of training labels to replace or leave out: PATH<tab>LABEL or -", "")
    image_size: int = setting(Number(8, whole=True), "side of the crop in pixels", 224)
    rrc_minimum: float = setting(Number(1e-3, 1), "least area of a random crop, share of the image's", 0.08)
    crop_ratio: float = setting(Number(0.1, 1), "side of the validation crop, share of the shorter side", 0.875)
    color_jitter: float = setting(Number(0, 1), "strength of brightness, contrast and saturation", 0.4)
    lighting: float = setting(Number(0, 1), "standard deviation of PCA lighting", 0.1)
    cutmix: CutMix = group(CutMix)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    init: float = setting(Number(0), "peak learning rate, for the whole batch", 0.5)
    decay_type: str = setting(Choice("cos", "linear", "step", "default"), "step: a tenth every 30 epochs", "cos")


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    lr: float = setting(Number(0), "learning rate at the start of the warm-up", 0.0)
    epochs: float = setting(Number(0), "length of the linear warm-up", 5)


@dataclass(frozen=True, kw_only=True)
class WeightDecay:
    base: float = setting(Number(0), "weight decay", 1e-5)


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    momentum: float = setting(Number(0, 1), "batch norm's weight of the past (1 - torch's momentum)", 0.9)
    eps: float = setting(Number(0), "batch norm's epsilon", 1e-5)
    decay: bool = setting(Flag(), "weight decay also on batch norm's parameters", True)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """optimizer and schedule"""

    optimizer: str = setting(Choice("sgd", "adamp", "adamw", "lamb"), "optimizer", "sgd")
    epochs: int = setting(Number(1, whole=True), "length of the run", 100)
    start_epoch: int = setting(Number(0, whole=True), "resume at the start of this epoch", 0)
    batch_size: int = setting(Number(1, whole=True), "images in a step, over all GPUs", 512)
    accumulate: int = setting(Number(1, whole=True), "parts a step's batch is cut into, to save memory", 1)
    lr: LearningRate = group(LearningRate)
    warmup: WarmUp = group(WarmUp)
    nesterov: bool = setting(Flag(), "Nesterov's momentum", True)
    momentum: float = setting(Number(0, 1), "SGD's momentum, the others' first beta", 0.9)
    wd: WeightDecay = group(WeightDecay)
    label_smoothing: float = setting(Number(0, 1), "share of each target spread over all classes", 0.0)
    bn: BatchNorm = group(BatchNorm)
    ema_decay: float = setting(Number(0, 1), "EMA of the weights, decay a step; it is validated; 0: off", 0.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model = group(Model)
    data: Data = group(Data)
    resolution: Resolution = group(Resolution)
    optim: Optim = group(Optim)
    validation: Validation = group(Validation)
    compute: Compute = group(Compute)
    logging: Logging = group(Logging)
    util: Util = group(Util)


# --- the run --------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Prepare everything in the order of its use, then train, or only evaluate."""
    compute, logging, optim = settings.compute, settings.logging, settings.optim
    if compute.distributed.use and compute.gpu < 0:
        start_one_process_a_gpu(compute.distributed.url)
    processes = join(compute.gpu, compute.distributed.backend)
    say = print if processes.first else (lambda _: None)
    use_all_cores(processes.local_size)
    torch.backends.cudnn.benchmark = True
    precision = precision_of(compute.precision, processes.device)

    folder = RunFolder(logging.folder, as_dict(settings), logging.tensorboard)
    saved = folder.load(processes.device, logging.resume == "auto", optim.start_epoch)
    seed = folder.settings["compute.seed"] = processes.agree(seed_of(compute.seed, saved))
    settings = replace(settings, compute=replace(compute, seed=seed))
    torch.manual_seed(seed)
    network = make_network(settings, processes)
    val_loader = make_val_loader(settings, processes)
    file, count, flip = settings.validation.multilabel_file, len(val_loader.labels), settings.validation.lr_tta
    right = read_multilabels(file, count, settings.model.num_classes) if file else None
    validate = partial(evaluate, loader=val_loader, precision=precision, flip_average=flip, multilabels=right)
    if settings.util.test_only:
        load_weights(network, settings.util.test_weight_file)
        return say(summary(validate(network)))
    loader = make_train_loader(settings, processes)
    if settings.model.weights and not saved:
        head = load_weights(network, settings.model.weights, new_head=True)
        say(f"{settings.model.weights}: loaded{f'; {head} is re-initialized, for other classes' if head else ''}")
    run = make_run(settings, network, processes, precision)
    if processes.first:
        folder.begin(saved)
    if saved:
        run.restore(saved)
    plan = Plan(optim.epochs, len(loader) // optim.accumulate, optim.batch_size)
    monitor = Monitor(run, folder, loader, processes, plan, settings.util.print_freq, logging.checkpoint_minutes)
    say(
        f"{folder.path}: {settings.model.arch}, {processes.world_size} x {processes.device.type}, targets from "
        f"{'label maps' if settings.data.relabel.use else 'single labels'}, seed {seed}, epoch {run.epoch}, "
        f"step {run.step} of {plan.epochs} epochs of {plan.steps} steps"
    )
    while run.epoch < optim.epochs:
        line = train_epoch(settings, run, loader, monitor)
        if run.epoch % settings.validation.every == settings.validation.every - 1 or run.epoch + 1 == optim.epochs:
            line |= validate(run.to_validate())
        say(summary(line))
        monitor.end_epoch(line)
    say(f"done: {folder.path}/log.jsonl, curves.png, checkpoint.pt; peak memory {peak_memory():.2f} GiB")


def make_network(settings: Settings, processes: Processes) -> torch.nn.Module:
    model, bn = settings.model, settings.optim.bn
    network = build_model(model.arch, model.num_classes, 1 - bn.momentum, bn.eps, model.use_blurpool)
    network = processes.sync_batch_norm(network) if model.sync_bn else network
    return network.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_run(settings: Settings, network: torch.nn.Module, processes: Processes, precision: Precision) -> Run:
    """The network, as it is trained (parallel, compiled), its optimizer and its average; no step done yet."""
    optim, model = settings.optim, processes.parallel(network)
    compiled: Any = torch.compile(model) if settings.model.compile else model
    optimizer = build_optimizer(
        network, optim.optimizer, optim.lr.init, optim.momentum, optim.nesterov, optim.wd.base, optim.bn.decay
    )
    return Run(network, compiled, optimizer, precision, processes, average_of(network, optim.ema_decay))


def make_train_loader(settings: Settings, processes: Processes) -> Loader:
    data, optim, size = settings.data, settings.optim, settings.resolution.at(0, settings.data.image_size)
    path = packed_once("train", data.train_dataset, data.data_path, data.relabel.path if data.relabel.use else "")
    labels = cleaned_labels(data.clean_labels, path, say=processes.first) if data.clean_labels else None
    loader = training_loader(
        path, reading(settings, processes), processes.share(optim.batch_size, optim.accumulate),
        CropSampler(settings.compute.seed, scale=(data.rrc_minimum, 1.0)), size, label_maps=data.relabel.use,
        normalize=not (data.color_jitter or data.lighting), labels=labels,
    )  # fmt: skip
    if len(loader) < optim.accumulate:
        raise BadInput(f"{path}: fewer samples than optim.batch_size={optim.batch_size}")
    return loader


def make_val_loader(settings: Settings, processes: Processes) -> Loader:
    data, validation = settings.data, settings.validation
    path, size = packed_once("val", data.val_dataset, data.data_path), validation.resolution or data.image_size
    return validation_loader(path, reading(settings, processes), validation.batch_size, size, data.crop_ratio)


def reading(settings: Settings, processes: Processes) -> Reading:
    data, threads = settings.data, decoding_threads(settings.data.num_workers, processes)
    return Reading(settings.model.num_classes, processes, threads, data.in_memory, data.decode)


# --- the loop -------------------------------------------------------------------------------------------------


def train_epoch(settings: Settings, run: Run, loader: Loader, monitor: Monitor) -> dict[str, Any]:
    """The steps of `run.epoch` that are not done yet. Returns what the log says of training."""
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
            temperature=relabel.temperature, softmax=relabel.softmax,
        )  # fmt: skip
        rng = rng_of_step(settings.compute.seed, run.epoch, run.step * optim.accumulate + part, run.processes.rank)
        images = augment(batch.images, rng, data.color_jitter, data.lighting, run.precision.dtype)
        if run.epoch < optim.epochs - data.cutmix.off_epoch:
            images, targets = cutmix(images, targets, rng, data.cutmix.prob, data.cutmix.beta)

        with run.processes.exchange_gradients(run.model, last=part + 1 == optim.accumulate):
            with run.precision.autocast():
                logits = run.model(images)
            loss = cross_entropy(logits.float(), targets, label_smoothing=optim.label_smoothing) / optim.accumulate
            run.scaler.scale(loss).backward()
        run.add_loss(loss.detach())
    run.optimizer_step()


def run() -> NoReturn:
    """The command line."""
    run_command(partial(main, load_settings(Settings, __doc__, OFFICIAL_NAMES)))


if __name__ == "__main__":
    run()
