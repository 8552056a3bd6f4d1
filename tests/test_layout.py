"""The layout: who may import whom, how long files and argument lists are, and that each file says what it is for."""

import ast

import pytest
from conftest import ROOT

COMMANDS = sorted(p.stem for p in ROOT.glob("*.py"))
FOLDERS = ("relabel", "ffcv_fields", "scenes", "benchmarks", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])
SOURCES = [file for file in FILES if "tests" not in file.parts]
# From the lowest up: a file imports from its own level or from below.
LEVELS = [
    ["ffcv_fields"],
    ["relabel", "relabel.errors", "relabel.files", "relabel.locks", "relabel.cores", "relabel.dialects",
     "relabel.decoding", "relabel.settings", "relabel.official", "relabel.progress", "relabel.imagenet",
     "relabel.processes", "relabel.precision", "relabel.normalization", "relabel.checkpoints", "relabel.models",
     "relabel.stopping", "relabel.commands", "relabel.scripts"],
    ["relabel.sources"],
    ["relabel.data"],
    ["relabel.label_maps", "relabel.training", "relabel.evaluation"],
    ["relabel.transfer"],
    [*COMMANDS, "scenes"],
    ["benchmarks", "tests"],
]  # fmt: skip
ALONE = ("relabel.label_maps", "relabel.training", "relabel.evaluation")  # do not import one another
# FFCV's own constructor takes as many; `pool` is label_pooling's twin in a test, and says which memory to use besides.
MORE_ARGUMENTS = {"Loader.__init__", "pool"}


def name_of(file):
    """The dotted name of a file's package, or of the file where it is a module of `relabel` itself or a command."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "relabel":
        return ".".join(parts[:2]).removesuffix(".__init__")
    return parts[0]


def level_of(name):
    matches = [level for level, names in enumerate(LEVELS) for known in names if known == name]
    assert matches, f"{name} has no level"
    return matches[0]


def imported(file):
    """Dotted names of what a file imports, relative imports made absolute."""
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(name):
    parts = name.split(".")
    if parts[0] == "relabel":
        return ".".join(parts[:2]) if level_exists(".".join(parts[:2])) else "relabel"
    return parts[0] if level_exists(parts[0]) else None


def level_exists(name):
    return any(name in names for names in LEVELS)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards_and_files_are_short_and_say_what_they_are(file):
    own = name_of(file)
    for name in filter(None, map(ours, imported(file))):
        assert level_of(name) <= level_of(own), f"{own} imports {name}"
        assert own == name or not (own in ALONE and name in ALONE), f"{own} imports {name}"
        assert name != "scenes" or own in ("scenes", "benchmarks"), "nothing imports the study"
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) and len(ast.get_docstring(tree).splitlines()[0]) < 120
    assert len(file.read_text().splitlines()) <= (300 if file.name == "train_imagenet.py" else 350)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_take_at_most_eight_arguments(file):
    tree = ast.parse(file.read_text())
    owners = {f: c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            name = f"{owners[node]}.{node.name}" if node in owners else node.name
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(arguments) - (node in owners and arguments[:1] in (["self"], ["cls"]))
            assert count <= 8 or name in MORE_ARGUMENTS, f"{name} takes {count} arguments"


def test_a_training_step_is_read_on_one_screen():
    tree = ast.parse((ROOT / "train_imagenet.py").read_text())
    (step,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step")
    assert step.end_lineno - step.lineno < 40


def test_no_package_holds_more_than_30_percent_of_the_code():
    lines: dict[str, int] = {}
    for file in SOURCES:
        lines[name_of(file)] = lines.get(name_of(file), 0) + len(file.read_text().splitlines())
    for name, count in lines.items():
        assert count <= 0.3 * sum(lines.values()), name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_imports_ffcv_before_ffcv_fields_has_chosen_numba_s_threads(file):
    if file.relative_to(ROOT).parts[0] == "ffcv_fields":
        return  # its __init__.py comes before
    names = [name.split(".")[0] for name in imported(file)]
    if "ffcv" in names:
        assert "ffcv_fields" in names[: names.index("ffcv")]
