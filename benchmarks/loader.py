"""Loading training batches on the CPU: ours against its peers, same images and cores, interleaved, medians.

    pip install .[bench] && python -m benchmarks.loader

Work: JPEGs of ImageNet's sizes (mean about 500 x 400, quality 90, made from real photographs), RandomResizedCrop with
scale 0.08-1 to 160, 192 and 224 pixels, flip, float32 normalization. Every loader gets all cores. An epoch is two
passes over the images, so that its start-up weighs less (an epoch of ImageNet has 5,000 batches). Peers:

  ffcv_jpg, ffcv_raw   stock FFCV's decoder and its own flip and normalization
  dali                 NVIDIA DALI's CPU pipeline: decode_random_crop, resize, crop_mirror_normalize
  torchvision_v1/_v2   ImageFolder and DataLoader, PIL transforms and tensor transforms
  official             the official project's way: PIL, a torch.load of the image's label map, dense maps and roi_align
  ours                 with the label map decoded and pooled into the soft target by the loader's thread
  ours_no_label_map    without, to see what the label map costs
  ours_no_markers      from JPEGs without restart markers (cfg.restart_interval=0)
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv_fields import CropBoxDecoder, CropSampler, LabelMapDecoder, RandomResizedCropDecoder
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
from PIL import Image

from relabel.cores import usable_cores
from relabel.data.apart import pack_apart
from relabel.data.label_map_files import write_label_map
from relabel.data.loader import Loader
from relabel.data.settings import Packing
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD
from relabel.processes import use_all_cores
from relabel.training.targets import soft_targets

from .label_pooling import official

CORES = usable_cores()
BATCH, PASSES = 256, 2
MEAN_255, STD_255 = np.float32(IMAGENET_MEAN) * 255, np.float32(IMAGENET_STD) * 255


def photographs_or_noise() -> list[Image.Image]:
    """scikit-image's photographs; without it noise whose spectrum falls as theirs does, by 1/f, which is said."""
    try:
        from skimage import data
    except ImportError:
        print("without scikit-image the JPEGs are of noise with a 1/f spectrum, not photographs")
        rng, frequency = np.random.default_rng(0), np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512))
        frequency[0, 0] = 1
        noise = [np.fft.irfft2(np.fft.rfft2(rng.normal(0, 1, (512, 512))) / frequency) for _ in range(12)]
        planes = [np.clip(128 + 60 * plane / plane.std(), 0, 255).astype(np.uint8) for plane in noise]
        return [Image.fromarray(np.stack(planes[i : i + 3], 2)) for i in range(0, 12, 3)]
    return [Image.fromarray(p()[..., :3]) for p in (data.chelsea, data.astronaut, data.coffee, data.rocket)]


def write_images(root: Path, count: int) -> None:
    """`count` JPEGs of ImageNet's size distribution, cropped from real photographs, and a label map for each."""
    photographs = photographs_or_noise()
    sizes, shares = [(500, 375), (375, 500), (500, 333), (640, 480), (400, 300)], [0.5, 0.17, 0.18, 0.05, 0.1]
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = sizes[rng.choice(len(sizes), p=shares)]
        photograph = photographs[i % len(photographs)]
        cut = rng.uniform(0.7, 1) * min(photograph.width / width, photograph.height / height)
        w, h = int(width * cut), int(height * cut)
        x, y = int(rng.integers(0, photograph.width - w + 1)), int(rng.integers(0, photograph.height - h + 1))
        image = photograph.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
        folder = f"class{i % 10}"
        (root / "images" / folder).mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / folder / f"{i:05d}.jpg", quality=90)
        classes = rng.integers(0, 100, (1, 15, 15)) * 10 + np.arange(5)[:, None, None]  # 5 different ones per cell
        scores = rng.normal(5, 3, (5, 15, 15)).astype(np.float16).astype(np.float32)
        write_label_map(root / "label_maps" / folder / f"{i:05d}.pt", scores, classes)
    for c in range(10, 1000):  # an ImageNet of 1,000 classes, most without images
        (root / "images" / f"class{c}").mkdir()


FILES: dict[str, dict[str, Any]] = {
    "jpg": {},
    "plain": {"restart_interval": 0},  # as FFCV's own writer writes them
    "raw": {"write_mode": "raw"},
}


def pack(root: Path, files: Iterable[str] = FILES) -> None:
    """`root/NAME.beton` of each of `files`."""
    for name in files:
        pack_apart(
            Packing(
                data_dir=str(root / "images"), label_map_dir=str(root / "label_maps"), axis_order="yx",
                write_path=str(root / f"{name}.beton"), max_resolution=0, num_workers=CORES,
                min_agreement=0, **FILES[name],  # 0: the maps are random
            )
        )  # fmt: skip


class Passes(Loader):
    """A loader whose epoch is several passes over the samples."""

    def __init__(self, path: Path, pipelines: dict[str, Any]) -> None:
        super().__init__(str(path), 1000, BATCH, pipelines, order="random", num_workers=CORES)
        self.samples = np.tile(self.samples, PASSES)


def ours(root: Path, size: int, label_map: bool = True, file: str = "jpg") -> Callable[[], Iterator]:
    crops = CropSampler(0)
    pipelines: dict[str, Any] = {
        "image": [RandomResizedCropDecoder(size, crops, normalize=(IMAGENET_MEAN, IMAGENET_STD)), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
        "label_map": None,
    }
    if label_map:
        pipelines["label_map"] = [LabelMapDecoder(), ToTensor()]
        pipelines["crop_box"] = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()])
    loader = Passes(root / f"{file}.beton", pipelines)
    return lambda: ((batch.images, soft_targets(batch, 1000) if label_map else None) for batch in loader.epoch(0))


def stock_ffcv(root: Path, size: int, file: str) -> Callable[[], Iterator]:
    decoder = RandomResizedCropRGBImageDecoder((size, size))
    normalize = NormalizeImage(MEAN_255, STD_255, np.float32)
    image = [decoder, RandomHorizontalFlip(), normalize, ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()], "label_map": None}
    loader = Passes(root / f"{file}.beton", pipelines)
    return lambda: loader.epoch(0)


def dali(root: Path, size: int) -> Callable[[], Iterator]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=CORES, device_id=None, seed=0, prefetch_queue_depth=3)
    def pipeline():
        files, labels = fn.readers.file(file_root=str(root / "images"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), mean=MEAN_255.tolist(), std=STD_255.tolist(), dtype=types.FLOAT
        )
        return images, labels

    built = pipeline()
    built.build()
    steps = PASSES * built.reader_meta("files")["epoch_size"] // BATCH

    def epoch():
        for _ in range(steps):
            yield built.run()

    # Its pipeline works on between epochs: without this the first batches of an epoch would cost nothing.
    epoch.prepare = lambda: [built.run() for _ in range(4)]
    return epoch


def torchvision_loader(root: Path, size: int, version: int) -> Callable[[], Iterator]:
    from torchvision import datasets
    from torchvision.transforms import v2

    crop, flip = v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if version == 1:
        transform = v2.Compose([crop, flip, v2.PILToTensor(), *to_float])
    else:
        transform = v2.Compose([v2.PILToTensor(), crop, flip, *to_float])
    dataset = datasets.ImageFolder(root / "images", transform, allow_empty=True)
    dataset.samples *= PASSES
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True
    )
    return lambda: iter(loader)


class _Official(torch.utils.data.Dataset):
    """An image, its crop box and its label map, as the official project's dataset returns them."""

    def __init__(self, root: Path, size: int) -> None:
        from torchvision import datasets
        from torchvision.transforms import v2

        self.images = datasets.ImageFolder(root / "images", allow_empty=True)
        self.images.samples *= PASSES
        self.maps, self.size, self.crop = root / "label_maps", size, v2.RandomResizedCrop
        self.finish = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
             v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as F

        path, label = self.images.samples[index]
        image = self.images.loader(path)
        y, x, h, w = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        box = torch.tensor([x / image.width, y / image.height, (x + w) / image.width, (y + h) / image.height])
        label_map = torch.load(self.maps / Path(path).parent.name / f"{Path(path).stem}.pt", weights_only=True)
        return self.finish(F.resized_crop(image, y, x, h, w, [self.size, self.size])), label, box, label_map


def official_loader(root: Path, size: int) -> Callable[[], Iterator]:
    loader = torch.utils.data.DataLoader(
        _Official(root, size), BATCH, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True
    )

    def epoch():
        for images, _, boxes, maps in loader:
            yield images, official(maps, boxes)

    return epoch


PEERS = {
    "ours": ours,
    "ours_no_label_map": lambda root, size: ours(root, size, label_map=False),
    "ours_no_markers": lambda root, size: ours(root, size, file="plain"),
    "ffcv_jpg": lambda root, size: stock_ffcv(root, size, "plain"),
    "ffcv_raw": lambda root, size: stock_ffcv(root, size, "raw"),
    "dali": dali,
    "torchvision_v1": lambda root, size: torchvision_loader(root, size, 1),
    "torchvision_v2": lambda root, size: torchvision_loader(root, size, 2),
    "official": official_loader,
}


def images_per_second(epoch: Callable[[], Iterator]) -> float:
    """A complete epoch, from asking for its first batch to the end."""
    getattr(epoch, "prepare", lambda: None)()
    start = time.perf_counter()
    batches = sum(1 for _ in epoch())
    return batches * BATCH / (time.perf_counter() - start)


def median_with_interval(values: list[float]) -> str:
    """The median, and its 95 % confidence interval by order statistics, which asks nothing of the distribution."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low = ordered[max(0, int(len(values) / 2 - half))]
    high = ordered[min(len(values) - 1, int(len(values) / 2 + half))]
    return f"{statistics.median(values):.1%} ({low:.1%} to {high:.1%})"


def main(count: int, sizes: list[int], rounds: int, only: list[str]) -> None:
    use_all_cores()
    packages = ("torch", "torchvision", "ffcv", "numba", *(["nvidia-dali-cuda130"] if "dali" in only else []))
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(
        f"{CORES} cores ({platform.machine()}), Python {platform.python_version()}, {versions}; "
        f"{PASSES} x {count} images, batches of {BATCH}, median of {rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, count)
        pack(root)
        medians, costs = {}, {}
        for size in sizes:
            loaders = {name: PEERS[name](root, size) for name in only}
            speeds: dict[str, list[float]] = {name: [] for name in loaders}
            for round_number in range(rounds + 1):
                for name, epoch in loaders.items():
                    speed = images_per_second(epoch)
                    if round_number:  # the first compiles and fills caches
                        speeds[name].append(speed)
            medians[size] = {name: statistics.median(values) for name, values in speeds.items()}
            if {"ours", "ours_no_label_map"} <= set(only):
                pairs = zip(speeds["ours"], speeds["ours_no_label_map"], strict=True)
                costs[size] = [f"label map costs {median_with_interval([1 - a / b for a, b in pairs])}"]
            del loaders
    names = list(medians[sizes[0]])
    print(f"\n| images/s on {CORES} cores | {' | '.join(f'{size} px' for size in sizes)} |\n|---|{'---|' * len(sizes)}")
    for name in names:
        print(f"| {name} | {' | '.join(f'{medians[size][name]:,.0f}' for size in sizes)} |")
    ratios = []
    for size in sizes:
        against = (f"{medians[size]['ours'] / medians[size][n]:.1f}x {n}" for n in names if not n.startswith("ours"))
        ratios.append(f"{size} px: {', '.join([*against, *costs.get(size, [])])}")
    print("ours against: " + "; ".join(ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2560, help="images")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 192, 224], help="output sizes in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each loader, interleaved")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="loaders to time")
    arguments = parser.parse_args()
    main(arguments.count, arguments.sizes, arguments.rounds, arguments.only)
