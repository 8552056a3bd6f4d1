"""At once: `--help` and a mistaken setting are answered before any library is imported, which takes seconds."""

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


def test_the_check_sees_what_a_command_imports():
    result, imported = started("-c", "import argparse, relabel.processes")
    assert result.returncode == 0 and imported >= {"torch", "numba", "ffcv", "ffcv_fields", "numpy"}
