"""Settings: YAML, command line, and the errors of both."""

import subprocess
import sys

import pytest
from conftest import ROOT, run

SCRIPT = """
import sys, json
sys.path.insert(0, {root!r})
from fastargs import Param, Section
from relabel.settings import Choice, Flag, Number, load_settings, resolved
optim, data = Section("optim", "o"), Section("data", "d")
optim.params(**{{"lr.init": Param(Number(0), "rate", default=0.5)}})
optim.params(epochs=Param(Number(1, whole=True), "n", required=True))
data.params(use=Param(Flag(), "f", default=True), mode=Param(Choice("a", "b"), "m", default="a"))
print(json.dumps(resolved(load_settings("What it is."))))
"""


def load(tmp_path, *arguments, yaml=None):
    if yaml is not None:
        (tmp_path / "c.yaml").write_text(yaml)
        arguments = ("--config-file", str(tmp_path / "c.yaml"), *arguments)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_line_goes_over_yaml_goes_over_defaults(tmp_path):
    result = load(tmp_path, "--optim.lr.init", "2.e-3", yaml="optim: {epochs: 7, lr: {init: 1}}\ndata:\n  use: False\n")
    assert result.stdout.strip() == '{"optim.lr.init": 0.002, "optim.epochs": 7, "data.use": false, "data.mode": "a"}'


@pytest.mark.parametrize(
    "arguments, yaml, says",
    [
        (["--optim.epoch=3"], None, "did you mean optim.epochs?"),
        ([], "optim: {epochs: 3, lr: {int: 1}}", "did you mean optim.lr.init?"),
        ([], None, "--optim.epochs is missing"),
        (["--optim.epochs=2.5"], None, "--optim.epochs is '2.5'; must be an integer, 1 or more"),
        (["--optim.epochs=nan"], None, "an integer, 1 or more"),
        (["--optim.epochs=3", "--data.mode=c"], None, "a | b"),
        (["--optim.epochs=3", "--data.use=maybe"], None, "True or False"),
        (["--optim.epochs"], None, "--optim.epochs needs a value"),
        (["train"], None, "did not expect 'train'"),
        ([], "- a\n- b", "must hold sections"),
        ([], "a: [", "cannot read config file"),
    ],
)
def test_each_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, yaml, says):
    result = load(tmp_path, *arguments, yaml=yaml)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


def test_help_lists_every_setting_with_default_and_meaning(tmp_path):
    result = load(tmp_path, "--help")
    assert result.returncode == 0
    for part in ("What it is.", "--optim.lr.init", "rate", "default 0.5", "required", "a | b"):
        assert part in result.stdout


def test_the_recipes_are_found_from_wherever_a_command_is_called(tmp_path):
    arguments = ("--config-file=rn50_configs/demo.yaml", "--data.val_dataset=nowhere.beton")
    result = run("train_imagenet.py", *arguments, cwd=tmp_path)
    assert result.returncode == 1 and "nowhere.beton: no such file" in result.stderr
