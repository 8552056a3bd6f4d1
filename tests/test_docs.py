"""The documentation: links, files, commands, settings, tests and versions that the pages name exist."""

import ast
import importlib.util
import itertools
import re
from functools import cache

import pytest
import yaml
from conftest import ROOT, run

import relabel

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
COMMANDS = sorted(p.stem for p in ROOT.glob("*.py"))
FOLDERS = ("relabel", "ffcv_fields", "scenes", "benchmarks", "tests", "docs", "setup", "rn50_configs", ".github")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?\n(.*?)```|`([^`]+)`", re.DOTALL)
SETTING = re.compile(r"--([a-z_]+(?:\.[a-z_0-9]+)+)")  # --section.name

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page):
    """The code of a page, blocks and spans, a line each; lines that end in a backslash are joined."""
    for block, span in CODE.findall(page.read_text()):
        yield from re.sub(r"\\\n\s*", "", block).splitlines() if block else [" ".join(span.split())]


def all_code():
    return list(itertools.chain.from_iterable(map(code, PAGES)))


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def options(command):
    """Names of a command's options, without the dashes: from its `--help`; of the other modules from the source."""
    if command in COMMANDS:
        result = run(f"{command}.py", "--help")
        assert result.returncode == 0, result.stderr
        return set(re.findall(r"^  (?:-\w(?: [A-Z_]+)?, )?--([\w.-]+)", result.stdout, re.MULTILINE))
    file = next(p for p in (ROOT / f"{command}.py", ROOT / f"{command.replace('.', '/')}.py") if p.is_file())
    return {"help"} | {
        argument.value[2:]
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    }


@cache
def settings():
    """The settings of all commands."""
    return {name for command in COMMANDS for name in options(command) if "." in name}


def started(line):
    """`[(command, its options)]` of a line of shell."""
    calls = re.findall(r"(?:python -m |python )([\w./]+)((?: [^#|;&]*)?)", line)
    calls += re.findall(r"torchrun (?:-\S+ )*([\w/]+\.py)(.*)", line)
    for name, rest in calls:
        name = name.removesuffix(".py").replace("/", ".")
        if name.split(".")[0] in (*FOLDERS, *COMMANDS):
            yield name, re.findall(r" --([\w.-]+)", rest)


@pages
def test_links_and_images_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_commands_of_a_page_exist_with_their_options(page):
    for line in code(page):
        for name in re.findall(r"python -m ([\w.]+)", line):
            assert importlib.util.find_spec(name), line
        for name in re.findall(r"python (?!-)([\w/]+\.py)", line):
            assert (ROOT / name).is_file(), line
        for name in re.findall(r"\bmake ([a-z][\w-]*)", line):
            assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        for command, given in started(line):
            assert set(given) <= options(command), line


@pages
def test_settings_of_a_page_exist(page):
    sections = {name.split(".")[0] for name in settings()}
    for line in code(page):
        names = SETTING.findall(line)
        if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", line) and line.split(".")[0] in sections:
            names.append(line)
        assert set(names) <= settings(), line


@pages
def test_files_and_tests_that_a_page_names_exist(page):
    known = set(re.findall(r"def (test_\w+)", "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))))
    for line in code(page):
        if line.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and " " not in line:
            assert any(ROOT.glob(line.rstrip("/"))), line
        if match := re.fullmatch(r"(test_\w+?)(_\.\.\.)?", line):
            assert any(name == match[1] or (match[2] and name.startswith(f"{match[1]}_")) for name in known), line


def test_the_checks_find_what_they_check():
    lines = all_code()
    calls = [call for line in lines for call in started(line)]
    assert {name for name, _ in calls} >= {*COMMANDS, "scenes.demo", "benchmarks.loader", "tests.faults"}
    assert sum(len(given) for _, given in calls) > 40 and sum(bool(SETTING.search(line)) for line in lines) > 20
    assert {"optim.lr.init", "cfg.axis_order", "maps.path"} <= settings()
    assert sum(len(LINK.findall(page.read_text())) for page in PAGES) > 30


def test_the_readme_is_read_in_five_minutes_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 160
    linked = {(ROOT / target.partition("#")[0]) for target in LINK.findall(readme) if "://" not in target}
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == relabel.__version__
    assert re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == relabel.__version__
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    assert f"ruff=={ruff.removeprefix('v')}\n" in (ROOT / "requirements.lock").read_text()
