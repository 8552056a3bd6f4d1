"""Several processes: the same samples, losses and accuracies as one."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_together, write_images
from test_train import log_of, small, weights  # noqa: F401  (a fixture)

from relabel.label_maps.inspection import Samples
from relabel.models import build_model


def train(small, folder, processes, *more):  # noqa: F811
    return run_together(
        processes, "train_imagenet.py", f"--config-file={ROOT}/rn50_configs/demo.yaml",
        f"--data.train_dataset={small}/train.beton", f"--data.val_dataset={small}/val.beton",
        f"--validation.multilabel_file={small}/val_multilabels.json", "--data.image_size=32",
        "--model.arch=timm/test_convnext", f"--logging.folder={folder}", "--data.num_workers=2", *more,
    )  # fmt: skip


def test_two_processes_train_and_evaluate_as_one(small, tmp_path):  # noqa: F811
    """20 steps of a network without batch norm: the same losses to 1e-4; validation of a size that does not divide."""
    logs = {}
    for processes in (1, 2):
        result = train(
            small, tmp_path / str(processes), processes, "--optim.batch_size=32", "--optim.epochs=5",
            "--util.print_freq=1", "--validation.batch_size=6", "--validation.every=5",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        steps = (tmp_path / str(processes) / "steps.jsonl").read_text().splitlines()
        logs[processes] = [json.loads(line)["loss"] for line in steps]
    assert len(logs[1]) == 20
    np.testing.assert_allclose(logs[2], logs[1], atol=1e-4)
    last = [log_of(tmp_path / str(n))[-1] for n in (1, 2)]
    assert last[0]["images"] == last[1]["images"] == 64
    for key, tolerance in (("loss", 1e-3), ("top_1", 2), ("top_5", 2), ("multilabel", 2), ("train_loss", 1e-4)):
        assert last[1][key] == pytest.approx(last[0][key], abs=tolerance)
    tested = [
        train(small, "unused", n, "--util.test_only=True", "--validation.batch_size=6",
              f"--util.test_weight_file={tmp_path}/1/checkpoint.pt").stdout
        for n in (1, 2)
    ]  # fmt: skip
    assert tested[0].startswith("top_1") and tested[0] == tested[1]


def test_the_logged_figures_are_those_of_the_checkpoint_also_after_a_resume(small, tmp_path):  # noqa: F811
    """Batch norm's statistics are each process's own during an epoch, and its EMA's: one set is validated and saved."""
    arguments = (
        "--model.arch=shufflenet_v2_x0_5", "--optim.batch_size=32", "--optim.ema_decay=0.9", "--validation.every=1",
        "--optim.bn.momentum=0.5", "--optim.warmup.epochs=0", "--optim.loss=bce",
    )  # fmt: skip
    for folder, epochs in (("whole", 2), ("resumed", 1), ("resumed", 2)):
        # the schedule must not depend on where the run is cut
        result = train(small, tmp_path / folder, 2, *arguments, f"--optim.epochs={epochs}", "--resume=auto",
                       "--optim.lr.decay_type=step", "--optim.lr.init=0.02")  # fmt: skip
        assert result.returncode == 0, result.stderr
        if epochs == 1:
            continue
        tested = train(small, "unused", 1, *arguments, "--util.test_only=True",
                       f"--util.test_weight_file={tmp_path}/{folder}/checkpoint.pt")  # fmt: skip
        loss = log_of(tmp_path / folder)[-1]["loss"]
        assert float(re.search(r"loss (\S+)", tested.stdout)[1]) == pytest.approx(loss, rel=1e-3)
    figures = [[(line["loss"], line["top_1"]) for line in log_of(tmp_path / run)] for run in ("whole", "resumed")]
    assert figures[0] == figures[1]


FAILS = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from relabel.commands import run_command
from relabel.errors import BadInput
from relabel.processes import all_reduce_sum, join

dist.destroy_process_group = dist.barrier  # as NCCL's: it waits for all

def main():
    processes = join(-1, "nccl")
    all_reduce_sum(torch.ones(1))
    if processes.rank == 1:
        open({file!r}, "w").write(str(time.monotonic()))
        raise BadInput("train.beton: this is why")
    {then}

run_command(main)
"""


@pytest.mark.parametrize("then", ["all_reduce_sum(torch.ones(1))", "threading.Event().wait()"])
def test_a_process_that_fails_ends_all_with_its_message(tmp_path, then):
    """Whether the others are in a collective or in something that never ends."""
    script, file = tmp_path / "fails.py", tmp_path / "failed_at"
    script.write_text(FAILS.format(root=str(ROOT), file=str(file), then=then))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([sys.executable, *launch, str(script)], capture_output=True, text=True, timeout=300)
    assert time.monotonic() - float(file.read_text()) < 20
    assert result.returncode == 1 and "fails.py: train.beton: this is why" in result.stderr
    assert "relabel/processes.py" not in result.stderr  # no traceback


def test_a_run_resumes_with_another_number_of_processes(small, tmp_path):  # noqa: F811
    batch = ("--optim.batch_size=32", "--resume=auto")
    assert train(small, tmp_path / "run", 2, *batch, "--optim.epochs=1").returncode == 0
    result = train(small, tmp_path / "run", 1, *batch, "--optim.epochs=2")
    assert result.returncode == 0 and "epoch 1, step 0 of 2 epochs" in result.stdout
    assert weights(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_processes_train_on_shards_also_after_a_resume(small, tmp_path, in_memory):  # noqa: F811
    """As on the single file; near-sequentially, where the order is another, as without a stop."""
    for number in (1, 2, 3):
        packed = run("write_datasets.py", f"--cfg.data_dir={small}/train", f"--cfg.label_map_dir={small}/label_maps",
                     f"--cfg.write_path={tmp_path}/train.beton", f"--cfg.shard={number}/3")  # fmt: skip
        assert packed.returncode == 0, packed.stderr
    common = ("--optim.batch_size=32", "--util.print_freq=1", "--optim.lr.decay_type=step", "--optim.lr.init=0.02",
              f"--data.in_memory={in_memory}", "--resume=auto")  # fmt: skip
    shards = f"--data.train_dataset={tmp_path}/train-*-of-3.beton"
    for folder, epochs in (("whole", 2), ("resumed", 1), ("resumed", 2)):
        data = [] if folder == "whole" and in_memory else [shards]
        result = train(small, tmp_path / folder, 2, *common, *data, f"--optim.epochs={epochs}")
        assert result.returncode == 0, result.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / folder / "steps.jsonl").read_text().splitlines()]
        for folder in ("whole", "resumed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_batch_that_cannot_be_shared_is_named(small, tmp_path):  # noqa: F811
    result = train(small, tmp_path / "run", 2, "--optim.batch_size=33")
    assert result.returncode == 1 and "not divisible by 2 processes" in result.stderr


def test_batch_norm_is_not_synchronized_among_cpus(small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = train(small, tmp_path / "run", 2, "--model.arch=resnet18", "--model.sync_bn=True")
    assert result.returncode == 1 and "model.sync_bn needs GPUs" in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch synchronizes batch norm on GPUs only")
def test_a_run_with_synchronized_batch_norm_resumes_on_one_process(small, tmp_path):  # noqa: F811
    """Two processes on one GPU, by gloo: timm's activations inside batch norm, no weight decay on it."""
    common = ("--model.arch=timm/rexnet_100", "--model.sync_bn=True", "--optim.bn.decay=False", "--compute.gpu=0",
              "--compute.distributed.backend=gloo", "--optim.batch_size=32", "--resume=auto")  # fmt: skip
    assert train(small, tmp_path / "run", 2, *common, "--optim.epochs=1").returncode == 0
    result = train(small, tmp_path / "run", 1, *common, "--optim.epochs=2")
    assert result.returncode == 0 and weights(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("name", ["maps", "maps.npy"])
def test_two_processes_write_the_label_maps_of_one(tmp_path, name):
    write_images(tmp_path / "images", 13)
    torch.manual_seed(0)
    torch.save(build_model("resnet18", 8).state_dict(), tmp_path / "net.pth")
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        result = run_together(
            processes, "generate_label_maps.py", f"--data.data_dir={tmp_path}/images",
            f"--maps.path={tmp_path}/{processes}/{name}", "--model.arch=resnet18",
            f"--model.weights={tmp_path}/net.pth", "--model.num_classes=8", "--data.num_workers=0", "--maps.size=5",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    one, two = (Samples(str(tmp_path / "images"), str(tmp_path / str(processes) / name)) for processes in (1, 2))
    assert len(one) == len(two) == 13
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-3)
