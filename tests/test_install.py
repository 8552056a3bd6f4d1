"""What is installed: complete, as pyproject.toml asks for it, and from nowhere but PyPI."""

import re
import subprocess
import sys
import tomllib

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED_EXTRAS = ("label-map-demo", "docs", "dev")  # as in `make lock`


def test_every_installed_package_has_what_it_requires():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    # FFCV asks for opencv-python, which needs desktop libraries; opencv-python-headless is the same module.
    known = r"ffcv \S+ requires opencv-python, which is not installed\.|No broken requirements found\."
    assert [line for line in result.stdout.splitlines() if not re.fullmatch(known, line)] == [], result.stderr


def test_the_lock_pins_what_pyproject_asks_for_and_names_no_place():
    pins = dict(line.split("==") for line in LOCK.splitlines() if line and not line.lstrip().startswith("#"))
    optional = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for extra in LOCKED_EXTRAS for text in optional[extra])]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
    assert "://" not in LOCK and "--" not in LOCK
    for extra in LOCKED_EXTRAS:
        assert f"--extra {extra} " in (ROOT / "Makefile").read_text()
