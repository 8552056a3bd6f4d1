"""Recipes: each is understood, says what it reproduces, and resolves, with its base, to its row's settings."""

import re

import pytest
import yaml
from conftest import ROOT, run

import reproduce_tables
import train_imagenet
from relabel.settings import as_dict, load_settings

FILES = sorted((ROOT / "rn50_configs").glob("*.yaml"))
BASES = [file for file in FILES if file.stem.startswith("base_")]
RECIPES = [file for file in FILES if file not in BASES]
FAST = [file for file in RECIPES if re.fullmatch(r"rn50_\d+_epochs(_\w+)?", file.stem)]
PAPER = [file for file in RECIPES if file not in FAST and file.stem != "demo"]
by_name = pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)


@pytest.fixture
def resolve(monkeypatch):
    def resolve(file):
        monkeypatch.setattr("sys.argv", ["train_imagenet.py", "--config-file", str(file)])
        return as_dict(load_settings(train_imagenet.Settings, ""))

    return resolve


def own_settings(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from own_settings(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" != "base":
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_every_file_is_understood_and_its_own_settings_are_in_force(file, resolve):
    settings, own = resolve(file), dict(own_settings(yaml.safe_load(file.read_text())))
    assert own and {name: settings[name] for name in own} == own


@by_name
def test_every_recipe_says_what_it_reproduces_and_its_command(file):
    head = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert "easured" in head and "Command" in head
    assert f"{file.name}" in head or file.stem == "demo"


def test_every_base_is_some_file_s_base_and_says_so():
    named = {yaml.safe_load(file.read_text()).get("base") for file in FILES}
    assert named - {None} - {file.name for file in FAST} == {file.name for file in BASES}
    assert all("not run" in file.read_text() and "share" in file.read_text() for file in BASES)


@pytest.mark.parametrize("file", PAPER, ids=lambda p: p.stem)
def test_a_row_of_the_paper_is_trained_as_the_paper_says(file, resolve):
    """The values of the official code's two recipes, by what the row's name says."""
    settings, cutmix = resolve(file), "cutmix" in file.stem
    sizes = {"efficientnet_b1": 240, "efficientnet_b2": 260, "efficientnet_b3": 300}
    expected = {
        "data.relabel.use": file.stem.startswith("relabel"),
        "data.image_size": next((size for name, size in sizes.items() if name in file.stem), 224),
        "data.rrc_minimum": 0.08, "data.crop_ratio": 0.875, "data.color_jitter": 0.4, "data.lighting": 0.1,
        "data.cutmix.prob": 1.0 if cutmix else 0.0, "data.cutmix.off_epoch": 5,
        "optim.optimizer": "adamp" if cutmix else "sgd", "optim.lr.init": 2e-3 if cutmix else 0.1,
        "optim.wd.base": 1e-2 if cutmix else 1e-4, "optim.epochs": 300, "optim.batch_size": 1024,
        "optim.lr.decay_type": "cos", "optim.warmup.lr": 0, "optim.warmup.epochs": 5, "optim.nesterov": True,
        "optim.momentum": 0.9, "optim.bn.decay": True, "model.use_blurpool": False, "resolution.min_res": 0,
        "optim.label_smoothing": 0.1 if file.stem.startswith("label_smoothing") else 0.0,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    arch = settings["model.arch"].removeprefix("timm/").replace("resnet", "rn").replace("_100", "_x1")
    assert file.stem.endswith(f"_{arch}")
    assert file.stem in reproduce_tables.ALL_CONFIGS


@pytest.mark.parametrize("file", FAST, ids=lambda p: p.stem)
def test_a_fast_recipe_is_ffcv_imagenet_s_with_relabel(file, resolve):
    settings = resolve(file)
    epochs = int(file.stem.split("_")[1])
    assert settings["optim.epochs"] == epochs and settings["data.relabel.use"] and settings["model.use_blurpool"]
    ramp = settings["resolution.start_ramp"], settings["resolution.end_ramp"]
    assert 0.6 < ramp[0] / epochs < ramp[1] / epochs < 0.9
    assert (settings["resolution.min_res"], settings["resolution.max_res"]) == (160, 192)
    assert (settings["optim.batch_size"], settings["optim.lr.init"]) == (4096, 1.7)
    assert (settings["validation.resolution"], settings["validation.lr_tta"]) == (256, True)
    variant = file.stem.partition("_epochs")[2]
    changes = {"data.cutmix.prob": 1.0, "data.cutmix.beta": 1.0, "optim.loss": "bce", "optim.ema_decay": 0.998}
    of_variant = {"_cutmix": "data.cutmix.", "_bce": "optim.loss", "_ema": "optim.ema_decay"}.get(variant, "none")
    defaults = {"data.cutmix.prob": 0.0, "data.cutmix.beta": 0.0, "optim.loss": "ce", "optim.ema_decay": 0.0}
    expected = {name: changes[name] if name.startswith(of_variant) else value for name, value in defaults.items()}
    assert {name: settings[name] for name in expected} == expected and variant in ("", "_cutmix", "_bce", "_ema")
    assert file.stem in reproduce_tables.ALL_CONFIGS


def test_the_recipes_and_their_bases_are_found_from_wherever_a_command_is_called(tmp_path):
    nowhere = ("--data.train_dataset=nowhere.beton", "--data.val_dataset=nowhere.beton")
    arguments = ("--config-file=rn50_configs/relabel_cutmix_rn50.yaml", *nowhere)
    result = run("train_imagenet.py", *arguments, "--model.arch=shufflenet_v2_x0_5", cwd=tmp_path)
    assert result.returncode == 1 and "nowhere.beton: no such file" in result.stderr
