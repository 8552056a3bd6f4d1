"""The order of the house: who may import whom, how long files are, and that each says what it is for."""

import ast

import pytest
from conftest import ROOT

COMMANDS = [p.stem for p in ROOT.glob("*.py")]
FILES = [*ROOT.glob("*.py"), *(ROOT / "relabel").glob("*.py"), *(ROOT / "ffcv_fields").glob("*.py")]
MAY_NOT = {"ffcv_fields": {"relabel", "tests", "benchmarks", *COMMANDS}, "relabel": {"tests", "benchmarks", *COMMANDS}}


HOUSE = FILES + [p for folder in ("tests", "benchmarks") for p in (ROOT / folder).glob("*.py")]


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards_and_files_are_short_and_say_what_they_are(file):
    above = MAY_NOT.get(file.parent.name, set(COMMANDS) if file.parent == ROOT else set())
    assert not set(imported(file)) & above
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) and len(ast.get_docstring(tree).splitlines()[0]) < 120
    assert len(file.read_text().splitlines()) <= (450 if file.name == "train_imagenet.py" else 500)


@pytest.mark.parametrize("file", HOUSE, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_imports_ffcv_before_ffcv_fields_has_chosen_numba_s_threads(file):
    names = list(imported(file))  # of modules in packages: relabel/__init__.py comes before them, as does ffcv_fields'
    if file.parent.name in ("relabel", "ffcv_fields") or "ffcv" not in names:
        return
    first = min((names.index(name) for name in ("ffcv_fields", "relabel") if name in names), default=len(names))
    assert first < names.index("ffcv")
