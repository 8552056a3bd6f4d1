"""What only a GPU can show, in one table: do the kernels agree, how fast are they, does the loader keep up?

    make gpu-check                     (or make gpu-check PYTHON=python3, by a Python that has torch and CuPy)
    python -m benchmarks.gpu_check --dry-run    the same code on the CPU, on tiny sizes, so that it can be tested

- parity: label pooling and color augmentation on the GPU against the CPU's; pooling against the official computation
- label pooling: the same bits in every run; the time of the kernel (launches in a CUDA graph, not Python) against the
  official computation's and against the memory floor, the copy of as many bytes. In its maps a class repeats over
  neighboring cells, as in real ones: the hard case for the atomics that add its scores up.
- training of ResNet-50 at 160 pixels on several kinds of data (benchmarks/training.py), peak memory, and operations
  that make the CPU wait for the GPU, by torch.cuda.set_sync_debug_mode
- the tests that need a GPU, where pytest and hypothesis are installed

Takes at most about 9 minutes on 16 cores: what does not fit is left out, and the table says so. The table goes to the
standard output, all else to the standard error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numba
import numpy as np
import torch
import torchvision
from ffcv_fields import label_pooling

import train_imagenet
from relabel.cores import usable_cores
from relabel.processes import join, use_all_cores
from relabel.training.augment import apply_draws

from .label_pooling import NUM_CLASSES, inputs, official
from .training import Size, Training, prepare

ROOT = Path(__file__).parent.parent
SECONDS = 9 * 60
GPU_TESTS = ("tests/test_pooling_cuda.py", "tests/test_augment.py", "tests/test_optimizers.py")
TINY = Size(arch="resnet18", size=32, batch_size=8, steps=2, rounds=1, count=16)


@dataclass(frozen=True)
class Row:
    """A line of the table. `good` is None where there is nothing to hold the result to, or nothing was run."""

    check: str
    result: str
    goal: str = ""
    good: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "NO", None: ""}[self.good]
        return f"| {self.check} | {self.result} | {self.goal} | {verdict} |"


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 20, rounds: int = 15) -> float:
    """Seconds of one `run`, the median: on a GPU of launches in a CUDA graph, so that Python's time is not in it."""
    run()
    times = []
    if device.type == "cpu":
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return float(np.median(times))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    for number in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1000 / repeats)
    return float(np.median(times))


def eager_seconds(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Seconds of one `run` as Python starts it, the median."""
    times = []
    for number in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if number:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float().cpu() - b.float().cpu()).abs().max().item()


def parity(device: torch.device) -> Iterator[Row]:
    maps, packed, boxes = inputs(64, repeat=3)
    ours = label_pooling(packed.to(device), boxes.to(device), NUM_CLASSES)
    for name, other in (
        ("label pooling: largest difference from the CPU's", label_pooling(packed, boxes, NUM_CLASSES)),
        ("label pooling: largest difference from the official computation", official(maps, boxes)),
    ):
        error = difference(ours, other)
        yield Row(name, f"{error:.1e}", "1e-5", error <= 1e-5)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
    draws = np.concatenate(
        [rng.uniform(0.6, 1.4, (16, 3)), rng.random((16, 3)).argsort(1), rng.normal(0, 0.02, (16, 3))], 1
    ).astype(np.float32)
    for dtype, goal in ((torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        error = difference(apply_draws(images.to(device), draws, dtype), apply_draws(images, draws, torch.float32))
        yield Row(f"augmentation, {str(dtype)[6:]}: largest difference", f"{error:.1e}", f"{goal:g}", error <= goal)


def bits(device: torch.device, runs: int = 100) -> Iterator[Row]:
    _, packed, boxes = inputs(256, repeat=5)
    packed, boxes = packed.to(device), boxes.to(device)
    first = label_pooling(packed, boxes, NUM_CLASSES)
    same = sum(torch.equal(label_pooling(packed, boxes, NUM_CLASSES), first) for _ in range(runs))
    yield Row("label pooling: runs with the same bits", f"{same} of {runs}", "all", same == runs)


def pooling(device: torch.device, batches: tuple[int, ...]) -> Iterator[Row]:
    for batch in batches:
        maps, packed, boxes = inputs(batch, repeat=5)
        packed, boxes = packed.to(device), boxes.to(device)
        half = (packed.nbytes + boxes.nbytes + 4 * batch * NUM_CLASSES) // 2
        source = torch.zeros(half, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        ours = seconds_of(lambda p=packed, b=boxes: label_pooling(p, b, NUM_CLASSES), device)
        floor = seconds_of(lambda t=target, s=source: t.copy_(s), device)
        theirs = eager_seconds(lambda m=maps, b=boxes: official(m, b), device)
        yield Row(
            f"label pooling of {batch} images",
            f"{1e6 * ours:.1f} us; official {1e3 * theirs:.1f} ms, {theirs / ours:,.0f}x; "
            f"copying its bytes {1e6 * floor:.1f} us, {ours / floor:.1f}x",
        )


def count_syncs(run: Callable[[], object]) -> list[str]:
    """Where `run` makes the CPU wait for the GPU, as `torch.cuda.set_sync_debug_mode` sees it: FILE:LINE, each time."""
    set_mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
    set_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        set_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]


def syncs(training: Training) -> Iterator[Row]:
    run, batches = training.run, training.loaders["relabel"].epoch(0)
    run.losses = torch.zeros(training.size.steps, device=run.processes.device)
    steps = min(10, training.size.steps)

    def train() -> None:
        for step in range(steps):
            run.step = step
            train_imagenet.train_step(training.settings, run, batches)

    where = count_syncs(train)
    batches.close()
    shown = f" ({', '.join(sorted(set(where)))})" if where else ""
    yield Row(f"waits for the GPU in {steps} steps", f"{len(where)}{shown}", "0", not where)


def training_rows(size: Size, until: float) -> Iterator[Row]:
    processes = join(0 if torch.cuda.is_available() else -1, "nccl")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), size.count)
        training = Training(Path(folder), size, processes)
        measured = training.measure(until)
        ceiling = measured["synthetic"]["images_per_second"]
        of = f"training, {size.arch}, {size.size} px, batches of {size.batch_size}"
        for kind, line in measured.items():
            share, used = line["images_per_second"] / ceiling, line["utilization"]
            result = (
                f"{line['images_per_second']:,.0f} images/s, {share:.1%} of synthetic, waits {line['data_wait']:.1%}"
            )
            result += f", GPU used {used:.0f} %" if used == used else ""
            ours = kind == "relabel"
            yield Row(f"{of}: {kind}", result, "95 %" if ours else "", share >= 0.95 if ours else None)
        if training.without_dali:
            yield Row(f"{of}: dali", f"not run: {training.without_dali}")
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        yield Row("peak GPU memory of the process", f"{peak:.2f} GiB of tensors, {reserved:.2f} GiB reserved")
        yield from syncs(training)


def gpu_tests(until: float) -> Iterator[Row]:
    if not (find_spec("pytest") and find_spec("hypothesis")):
        yield Row("tests on the GPU", "not run: no pytest and hypothesis here")
        return
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-k", "on_a_gpu", *GPU_TESTS]
    environment = os.environ | {"RELABEL_TEST_GPU": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1, until - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        yield Row("tests on the GPU", "not finished: time is up")
        return
    if done.returncode:
        print(done.stdout[-5000:], file=sys.stderr)
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    yield Row("tests on the GPU", said, "all pass", done.returncode == 0 and "skipped" not in said)


def main(size: Size, dry_run: bool) -> int:
    """Print the table as it comes. Returns 1 if a goal was missed or something failed."""
    start = time.monotonic()
    device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
    if not dry_run and not torch.cuda.is_available():
        print("no NVIDIA GPU here that torch can use; --dry-run tries the same on the CPU", file=sys.stderr)
        return 1
    use_all_cores()
    name = "DRY RUN on the CPU: figures mean nothing" if dry_run else torch.cuda.get_device_name(device)
    print(
        f"{name}; {usable_cores()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, CUDA {torch.version.cuda}, numba {numba.__version__}\n"
        "\n| check | result | goal | met |\n|---|---|---|---|"
    )
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "parity": lambda: parity(device),
        "bits": lambda: bits(device, 3 if dry_run else 100),
        "pooling": lambda: pooling(device, (4,) if dry_run else (64, 256, 1024)),
        "training": lambda: training_rows(size, until=start + 0.7 * SECONDS),
        "tests": lambda: gpu_tests(until=start + SECONDS),
    }
    bad, table = False, sys.stdout
    for part, rows in parts.items():
        if time.monotonic() - start > 0.8 * SECONDS:
            print(Row(part, "not run: time is up"), flush=True)
            continue
        try:
            with redirect_stdout(sys.stderr):
                for row in rows():
                    print(row, file=table, flush=True)
                    bad = bad or row.good is False
        except Exception as error:  # the other parts can still be had
            print(Row(part, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "", False))
            print(f"{part}: {error!r}", file=sys.stderr)
            bad = True
    print(f"\n{time.monotonic() - start:.0f} s")
    return int(bad and not dry_run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny sizes")
    arguments = parser.parse_args()
    sys.exit(main(TINY if arguments.dry_run else Size(), arguments.dry_run))
