"""Settings: YAML, command line, and the errors of both."""

from dataclasses import dataclass

import pytest

import train_imagenet
from relabel.official import OFFICIAL
from relabel.settings import Choice, Flag, Number, as_dict, group, load_settings, setting


@dataclass(frozen=True, kw_only=True)
class Lr:
    init: float = setting(Number(0), "rate", 0.5)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """the optimizer"""

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


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The settings that a command resolves from its arguments and, with `yaml`, from a config file c.yaml."""

    def load(*arguments, yaml=None, kind=Settings, dialect=None):
        if yaml is not None:
            (tmp_path / "c.yaml").write_text(yaml)
            arguments = ("--config-file", str(tmp_path / "c.yaml"), *arguments)
        monkeypatch.setattr("sys.argv", ["command.py", *arguments])
        return load_settings(kind, "What it is.", dialect)

    return load


def test_the_command_line_goes_over_yaml_goes_over_defaults(load):
    settings = load("--optim.lr.init", "2.e-3", yaml="optim: {epochs: 7, lr: {init: 1}}\ndata:\n  use: False\n")
    assert settings == Settings(optim=Optim(lr=Lr(init=0.002), epochs=7), data=Data(use=False, mode="a"))
    assert as_dict(settings) == {"optim.lr.init": 0.002, "optim.epochs": 7, "data.use": False, "data.mode": "a"}


def test_words_in_any_case_and_a_flag_alone(load):
    assert load("--data.use", "--data.mode=B", "--optim.epochs=1", yaml="data.use: f").data == Data(use=True, mode="b")


def test_a_file_goes_over_its_base_which_is_found_beside_it(tmp_path, load):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "middle.yaml").write_text("base: ../root.yaml\noptim: {epochs: 2}\ndata: {mode: b}")
    (tmp_path / "root.yaml").write_text("optim: {epochs: 1, lr: {init: 3}}\ndata: {use: False}")
    settings = load("--data.use=True", yaml="base: more/middle.yaml\noptim.epochs: 7")
    assert settings == Settings(optim=Optim(lr=Lr(init=3), epochs=7), data=Data(use=True, mode="b"))


def test_the_official_name_of_a_setting_goes_over_our_name_of_it_in_the_base(tmp_path, load):
    (tmp_path / "base.yaml").write_text("data: {num_workers: 3}\nvalidation: {batch_size: 4}")
    own = "base: base.yaml\ncompute: {num_workers: 5}"
    settings = load(yaml=own, kind=train_imagenet.Settings, dialect=OFFICIAL)
    assert settings.data.num_workers == 5 and settings.validation.batch_size == 4


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
        (["--optim.epochs=3", "--data.mode"], None, "--data.mode needs a value"),
        (["train"], None, "did not expect 'train'"),
        ([], "- a\n- b", "must hold sections"),
        ([], "a: [", "cannot read config file"),
        ([], "base: c.yaml", "c.yaml is its own base"),
        ([], "base: b.yaml", "b.yaml is its own base"),
        ([], "base: nowhere.yaml", "nowhere.yaml (the base of"),
        ([], "base: [c.yaml]", "base is ['c.yaml']; must be the path of a YAML file"),
        ([], "base:", "base is None; must be the path"),
        ([], "base: misspelt.yaml", "did you mean optim.epochs?"),
        (["--base=c.yaml"], None, "unknown setting base"),
    ],
)
def test_each_mistake_is_one_message_and_exit_code_2(tmp_path, load, capsys, arguments, yaml, says):
    (tmp_path / "b.yaml").write_text("base: b2.yaml")
    (tmp_path / "b2.yaml").write_text(f"base: ../{tmp_path.name}/b.yaml")
    (tmp_path / "misspelt.yaml").write_text("optim: {epoch: 1}")
    with pytest.raises(SystemExit) as stopped:
        load(*arguments, yaml=yaml)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("command.py: ") and message.count("command.py: ") == 1
    assert says in message


def test_help_lists_every_setting_with_default_and_meaning(load, capsys):
    with pytest.raises(SystemExit) as stopped:
        load("--help")
    assert not stopped.value.code
    shown = capsys.readouterr().out
    for part in ("What it is.", "optim: the optimizer", "--optim.lr.init", "rate", "default 0.5", "required", "a | b"):
        assert part in shown


def test_all_commands_can_be_imported_in_one_process():
    import evaluate_imagenet
    import generate_label_maps
    import inspect_label_maps
    import reproduce_tables
    import write_datasets

    assert train_imagenet.Settings().optim.lr.init == 0.5
    assert len({m.__name__ for m in (evaluate_imagenet, generate_label_maps, inspect_label_maps, reproduce_tables,
                                     train_imagenet, write_datasets)}) == 6  # fmt: skip
