"""Everything at a small scale: scenes -> label maps -> .beton -> training -> evaluation, by the commands themselves."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, names_of, run
from safetensors import safe_open
from safetensors.torch import load_file

from relabel.models import build_model
from relabel.training.run_folder import RunFolder
from scenes import compose
from scenes.annotator import annotate
from scenes.strong_annotator import strong_annotator

OFFICIAL_BASE = """
model: {arch: 'resnet50'}
data: {dataset: 'imagenet', data_path: '/home/data/ILSVRC2015/', image_size: 224, rrc_minimum: 0.08, crop_ratio: 0.875}
optim:
  {optimizer: 'sgd', epochs: 100, start_epoch: 0, bn: {momentum: 0.9, eps: 1.e-5}, batch_size: 512,
   lr: {init: 0.5, decay_type: 'cos'}, warmup: {lr: 0.0, epochs: 5}, nesterov: True, momentum: 0.9,
   wd: {base: 1.e-5}, label_smoothing: 0.0}
compute:
  {seed: -1, gpu: -1, opt_level: 'O1', num_workers: 32,
   distributed: {use: True, num_processes_per_node: 1, url: 'tcp://127.0.0.1:6946', backend: 'nccl'}}
util: {print_freq: 250, val_batch_size: 512}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with scenes, label maps of the strong annotator, and the two .beton."""
    root = tmp_path_factory.mktemp("scenes")
    compose.write_scenes(root, "train", 128, 0)
    compose.write_scenes(root, "val", 64, 0)
    annotate(strong_annotator(), root / "train", root / "label_maps")
    result = run(
        "write_datasets.py", f"--cfg.data_dir={root}/train", f"--cfg.label_map_dir={root}/label_maps",
        f"--cfg.write_path={root}/train.beton",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert run("write_datasets.py", f"--cfg.data_dir={root}/val", f"--cfg.write_path={root}/val.beton").returncode == 0
    return root


def arguments_of(small, folder):
    return [
        "--config-file", str(ROOT / "rn50_configs/demo.yaml"), "--model.arch=shufflenet_v2_x0_5",
        f"--data.train_dataset={small}/train.beton", f"--data.val_dataset={small}/val.beton", "--optim.epochs=2",
        "--data.image_size=32", "--optim.batch_size=32", f"--logging.folder={folder}", "--data.num_workers=2",
    ]  # fmt: skip


def train(small, folder, *more):
    return run("train_imagenet.py", *arguments_of(small, folder), *more)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_folder_and_its_checkpoint_evaluates_to_the_same(small, tmp_path):
    multi = f"--validation.multilabel_file={small}/val_multilabels.json"
    result = train(small, tmp_path / "run", multi, "--data.cutmix.prob=1", "--data.cutmix.beta=1",
                   "--data.cutmix.off_epoch=1", "--resolution.min_res=32", "--resolution.max_res=64",
                   "--resolution.start_ramp=0", "--resolution.end_ramp=1", "--data.color_jitter=0.4",
                   "--validation.every=1",
                   "--data.lighting=0.1")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml", "log.jsonl", "steps.jsonl", "curves.png", "checkpoint.pt", "checkpoint_before.pt",
        "weights.safetensors", "weights.pth",
    }  # fmt: skip
    log = log_of(tmp_path / "run")
    assert [line["epoch"] for line in log] == [0, 1] and [line["image_size"] for line in log] == [32, 64]
    assert all(np.isfinite(line["train_loss"]) and 0 <= line["data_wait"] <= 1 for line in log)
    assert all(line["multilabel"] >= line["top_1"] for line in log)  # the single label is among the right classes
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["optim.epochs"] == 2 and settings["model.arch"] == "shufflenet_v2_x0_5"
    test = train(small, tmp_path / "unused", multi, "--util.test_only=True",
                 f"--util.test_weight_file={tmp_path / 'run' / 'checkpoint.pt'}")  # fmt: skip
    assert test.returncode == 0 and f"top_1 {log[-1]['top_1']:.4g}%" in test.stdout
    assert f"multilabel {log[-1]['multilabel']:.4g}%" in test.stdout and not (tmp_path / "unused").exists()
    assert_hands_on(tmp_path / "run", weights(tmp_path / "run")["model"], "shufflenet_v2_x0_5", ["fc"])
    assert re.search(r"run: checkpoints of [\d.]+ MB; at most [\d.]+ MB more .* free$", result.stdout, re.M)


def assert_hands_on(folder, validated, arch, head):
    """The weights that a finished run leaves for other programs, with their card."""
    for state in (load_file(folder / "weights.safetensors"), torch.load(folder / "weights.pth", weights_only=True)):
        assert state.keys() == validated.keys() and all(torch.equal(state[k], v) for k, v in validated.items())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        card = file.metadata()
    assert card["arch"] == arch and card["num_classes"] == "8" and json.loads(card["head"]) == head
    assert json.loads(card["measured"]) == log_of(folder)[-1]
    assert json.loads(card["settings"]) == yaml.safe_load((folder / "config.yaml").read_text())


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def test_a_run_is_reproducible_and_resumes_where_it_stopped(small, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        assert train(small, tmp_path / name, f"--data.num_workers={workers}").returncode == 0
    first, second = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert [line["train_loss"] for line in first] == [line["train_loss"] for line in second]
    again = train(small, tmp_path / "a")
    assert again.returncode == 1 and "--resume=auto resumes" in again.stderr  # nothing is overwritten
    short = ("--optim.epochs=1", "--optim.lr.decay_type=default", "--optim.warmup.epochs=0")
    assert train(small, tmp_path / "c", *short).returncode == 0
    result = train(small, tmp_path / "c", "--optim.start_epoch=1")
    assert result.returncode == 0 and [line["epoch"] for line in log_of(tmp_path / "c")] == [0, 1]
    wrong = train(small, tmp_path / "c", "--optim.start_epoch=1")
    assert wrong.returncode == 1 and "is at epoch 2, step 0" in wrong.stderr
    other = train(small, tmp_path / "c", "--resume=auto", "--optim.batch_size=16")
    assert other.returncode == 1 and "is a run with optim.batch_size=32; now it is 16" in other.stderr


def test_accumulated_steps_and_averaged_weights(small, tmp_path):
    """Without batch norm, a batch in two micro-batches trains as one; the average is what is validated."""
    common = ("--model.arch=timm/test_vit", "--optim.ema_decay=0.5", "--data.image_size=160")
    for name, more in (("whole", ()), ("parts", ("--optim.accumulate=2",))):
        result = train(small, tmp_path / name, *common, *more)
        assert result.returncode == 0, result.stderr
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][key], value, atol=2e-5, rtol=1e-4)
    losses = [[line["train_loss"] for line in log_of(tmp_path / name)] for name in ("whole", "parts")]
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert any(not torch.equal(whole["ema"][key], value) for key, value in whole["model"].items())
    assert_hands_on(tmp_path / "whole", whole["ema"], "timm/test_vit", ["head"])
    test = train(small, tmp_path / "unused", *common, "--util.test_only=True",
                 f"--util.test_weight_file={tmp_path / 'whole' / 'checkpoint.pt'}")  # fmt: skip
    assert f"loss {log_of(tmp_path / 'whole')[-1]['loss']:.4g}" in test.stdout
    assert f"{tmp_path / 'whole' / 'checkpoint.pt'}: its ema" in test.stdout


def test_a_run_resumes_with_another_precision(small, tmp_path):
    assert train(small, tmp_path / "run", "--optim.epochs=1").returncode == 0
    result = train(small, tmp_path / "run", "--resume=auto", "--compute.precision=fp16")
    assert result.returncode == 0, result.stderr
    assert "resumed with another precision: float16's loss scaler starts anew" in result.stdout
    assert weights(tmp_path / "run")["scaler"]["scale"] > 0
    result = train(small, tmp_path / "run", "--resume=auto", "--compute.precision=bf16", "--optim.epochs=3")
    assert result.returncode == 0 and weights(tmp_path / "run")["scaler"] == {}


def test_a_disk_that_is_full_keeps_the_checkpoint_before(small, tmp_path):
    """A limit on the size of files stands for the disk: the system's error comes at the same place."""
    folder = tmp_path / "run"
    assert train(small, folder, "--optim.epochs=1").returncode == 0
    before = (folder / "checkpoint.pt").read_bytes()
    arguments = [*arguments_of(small, folder), "--resume=auto"]
    full = subprocess.run(
        [sys.executable, str(ROOT / "train_imagenet.py"), *arguments], capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2),
    )  # fmt: skip
    assert full.returncode == 1 and "Traceback" not in full.stderr
    says = rf"{folder}: no room for checkpoint.pt, which takes [\d.]+ MB; .* free .*--resume=auto resumes$"
    assert re.search(says, full.stderr, re.M)
    assert not list(folder.glob("*.part")) and (folder / "checkpoint.pt").read_bytes() == before
    result = run("train_imagenet.py", *arguments)
    assert result.returncode == 0 and weights(folder)["epoch"] == 2


def test_too_little_room_is_said(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), {})
    enough = "at most 3.2 MB more with the weights at the end, 1 GB free"
    for free, says in ((10**9, enough), (10**6, "NOT ENOUGH ROOM")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        line, enough_room = folder.room(1_000_000, 100_000)
        assert line.endswith(says) and enough_room == (free == 10**9)
    (tmp_path / "checkpoint.pt").write_bytes(bytes(1_000_000))
    assert "at most 2.2 MB more" in folder.room(1_000_000, 100_000)[0]


def test_labels_are_cleaned_and_a_head_of_another_size_is_reinitialized(small, tmp_path):
    torch.manual_seed(0)
    pretrained = tmp_path / "21k.pth"
    torch.save({"state_dict": build_model("shufflenet_v2_x0_5", 21).state_dict()}, pretrained)
    files = names_of(f"{small}/train.beton")
    (tmp_path / "clean.tsv").write_text("".join(f"{name}\t-\n" for name in files[:40]) + f"{Path(files[50]).name}\t7\n")
    result = train(small, tmp_path / "run", f"--model.weights={pretrained}", "--optim.epochs=1",
                   f"--data.clean_labels={tmp_path}/clean.tsv")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "fc is re-initialized, for other classes" in result.stdout
    assert "1 labels replaced, 40 of 128 samples left out" in result.stdout
    assert "of 1 epochs of 2 steps" in result.stdout  # 88 samples are left for batches of 32
    (tmp_path / "clean.tsv").write_text("nowhere.jpg\t3\n")
    result = train(small, tmp_path / "other", f"--data.clean_labels={tmp_path}/clean.tsv")
    assert result.returncode == 1 and "line 1: 'nowhere.jpg' is no sample of" in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(small, tmp_path):
    result = train(small, tmp_path / "run", "--optim.lr.init=1e30", "--optim.warmup.epochs=0", "--util.print_freq=1")
    assert result.returncode == 1 and "at epoch 0, step 1" in result.stderr and "Traceback" not in result.stderr
    named = json.loads((tmp_path / "run" / "not_finite_0.json").read_text())
    assert len(named["samples"]) == 32 and str(named["samples"][0]) in result.stderr
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_official_project_s_settings_mean_the_same(small, tmp_path):
    """Its base.yaml (values as published), its recipe's form, and its way to write a command line."""
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text(OFFICIAL_BASE)
    recipe.write_text("data:\n  relabel:\n    use: True\n    path: '/nowhere'\nutil:\n  test_weight_file: ''\n")
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(f"{small}/{split}")
    result = run(
        "train_imagenet.py", "--config-file-path", str(base), "--config-file-path", str(recipe),
        "--data.data_path", str(tmp_path), "--data.relabel.path", f"{small}/label_maps", "--optim.epochs", "1",
        "--model.arch", "shufflenet_v2_x0_5", "--data.image_size", "32", "--optim.batch_size", "32",
        "--logging.folder", str(tmp_path / "run"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["validation.batch_size"] == 512 and settings["data.num_workers"] == 32
    assert (
        settings["compute.precision"] == "auto" and settings["compute.seed"] >= 0 and settings["optim.lr.init"] == 0.5
    )
    assert (tmp_path / "train_relabel.beton").exists() and (tmp_path / "val.beton").exists()
    refused = run("train_imagenet.py", "--config-file", str(base), "--data.dataset=cifar")
    assert refused.returncode == 2 and "must be imagenet" in refused.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data.train_dataset=nowhere.beton"], "nowhere.beton: no such file"),
        (["--model.arch=resnet5"], "did you mean"),
        (["--data.train_dataset="], "data.train_dataset is not given"),
        (["--optim.batch_size=33", "--optim.accumulate=2"], "not divisible by 1 processes x optim.accumulate=2; 32 is"),
        (
            ["--optim.batch_size=500"],
            "128 samples are fewer than optim.batch_size=500, of which only whole batches are trained on; 128 is",
        ),
        (["--model.num_classes=5"], "model.num_classes is 5"),
        (["--model.arch=vit_b_16"], "vit_b_16 does not take a batch of 1 x 3 x 32 x 32 in validation"),
        (["--optim.batch_size=1"], "does not take a batch of 1 x 3 x 32 x 32 in training: Expected more than 1 value"),
        (["--optim.batch_size=2", "--optim.accumulate=2"], "does not take a batch of 1 x 3 x 32 x 32 in training"),
    ],
)
def test_bad_input_is_one_message(small, tmp_path, arguments, says):
    result = train(small, tmp_path / "run", *arguments)
    assert result.returncode == 1 and says in result.stderr and "Traceback" not in result.stderr


def test_a_file_without_label_maps_says_how_to_get_them(small, tmp_path):
    result = train(small, tmp_path / "run", f"--data.train_dataset={small}/val.beton")
    assert (
        result.returncode == 1
        and "--cfg.label_map_dir" in result.stderr
        and "--data.relabel.use=False" in result.stderr
    )
    assert (
        train(small, tmp_path / "run", f"--data.train_dataset={small}/val.beton", "--data.relabel.use=False").returncode
        == 0
    )
