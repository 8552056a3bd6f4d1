"""What is installed: complete, as pyproject.toml asks for it, and from nowhere but PyPI. And what is built."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / "requirements.lock").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = [name.replace(".", "/") for name in PYPROJECT["tool"]["setuptools"]["packages"]]
LOCKED_EXTRAS = ("label-map-demo", "detection", "docs", "dev")  # as in `make lock`


def test_every_installed_package_has_what_it_requires():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    # FFCV asks for opencv-python, which needs desktop libraries; opencv-python-headless is the same module.
    known = r"ffcv \S+ requires opencv-python, which is not installed\.|No broken requirements found\."
    assert [line for line in result.stdout.splitlines() if not re.fullmatch(known, line)] == [], result.stderr


def test_the_lock_pins_what_pyproject_and_set_up_ask_for_and_names_no_place():
    pins = dict(line.split("==") for line in LOCK.splitlines() if line and not line.lstrip().startswith("#"))
    for script in ("install.sh", "gpu_kit.sh"):
        asked = re.findall(r"\$\(pinned ([^)]+)\)", (ROOT / "setup" / script).read_text())
        assert asked and set(" ".join(asked).replace("\\", "").split()) <= set(pins), script
    optional = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for extra in LOCKED_EXTRAS for text in optional[extra])]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
    assert "://" not in LOCK and "--" not in LOCK
    for extra in LOCKED_EXTRAS:
        assert f"--extra {extra} " in (ROOT / "Makefile").read_text()


def test_the_sdist_builds_a_wheel_with_all_that_is_loaded_and_no_sources_of_the_extension(tmp_path):
    project = tmp_path / "project"
    for folder in {name.split("/")[0] for name in PACKAGES}:
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", *ROOT.glob("*.py")):
        shutil.copy(ROOT / file, project)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]  # the wheel from the sdist
    result = subprocess.run(build, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path for folder in PACKAGES for path in (ROOT / folder).iterdir() if path.suffix not in (".pyc", ".so")]
    wanted = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    assert wanted <= set(names)
    for library in ("_crop_decode", "_jpeg_keep"):
        assert any(re.fullmatch(rf"ffcv_fields/{library}\..*\.so", name) for name in names)
    assert not [name for name in names if name.endswith((".c", ".h"))]
