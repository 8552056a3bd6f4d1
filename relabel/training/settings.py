"""Settings of train_imagenet.py. No library is imported here: settings are read before them."""

from dataclasses import dataclass

from ..settings import Choice, Files, Flag, Number, group, setting


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
    localized: bool = setting(Flag(), "pool over the crop; else over the full image", True)
    multi: bool = setting(Flag(), "soft targets; else the best class of each alone", True)
    temperature: float = setting(Number(1e-3), "scores are divided by it before the softmax", 1.0)
    pairing: str = setting(
        Choice("image", "official"), "region to pool. image: the crop's; official: the official code's", "image"
    )
    path: str = setting(str, "label maps, to pack from: as cfg.label_map_dir of write_datasets.py", "")


@dataclass(frozen=True, kw_only=True)
class CutMix:
    prob: float = setting(Number(0, 1), "fraction of batches with CutMix", 0.0)
    beta: float = setting(Number(0), "parameter of its Beta distribution", 0.0)
    off_epoch: int = setting(Number(0, whole=True), "last epochs without CutMix", 5)


@dataclass(frozen=True, kw_only=True)
class Data:
    """datasets, and how images are cropped and augmented"""

    train_dataset: str = setting(
        Files(), "the training .beton, or all its shards; one file is packed from data.data_path if missing", ""
    )
    val_dataset: str = setting(Files(), "the validation .beton; the same", "")
    data_path: str = setting(
        str, "the folder of train/ and val/, or of ImageNet as it was downloaded, to pack from", ""
    )
    num_workers: int = setting(Number(0, whole=True), "decoding threads per machine; 0: most cores, 1 on CPU", 0)
    in_memory: bool = setting(Flag(), "the file fits in memory: any order; else near-sequential reading", True)
    decode: str = setting(Choice("fast", "exact"), "fast: only what is needed; exact: stock FFCV's pixels", "fast")
    verify: bool = setting(Flag(), "check every sample of the training .beton against its checksum first", False)
    relabel: Relabel = group(Relabel)
    clean_labels: str = setting(str, "list of training labels to replace or leave out: PATH<tab>LABEL or -", "")
    image_size: int = setting(Number(8, whole=True), "side of the crop in pixels", 224)
    rrc_minimum: float = setting(Number(1e-3, 1), "minimum area of a random crop, fraction of the image's", 0.08)
    crop_ratio: float = setting(Number(0.1, 1), "side of the validation crop, fraction of the shorter side", 0.875)
    color_jitter: float = setting(Number(0, 1), "strength of brightness, contrast and saturation", 0.4)
    lighting: float = setting(Number(0, 1), "standard deviation of PCA lighting", 0.1)
    cutmix: CutMix = group(CutMix)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """progressive resizing, in pixels and epochs"""

    min_res: int = setting(Number(0, whole=True), "first image size; 0: always data.image_size", 0)
    max_res: int = setting(Number(0, whole=True), "last image size", 0)
    start_ramp: int = setting(Number(0, whole=True), "epoch at which it starts to grow", 0)
    end_ramp: int = setting(Number(0, whole=True), "epoch at which max_res is reached", 0)

    def at(self, epoch: int, image_size: int) -> int:
        """Side of the training crop in an epoch, in pixels; without progressive resizing `image_size`.

        `min_res` up to `start_ramp`, `max_res` from `end_ramp`, linear in steps of 32 pixels between.
        """
        if not self.min_res:
            return image_size
        if epoch <= self.start_ramp:
            return self.min_res
        if epoch >= self.end_ramp:
            return self.max_res
        grown = (self.max_res - self.min_res) * (epoch - self.start_ramp) / (self.end_ramp - self.start_ramp)
        return max(self.min_res, min(self.max_res, round((self.min_res + grown) / 32) * 32))

    def sizes(self, epochs: int, image_size: int) -> set[int]:
        """All that `at` says in a run of `epochs`."""
        return {self.at(epoch, image_size) for epoch in range(epochs)}


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
    batch_size: int = setting(Number(1, whole=True), "batch size, over all GPUs", 512)
    accumulate: int = setting(Number(1, whole=True), "gradient accumulation: micro-batches per step", 1)
    lr: LearningRate = group(LearningRate)
    warmup: WarmUp = group(WarmUp)
    nesterov: bool = setting(Flag(), "Nesterov's momentum", True)
    momentum: float = setting(Number(0, 1), "SGD's momentum, the others' first beta", 0.9)
    wd: WeightDecay = group(WeightDecay)
    loss: str = setting(Choice("ce", "bce"), "ce: cross-entropy; bce: binary cross-entropy, summed over classes", "ce")
    label_smoothing: float = setting(Number(0, 1), "fraction of each target spread over all classes", 0.0)
    bn: BatchNorm = group(BatchNorm)
    ema_decay: float = setting(Number(0, 1), "decay per step of the weights' EMA, which is then validated; 0: off", 0.0)


@dataclass(frozen=True, kw_only=True)
class Distributed:
    use: bool = setting(Flag(), "start a process on every GPU here, as torchrun does", False)
    url: str = setting(str, "tcp://HOST:PORT where these meet; empty: a free port", "")
    timeout: int = setting(Number(1, whole=True), "seconds to wait for another process before giving up", 600)
    backend: str = setting(Choice("nccl", "gloo"), "between GPUs; CPUs always use gloo", "nccl")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """hardware, precision and seed"""

    seed: int = setting(Number(-1, whole=True), "seed of everything random; -1: drawn and recorded", 0)
    precision: str = setting(Choice("auto", "fp32", "bf16", "fp16"), "auto: fp16 on a GPU, else fp32", "auto")
    gpu: int = setting(Number(-1, whole=True), "index of the only GPU to use; -1: one per process", -1)
    distributed: Distributed = group(Distributed)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """how accuracy is measured"""

    batch_size: int = setting(Number(1, whole=True), "batch size, over all GPUs", 512)
    resolution: int = setting(Number(0, whole=True), "image size; 0: data.image_size", 0)
    lr_tta: bool = setting(Flag(), "average with the horizontally flipped image", False)
    every: int = setting(Number(1, whole=True), "epochs between validations; the last is always validated", 1)
    multilabel_file: str = setting(str, "JSON, each sample's list of correct classes, for multi-label accuracy", "")

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether accuracy is measured after an epoch, of a run of `epochs`."""
        return (epoch + 1) % self.every == 0 or epoch + 1 == epochs


@dataclass(frozen=True, kw_only=True)
class Logging:
    """what a run leaves"""

    folder: str = setting(str, "folder of this run", "runs/latest")
    resume: str = setting(Choice("no", "auto"), "auto: resume the run in logging.folder, if there is one", "no")
    checkpoint_minutes: float = setting(Number(0), "between checkpoints within an epoch; 0: only at its end", 10)
    tensorboard: bool = setting(Flag(), "also write for TensorBoard (pip install tensorboard)", False)


@dataclass(frozen=True, kw_only=True)
class Util:
    """other uses"""

    print_freq: int = setting(Number(1, whole=True), "steps between reports: progress bar, steps.jsonl", 50)
    dry_run: bool = setting(Flag(), "write nothing; say what the run will take, by a few steps", False)
    test_only: bool = setting(Flag(), "only evaluate test_weight_file", False)
    test_weight_file: str = setting(str, "checkpoint to evaluate", "")


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
