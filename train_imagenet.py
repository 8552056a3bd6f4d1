"""Train and evaluate a network on .beton files, with ReLabel's localized multi-labels or with single labels.

  the paper's ResNet-50 + ReLabel, on one GPU (or, without any, on the CPU):
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml \\
        --data.train_dataset=train.beton --data.val_dataset=val.beton --logging.folder=runs/relabel_rn50
  on 8 GPUs, the same batch in all:
    torchrun --standalone --nproc-per-node=8 train_imagenet.py --config-file ... (as above)
  on 2 machines of 8 GPUs, on each of them:
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_imagenet.py ...
  go on where a run was stopped or killed, also with another number of GPUs:
    (the same command) --resume=auto
  the accuracy of a checkpoint, also one of the official project:
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml --data.val_dataset=val.beton \\
        --util.test_only=True --util.test_weight_file=rn50_relabel_78.9.pth

Everything a run leaves is in `logging.folder`: config.yaml (every setting in force), log.jsonl (one line an epoch),
steps.jsonl, curves.png, checkpoint.pt and the one before it.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting; 75 stopped by SIGTERM or SIGINT, state saved.
"""

import resource
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from ffcv_fields import (
    CenterCropDecoder,
    CropBoxDecoder,
    CropSampler,
    LabelMapDecoder,
    RandomResizedCropDecoder,
    label_pooling,
)
from fastargs import Param, Section
from fastargs.decorators import param
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import ToDevice, ToTensor
from torch.nn.functional import one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from relabel import distributed
from relabel.augment import IMAGENET_MEAN, IMAGENET_STD, augment, cutmix, smooth, soft_cross_entropy
from relabel.beton import labels_of
from relabel.commands import run_command
from relabel.errors import BadInput
from relabel.evaluate import evaluate
from relabel.file_list import cleaned_labels
from relabel.label_sets import read_multilabels
from relabel.loading import Loader, decoding_threads, packed_once, use_all_cores
from relabel.models import build_model, load_weights
from relabel.optim import build_optimizer, image_size, learning_rate
from relabel.precision import precision_of
from relabel.run_folder import Run, RunFolder, seed_of
from relabel.settings import OFFICIAL_NAMES, Choice, Flag, Number, load_settings, resolved
from relabel.watch import StopSignals, Watch, summary

Section("model", "the network").params(
    arch=Param(str, "a torchvision classifier, or timm/NAME", default="resnet50"),
    num_classes=Param(Number(2, 32767, whole=True), "classes", default=1000),
    use_blurpool=Param(Flag(), "blur before strided convolutions", default=False),
    weights=Param(str, "checkpoint to start from; a head of another size starts anew", default=""),
    sync_bn=Param(Flag(), "batch norm over the whole batch of all GPUs", default=False),
    compile=Param(Flag(), "torch.compile", default=False),
)
Section("data", "what is trained on, and how images are cropped and coloured").params(
    **{
        "train_dataset": Param(str, "the training .beton; packed from data.data_path if missing", default=""),
        "val_dataset": Param(str, "the validation .beton; the same", default=""),
        "data_path": Param(str, "ImageNet's folder with train/ and val/, to pack from", default=""),
        "num_workers": Param(
            Number(0, whole=True), "decoding threads of a machine; 0: all cores, 1 on the CPU", default=0
        ),
        "in_memory": Param(Flag(), "the file fits in memory: any order; else near-sequential reading", default=True),
        "decode": Param(
            Choice("fast", "exact"), "fast: only what the crop needs; exact: stock FFCV's pixels", default="fast"
        ),
        "relabel.use": Param(Flag(), "targets pooled from label maps; else single labels", default=True),
        "relabel.localized": Param(Flag(), "pool over the crop; else over the whole image", default=True),
        "relabel.multi": Param(Flag(), "soft targets; else the best class of each alone", default=True),
        "relabel.temperature": Param(Number(1e-3), "scores are divided by it before the softmax", default=1.0),
        "relabel.softmax": Param(Flag(), "maps hold logits; False: probabilities (TokenLabeling's)", default=True),
        "relabel.path": Param(str, "folder of label maps, to pack from", default=""),
        "clean_labels": Param(str, "list of training labels to replace or leave out: PATH<tab>LABEL or -", default=""),
        "image_size": Param(Number(8, whole=True), "side of the crop in pixels", default=224),
        "rrc_minimum": Param(Number(1e-3, 1), "least area of a random crop, share of the image's", default=0.08),
        "crop_ratio": Param(Number(0.1, 1), "side of the validation crop, share of the shorter side", default=0.875),
        "color_jitter": Param(Number(0, 1), "strength of brightness, contrast and saturation", default=0.4),
        "lighting": Param(Number(0, 1), "deviation of PCA lighting", default=0.1),
        "cutmix.prob": Param(Number(0, 1), "share of batches with CutMix", default=0.0),
        "cutmix.beta": Param(Number(0), "parameter of its Beta distribution", default=0.0),
        "cutmix.off_epoch": Param(Number(0, whole=True), "last epochs without CutMix", default=5),
    }
)
Section("resolution", "progressive resizing, in pixels and epochs").params(
    min_res=Param(Number(0, whole=True), "first image size; 0: always data.image_size", default=0),
    max_res=Param(Number(0, whole=True), "last image size", default=0),
    start_ramp=Param(Number(0, whole=True), "epoch at which it begins to grow", default=0),
    end_ramp=Param(Number(0, whole=True), "epoch at which max_res is reached", default=0),
)
Section("optim", "optimizer and schedule").params(
    **{
        "optimizer": Param(Choice("sgd", "adamp", "adamw", "lamb"), "optimizer", default="sgd"),
        "epochs": Param(Number(1, whole=True), "length of the run", default=100),
        "start_epoch": Param(Number(0, whole=True), "go on at the start of this epoch, by hand", default=0),
        "batch_size": Param(Number(1, whole=True), "images in a step, over all GPUs", default=512),
        "accumulate": Param(Number(1, whole=True), "parts a step's batch is cut into, to save memory", default=1),
        "lr.init": Param(Number(0), "learning rate at its peak, for the whole batch", default=0.5),
        "lr.decay_type": Param(
            Choice("cos", "linear", "step", "default"), "step, default: a tenth every 30 epochs", default="cos"
        ),
        "warmup.lr": Param(Number(0), "learning rate at the start of the warm-up", default=0.0),
        "warmup.epochs": Param(Number(0), "length of the linear warm-up", default=5),
        "nesterov": Param(Flag(), "Nesterov's momentum", default=True),
        "momentum": Param(Number(0, 1), "SGD's momentum, the others' first beta", default=0.9),
        "wd.base": Param(Number(0), "weight decay", default=1e-5),
        "label_smoothing": Param(Number(0, 1), "share of each target spread over all classes", default=0.0),
        "bn.momentum": Param(Number(0, 1), "batch norm's weight of the past (1 - torch's momentum)", default=0.9),
        "bn.eps": Param(Number(0), "batch norm's epsilon", default=1e-5),
        "bn.decay": Param(Flag(), "weight decay also on batch norm's parameters", default=True),
        "ema_decay": Param(Number(0, 1), "weights averaged with this decay a step are validated; 0: off", default=0.0),
    }
)
Section("validation", "how accuracy is measured").params(
    batch_size=Param(Number(1, whole=True), "images in a step, over all GPUs", default=512),
    resolution=Param(Number(0, whole=True), "image size; 0: data.image_size", default=0),
    lr_tta=Param(Flag(), "average with the mirrored image", default=False),
    every=Param(Number(1, whole=True), "epochs between validations; the last is always validated", default=1),
    multilabel_file=Param(str, "JSON, the list of right classes of each sample, for multi-label accuracy", default=""),
)
Section("compute", "machine and numbers").params(
    **{
        "seed": Param(Number(-1, whole=True), "seed of everything random; -1: drawn and recorded", default=0),
        "precision": Param(Choice("auto", "fp32", "bf16", "fp16"), "auto: fp16 on a GPU, else fp32", default="auto"),
        "gpu": Param(Number(-1, whole=True), "number of the only GPU to use; -1: as many as processes", default=-1),
        "distributed.use": Param(Flag(), "start a process on every GPU here, as torchrun does", default=False),
        "distributed.url": Param(str, "tcp://HOST:PORT where these meet; empty: a free port", default=""),
        "distributed.backend": Param(Choice("nccl", "gloo"), "between GPUs; CPUs always use gloo", default="nccl"),
    }
)
Section("logging", "what a run leaves").params(
    folder=Param(str, "folder of this run", default="runs/latest"),
    resume=Param(Choice("no", "auto"), "auto: go on with the run in logging.folder, if there is one", default="no"),
    checkpoint_minutes=Param(Number(0), "between checkpoints within an epoch; 0: only at its end", default=10),
    tensorboard=Param(Flag(), "also write for TensorBoard (pip install tensorboard)", default=False),
)
Section("util", "other uses").params(
    print_freq=Param(Number(1, whole=True), "steps between looks at the loss: progress line, steps.jsonl", default=50),
    test_only=Param(Flag(), "evaluate test_weight_file, train nothing", default=False),
    test_weight_file=Param(str, "checkpoint to evaluate", default=""),
)


def main(config) -> None:
    settings = resolved(config)
    if settings["compute.distributed.use"] and settings["compute.gpu"] < 0:
        distributed.start_one_process_a_gpu(settings["compute.distributed.url"])
    processes = distributed.join(settings["compute.gpu"], settings["compute.distributed.backend"])
    device, say = processes.device, print if processes.first else (lambda _: None)
    use_all_cores(processes.local_size)
    torch.backends.cudnn.benchmark = True

    folder = RunFolder(settings["logging.folder"], settings["logging.tensorboard"])
    saved = folder.load(device, settings)
    seed = settings["compute.seed"] = processes.agree(seed_of(settings["compute.seed"], saved))
    torch.manual_seed(seed)
    network = make_network(processes)
    dtype, autocast, scaler = mixed_precision(device)
    val_loader = make_val_loader(processes)
    validate = partial(
        evaluate, loader=val_loader, device=device, autocast=autocast,
        flip_average=settings["validation.lr_tta"], multilabels=right_classes(len(val_loader.labels)),
    )  # fmt: skip
    if settings["util.test_only"]:
        load_weights(network, settings["util.test_weight_file"])
        say(summary(validate(network)))
        return

    train_loader, decoder = make_train_loader(processes, seed)
    if settings["model.weights"] and not saved:
        head = load_weights(network, settings["model.weights"], new_head=True)
        say(f"{settings['model.weights']}: loaded{f'; {head}, for other classes there, starts anew' if head else ''}")
    run = make_run(network, processes, scaler)
    if processes.first:
        folder.begin(settings, saved)
    if saved:
        run.restore(saved)
    epochs, stop = settings["optim.epochs"], StopSignals()
    watch = Watch(run, folder, train_loader, processes, stop, settings)
    targets_of = "label maps" if settings["data.relabel.use"] else "single labels"
    say(
        f"{folder.path}: {settings['model.arch']}, {processes.world_size} x {device.type}, targets from {targets_of}, "
        f"seed {seed}, epoch {run.epoch}, step {run.step} of {epochs} epochs of {watch.steps} steps"
    )
    while run.epoch < epochs:
        decoder.output_size = image_size_at(run.epoch)
        line = {"epoch": run.epoch, "image_size": decoder.output_size}
        line |= train_epoch(run, seed, dtype, autocast, train_loader, processes, watch)
        if (run.epoch + 1) % settings["validation.every"] == 0 or run.epoch + 1 == epochs:
            line |= validate(run.ema.module if run.ema else network)
        say(summary(line))
        watch.end_epoch(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"done: {folder.path}/log.jsonl, curves.png, checkpoint.pt; peak memory {peak:.2f} GiB")


# --- data -----------------------------------------------------------------------------------------------------


@param("data.train_dataset", "path")
@param("data.num_workers")
@param("data.in_memory")
@param("data.decode")
@param("data.relabel.use", "use_relabel")
@param("data.clean_labels")
@param("data.rrc_minimum")
@param("data.color_jitter")
@param("data.lighting")
@param("optim.batch_size")
@param("optim.accumulate")
@param("model.num_classes")
def make_train_loader(
    processes, seed, path, num_workers, in_memory, decode, use_relabel, clean_labels, rrc_minimum, color_jitter,
    lighting, batch_size, accumulate, num_classes,
):  # fmt: skip
    """The training loader, and its image decoder, whose `output_size` is set before each epoch."""
    path = beton("train", path)
    labels = None
    if clean_labels:
        labels, done = cleaned_labels(clean_labels, path, labels_of(path))
        if processes.first:
            print(done)
    crops = CropSampler(seed, scale=(rrc_minimum, 1.0))
    normalize = on_cpu(processes.device, decode, color_jitter or lighting)
    decoder = RandomResizedCropDecoder(image_size_at(0), crops, decode, normalize)
    out = [ToTensor(), *to_device(processes.device)]
    pipelines = {"image": [decoder, *out], "label": [IntDecoder(), *out], "label_map": None}
    if use_relabel:
        pipelines["label_map"] = [LabelMapDecoder(), *out]
        pipelines["crop_box"] = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=list(out))
    loader = Loader(
        path,
        crops=crops,
        labels=labels,
        num_classes=num_classes,
        batch_size=processes.share(batch_size, accumulate),
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=decoding_threads(num_workers, processes),
        seed=seed,
        order="random" if in_memory else "near_sequential",
        os_cache=in_memory,
        drop_last=True,
        pipelines=pipelines,
    )
    if len(loader) < accumulate:
        raise BadInput(f"{path}: fewer samples than optim.batch_size={batch_size}")
    return loader, decoder


@param("data.val_dataset", "path")
@param("data.num_workers")
@param("data.in_memory")
@param("data.decode")
@param("data.image_size")
@param("data.crop_ratio")
@param("validation.resolution")
@param("validation.batch_size")
@param("model.num_classes")
def make_val_loader(
    processes, path, num_workers, in_memory, decode, image_size, crop_ratio, resolution, batch_size, num_classes
):
    out = [ToTensor(), *to_device(processes.device)]
    normalize = on_cpu(processes.device, decode)
    return Loader(
        beton("val", path),
        num_classes=num_classes,
        batch_size=-(-batch_size // processes.world_size),
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=decoding_threads(num_workers, processes),
        order="sequential",
        os_cache=in_memory,
        drop_last=False,
        pipelines={
            "image": [CenterCropDecoder(resolution or image_size, crop_ratio, decode, normalize), *out],
            "label": [IntDecoder(), *out],
            "label_map": None,
        },
    )


@param("data.data_path")
@param("data.relabel.use", "use_relabel")
@param("data.relabel.path", "label_maps")
def beton(split, path, data_path, use_relabel, label_maps):
    """The `.beton` of "train" or "val": the one named, or one packed from the image folder, once."""
    return packed_once(split, path, data_path, label_maps if split == "train" and use_relabel else "")


def on_cpu(device, decode, coloured=False):
    """Mean and deviation for the decoder to normalize with, on the CPU; a GPU does it after the transfer of bytes."""
    return (IMAGENET_MEAN, IMAGENET_STD) if device.type == "cpu" and decode == "fast" and not coloured else None


def to_device(device):
    return [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []


@param("validation.multilabel_file")
@param("model.num_classes")
def right_classes(num_samples, num_classes, multilabel_file=""):
    return read_multilabels(multilabel_file, num_samples, num_classes) if multilabel_file else None


@param("data.image_size", "size")
@param("resolution.min_res")
@param("resolution.max_res")
@param("resolution.start_ramp")
@param("resolution.end_ramp")
def image_size_at(epoch, size, min_res, max_res, start_ramp, end_ramp):
    return image_size(epoch, min_res, max_res, start_ramp, end_ramp) if min_res else size


# --- network and optimizer ------------------------------------------------------------------------------------


@param("model.arch")
@param("model.num_classes")
@param("model.use_blurpool")
@param("model.sync_bn")
@param("optim.bn.momentum", "bn_momentum")
@param("optim.bn.eps", "bn_eps")
def make_network(processes, arch, num_classes, use_blurpool, sync_bn, bn_momentum, bn_eps):
    network = build_model(arch, num_classes, 1 - bn_momentum, bn_eps, use_blurpool)
    if sync_bn and processes.world_size > 1:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(processes.device, memory_format=torch.channels_last)


@param("optim.optimizer")
@param("optim.lr.init", "lr")
@param("optim.momentum")
@param("optim.nesterov")
@param("optim.wd.base", "weight_decay")
@param("optim.bn.decay", "decay_bn")
@param("optim.ema_decay")
@param("model.compile", "compiled")
def make_run(
    network, processes, scaler, optimizer, lr, momentum, nesterov, weight_decay, decay_bn, ema_decay, compiled
):
    """The network, the same as it is trained (parallel, compiled), its average, its optimizer; nothing done yet."""
    model = processes.parallel(network)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True) if ema_decay else None
    optimizer = build_optimizer(network, optimizer, lr, momentum, nesterov, weight_decay, decay_bn)
    return Run(network, torch.compile(model) if compiled else model, ema, optimizer, scaler)


@param("compute.precision")
def mixed_precision(device, precision):
    """The images' dtype, the context of a forward pass, and the scaler of its loss (for fp16; else it does nothing)."""
    dtype, autocast = precision_of(precision, device)
    return dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# --- one epoch ------------------------------------------------------------------------------------------------


@param("optim.epochs")
@param("optim.accumulate")
@param("optim.lr.init", "peak_lr")
@param("optim.lr.decay_type", "decay_type")
@param("optim.warmup.lr", "warmup_lr")
@param("optim.warmup.epochs", "warmup_epochs")
@param("optim.label_smoothing")
@param("data.relabel.temperature")
@param("data.relabel.softmax")
@param("data.relabel.localized")
@param("data.relabel.multi", "multi_label")
@param("data.color_jitter")
@param("data.lighting")
@param("data.cutmix.prob", "cutmix_prob")
@param("data.cutmix.beta", "cutmix_beta")
@param("data.cutmix.off_epoch", "cutmix_off_epoch")
def train_epoch(
    run, seed, dtype, autocast, loader, processes, watch,
    epochs, accumulate, peak_lr, decay_type, warmup_lr, warmup_epochs, label_smoothing, temperature, softmax,
    localized, multi_label, color_jitter, lighting, cutmix_prob, cutmix_beta, cutmix_off_epoch,
):  # fmt: skip
    """The steps of `run.epoch` that are not done yet. Returns what the log says of training."""
    run.network.train()
    run.losses = torch.zeros(watch.steps, device=processes.device) if run.losses is None else run.losses
    watch.begin_epoch()
    batches = loader.epoch(run.epoch, first_batch=run.step * accumulate)
    while run.step < watch.steps:
        at = run.epoch + run.step / watch.steps
        lr = learning_rate(at, epochs, peak_lr, decay_type, warmup_lr, warmup_epochs)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        for part in range(accumulate):
            with watch.waiting():
                images, labels, *maps_and_boxes = next(batches)
            labels = labels.view(-1)
            if maps_and_boxes:
                label_maps, crop_boxes = maps_and_boxes
                boxes = crop_boxes if localized else crop_boxes.new_tensor([[0, 0, 1, 1]]).repeat(len(labels), 1)
                pool = partial(label_pooling, temperature=temperature, softmax=softmax)
                targets = pool(label_maps, boxes, loader.num_classes, labels)
                targets = targets if multi_label else one_hot(targets.argmax(1), loader.num_classes).float()
            else:
                targets = one_hot(labels, loader.num_classes).float()
            targets = smooth(targets, label_smoothing)

            # All that is random hangs on the step's number: a restart needs no generator's state.
            rng = np.random.default_rng([seed, run.epoch, run.step * accumulate + part, processes.rank])
            torch.manual_seed(int(rng.integers(2**63)))  # dropout and its like
            images = augment(images, rng, color_jitter, lighting, dtype)
            if run.epoch < epochs - cutmix_off_epoch:
                images, targets = cutmix(images, targets, rng, cutmix_prob, cutmix_beta)

            with processes.exchange_gradients(run.model, last=part + 1 == accumulate):
                with autocast():
                    logits = run.model(images)
                loss = soft_cross_entropy(logits, targets) / accumulate
                run.scaler.scale(loss).backward()
            run.losses[run.step] += loss.detach()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        if run.ema:
            run.ema.update_parameters(run.network)
        run.step += 1
        watch.step_done(lr)
    batches.close()
    return watch.of_epoch()


def run() -> NoReturn:
    """The command line."""
    config = load_settings(__doc__, OFFICIAL_NAMES)
    run_command(partial(main, config))


if __name__ == "__main__":
    run()
