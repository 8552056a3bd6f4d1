"""Runs that are killed or stopped, and runs whose checkpoint is truncated, resume as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Command, run, write_images, write_label_maps
from faults import training_rounds
from test_train import log_of, weights

from relabel.errors import BadInput
from relabel.stopping import STOPPED
from relabel.training.run_folder import RunFolder

EPOCHS, STEPS = 3, 12


def training_arguments(root):
    """A training of 36 steps with everything that has a state: dropout, momentum, average, CutMix, jitter, sizes."""
    files = write_images(root / "images", 96)
    write_label_maps(root / "maps", files)
    for split, more in (("train", [f"--cfg.label_map_dir={root}/maps", "--cfg.axis_order=yx"]), ("val", [])):
        packed = run(
            "write_datasets.py", f"--cfg.data_dir={root}/images", f"--cfg.write_path={root}/{split}.beton", *more
        )
        assert packed.returncode == 0, packed.stderr
    return [
        "train_imagenet.py", f"--config-file={ROOT}/rn50_configs/demo.yaml",
        "--model.arch=mobilenet_v3_small", f"--data.train_dataset={root}/train.beton",
        f"--data.val_dataset={root}/val.beton", "--data.image_size=32", "--optim.batch_size=8", "--data.num_workers=1",
        f"--optim.epochs={EPOCHS}", "--optim.ema_decay=0.9", "--data.cutmix.prob=0.5", "--data.cutmix.beta=1",
        "--data.cutmix.off_epoch=1", "--data.color_jitter=0.4", "--resolution.min_res=32",
        "--resolution.max_res=64", "--resolution.start_ramp=0", "--resolution.end_ramp=1",
        "--logging.checkpoint_minutes=0.0001", "--validation.every=1", "--resume=auto",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return training_arguments(tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*arguments, f"--logging.folder={folder}").returncode == 0
    return folder


def same_in_the_end(folder, whole):
    ours, theirs = weights(folder), weights(whole)
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][key], value) for key, value in theirs[part].items())
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    keys = ("epoch", "train_loss", "top_1", "loss", "lr")
    assert [[line[k] for k in keys] for line in log_of(folder)] == [[line[k] for k in keys] for line in log_of(whole)]


KERNELS = """
import sys
import numpy as np
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import label_map_tensor
from ffcv_fields import label_pooling
from relabel.training.augment import augment
rng = np.random.default_rng(0)
images = torch.from_numpy(rng.integers(0, 256, (8, 45, 45, 3), dtype=np.uint8))
maps = torch.stack([label_map_tensor(rng, 100).to(torch.float16) for _ in range(8)])
sparse = torch.from_numpy(np.stack([maps[:, 0].numpy().view(np.int16), maps[:, 1].numpy().astype(np.int16)], 1))
boxes = torch.from_numpy(np.sort(rng.random((8, 2, 2)), 1).reshape(8, 4).astype(np.float32))
sys.stdout.buffer.write(augment(images, rng, 0.4, 0.1, torch.float32).contiguous().numpy().tobytes())
sys.stdout.buffer.write(label_pooling(sparse, boxes, 100).numpy().tobytes())
"""


def test_kernels_that_were_just_compiled_and_kernels_from_the_cache_agree_bit_for_bit(tmp_path):
    # They did not, with fastmath: a run that had compiled them and its continuation, which loaded them, differed.
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, "-c", KERNELS.format(root=str(ROOT))]
    compiled = subprocess.run(script, capture_output=True, env=environment, timeout=300, check=True).stdout
    assert list(tmp_path.rglob("*.nbc"))
    loaded = subprocess.run(script, capture_output=True, env=environment, timeout=300, check=True).stdout
    assert len(compiled) == 4 * (8 * 3 * 45 * 45 + 8 * 100) and compiled == loaded


def wait_for_steps(folder, count, process):
    """Until a checkpoint is there and `count` lines of steps have been written, or the process has ended."""
    log, end = folder / "steps.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if (folder / "checkpoint.pt").exists() and log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "the run neither continued nor ended"


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(arguments, uninterrupted, tmp_path):
    assert training_rounds(arguments, uninterrupted, tmp_path / "killed", rounds=3, seed=0) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_exit_code(arguments, uninterrupted, tmp_path, number):
    folder = tmp_path / "stopped"
    command = [*arguments, f"--logging.folder={folder}", "--logging.checkpoint_minutes=0"]
    process = Command(*command)
    while not (folder / "log.jsonl").exists() and process.poll() is None:  # an event, however slow the machine
        time.sleep(0.01)
    process.send_signal(number)
    result = process.wait()
    assert result.returncode == STOPPED and "--resume=auto resumes" in result.stdout
    assert "Traceback" not in result.stderr
    assert run(*command).returncode == 0
    same_in_the_end(folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_libraries_are_imported_has_the_same_exit_code(tmp_path, number):
    command = [sys.executable, str(ROOT / "train_imagenet.py"), f"--logging.folder={tmp_path}/run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and "/libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == STOPPED and "stopped while starting, nothing to save" in out and not err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_leaves_nothing_half_written(tmp_path, number):
    """While it packs, or soon after: the same exit code, the `.beton` complete or absent; again, and it trains."""
    write_images(tmp_path / "train", 96)
    write_images(tmp_path / "val", 16)
    arguments = ["train_imagenet.py", f"--config-file={ROOT}/rn50_configs/demo.yaml", "--model.arch=mobilenet_v3_small",
                 f"--data.data_path={tmp_path}", "--data.relabel.use=False", "--data.image_size=32",
                 "--optim.batch_size=48", "--optim.epochs=1", f"--logging.folder={tmp_path}/run"]  # fmt: skip
    process = Command(*arguments)
    while process.poll() is None and not (tmp_path / "train.beton.part").exists():
        time.sleep(0.001)
    process.send_signal(number)
    result = process.wait()
    assert result.returncode == STOPPED and "Traceback" not in result.stderr
    assert "stopped while starting, nothing to save; the same command starts again" in result.stdout
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "run").exists()
    again = run(*arguments)
    assert again.returncode == 0, again.stderr


def test_data_that_were_packed_again_are_seen_at_the_start(tmp_path):
    """Within an epoch another number or order of samples is refused; at its start it is said."""
    arguments = [*training_arguments(tmp_path), f"--logging.folder={tmp_path}/run", "--optim.epochs=1"]
    process = Command(*arguments)
    wait_for_steps(tmp_path / "run", 2, process)
    process.kill()
    process.wait()
    state = weights(tmp_path / "run")
    assert 0 < state["step"] < STEPS and state["data"]["samples"] == 96
    packing = ["write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.write_path={tmp_path}/train.beton",
               f"--cfg.label_map_dir={tmp_path}/maps", "--cfg.axis_order=yx", "--cfg.overwrite=yes"]  # fmt: skip
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for count, steps, more in (
        (95, 11, ()),
        (96, 12, ("--cfg.seed=1",)),
        (98, 12, ()),
    ):  # fewer, in another order, more
        if count > 96:
            write_label_maps(tmp_path / "maps", write_images(tmp_path / "images", count))
        assert run(*packing, f"--cfg.subset={count}", *more).returncode == 0
        refused = run(*arguments)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert f"is at step {state['step']} of 12 of an epoch of 96 samples" in refused.stderr
        assert f"train.beton is packed otherwise now, {count} samples, {steps} steps" in refused.stderr
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    for number in (96, 97):
        (tmp_path / "images" / f"class{number % 8}" / f"img{number:03d}.jpg").unlink()
    (tmp_path / "maps").rename(tmp_path / "all_maps")
    write_label_maps(tmp_path / "maps", write_images(tmp_path / "images", 96))
    assert run(*packing, "--cfg.jpeg=encode", "--cfg.jpeg_quality=80").returncode == 0
    resumed = run(*arguments)
    assert resumed.returncode == 0 and "not the file of the checkpoint; 96 samples then, 96 now" in resumed.stdout
    write_label_maps(tmp_path / "maps", write_images(tmp_path / "images", 98))
    assert run(*packing).returncode == 0
    resumed = run(*arguments, "--optim.epochs=2")
    assert resumed.returncode == 0 and "not the file of the checkpoint; 96 samples then, 98 now" in resumed.stdout


def test_a_run_on_a_single_file_resumes_on_its_shards_with_the_same_weights(arguments, uninterrupted, tmp_path):
    (beton,) = (Path(a.partition("=")[2]) for a in arguments if a.startswith("--data.train_dataset="))
    for number in (1, 2, 3):
        packed = run(
            "write_datasets.py", f"--cfg.data_dir={beton.parent}/images", f"--cfg.label_map_dir={beton.parent}/maps",
            f"--cfg.write_path={tmp_path}/train.beton", "--cfg.axis_order=yx", f"--cfg.shard={number}/3",
        )  # fmt: skip
        assert packed.returncode == 0, packed.stderr
    command = [*arguments, f"--logging.folder={tmp_path}/run"]
    process = Command(*command)
    wait_for_steps(tmp_path / "run", STEPS + 3, process)
    process.kill()
    process.wait()
    assert weights(tmp_path / "run")["epoch"] < EPOCHS
    shards = f"--data.train_dataset={tmp_path}/train-*-of-3.beton"
    (tmp_path / "train-2-of-3.beton").rename(tmp_path / "elsewhere")
    refused = run(*command, shards)
    assert refused.returncode == 1 and "of 3 shards, one is missing: 2" in refused.stderr
    (tmp_path / "elsewhere").rename(tmp_path / "train-2-of-3.beton")
    resumed = run(*command, shards, "--data.verify=True")
    assert resumed.returncode == 0, resumed.stderr
    same_in_the_end(tmp_path / "run", uninterrupted)


def test_a_truncated_checkpoint_is_seen_and_the_one_before_used(arguments, uninterrupted, tmp_path):
    folder = tmp_path / "truncated"
    assert run(*arguments, f"--logging.folder={folder}", "--optim.epochs=2").returncode == 0
    file = folder / "checkpoint.pt"
    os.truncate(file, file.stat().st_size // 2)
    result = run(*arguments, f"--logging.folder={folder}")
    assert result.returncode == 0 and f"{file}: damaged, not used" in result.stderr
    assert weights(folder)["epoch"] == EPOCHS  # its schedule was of 2 epochs at first: the weights are others
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        os.truncate(folder / name, 100)
    with pytest.raises(BadInput, match="no complete checkpoint"):
        RunFolder(str(folder), {}).load(torch.device("cpu"), resume=True, start_epoch=0)
