"""The official project's files and command lines, with the values that it publishes, mean here what they mean there.

naver-ai/relabel_imagenet: its parser merges `configs/base.yaml` under the one file that it is given, casts what the
command line says to the type that stands there, and takes t, true, 1, y, yes for true.
"""

import pytest
import yaml
from conftest import ROOT, run
from test_train import OFFICIAL_BASE, small  # noqa: F401  (a fixture)

import train_imagenet
from relabel.official import OFFICIAL
from relabel.settings import as_dict, load_settings

RELABEL = """
model:
  arch: 'resnet50'
data:
  cutmix: {prob: 0.0, beta: 0.0, off_epoch: 5}
  relabel: {use: True, path: '/home/data/relabel_imagenet/'}
optim:
  optimizer: 'sgd'
  epochs: 300
  start_epoch: 0
  batch_size: 1024
  lr: {init: 0.1, decay_type: 'cos'}
  warmup: {lr: 0.0, epochs: 5}
  nesterov: True
  momentum: 0.9
  wd: {base: 1.e-4}
  label_smoothing: 0.0
util:
  test_only: False
  test_weight_file: ''
"""
RELABEL_CUTMIX = (
    RELABEL.replace("prob: 0.0, beta: 0.0", "prob: 1.0, beta: 1.0")
    .replace("'sgd'", "'adamp'")
    .replace("init: 0.1", "init: 2.e-3")
    .replace("base: 1.e-4", "base: 1.e-2")
)
OURS = sorted((ROOT / "rn50_configs").glob("*.yaml"))


def flat(tree, prefix=""):
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(recipe, *arguments)`: all settings, by name, of the official command with this file."""

    def load(recipe, *arguments, option="--config-file-path"):
        file = tmp_path / "relabel_train_resnet50.yaml"
        file.write_text(recipe)
        monkeypatch.setattr("sys.argv", ["train_imagenet.py", option, str(file), *arguments])
        return as_dict(load_settings(train_imagenet.Settings, "", OFFICIAL))

    return load


def test_the_base_is_the_published_one():
    pairing = {"data.relabel.pairing": "official"}  # no setting there: what the code does
    assert dict(flat(yaml.safe_load(OFFICIAL_BASE))) | pairing == OFFICIAL.base


@pytest.mark.parametrize("recipe, cutmix", [(RELABEL, False), (RELABEL_CUTMIX, True)])
def test_the_official_command_alone_means_what_it_means_there(load, capsys, recipe, cutmix):
    settings = load(recipe, "--data.relabel.path", "path/to/relabel")
    expected = dict(flat(yaml.safe_load(OFFICIAL_BASE))) | dict(flat(yaml.safe_load(recipe)))
    expected |= {"data.relabel.path": "path/to/relabel", "data.relabel.pairing": "official"}
    del expected["data.dataset"], expected["compute.distributed.num_processes_per_node"]
    expected["compute.precision"] = "auto" if expected.pop("compute.opt_level") == "O1" else None
    expected["data.num_workers"] = expected.pop("compute.num_workers")
    expected["validation.batch_size"] = expected.pop("util.val_batch_size")
    assert {name: settings[name] for name in expected} == expected
    assert settings["compute.distributed.use"] and settings["compute.seed"] == -1 and settings["util.print_freq"] == 250
    own = {"model.num_classes": 1000, "data.color_jitter": 0.4, "data.lighting": 0.1, "optim.bn.decay": True}
    assert {name: settings[name] for name in own} == own  # what the official code has no setting for
    (line,) = capsys.readouterr().out.splitlines()
    assert "of the official project; from its base.yaml come data.data_path=/home/data/ILSVRC2015/" in line
    assert "util.print_freq=250" in line and "optim.epochs" not in line
    assert settings["optim.optimizer"] == ("adamp" if cutmix else "sgd")


def test_the_official_test_of_a_pretrained_model(load):
    settings = load(RELABEL, "--util.test_only", "True", "--util.test_weight_file", "path/to/checkpoint")
    assert settings["util.test_only"] is True and settings["util.test_weight_file"] == "path/to/checkpoint"


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--util.test_only"], "util.test_only", True),
        (["--util.test_only", "--optim.epochs", "3"], "util.test_only", True),
        (["--util.test_only", "t"], "util.test_only", True),
        (["--data.relabel.use", "n"], "data.relabel.use", False),
        (["--compute.distributed.use", "F"], "compute.distributed.use", False),
        (["--optim.nesterov=Y"], "optim.nesterov", True),
        (["--optim.optimizer", "SGD"], "optim.optimizer", "sgd"),
        (["--optim.optimizer", "AdamP"], "optim.optimizer", "adamp"),
        (["--data.dataset", "ImageNet"], "data.data_path", "/home/data/ILSVRC2015/"),
        (["--compute.opt_level", "O0"], "compute.precision", "fp32"),
        (["--compute.opt_level", "O3"], "compute.precision", "auto"),
        (["--compute.seed", "-1"], "compute.seed", -1),
        (["--data.train_dataset=train.beton"], "data.data_path", ""),  # nothing is to be packed from base.yaml's folder
        (["--data.val_dataset=val.beton", "--data.data_path=/mine"], "data.data_path", "/mine"),
    ],
)
def test_spellings_that_the_official_parser_takes(load, arguments, name, value):
    assert load(RELABEL, *arguments)[name] == value


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--compute.distributed.num_processes_per_node", "2"], "is '2'; must be 1: the official code multiplies"),
        (["--data.dataset", "cifar"], "is 'cifar'; must be imagenet"),
        (["--compute.opt_level", "O4"], "must be O0 or O1 or O2 or O3"),
        (["--util.test_weight_file"], "--util.test_weight_file needs a value"),
        (["--util.test_only", "maybe"], "must be True or False"),
    ],
)
def test_values_that_it_has_no_meaning_for_are_refused(load, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        load(RELABEL, *arguments)
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_both_spellings_of_the_option(load):
    assert load(RELABEL, option="--config_file_path")["util.print_freq"] == 250


def test_the_same_file_given_as_this_project_s_own_has_this_project_s_defaults(load, capsys):
    settings = load(RELABEL, option="--config-file")
    assert not settings["compute.distributed.use"] and settings["compute.seed"] == 0
    assert settings["data.data_path"] == "" and not capsys.readouterr().out


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.stem)
def test_a_file_of_this_project_is_never_taken_for_an_official_one(monkeypatch, capsys, file):
    resolved = []
    for option in ("--config-file", "--config-file-path"):
        monkeypatch.setattr("sys.argv", ["train_imagenet.py", option, str(file)])
        resolved.append(as_dict(load_settings(train_imagenet.Settings, "", OFFICIAL)))
    assert resolved[0] == resolved[1]
    assert f"{file}: read as this project's own, not the official one's, which has no " in capsys.readouterr().out


class Becomes(Exception):
    """In place of `execv`, which does not return."""


def test_data_are_packed_before_the_processes_start(small, load, tmp_path, monkeypatch):  # noqa: F811
    """On a machine with two GPUs, as far as it can be told: the one process packs, then becomes torchrun."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    there = []

    def execv(_, words):
        there.extend((tmp_path / name).exists() for name in ("train_relabel.beton", "val.beton"))
        raise Becomes(*words)

    monkeypatch.setattr("os.execv", execv)
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(f"{small}/{split}")
    load(RELABEL, "--data.data_path", str(tmp_path), "--data.relabel.path", f"{small}/label_maps")
    settings = load_settings(train_imagenet.Settings, "", OFFICIAL)
    with pytest.raises(Becomes) as became:
        train_imagenet.main(settings)
    words = became.value.args
    assert there == [True, True] and "torch.distributed.run" in words and "--nproc-per-node" in words
    assert words[words.index("--master-port") + 1] == "6946" and words[words.index("--nproc-per-node") + 1] == "2"


def test_a_data_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RELABEL)
    result = run("train_imagenet.py", "--config-file-path", f"{tmp_path}/recipe.yaml", "--data.data_path", "/nowhere/")
    assert result.returncode == 1 and "data.data_path is /nowhere/: there is no /nowhere/train to pack" in result.stderr
