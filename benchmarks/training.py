"""Does the loader feed the network? Training steps on several kinds of data, interleaved, medians.

    python -m benchmarks.training

The fast recipe (`rn50_configs/rn50_16_epochs.yaml`, 160 pixels) trains for some hundred steps on JPEGs of ImageNet's
sizes, by `train_imagenet.py`'s own functions, with

  synthetic    one batch that stays on the device: the ceiling
  relabel      our loader, label maps decoded and pooled
  stock_ffcv   FFCV's decoders, single labels
  dali         NVIDIA DALI's mixed pipeline (JPEGs are decoded on the GPU too), where it is installed; single labels

and reports images/s, the fraction of time that training waits for data, and the GPU's utilization (by nvidia-smi).
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ffcv_fields  # noqa: F401 - before FFCV
import numpy as np
import torch
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor

import train_imagenet
from relabel.cores import usable_cores
from relabel.data.loader import Batch, Loader
from relabel.precision import precision_of
from relabel.processes import Processes, join, use_all_cores
from relabel.settings import as_dict, load_settings
from relabel.training.monitor import Monitor
from relabel.training.run import Plan
from relabel.training.run_folder import RunFolder

from .loader import pack, write_images

CONFIG = Path(__file__).parent.parent / "rn50_configs" / "rn50_16_epochs.yaml"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the measurement."""

    arch: str = "resnet50"
    size: int = 160
    batch_size: int = 256
    steps: int = 100
    rounds: int = 5
    count: int = 4096
    num_workers: int = 0


class Repeated:
    """Like a loader, of batches that something else makes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def set_image_size(self, size: int) -> None:
        pass

    def next_batch(self) -> Batch:
        raise NotImplementedError

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch]:
        for _ in range(first_batch, self.steps):
            yield self.next_batch()


class Synthetic(Repeated):
    """One batch of `like` again and again."""

    def __init__(self, like: Loader, steps: int) -> None:
        super().__init__(steps)
        batches = like.epoch(0)
        parts = vars(next(batches))
        self._batch = Batch(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in parts.items()})
        batches.close()

    def next_batch(self) -> Batch:
        return self._batch


class Dali(Repeated):
    """DALI's pipeline on the same files: decoding begins on the CPU and ends on the GPU ("mixed")."""

    def __init__(self, root: Path, size: Size, steps: int, num_workers: int, device: torch.device) -> None:
        super().__init__(steps)
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        mixed = device.type == "cuda"

        @pipeline_def(
            batch_size=size.batch_size, num_threads=num_workers, device_id=device.index, seed=0, prefetch_queue_depth=3
        )
        def pipeline():
            files, labels = fn.readers.file(file_root=str(root / "images"), random_shuffle=True)
            images = fn.decoders.image_random_crop(files, device="mixed" if mixed else "cpu", random_area=[0.08, 1.0])
            images = fn.resize(images, size=(size.size, size.size), interp_type=types.INTERP_TRIANGULAR)
            images = fn.flip(images, horizontal=fn.random.coin_flip())
            return images, labels.gpu() if mixed else labels

        self._batches = DALIGenericIterator(pipeline(), ["images", "labels"], size=-1)

    def next_batch(self) -> Batch:
        batch = next(self._batches)[0]
        return Batch(batch["images"], batch["labels"].view(-1).long())


def settings_of(values: dict[str, object]) -> train_imagenet.Settings:
    """The fast recipe's settings, with `values`."""
    argv, sys.argv = sys.argv, [sys.argv[0], f"--config-file={CONFIG}", *(f"--{k}={v}" for k, v in values.items())]
    try:
        return load_settings(train_imagenet.Settings, "")
    finally:
        sys.argv = argv


class FixedSize(Loader):
    """A loader of images of one size: FFCV's decoders have another way to say it."""

    def set_image_size(self, size: int) -> None:
        pass


def stock_ffcv(root: Path, size: Size, num_workers: int, device: torch.device) -> Loader:
    out = [ToTensor(), *([ToDevice(device, non_blocking=True)] if device.type == "cuda" else [])]
    return FixedSize(
        str(root / "plain.beton"), num_classes=1000, order="random", num_workers=num_workers,
        batch_size=size.batch_size, drop_last=True,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((size.size, size.size)), RandomHorizontalFlip(), *out],
            "label": [IntDecoder(), *out],
            "label_map": None,
        },
    )  # fmt: skip


def repeat_samples(loader: Loader, steps: int) -> Loader:
    """Make an epoch of `loader` at least `steps` batches, of its samples as often as that takes."""
    loader.samples = np.tile(loader.samples, -(-steps * loader.batch_size // len(loader.samples)))
    return loader


@contextmanager
def gpu_utilization(device: torch.device) -> Iterator[list[float]]:
    """A list that is filled, at the end, with the GPU's utilization in percent, five times a second."""
    samples: list[float] = []
    if device.type != "cuda":
        yield samples
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    watcher = subprocess.Popen([*query, "-i", str(device.index)], stdout=subprocess.PIPE, text=True)
    try:
        yield samples
    finally:
        watcher.terminate()
        samples += [float(line) for line in watcher.communicate()[0].split() if line.isdigit()]


class Training:
    """A run of the fast recipe that trains on one kind of data or another.

    Args:
        root: a folder with the files that `write_images` and `pack` make; the run's goes there too.
        size: of the measurement.
        processes: this one alone.
    """

    def __init__(self, root: Path, size: Size, processes: Processes) -> None:
        self.size, device = size, processes.device
        self.settings = settings_of(
            {
                "model.arch": size.arch, "data.train_dataset": root / "jpg.beton", "data.image_size": size.size,
                "data.num_workers": size.num_workers, "optim.batch_size": size.batch_size, "resolution.min_res": 0,
                "logging.folder": root / "run", "logging.checkpoint_minutes": 0,
            }
        )  # fmt: skip
        torch.backends.cudnn.benchmark = True
        precision = precision_of(self.settings.compute.precision, device)
        network = train_imagenet.make_network(self.settings, processes)
        self.run = train_imagenet.make_run(self.settings, network, processes, precision)
        reading = train_imagenet.make_reading(self.settings, processes, None)
        threads = reading.num_workers
        ours = train_imagenet.make_train_loader(self.settings, reading, str(root / "jpg.beton"))
        self.loaders: dict[str, Any] = {
            "synthetic": Synthetic(ours, size.steps),
            "relabel": repeat_samples(ours, size.steps),
            "stock_ffcv": repeat_samples(stock_ffcv(root, size, threads, device), size.steps),
        }
        self.without_dali = ""  # why
        try:
            self.loaders["dali"] = Dali(root, size, size.steps, threads, device)
        except Exception as error:  # not installed, or not for this machine
            self.without_dali = str(error).splitlines()[0]
        folder = RunFolder(str(root / "run"), as_dict(self.settings))
        folder.path.mkdir()
        plan = Plan(self.settings.optim.epochs, size.steps, size.batch_size)
        self.monitor = Monitor(self.run, folder, ours, processes, plan, 50, 0)

    def pass_over(self, kind: str) -> dict[str, float]:
        """`size.steps` steps on a kind of data. Returns images_per_second, data_wait, utilization (NaN: no GPU)."""
        loader = self.monitor.loader = self.loaders[kind]
        with gpu_utilization(self.run.processes.device) as used:
            line = train_imagenet.train_epoch(self.settings, self.run, loader, self.monitor)
        self.run.next_epoch()
        self.run.epoch = 0  # always the same point of the schedule
        return line | {"utilization": statistics.mean(used) if used else float("nan")}

    def measure(self, until: float) -> dict[str, dict[str, float]]:
        """Medians of `size.rounds` rounds over all kinds, after one that warms up; fewer where time is up.

        Args:
            until: on `time.monotonic`'s clock, when no further round is begun.
        """
        lines: dict[str, list[dict[str, float]]] = {kind: [] for kind in self.loaders}
        for kind in lines:
            self.pass_over(kind)
        for number in range(self.size.rounds):
            if number and time.monotonic() > until:
                break
            for kind, measured in lines.items():
                measured.append(self.pass_over(kind))
        keys = ("images_per_second", "data_wait", "utilization")
        return {kind: {k: statistics.median(m[k] for m in of) for k in keys} for kind, of in lines.items()}


def prepare(root: Path, count: int) -> None:
    """The images, label maps and `.beton` files that a training needs."""
    write_images(root, count)
    pack(root, ("jpg", "plain"))


def main(size: Size) -> None:
    use_all_cores()
    processes = join(-1, "nccl")
    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    print(f"{name}, {usable_cores()} cores, torch {torch.__version__}; {size}")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), size.count)
        measured = Training(Path(folder), size, processes).measure(until=float("inf"))
    print("\n| | images/s | of the ceiling | waiting for data | GPU utilization |\n|---|---|---|---|---|")
    for kind, line in measured.items():
        speed, used = line["images_per_second"], line["utilization"]
        share = speed / measured["synthetic"]["images_per_second"]
        shown = f"{used:.0f} %" if used == used else "no GPU"
        print(f"| {kind} | {speed:,.0f} | {share:.1%} | {line['data_wait']:.1%} | {shown} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Size()
    parser.add_argument("--arch", default=default.arch, help="the network")
    parser.add_argument("--size", type=int, default=default.size, help="image size in pixels")
    parser.add_argument("--batch_size", type=int, default=default.batch_size, help="images a step")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of each kind and round")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="measured rounds, interleaved")
    parser.add_argument("--count", type=int, default=default.count, help="images")
    parser.add_argument("--num_workers", type=int, default=default.num_workers, help="decoding threads; 0: automatic")
    main(replace(default, **vars(parser.parse_args())))
