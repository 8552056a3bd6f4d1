"""Joining processes: a GPU that cannot be used is an error that names the mend, not a slow run on the CPU."""

import os
import sys

import pytest
import torch
from ffcv_fields import CropSampler

from relabel import processes
from relabel.data.reading import Reading, training_loader
from relabel.errors import BadInput

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(error of torch.cuda.init, whether there is a GPU's device file)."""

    def make(error, gpu_file):
        def init():
            raise error

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        driver, gpu = tmp_path / "version", tmp_path / "nvidia0"
        driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n")
        if gpu_file:
            gpu.touch()
        monkeypatch.setattr(processes, "DRIVER_FILE", driver)
        monkeypatch.setattr(processes, "GPU_FILE", gpu)

    return make


@pytest.mark.parametrize(
    "error, gpu_file",
    [
        (RuntimeError(TOO_OLD), False),
        (RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."), True),
        (AssertionError("Torch not compiled with CUDA enabled"), True),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error_with_driver_and_mend(machine, error, gpu_file):
    machine(error, gpu_file)
    with pytest.raises(BadInput, match=r"driver 470\.82\.01.*Update the driver") as raised:
        processes.join(-1, "nccl")
    assert str(error).splitlines()[0].rstrip(".") in str(raised.value)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_who_hides_the_gpu_trains_on_the_cpu(machine, monkeypatch, visible):
    machine(RuntimeError(TOO_OLD), True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.join(-1, "nccl").device.type == "cpu"


def test_a_machine_without_a_gpu_trains_on_the_cpu(machine):
    machine(RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"), False)
    assert processes.join(-1, "nccl").device.type == "cpu"


def test_without_cupy_training_on_a_gpu_is_one_message(beton, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    on_gpu = processes.Processes(0, 1, 0, 1, torch.device("cuda", 0))
    with pytest.raises(BadInput, match=r"need CuPy.*pip install cupy-cuda"):
        training_loader(str(beton), Reading(8, on_gpu, 1), 8, CropSampler(0), 32)


def test_the_tests_see_no_gpu_unless_they_are_asked_to():
    assert os.environ.get("RELABEL_TEST_GPU") == "1" or not torch.cuda.is_available()


@pytest.mark.parametrize(
    "cores, local_size, threads",
    [(16, 1, 14), (8, 1, 6), (7, 1, 6), (2, 1, 1), (1, 1, 1), (64, 8, 6), (96, 8, 10), (16, 4, 3), (4, 8, 1)],
)
def test_decoding_leaves_cores_to_each_gpu_s_trainer(monkeypatch, cores, local_size, threads):
    """Of the cores that this process may use, not of all that the machine has."""
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    on_gpu = processes.Processes(0, local_size, 0, local_size, torch.device("cuda", 0))
    assert processes.decoding_threads(0, on_gpu) == threads
    assert processes.decoding_threads(24, on_gpu) == -(-24 // local_size)  # what is asked for is done
    assert processes.decoding_threads(0, processes.Processes(0, 1, 0, 1, torch.device("cpu"))) == 1
