"""Workers are forked from a process without threads, whatever process asks for packing, and end with it."""

import os
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from ffcv_fields import image_field
from conftest import ROOT, names_of, write_images
from faults import alive, descendants
from ffcv.fields import IntField
from PIL import Image

from relabel.data.apart import pack_apart
from relabel.data.settings import Packing
from relabel.data.writer import Workers, write_beton
from relabel.errors import BadInput, BadSample, WorkerFailed

AT_FORK = """
import os
def count():
    with open({file!r}, "a") as file:
        file.write(f"{{len(os.listdir('/proc/self/task'))}}\\n")
os.register_at_fork(before=count)
"""


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """How many threads each process below this one had whenever it forked: what Python 3.12 and later warn of."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AT_FORK.format(file=str(tmp_path / "forks")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name)
    return lambda: [int(line) for line in (tmp_path / "forks").read_text().split()]


def test_the_command_forks_without_threads(tmp_path, threads):
    write_images(tmp_path / "images", 12)
    command = [sys.executable, "-W", "error::DeprecationWarning:multiprocessing", str(ROOT / "write_datasets.py")]
    path = tmp_path / "t.beton"
    arguments = [f"--cfg.data_dir={tmp_path}/images", f"--cfg.write_path={path}", "--cfg.num_workers=2"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert threads() == [1, 1] and len(names_of(path)) == 12


def test_a_process_with_threads_packs_in_one_without(tmp_path, threads, capfd):
    end = threading.Event()
    waits = threading.Thread(target=end.wait)
    waits.start()
    try:
        files = write_images(tmp_path / "images", 12)
        settings = {"data_dir": str(tmp_path / "images"), "write_path": str(tmp_path / "t.beton"), "num_workers": 2}
        assert pack_apart(Packing(**settings)) == [] and threads() == [1, 1]
        assert "12 images of 8 classes" in capfd.readouterr().out and len(names_of(tmp_path / "t.beton")) == 12
        files[3].write_text("no image")
        with pytest.raises(BadSample, match=f"{files[3]}: cannot be decoded") as raised:
            pack_apart(Packing(**settings, overwrite="yes"))
        assert str(raised.value.file) == str(files[3])
        (left_out,) = pack_apart(Packing(**settings, overwrite="yes", on_error="skip"))
        assert str(left_out.file) == str(files[3])
        with pytest.raises(BadInput, match="exists already"):
            pack_apart(Packing(**settings))
    finally:
        end.set()
        waits.join()


SLOW = """
import sys
sys.path.insert(0, {root!r})
from relabel.data.apart import pack_apart
from relabel.data.settings import Packing
pack_apart(Packing(data_dir={images!r}, write_path={path!r}, num_workers=2, chunk_size=1, jpeg="encode"))
"""


@pytest.fixture
def packing(tmp_path):
    """A process that packs apart, slowly, once workers are there: (the process, all that it started)."""
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype=np.uint8))
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(100):
        big.save(tmp_path / "images" / "a" / f"{i}.jpg")
    script = SLOW.format(root=str(ROOT), images=str(tmp_path / "images"), path=str(tmp_path / "t.beton"))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(below := descendants(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    yield process, below
    process.kill()
    process.communicate()


def gone(processes):
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_end_with_the_process_that_asked(tmp_path, packing, number):
    process, below = packing
    os.kill(process.pid, number)
    process.wait(30)
    assert process.returncode != 0 and gone(below)
    assert os.listdir(tmp_path) == ["images"]


def test_a_packing_process_that_is_killed_is_an_error(tmp_path, packing):
    process, below = packing
    os.kill(below[0], signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and WorkerFailed.__name__ in said and "was killed by SIGKILL" in said
    assert gone(below) and not (tmp_path / "t.beton").exists()


def test_workers_do_not_wait_for_opencv_s_threads(tmp_path):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(2)
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (500, 500), interpolation=cv2.INTER_AREA)  # starts them
    fields = {"image": image_field(0, write_mode="raw", max_resolution=64), "label": IntField()}
    image = np.zeros((1500, 1500, 3), np.uint8)  # resized by the field, with OpenCV
    write_beton(tmp_path / "a.beton", fields, [0, 1], lambda index: (image, index), Workers(2, 1))
    assert cv2.getNumThreads() == 2
    cv2.setNumThreads(threads)
