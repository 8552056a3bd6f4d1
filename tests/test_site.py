"""The site of docs/ and the docstrings: every page is in it, and it is built without a warning."""

import shutil
import subprocess
import sys
import tomllib

import ffcv_fields
from conftest import ROOT


def pages_of(navigation):
    """The files that a navigation names, at any depth."""
    for entry in navigation:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_every_page_is_in_the_navigation_once():
    navigation = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(pages_of(navigation)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_is_built_without_a_warning_and_shows_the_api(tmp_path):
    for name in ("docs", "ffcv_fields"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "zensical.toml"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    result = subprocess.run(build, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert "warning" not in result.stdout.lower() and "griffe" not in result.stdout, result.stdout
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(f'id="ffcv_fields.{name}"' in api for name in ffcv_fields.__all__)
    start = (tmp_path / "site" / "index.html").read_text()
    assert "--8&lt;--" not in start and "train_imagenet.py" in start
