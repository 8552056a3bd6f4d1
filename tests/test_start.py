"""At once: `--help` and a mistaken setting are answered before any library is imported, which takes seconds."""

import os
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

LIBRARIES = {"torch", "torchvision", "timm", "numba", "ffcv", "ffcv_fields", "cupy", "numpy", "cv2", "matplotlib"}
MISTAKES = {  # command: a mistaken setting, and what is said of it
    "write_datasets": ("--cfg.data=images", "did you mean cfg.data_dir?"),
    "verify_datasets": ("--cfg.pth=train.beton", "did you mean cfg.path?"),
    "train_imagenet": ("--optim.epochs=none", "--optim.epochs is 'none'; must be an integer, 1 or more"),
    "evaluate_imagenet": ("--config-file=nowhere.yaml", "cannot read config file nowhere.yaml"),
    "generate_label_maps": ("--maps.top=5", "did you mean maps.top_k?"),
    "inspect_label_maps": ("--images=images", "--images and --label-maps go together"),
    "finetune_detector": ("--data.train_dataset=train.beton", "did you mean data.train?"),
    "reproduce_tables": ("--gpus=all", "argument --gpus: invalid int value: 'all'"),
}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def started(*words):
    """The result of Python with `words`, and the names of the packages that it imported."""
    command = [sys.executable, "-X", "importtime", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    names = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert {"argparse", "relabel"} <= names
    return result, {name.partition(".")[0] for name in names}


def test_all_commands_are_here():
    assert sorted(MISTAKES) == sorted(file.stem for file in ROOT.glob("*.py")) and len(SCRIPTS) == len(MISTAKES)


@pytest.mark.parametrize("command", MISTAKES)
def test_help_imports_no_library(command):
    result, imported = started(f"{command}.py", "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {command}.py") and not imported & LIBRARIES


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistaken_setting_imports_no_library(command):
    mistake, says = MISTAKES[command]
    result, imported = started(f"{command}.py", mistake)
    assert result.returncode == 2 and says in result.stderr and not imported & LIBRARIES


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_that_pip_installs_is_the_file_s(script):
    module, _, function = SCRIPTS[script].partition(":")
    result, imported = started("-c", f"from {module} import {function}; {function}()", "--help")
    assert result.returncode == 0 and not imported & LIBRARIES
    file = result.stdout.split()[1]
    assert file.removesuffix(".py") in MISTAKES and script.removeprefix("relabel-").split("-")[0] in file


@pytest.mark.parametrize(
    "given, count", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "-")]
)
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(given, count):
    """Said to OpenMP before anything loads it."""
    script = "import relabel.settings, os, sys; print(os.environ.get('GOMP_SPINCOUNT', '-'), 'torch' in sys.modules)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment | given, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == [count, "False"]


def test_the_check_sees_what_a_command_imports():
    result, imported = started("-c", "import argparse, relabel.processes")
    assert result.returncode == 0 and imported >= {"torch", "numba", "ffcv", "ffcv_fields", "numpy"}
