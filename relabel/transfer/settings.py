"""Settings of finetune_detector.py. No library is imported here: settings are read before them."""

from dataclasses import dataclass
from typing import Any

from fastargs.validation import Checker

from ..settings import Choice, Number, group, setting


class Epochs(Checker):
    """Epochs, in order: `8,11`, or a list in a YAML file; may be empty."""

    def check(self, value: Any) -> tuple[int, ...]:
        words = [str(v) for v in value] if isinstance(value, list | tuple) else str(value).split(",")
        epochs = tuple(int(word) for word in words if word.strip())
        if list(epochs) != sorted(set(epochs)) or min(epochs, default=1) < 1:
            raise ValueError(value)
        return epochs

    def help(self) -> str:
        return "epochs in ascending order, separated by commas"


@dataclass(frozen=True, kw_only=True)
class Model:
    """the detector and its backbone"""

    detector: str = setting(
        Choice("mask_rcnn", "faster_rcnn"), "mask_rcnn: boxes and masks; faster_rcnn: boxes", "mask_rcnn"
    )
    weights: str = setting(str, "the backbone's checkpoint; published: torchvision's own; random: none")
    arch: str = setting(str, "a ResNet of torchvision, or timm/NAME of one; auto: as the checkpoint's run says", "auto")
    trainable_layers: int = setting(Number(0, 5, whole=True), "stages of the backbone to train, from its last", 3)
    channels: int = setting(Number(4, whole=True), "channels of the feature pyramid and the heads", 256)
    anchor_size: float = setting(Number(1), "side of the smallest anchors in pixels; each level doubles it", 32)
    rois: int = setting(Number(1, whole=True), "boxes of an image that the heads are trained on", 512)


@dataclass(frozen=True, kw_only=True)
class Data:
    """images and annotations, in COCO's format"""

    folder: str = setting(str, "holds SET/ with the images and annotations/instances_SET.json, for each SET")
    train: str = setting(str, "the SET to train on", "train2017")
    val: str = setting(str, "the SET to evaluate on", "val2017")
    min_size: int = setting(Number(16, whole=True), "length that an image's shorter side is resized to, pixels", 800)
    max_size: int = setting(Number(16, whole=True), "greatest length of its longer side, pixels", 1333)
    flip_prob: float = setting(Number(0, 1), "share of the training images that are flipped", 0.5)
    num_workers: int = setting(Number(0, whole=True), "processes that read images, for each GPU; 0: none", 2)


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    init: float = setting(Number(0), "peak learning rate, for the whole batch", 0.02)
    drop: tuple[int, ...] = setting(Epochs(), "epochs after which it drops to a tenth", (8, 11))


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    steps: int = setting(Number(0, whole=True), "length of the linear warm-up, from a thousandth", 500)


@dataclass(frozen=True, kw_only=True)
class WeightDecay:
    base: float = setting(Number(0), "weight decay", 1e-4)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """SGD and its schedule; the defaults are the 1x schedule"""

    epochs: int = setting(Number(1, whole=True), "length of the run", 12)
    batch_size: int = setting(Number(1, whole=True), "images in a step, over all GPUs", 16)
    lr: LearningRate = group(LearningRate)
    warmup: WarmUp = group(WarmUp)
    momentum: float = setting(Number(0, 1), "SGD's momentum", 0.9)
    wd: WeightDecay = group(WeightDecay)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """how average precision is measured"""

    every: int = setting(Number(1, whole=True), "epochs between evaluations; the last is always evaluated", 1)

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to evaluate after an epoch, of a run of `epochs`."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs


@dataclass(frozen=True, kw_only=True)
class Compute:
    """hardware, precision and seed"""

    seed: int = setting(Number(-1, whole=True), "seed of everything random; -1: drawn and recorded", 0)
    precision: str = setting(Choice("fp32", "bf16", "fp16"), "of the forward pass", "fp32")
    gpu: int = setting(Number(-1, whole=True), "index of the only GPU to use; -1: one per process", -1)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """what a run leaves"""

    folder: str = setting(str, "folder of this run", "runs/detector")
    resume: str = setting(Choice("no", "auto"), "auto: resume the run in logging.folder, if there is one", "no")
    checkpoint_minutes: float = setting(Number(0), "between checkpoints within an epoch; 0: only at its end", 10)
    print_freq: int = setting(Number(1, whole=True), "steps between reports: progress bar, steps.jsonl", 50)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Model = group(Model)
    data: Data = group(Data)
    optim: Optim = group(Optim)
    validation: Validation = group(Validation)
    compute: Compute = group(Compute)
    logging: Logging = group(Logging)
