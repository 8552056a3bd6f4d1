"""Settings: YAML, command line, and the errors of both."""

import subprocess
import sys

import pytest
from conftest import ROOT, run

SCRIPT = """
import sys, json
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from relabel.settings import Choice, Flag, Number, as_dict, group, load_settings, setting
@dataclass(frozen=True, kw_only=True)
class Lr:
    init: float = setting(Number(0), "rate", 0.5)
@dataclass(frozen=True, kw_only=True)
class Optim:
    \'\'\'the optimizer\'\'\'
    lr: Lr = group(Lr)
    epochs: int = setting(Number(1, whole=True), "n")
@dataclass(frozen=True, kw_only=True)
class Data:
    use: bool = setting(Flag(), "f", True)
    mode: str = setting(Choice("a", "b"), "m", "a")
@dataclass(frozen=True, kw_only=True)
class Settings:
    optim: Optim = group(Optim)
    data: Data = group(Data)
settings = load_settings(Settings, "What it is.")
assert settings.optim.lr.init == as_dict(settings)["optim.lr.init"]
print(json.dumps(as_dict(settings)))
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
    for part in ("What it is.", "optim: the optimizer", "--optim.lr.init", "rate", "default 0.5", "required", "a | b"):
        assert part in result.stdout


def test_the_recipes_are_found_from_wherever_a_command_is_called(tmp_path):
    arguments = ("--config-file=rn50_configs/demo.yaml", "--data.val_dataset=nowhere.beton")
    result = run("train_imagenet.py", *arguments, cwd=tmp_path)
    assert result.returncode == 1 and "nowhere.beton: no such file" in result.stderr


def test_all_commands_can_be_imported_in_one_process():
    import evaluate_imagenet
    import generate_label_maps
    import inspect_label_maps
    import reproduce_tables
    import train_imagenet
    import write_datasets

    assert train_imagenet.Settings().optim.lr.init == 0.5
    assert len({m.__name__ for m in (evaluate_imagenet, generate_label_maps, inspect_label_maps, reproduce_tables,
                                     train_imagenet, write_datasets)}) == 6  # fmt: skip
