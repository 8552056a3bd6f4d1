"""The main job, small: scenes -> label maps -> .beton -> training -> evaluation, by the commands themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run

import train_imagenet
from relabel import scenes
from relabel.label_map_files import read_tensor

CONFIGS = sorted((ROOT / "rn50_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with scenes, label maps of an untrained annotator, and the two .beton."""
    root = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(root, "train", 128, 0)
    scenes.write_scenes(root, "val", 64, 0)
    torch.manual_seed(0)
    scenes.annotate(scenes.Annotator().eval(), root / "train", root / "label_maps")
    result = run(
        "write_datasets.py", f"--cfg.data_dir={root}/train", f"--cfg.label_map_dir={root}/label_maps",
        "--cfg.axis_order=yx", f"--cfg.write_path={root}/train.beton",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert run("write_datasets.py", f"--cfg.data_dir={root}/val", f"--cfg.write_path={root}/val.beton").returncode == 0
    return root


def train(small, folder, *more):
    return run(
        "train_imagenet.py", "--config-file", str(ROOT / "rn50_configs/demo.yaml"), "--model.arch=shufflenet_v2_x0_5",
        f"--data.train_dataset={small}/train.beton", f"--data.val_dataset={small}/val.beton", "--optim.epochs=2",
        "--data.image_size=32", "--optim.batch_size=32", f"--logging.folder={folder}", "--data.num_workers=2", *more,
    )  # fmt: skip


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
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml", "log.jsonl", "curves.png", "checkpoint.pt"}
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


def test_a_run_is_reproducible_and_restarts_where_it_stopped(small, tmp_path):
    for name in ("a", "b"):
        assert train(small, tmp_path / name, "--data.num_workers=1").returncode == 0
    first, second = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert [line["train_loss"] for line in first] == [line["train_loss"] for line in second]
    assert (
        train(
            small, tmp_path / "c", "--optim.epochs=1", "--optim.lr.decay_type=step", "--optim.warmup.epochs=0"
        ).returncode
        == 0
    )
    result = train(small, tmp_path / "c", "--optim.start_epoch=1")
    assert result.returncode == 0 and [line["epoch"] for line in log_of(tmp_path / "c")] == [0, 1]
    wrong = train(small, tmp_path / "c", "--optim.start_epoch=1")
    assert wrong.returncode == 1 and "has 2 epochs done" in wrong.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data.train_dataset=nowhere.beton"], "nowhere.beton: no such file"),
        (["--model.arch=resnet5"], "did you mean"),
        (["--optim.batch_size=500"], "fewer samples than optim.batch_size=500"),
        (["--model.num_classes=5"], "model.num_classes is 5"),
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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_understood_and_says_what_it_reproduces(config, monkeypatch):
    from fastargs import get_current_config

    from relabel.settings import load_settings

    monkeypatch.setattr("sys.argv", ["train_imagenet.py", "--config-file", str(config), "--data.val_dataset=v"])
    known = get_current_config()  # of every command imported so far
    monkeypatch.setattr(known, "content", {})
    monkeypatch.setattr(known, "entries", {path: entry for path, entry in known.entries.items() if path[0] != "cfg"})
    sections = {name: paths for name, paths in known.sections_to_entries.items() if name[0] != "cfg"}
    monkeypatch.setattr(known, "sections_to_entries", sections)
    settings = train_imagenet.resolved(load_settings(""))
    given = yaml.safe_load(config.read_text())
    assert settings["optim.epochs"] == given["optim"]["epochs"]
    head = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any("Command" in line or "python" in line for line in head)
    assert any("easured" in line for line in head)


def test_scenes_are_what_their_json_says(small):
    layout = json.loads((small / "train.json").read_text())
    files = sorted(str(p.relative_to(small / "train")) for p in (small / "train").rglob("*.jpg"))
    assert layout["files"] == files and len(files) == 128
    for file, objects, present in zip(files, layout["objects"], layout["multilabels"], strict=True):
        assert scenes.CLASSES[objects[0][0]] == file.split("/")[0]
        assert present == sorted({c for c, *_ in objects})
    assert np.mean([len(p) for p in layout["multilabels"]]) > 1.5


def test_the_annotator_s_dense_logits_average_to_its_logits(small):
    torch.manual_seed(1)
    annotator, images = scenes.Annotator().eval(), torch.randn(2, 3, 120, 120)
    with torch.inference_mode():
        assert annotator.dense(images).shape == (2, 8, 15, 15)
        assert torch.allclose(annotator.dense(images).mean((2, 3)), annotator(images), atol=1e-5)
    file = next((small / "label_maps").rglob("*.pt"))
    assert read_tensor(file).shape == (2, 5, 15, 15) and read_tensor(file).dtype == torch.float32
