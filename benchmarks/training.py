"""Does the loader feed the network? Training steps on three kinds of data, interleaved, medians.

    python -m benchmarks.training

The fast recipe (`rn50_configs/rn50_16_epochs.yaml`, 160 pixels) trains for some hundred steps on JPEGs of ImageNet's
sizes, by `train_imagenet.py`'s own functions, with

  synthetic    one batch that stays on the device: the ceiling
  relabel      our loader, label maps decoded and pooled
  stock_ffcv   FFCV's decoders, single labels

and reports images/s, the fraction of time that training waits for data, and the GPU's utilization (by nvidia-smi).
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import ffcv_fields  # noqa: F401 - before FFCV
import torch
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor

import train_imagenet
from relabel.data.loader import Batch, Loader
from relabel.precision import precision_of
from relabel.processes import join, use_all_cores
from relabel.settings import as_dict, load_settings
from relabel.training.monitor import Monitor
from relabel.training.run import Plan
from relabel.training.run_folder import RunFolder

from .reading import pack, write_images

CONFIG = Path(__file__).parent.parent / "rn50_configs" / "rn50_16_epochs.yaml"


class Synthetic:
    """Like a loader; yields one batch of `like` again and again."""

    def __init__(self, like: Loader) -> None:
        self.order_of, self._steps = like.order_of, len(like)
        batch = next(like.epoch(0))
        parts = {name: part.clone() for name, part in vars(batch).items() if isinstance(part, torch.Tensor)}
        self._batch = Batch(**parts)

    def __len__(self) -> int:
        return self._steps

    def set_image_size(self, size: int) -> None:
        pass

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch]:
        for _ in range(first_batch, self._steps):
            yield self._batch


def settings_of(values: dict[str, object]) -> train_imagenet.Settings:
    """The fast recipe's settings, with `values`."""
    sys.argv[1:] = [f"--config-file={CONFIG}", *(f"--{name}={value}" for name, value in values.items())]
    return load_settings(train_imagenet.Settings, "")


def stock_ffcv(root: Path, size: int, batch_size: int, num_workers: int, device: torch.device) -> Loader:
    out = [ToTensor(), *([ToDevice(device, non_blocking=True)] if device.type == "cuda" else [])]
    return Loader(
        str(root / "jpg.beton"), num_classes=1000, order="random", num_workers=num_workers, batch_size=batch_size,
        drop_last=True,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), *out],
            "label": [IntDecoder(), *out],
            "label_map": None,
        },
    )  # fmt: skip


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


def main(arch: str, size: int, batch_size: int, steps: int, rounds: int, count: int, num_workers: int) -> None:
    use_all_cores()
    processes = join(-1, "nccl")
    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}; {arch}, {size} px, batches of {batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, count)
        pack(root)
        settings = settings_of(
            {
                "model.arch": arch, "data.train_dataset": root / "jpg.beton", "data.image_size": size,
                "data.num_workers": num_workers, "optim.batch_size": batch_size, "resolution.min_res": 0,
                "logging.folder": root / "run", "logging.checkpoint_minutes": 0,
            }
        )  # fmt: skip
        precision = precision_of(settings.compute.precision, device)
        network = train_imagenet.make_network(settings, processes)
        run = train_imagenet.make_run(settings, network, processes, precision)
        torch.backends.cudnn.benchmark = True
        run_folder = RunFolder(settings.logging.folder, as_dict(settings))
        run_folder.begin(None)
        ours = train_imagenet.make_train_loader(settings, processes)
        plan = Plan(settings.optim.epochs, len(ours), settings.optim.batch_size)
        loaders = {
            "synthetic": Synthetic(ours),
            "relabel": ours,
            "stock_ffcv": stock_ffcv(root, size, batch_size, num_workers, device),
        }
        monitors = {kind: Monitor(run, run_folder, loaders[kind], processes, plan, 50, 0) for kind in loaders}
        lines: dict[str, list[dict]] = {kind: [] for kind in loaders}
        passes = -(-steps // len(ours))
        for round_number in range(rounds + 1):  # the first one warms up
            for kind, loader in loaders.items():
                with gpu_utilization(device) as used:
                    for _ in range(passes if round_number else 1):
                        line = train_imagenet.train_epoch(settings, run, loader, monitors[kind])
                        run.next_epoch()
                        run.epoch = 0  # always the same point of the schedule
                        lines[kind].append(line)
                for entry in lines[kind][-passes:]:
                    entry["utilization"] = statistics.mean(used) if used else float("nan")
            if not round_number:
                lines = {kind: [] for kind in loaders}
    print(f"\n| {steps} steps, {rounds} rounds | images/s | waiting for data | GPU utilization |\n|---|---|---|---|")
    speeds = {}
    for kind in loaders:
        speed, wait, used = (
            statistics.median(line[key] for line in lines[kind])
            for key in ("images_per_second", "data_wait", "utilization")
        )
        speeds[kind] = speed
        print(f"| {kind} | {speed:,.0f} | {wait:.1%} | {f'{used:.0f} %' if used == used else 'no GPU'} |")
    shares = (f"{kind} {speeds[kind] / speeds['synthetic']:.1%}" for kind in ("relabel", "stock_ffcv"))
    print(f"of the ceiling: {', '.join(shares)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50", help="the network")
    parser.add_argument("--size", type=int, default=160, help="image size in pixels")
    parser.add_argument("--batch_size", type=int, default=256, help="images a step")
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind and round")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, interleaved")
    parser.add_argument("--count", type=int, default=10240, help="images")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads")
    arguments = parser.parse_args()
    main(**vars(arguments))
