"""Small data in the official formats, made for each test."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

if os.environ.get("RELABEL_TEST_GPU") != "1":  # the tests compare bits; on a GPU training is in float16
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["NUMBA_NUM_THREADS"] = "8"  # more workers than cores, on any machine
# Torch's threads: those of several test processes would starve each other, as OpenMP's spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent


# Commands run in processes of their own, forked from one that has imported the libraries (preload.py): the imports take
# longer than most of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])


class Command:
    """A top-level command that has been started as a user would start it; keywords are variables of its environment."""

    def __init__(self, command: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        self._process = FORKS.Process(target=_be, args=(command, arguments, cwd, environment, self._out, self._err))
        self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel  # which is ready when it has ended

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its result; a command that takes longer than `timeout` seconds is killed and fails the test."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"not finished after {timeout} s; stderr: {self._err.read_text()[-2000:]}")
        out, err = (file.read_text() if file.exists() else "" for file in (self._out, self._err))
        return subprocess.CompletedProcess((), self._process.exitcode, out, err)


def _be(command, arguments, cwd, environment, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [str(ROOT / command), *arguments]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(command: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the top-level commands to its end."""
    return Command(command, *arguments, cwd=cwd).wait()


def run_together(processes: int, command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command in several processes that know of each other as torchrun's do; one that fails ends the others.

    One process is started without any of that, as without torchrun.
    """
    if processes == 1:
        return run(command, *arguments)
    with socket.create_server(("localhost", 0)) as free:
        of_all = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    of_all |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [str(rank) for rank in range(processes)]
    started = [Command(command, *arguments, **of_all, RANK=rank, LOCAL_RANK=rank) for rank in ranks]
    running = set(started)
    while running and not any(process.poll() for process in started):
        if not multiprocessing.connection.wait([process.sentinel for process in running], timeout=300):
            for process in running:
                process.kill()
            raise TimeoutError("nothing ended within 300 s")
        running = {process for process in running if process.poll() is None}
    failed = [process.poll() for process in started if process.poll()]
    for process in running:
        process.send_signal(signal.SIGTERM)
    results = [process.wait() for process in started]
    code = failed[0] if failed else 0
    out, err = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess((), code, out, err)


def label_map_tensor(rng: np.random.Generator, num_classes: int, top_k: int = 5, height: int = 15, width: int = 15):
    """A label map in the official layout, rows = y: scores representable in float16, distinct classes in each cell."""
    scores = rng.normal(3, 4, (top_k, height, width)).astype(np.float16).astype(np.float32)
    classes = rng.random((num_classes, height, width)).argsort(0)[:top_k]
    return torch.from_numpy(np.stack([scores, classes.astype(np.float32)]))


def write_images(root: Path, count: int, num_classes: int = 8, seed: int = 0) -> list[Path]:
    """`root/classN/imgN.jpg`, photographs' sizes in miniature. Returns the files in ImageFolder's order."""
    rng = np.random.default_rng(seed)
    for c in range(num_classes):
        (root / f"class{c}").mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(count):
        height, width = (int(v) for v in rng.integers(40, 90, 2))
        coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        file = root / f"class{i % num_classes}" / f"img{i:03d}.jpg"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=95)
        files.append(file)
    return sorted(files)


def write_label_maps(root: Path, files: list[Path], num_classes: int = 8, suffix: str = ".pt", seed: int = 1) -> dict:
    """A map for each image; returns them by (class folder, stem)."""
    rng = np.random.default_rng(seed)
    maps = {}
    for file in files:
        tensor = label_map_tensor(rng, num_classes)
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        torch.save(tensor, root / file.parent.name / f"{file.stem}{suffix}")
        maps[file.parent.name, file.stem] = tensor.numpy()
    return maps


def names_of(beton: Path | str) -> list[str]:
    """The names of a `.beton`'s samples."""
    from relabel.data.beton import read_header
    from relabel.data.contents import read_sample_list

    return list(read_sample_list(read_header(str(beton))).names)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(image folder, label-map folder, files, maps): 48 images of 8 classes, maps with rows = y."""
    base = tmp_path_factory.mktemp("data")
    files = write_images(base / "images", 48)
    maps = write_label_maps(base / "maps", files)
    return base / "images", base / "maps", files, maps


@pytest.fixture(scope="session")
def beton(folders, tmp_path_factory):
    """The `.beton` of `folders`, in jpg mode, written by the command."""
    images, maps, _, _ = folders
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    result = run(
        "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.label_map_dir={maps}", f"--cfg.write_path={path}",
        "--cfg.axis_order=yx", "--cfg.num_workers=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return path
