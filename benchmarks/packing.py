"""Packing images into a `.beton`: ours against stock FFCV's writer in one interleaved run, with bars beside the ratios.

    pip install .[bench] && python -m benchmarks.packing

Work: JPEGs of ImageNet's sizes (`SIZES`; 464 x 382 on average) made from real photographs at quality 98 (84 KB; in
ImageNet 110 KB, of photographs that were not enlarged); each is there `COPIES` times. At most 500 pixels a side are
stored, at quality 90 where they are encoded, by a worker for each core; all files are in memory (/dev/shm), as ours are
synchronized to the disk at the end and stock's are not. Every writer packs in a process of its own, whose start and end
are not counted. Peers:

  stock         FFCV's DatasetWriter, fed by torchvision's loader
  encode        write_datasets.py with cfg.jpeg=encode
  keep          cfg.jpeg=keep, the default: what is no larger than 500 pixels keeps its coefficients
  keep from tar the same from one archive

`--work` times instead what a worker does for an image, from the file's bytes to those in the page, in CPU time of one
thread, each image by all of them in turn: other work on the machine disturbs that little.

Also: bytes an image, PSNR of what is stored to the source's pixels (of images that are not resized), images/s of the
training loader on each file, and label maps read from a tar against a tree of .pt files.
"""

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from ffcv_fields import image_field
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from PIL import Image

from relabel.cores import usable_cores
from relabel.data.beton import read_header
from relabel.data.contents import read_sample_list
from relabel.data.images import Stored, to_be_stored
from relabel.data.settings import Packing
from relabel.settings import ROOT

from . import sources
from .loader import images_per_second, ours, photographs_or_noise, use_all_cores

CORES = usable_cores()
LONGEST, QUALITY, CLASSES = 500, 90, 10
# Sides and their share: most of ImageNet is 500 pixels long, a part smaller, a few per cent much larger.
SIZES = {
    (500, 375): 0.36, (375, 500): 0.12, (500, 333): 0.14, (333, 500): 0.05, (500, 400): 0.06, (400, 300): 0.07,
    (300, 225): 0.07, (200, 150): 0.06, (640, 480): 0.03, (800, 600): 0.02, (1024, 768): 0.01, (1600, 1200): 0.01,
}  # fmt: skip
COPIES = 3  # a writer's own start and end then take little of the time
KINDS = {"gray": 0.01, "progressive": 0.01}  # the others are baseline and in color
BARS = {"encode": "1.3x", "keep": "3x; 5x", "keep from tar": "as from the tree"}


def write_sources(root: Path, count: int) -> None:
    """`count` JPEGs in class folders below `root/images`, and `root/images.tar` of them."""
    photographs, rng = photographs_or_noise(), np.random.default_rng(0)
    for i in range(count):
        width, height = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
        photograph = photographs[i % len(photographs)]
        cut = rng.uniform(0.7, 1) * min(photograph.width / width, photograph.height / height)
        w, h = int(width * cut), int(height * cut)
        x, y = int(rng.integers(0, photograph.width - w + 1)), int(rng.integers(0, photograph.height - h + 1))
        image = photograph.resize((width, height), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
        kind = rng.random()
        image = image.convert("L") if kind < KINDS["gray"] else image
        progressive = KINDS["gray"] <= kind < sum(KINDS.values())
        folder = root / "images" / f"n{i % CLASSES:08}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:05d}.JPEG", quality=98, progressive=progressive)
        for copy in range(1, COPIES):
            shutil.copy(folder / f"{i:05d}.JPEG", folder / f"{i:05d}_{copy}.JPEG")
    sources.pack(root / "images")


def pack(root: Path, peer: str) -> float:
    """Images/s of a peer that packs into `root/PEER.beton`."""
    path = root / f"{peer}.beton"
    path.unlink(missing_ok=True)
    if peer == "stock":
        command = [sys.executable, "-m", "benchmarks.packing", "--stock", str(root)]
    else:
        images = root / ("images.tar" if "tar" in peer else "images")
        command = [
            sys.executable, "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.write_path={path}",
            f"--cfg.max_resolution={LONGEST}", f"--cfg.jpeg_quality={QUALITY}", f"--cfg.num_workers={CORES}",
            f"--cfg.jpeg={peer.split()[0]}",
        ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return float(result.stdout.split()[-2].replace(",", ""))  # "... 1,234 images/s"


class _Folder:
    """Images and labels, as torchvision's ImageFolder gives them to FFCV's writer."""

    def __init__(self, root: Path) -> None:
        from torchvision.datasets import ImageFolder

        self._images = ImageFolder(str(root))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[index]


def stock(root: Path) -> None:
    """FFCV's writer; prints its images/s."""
    images = _Folder(root / "images")
    fields = {"image": RGBImageField("jpg", LONGEST, jpeg_quality=QUALITY), "label": IntField()}
    writer = DatasetWriter(str(root / "stock.beton"), fields, num_workers=CORES)
    start = time.perf_counter()
    writer.from_indexed_dataset(images, chunksize=100)
    print(f"stock: {len(images) / (time.perf_counter() - start):.1f} images/s")


def work(root: Path) -> None:
    """Print CPU microseconds an image of each peer's work, for all images and for those that are not resized."""
    page, memory = np.empty(8 << 20, np.uint8), np.zeros(1, RGBImageField().metadata_type)
    stocks = RGBImageField("jpg", LONGEST, jpeg_quality=QUALITY)
    ours_ = image_field(4, write_mode="jpg", max_resolution=LONGEST, jpeg_quality=QUALITY)
    cfg = {mode: Packing(data_dir="", write_path="", max_resolution=LONGEST, jpeg=mode) for mode in ("encode", "keep")}

    def malloc(size: int) -> tuple[int, np.ndarray]:
        return 0, page[:size]

    def by_stock(data: bytes) -> None:
        with Image.open(BytesIO(data)) as image:
            stocks.encode(memory, image.convert("RGB"), malloc)

    def by_ours(data: bytes, mode: str) -> None:
        ours_.encode(memory, to_be_stored(data, "", cfg[mode], Stored()), malloc)

    peers = {"stock": by_stock, "encode": lambda d: by_ours(d, "encode"), "keep": lambda d: by_ours(d, "keep")}
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    cv2.setNumThreads(1)
    sizes, files = [], sorted((root / "images").rglob("?????.JPEG"))
    for data in (file.read_bytes() for file in files):
        sizes.append(max(Image.open(BytesIO(data)).size))
        for peer, job in peers.items():
            start = time.process_time()
            job(data)
            seconds[peer].append(time.process_time() - start)
    fit = np.array(sizes) <= LONGEST
    print("\n| CPU microseconds an image | all | to stock | not resized | to stock |\n|---|---|---|---|---|")
    for peer, values in seconds.items():
        columns = ""
        for chosen in (np.full(len(fit), True), fit):
            mean, base = np.array(values)[chosen].mean(), np.array(seconds["stock"])[chosen].mean()
            columns += f" {1e6 * mean:,.0f} | {base / mean:.2f}x |"
        print(f"| {peer} |{columns}")
    print(f"{(~fit).sum()} of {len(fit)} images are resized")


def fidelity(root: Path, peer: str, names: list[str]) -> tuple[float, float, float]:
    """Bytes an image; share of images whose pixels are the source's; PSNR in dB of the others that were not resized."""
    header, data = read_header(str(root / f"{peer}.beton")), np.memmap(root / f"{peer}.beton", mode="r")
    names = names or list(read_sample_list(header).names)
    sizes = {int(pointer): int(size) for _, pointer, size in header.alloc_table}
    stored = [int(entry["data_ptr"]) for entry in header.metadata["f0"]]
    psnr, equal = [], 0
    for name, at in zip(names, stored, strict=True):
        pixels = np.asarray(Image.open(BytesIO(data[at : at + sizes[at]].tobytes())).convert("RGB"))
        source = np.asarray(Image.open(root / "images" / name).convert("RGB"))
        if pixels.shape == source.shape:
            error = ((pixels.astype(np.float32) - source) ** 2).mean()
            equal += error == 0
            psnr += [10 * np.log10(255**2 / error)] if error else []
    return float(np.mean([sizes[at] for at in stored])), equal / len(names), float(np.mean(psnr)) if psnr else np.inf


def loading(root: Path, peers: list[str], rounds: int, size: int) -> dict[str, float]:
    """Images/s of the training loader on each peer's file, interleaved."""
    use_all_cores()
    epochs = {peer: ours(root, size, label_map=False, file=peer) for peer in peers}
    speeds: dict[str, list[float]] = {peer: [] for peer in peers}
    for number in range(rounds + 1):
        for peer, epoch in epochs.items():
            speed = images_per_second(epoch)
            if number:
                speeds[peer].append(speed)
    return {peer: statistics.median(values) for peer, values in speeds.items()}


def main(count: int, rounds: int, sizes: list[int], only: list[str]) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("ffcv", "numpy", "pillow", "opencv-python-headless"))
    print(f"{CORES} cores ({platform.machine()}), Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        root = Path(folder)
        write_sources(root, count)
        files = sorted((root / "images").rglob("*.JPEG"))
        nbytes = np.mean([file.stat().st_size for file in files])
        print(f"sources: {nbytes:,.0f} bytes an image, {COPIES} x {count}; {rounds} rounds")
        if not rounds:
            return work(root)
        speeds: dict[str, list[float]] = {peer: [] for peer in only}
        for _ in range(rounds):
            for peer in only:
                speeds[peer].append(pack(root, peer))
        of_tree = [file.relative_to(root / "images").as_posix() for file in files]
        judged = {peer: fidelity(root, peer, of_tree if peer == "stock" else []) for peer in only}
        loaders = {size: loading(root, [peer for peer in only if "tar" not in peer], rounds, size) for size in sizes}
        heads = "".join(f" loaded at {size} px, images/s |" for size in sizes)
        columns = "writer | images/s | to stock, rounds | bar | bytes an image | equal pixels | PSNR of others, dB"
        print(f"\n| {columns} |{heads}")
        print(f"|---|---|---|---|---|---|---|{'---|' * len(sizes)}")
        for peer in only:
            base = speeds["keep" if "tar" in peer else "stock"]
            ratios = [a / b for a, b in zip(speeds[peer], base, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
            size_of_one, equal, psnr = judged[peer]
            loads = "".join(f" {loaders[size][peer]:,.0f} |" if peer in loaders[size] else " |" for size in sizes)
            print(
                f"| {peer} | {statistics.median(speeds[peer]):,.0f} | {ratio}{' of keep' if 'tar' in peer else ''} | "
                f"{BARS.get(peer, '')} | {size_of_one:,.0f} | {equal:.1%} | {psnr:.1f} |{loads}"
            )
        shutil.rmtree(root / "images")
        torch_s, tree, tar = sources.label_maps(root, old=True)
        print(
            f"\nlabel maps (torch before 1.6): from the tar {sources.per_second(tar)}, {sources.ratio_of(tree, tar)} of"
        )
        print(f"our reader on the tree, {sources.ratio_of(torch_s, tar)} of torch.load on the tree; bar 3x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="images")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each writer and loader, interleaved")
    parser.add_argument("--sizes", type=int, nargs="*", default=[160, 224], help="output sizes of the loader in pixels")
    peers = ["stock", "encode", "keep", "keep from tar"]
    parser.add_argument("--only", nargs="+", choices=peers, default=peers, help="writers; stock is needed for ratios")
    parser.add_argument("--work", action="store_true", help="CPU time of the work on an image")
    parser.add_argument("--stock", type=Path, help=argparse.SUPPRESS)  # given to itself
    arguments = parser.parse_args()
    if arguments.stock:
        stock(arguments.stock)
    else:
        main(arguments.count, 0 if arguments.work else arguments.rounds, arguments.sizes, arguments.only)
