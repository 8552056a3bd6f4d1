"""Settings besides the recipe: validation, the machine, the run's folder, other uses of the command."""

from dataclasses import dataclass

from ..settings import Choice, Flag, Number, group, setting


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
    test_only: bool = setting(Flag(), "only evaluate test_weight_file", False)
    test_weight_file: str = setting(str, "checkpoint to evaluate", "")
