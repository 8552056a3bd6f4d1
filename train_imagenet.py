"""Train and evaluate a network on .beton files, with ReLabel's localized multi-labels or with single labels.

  the paper's ResNet-50 + ReLabel:
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml \\
        --data.train_dataset=train.beton --data.val_dataset=val.beton
  the accuracy of a checkpoint, also one of the official project:
    python train_imagenet.py --config-file rn50_configs/relabel_rn50.yaml --data.val_dataset=val.beton \\
        --util.test_only=True --util.test_weight_file=rn50_relabel_78.9.pth

Runs on the GPU if there is one, else on the CPU. Everything a run leaves is in `logging.folder`: config.yaml (every
setting in force), log.jsonl (one line an epoch), curves.png, checkpoint.pt.

Exit codes: 0 done; 1 bad data or a failure; 2 a bad setting.
"""

import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from fastargs import Param, Section
from fastargs.decorators import param
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import ToDevice, ToTensor
from tqdm import tqdm

from ffcv_fields import (
    CenterCropDecoder,
    CropBoxDecoder,
    CropSampler,
    LabelMapDecoder,
    RandomResizedCropDecoder,
    label_pooling,
)
from relabel.augment import IMAGENET_MEAN, IMAGENET_STD, augment, cutmix, smooth, soft_cross_entropy
from relabel.errors import BadInput
from relabel.evaluate import evaluate, read_multilabels
from relabel.loading import Loader, use_all_cores
from relabel.models import build_model, load_weights
from relabel.optim import build_optimizer, image_size, learning_rate
from relabel.plots import draw_curves, read_log
from relabel.settings import Choice, Flag, Number, load_settings, resolved

Section("model", "the network").params(
    arch=Param(str, "a torchvision classifier, or timm/NAME", default="resnet50"),
    num_classes=Param(Number(2, 32767, whole=True), "classes", default=1000),
    use_blurpool=Param(Flag(), "blur before strided convolutions", default=False),
)
Section("data", "what is trained on, and how images are cropped and coloured").params(
    **{
        "train_dataset": Param(str, "the training .beton", default=""),
        "val_dataset": Param(str, "the validation .beton", required=True),
        "num_workers": Param(Number(1, whole=True), "threads that decode, at most one a core", default=os.cpu_count()),
        "in_memory": Param(Flag(), "the file fits in memory: any order; else near-sequential reading", default=True),
        "decode": Param(
            Choice("fast", "exact"), "fast: only what the crop needs; exact: stock FFCV's pixels", default="fast"
        ),
        "relabel.use": Param(Flag(), "targets pooled from label maps; else single labels", default=True),
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
        "optimizer": Param(Choice("sgd", "adamp"), "optimizer", default="sgd"),
        "epochs": Param(Number(1, whole=True), "length of the run", default=100),
        "start_epoch": Param(Number(0, whole=True), "first epoch, for restarts by hand", default=0),
        "batch_size": Param(Number(1, whole=True), "images in a step, over all GPUs", default=512),
        "lr.init": Param(Number(0), "learning rate at its peak, for the whole batch", default=0.5),
        "lr.decay_type": Param(Choice("cos", "linear", "step"), "step: a tenth every 30 epochs", default="cos"),
        "warmup.lr": Param(Number(0), "learning rate at the start of the warm-up", default=0.0),
        "warmup.epochs": Param(Number(0), "length of the linear warm-up", default=5),
        "nesterov": Param(Flag(), "Nesterov's momentum", default=True),
        "momentum": Param(Number(0, 1), "SGD's momentum, AdamP's first beta", default=0.9),
        "wd.base": Param(Number(0), "weight decay", default=1e-5),
        "label_smoothing": Param(Number(0, 1), "share of each target spread over all classes", default=0.0),
        "bn.momentum": Param(Number(0, 1), "batch norm's weight of the past (1 - torch's momentum)", default=0.9),
        "bn.eps": Param(Number(0), "batch norm's epsilon", default=1e-5),
        "bn.decay": Param(Flag(), "weight decay also on batch norm's parameters", default=True),
    }
)
Section("validation", "how accuracy is measured").params(
    batch_size=Param(Number(1, whole=True), "images in a step", default=512),
    resolution=Param(Number(0, whole=True), "image size; 0: data.image_size", default=0),
    lr_tta=Param(Flag(), "average with the mirrored image", default=False),
    every=Param(Number(1, whole=True), "epochs between validations; the last is always validated", default=1),
    multilabel_file=Param(str, "JSON, the list of right classes of each sample, for multi-label accuracy", default=""),
)
Section("compute", "machine and numbers").params(
    seed=Param(Number(-1, whole=True), "seed of everything random; -1: drawn and recorded", default=0),
    precision=Param(Choice("auto", "fp32", "bf16", "fp16"), "auto: fp16 on a GPU, fp32 on the CPU", default="auto"),
)
Section("logging", "what a run leaves").params(folder=Param(str, "folder of this run", default="runs/latest"))
Section("util", "other uses").params(
    test_only=Param(Flag(), "evaluate test_weight_file, train nothing", default=False),
    test_weight_file=Param(str, "checkpoint to evaluate", default=""),
)


def main(config) -> None:
    settings = resolved(config)
    use_all_cores()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = settings["compute.seed"]
    if seed < 0:
        seed = settings["compute.seed"] = int(np.random.SeedSequence().entropy % 2**31)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True

    dtype, autocast, scaler = mixed_precision(device)
    val_loader = make_val_loader(device)
    multilabels = right_classes(len(val_loader.indices))
    model = make_model().to(device, memory_format=torch.channels_last)
    validate = partial(evaluate, model, device=device, autocast=autocast, multilabels=multilabels)
    flip_average = settings["validation.lr_tta"]

    if settings["util.test_only"]:
        load_weights(model, settings["util.test_weight_file"])
        print(report(validate(val_loader, flip_average=flip_average)))
        return

    train_loader, decoder = make_train_loader(device, seed)
    optimizer = make_optimizer(model)
    folder = Path(settings["logging.folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    start_epoch, epochs = settings["optim.start_epoch"], settings["optim.epochs"]
    if start_epoch:
        resume(folder, start_epoch, model, optimizer, scaler)
    else:
        (folder / "log.jsonl").write_text("")
    targets_of = "label maps" if settings["data.relabel.use"] else "single labels"
    print(f"{folder}: {settings['model.arch']} on {device}, targets from {targets_of}, seed {seed}, {epochs} epochs")

    for epoch in range(start_epoch, epochs):
        decoder.output_size = image_size_at(epoch)
        line = {"epoch": epoch, "image_size": decoder.output_size}
        line |= train_epoch(epoch, seed, model, optimizer, scaler, dtype, autocast, train_loader, device)
        if (epoch + 1) % settings["validation.every"] == 0 or epoch + 1 == epochs:
            line |= validate(val_loader, flip_average=flip_average)
        save_checkpoint(folder, epoch + 1, model, optimizer, scaler)
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        draw_curves({folder.name: read_log(folder)}, folder / "curves.png")
        print(report(line))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"done: {folder}/log.jsonl, curves.png, checkpoint.pt; peak memory {peak:.2f} GiB")


# --- data -----------------------------------------------------------------------------------------------------


@param("data.train_dataset")
@param("data.num_workers")
@param("data.in_memory")
@param("data.decode")
@param("data.relabel.use", "use_relabel")
@param("data.rrc_minimum")
@param("data.color_jitter")
@param("data.lighting")
@param("optim.batch_size")
@param("model.num_classes")
def make_train_loader(
    device,
    seed,
    train_dataset,
    num_workers,
    in_memory,
    decode,
    use_relabel,
    rrc_minimum,
    color_jitter,
    lighting,
    batch_size,
    num_classes,
):
    """The training loader, and its image decoder, whose `output_size` is set before each epoch."""
    if not train_dataset:
        raise BadInput("data.train_dataset is not given: the .beton that write_datasets.py wrote")
    crops = CropSampler(seed, scale=(rrc_minimum, 1.0))
    normalize = on_cpu(device, decode, color_jitter or lighting)
    decoder = RandomResizedCropDecoder(image_size_at(0), crops, decode, normalize)
    out = [ToTensor(), *to_device(device)]
    pipelines = {"image": [decoder, *out], "label": [IntDecoder(), *out], "label_map": None}
    if use_relabel:
        pipelines["label_map"] = [LabelMapDecoder(), *out]
        pipelines["crop_box"] = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=list(out))
    loader = Loader(
        train_dataset,
        crops=crops,
        num_classes=num_classes,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        order="random" if in_memory else "near_sequential",
        os_cache=in_memory,
        drop_last=True,
        pipelines=pipelines,
    )
    if len(loader) == 0:
        raise BadInput(f"{train_dataset}: fewer samples than optim.batch_size={batch_size}")
    return loader, decoder


@param("data.val_dataset")
@param("data.num_workers")
@param("data.in_memory")
@param("data.decode")
@param("data.image_size")
@param("data.crop_ratio")
@param("validation.resolution")
@param("validation.batch_size")
@param("model.num_classes")
def make_val_loader(
    device, val_dataset, num_workers, in_memory, decode, image_size, crop_ratio, batch_size, num_classes, resolution=0
):
    size = resolution or image_size
    out = [ToTensor(), *to_device(device)]
    return Loader(
        val_dataset,
        num_classes=num_classes,
        batch_size=batch_size,
        num_workers=num_workers,
        order="sequential",
        os_cache=in_memory,
        drop_last=False,
        pipelines={
            "image": [CenterCropDecoder(size, crop_ratio, decode, on_cpu(device, decode)), *out],
            "label": [IntDecoder(), *out],
            "label_map": None,
        },
    )


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
@param("optim.bn.momentum", "bn_momentum")
@param("optim.bn.eps", "bn_eps")
def make_model(arch, num_classes, use_blurpool, bn_momentum, bn_eps):
    return build_model(arch, num_classes, 1 - bn_momentum, bn_eps, use_blurpool)


@param("optim.optimizer")
@param("optim.lr.init", "lr")
@param("optim.momentum")
@param("optim.nesterov")
@param("optim.wd.base", "weight_decay")
@param("optim.bn.decay", "decay_bn")
def make_optimizer(model, optimizer, lr, momentum, nesterov, weight_decay, decay_bn):
    return build_optimizer(model, optimizer, lr, momentum, nesterov, weight_decay, decay_bn)


@param("compute.precision")
def mixed_precision(device, precision):
    """The images' dtype, the context of a forward pass, and the scaler of its loss (for fp16; else it does nothing)."""
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    return dtype or torch.float32, autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


# --- one epoch ------------------------------------------------------------------------------------------------


@param("optim.epochs")
@param("optim.lr.init", "peak_lr")
@param("optim.lr.decay_type", "decay_type")
@param("optim.warmup.lr", "warmup_lr")
@param("optim.warmup.epochs", "warmup_epochs")
@param("optim.label_smoothing")
@param("data.color_jitter")
@param("data.lighting")
@param("data.cutmix.prob", "cutmix_prob")
@param("data.cutmix.beta", "cutmix_beta")
@param("data.cutmix.off_epoch", "cutmix_off_epoch")
@param("model.num_classes")
def train_epoch(
    epoch, seed, model, optimizer, scaler, dtype, autocast, loader, device,
    epochs, peak_lr, decay_type, warmup_lr, warmup_epochs, label_smoothing,
    color_jitter, lighting, cutmix_prob, cutmix_beta, cutmix_off_epoch, num_classes,
):  # fmt: skip
    model.train()
    steps = len(loader)
    losses = torch.zeros(steps, device=device)
    waited, start = 0.0, time.perf_counter()
    batches = iter(loader.epoch(epoch))
    progress = tqdm(range(steps), desc=f"epoch {epoch}", leave=False, disable=None, dynamic_ncols=True)
    for step in progress:
        asked = time.perf_counter()
        images, labels, *maps_and_boxes = next(batches)
        waited += time.perf_counter() - asked

        labels = labels.view(-1)
        if maps_and_boxes:
            targets = label_pooling(*maps_and_boxes, num_classes, labels)
        else:
            targets = torch.nn.functional.one_hot(labels, num_classes).float()
        targets = smooth(targets, label_smoothing)

        rng = np.random.default_rng([seed, epoch, step])
        images = augment(images, rng, color_jitter, lighting, dtype)
        if epoch < epochs - cutmix_off_epoch:
            images, targets = cutmix(images, targets, rng, cutmix_prob, cutmix_beta)

        lr = learning_rate(epoch + step / steps, epochs, peak_lr, decay_type, warmup_lr, warmup_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits = model(images)
        loss = soft_cross_entropy(logits, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        losses[step] = loss.detach()
        if step % 50 == 0 or step + 1 == steps:
            if not torch.isfinite(losses[max(0, step - 49) : step + 1]).all():
                raise BadInput(f"the loss is not finite at epoch {epoch}, step {step}: lower optim.lr.init")
            progress.set_postfix(loss=f"{losses[step].item():.3f}", lr=f"{lr:.4f}")
    batches.close()
    train_loss, seconds = losses.mean().item(), time.perf_counter() - start
    return {
        "train_loss": train_loss,
        "lr": lr,
        "seconds": seconds,
        "images_per_second": steps * loader.batch_size / seconds,
        "data_wait": waited / seconds,
    }


# --- the run folder -------------------------------------------------------------------------------------------


def save_checkpoint(folder, epochs_done, model, optimizer, scaler):
    """Written beside the last one and put in its place when complete."""
    temporary = folder / "checkpoint.pt.part"
    torch.save(
        {
            "epochs_done": epochs_done,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        },
        temporary,
    )
    os.replace(temporary, folder / "checkpoint.pt")


def resume(folder, start_epoch, model, optimizer, scaler):
    file = folder / "checkpoint.pt"
    load_weights(model, str(file))
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["epochs_done"] != start_epoch:
        raise BadInput(f"{file} has {state['epochs_done']} epochs done; optim.start_epoch is {start_epoch}")
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])


def report(line):
    units = {
        "top_1": "%",
        "top_5": "%",
        "multilabel": "%",
        "seconds": " s",
        "images_per_second": "",
        "image_size": " px",
    }
    values = {k: f"{v:.0%}" if k == "data_wait" else f"{v:.4g}{units.get(k, '')}" for k, v in line.items()}
    return "  ".join(f"{k} {v}" for k, v in values.items())


if __name__ == "__main__":
    config = load_settings(__doc__)
    try:
        main(config)
    except (BadInput, OSError) as error:
        sys.exit(f"train_imagenet.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_imagenet.py: interrupted")
