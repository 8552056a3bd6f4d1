"""LabelPooling: the official computation against ours, same inputs, interleaved in one run, medians.

    python -m benchmarks.label_pooling

The official computation is written from its formula with the official calls: scatter into a dense map, torchvision's
`roi_align`, softmax. It takes the unpacked maps, ours the packed ones, as each loader returns them. On the CPU
also: the time of decoding as many 500 x 375 JPEGs with FFCV's decoder. On a GPU: benchmarks/gpu_check.py.
"""

import argparse
import io
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
import torchvision
from ffcv_fields import label_pooling
from ffcv_fields.crops import CropSampler
from ffcv_fields.label_map import pack_label_map
from ffcv.libffcv import imdecode
from PIL import Image
from torchvision.ops import roi_align

from relabel.processes import use_all_cores

NUM_CLASSES, TOP_K, SIZE = 1000, 5, 15


def inputs(batch: int, repeat: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float maps `[B, 2, 5, 15, 15]`, packed maps, and the boxes of RandomResizedCrop on 500 x 375 images.

    Args:
        batch: B.
        repeat: blocks of so many cells squared list the same classes, as neighboring cells of real maps do.
    """
    rng = np.random.default_rng(0)
    scores = rng.normal(4, 4, (batch, TOP_K, SIZE, SIZE)).astype(np.float16).astype(np.float32)
    first = rng.integers(0, NUM_CLASSES - TOP_K, (batch, 1, SIZE, SIZE))
    classes = first + rng.permuted(np.arange(TOP_K)[None, :, None, None].repeat(batch, 0), axis=1)
    block = np.arange(SIZE) // repeat * repeat
    classes = classes[:, :, block][:, :, :, block]
    packed = np.stack([pack_label_map(s, c, "float16") for s, c in zip(scores, classes, strict=True)])
    sample, _ = CropSampler(0).compile()
    crops = np.array([sample(i, 375, 500) for i in range(batch)], np.float32)
    y, x, h, w = crops.T
    boxes = np.stack([x / 500, y / 375, (x + w) / 500, (y + h) / 375], 1).astype(np.float32)
    maps = torch.from_numpy(np.stack([scores, classes.astype(np.float32)], 1))
    return maps, torch.from_numpy(packed), torch.from_numpy(boxes)


def official(maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Targets `[B, 1000]` by the official way: one dense map per image, roi_align, softmax."""
    dense = torch.zeros(len(maps), NUM_CLASSES, *maps.shape[3:])
    for image, (scores, classes) in zip(dense, maps, strict=True):
        image.scatter_(0, classes.long(), scores)
    dense = dense.to(boxes.device)
    rois = torch.cat([torch.arange(len(maps), device=boxes.device)[:, None].float(), boxes * SIZE - 0.5], 1)
    return torch.softmax(roi_align(dense, rois, (1, 1)).flatten(1), 1)


def decode(jpeg: np.ndarray, batch: int) -> Callable[[], None]:
    """Decode the JPEG `batch` times on all cores, as FFCV's decoders do."""
    decode_jpeg = numba.njit(nogil=True)(imdecode)

    @numba.njit(nogil=True, parallel=True)
    def run(out):
        for _ in numba.prange(batch):
            pixels = out[numba.get_thread_id()]
            decode_jpeg(jpeg, pixels, 375, 500, 375, 500, 0, 0, 1, 1, False, False)

    out = np.empty((numba.config.NUMBA_NUM_THREADS, 375, 500, 3), np.uint8)
    return lambda: run(out)


def photograph() -> np.ndarray:
    """The bytes of a 500 x 375 JPEG of quality 90, a real photograph."""
    from skimage.data import chelsea

    file = io.BytesIO()
    Image.fromarray(chelsea()).resize((500, 375), Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return np.frombuffer(file.getvalue(), np.uint8)


def medians(candidates: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], None]) -> dict:
    """Seconds of each candidate: the median of `rounds` runs, in turn."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            repeats = 1 if name in ("official", "decode") else 10
            for _ in range(repeats):
                run()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peak(which: str, batch: int, connection) -> None:
    maps, packed, boxes = inputs(batch)
    label_pooling(packed[:1], boxes[:1], NUM_CLASSES)  # compile before measuring
    official(maps[:1], boxes[:1])
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status("VmRSS")
    _ = label_pooling(packed, boxes, NUM_CLASSES) if which == "ours" else official(maps, boxes)
    connection.send((status("VmHWM") - before) / 1024)


def status(name: str) -> int:
    """A line of this process's /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_extra_memory(which: str, batch: int) -> float:
    """MiB by which one call raises the peak of resident memory, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_peak, args=(which, batch, sender))
    process.start()
    value = receiver.recv()
    process.join()
    return value


def on_cpu(batches: list[int], rounds: int) -> None:
    jpeg = photograph()
    print(f"CPU: {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print("| batch | official ms | ours ms | ratio | ours / decoding | extra MiB official | ours |")
    print("|---|---|---|---|---|---|---|")
    for batch in batches:
        maps, packed, boxes = inputs(batch)
        error = (official(maps, boxes) - label_pooling(packed, boxes, NUM_CLASSES)).abs().max().item()
        assert error < 1e-5, error
        times = medians(
            {
                "official": lambda maps=maps, boxes=boxes: official(maps, boxes),
                "ours": lambda packed=packed, boxes=boxes: label_pooling(packed, boxes, NUM_CLASSES),
                "decode": decode(jpeg, batch),
            },
            rounds,
            lambda: None,
        )
        memory = {which: peak_extra_memory(which, batch) for which in ("official", "ours")}
        print(
            f"| {batch} | {1e3 * times['official']:.1f} | {1e3 * times['ours']:.2f} "
            f"| {times['official'] / times['ours']:.0f}x | {times['ours'] / times['decode']:.2%} "
            f"| {memory['official']:.0f} | {memory['ours']:.1f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="images in a batch")
    parser.add_argument("--rounds", type=int, default=7, help="measured runs of each, interleaved")
    arguments = parser.parse_args()
    use_all_cores()
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"numba {numba.__version__}"
    )
    on_cpu(arguments.batch, arguments.rounds)
