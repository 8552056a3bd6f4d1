"""finetune_detector.py: a run from start to end, stopped and resumed, in two processes, and with mistaken input."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from coco_data import write_coco
from conftest import ROOT, Command, run, run_together
from test_transfer import by_pycocotools

from relabel.stopping import STOPPED
from relabel.transfer.average_precision import MEASURES

EPOCHS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the sets `train`, of 13 images, and `val`, of 5, and a ResNet-18's weights."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train", 12)
    write_coco(root, "val", 4, seed=1)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), root / "rn18.pth")
    return root


def arguments(world, folder, *more):
    """A small detector that learns this data in a few steps: everything is trained, from random weights."""
    return [
        "finetune_detector.py", f"--data.folder={world}", "--data.train=train", "--data.val=val",
        "--model.weights=random", "--model.arch=resnet18", "--model.channels=32", "--model.anchor_size=8",
        "--model.rois=32", "--data.min_size=64", "--data.num_workers=0", "--optim.batch_size=4",
        f"--optim.epochs={EPOCHS}", "--optim.warmup.steps=4", "--optim.lr.drop=3", f"--logging.folder={folder}",
        "--logging.print_freq=1", f"--validation.every={EPOCHS}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run(*arguments(world, folder, "--optim.epochs=4"))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def state_of(folder):
    return torch.load(folder / "detector.pth", weights_only=True)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_run_leaves_its_detector_and_average_precision_as_pycocotools_finds_it_in_its_files(world, whole):
    folder, stdout = whole
    results = json.loads((folder / "results.json").read_text())
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    for kind, row in (("bbox", "| boxes |"), ("segm", "| masks |")):
        theirs = by_pycocotools(world / "annotations/instances_val.json", folder / f"detections_{kind}.json", kind)
        expected = {name: None if value < 0 else 100 * value for name, value in theirs.items()}
        assert results[kind] == expected == {name: last[f"{kind}_{name}"] for name in MEASURES}
        assert f"{row} {expected['AP']:.1f} |" in stdout
    found = json.loads((folder / "detections_bbox.json").read_text())
    assert {one["category_id"] for one in found} <= {7, 90} and {one["image_id"] for one in found} <= set(
        range(996, 1001)
    )
    assert [(c["label"], c["id"], c["name"]) for c in results["categories"]] == [(1, 7, "wide"), (2, 90, "tall")]
    assert results["images"] == 5 and results["epochs"] == EPOCHS and len(state_of(folder)) > 100
    assert "1 of 13 images have no box to train on" in stdout and (folder / "curves.png").stat().st_size > 1000
    losses = [json.loads(line)["train_loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_a_run_that_was_stopped_within_an_epoch_ends_as_one_that_was_not(world, whole, tmp_path):
    command = arguments(world, tmp_path / "run", "--resume=auto")
    stopped = Command(*command)
    steps = tmp_path / "run" / "steps.jsonl"
    while stopped.poll() is None and (not steps.exists() or len(steps.read_text().splitlines()) < 4):
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    result = stopped.wait()
    assert result.returncode == STOPPED and "--resume=auto resumes" in result.stdout
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (1, 0) < (state["epoch"], state["step"]) < (EPOCHS, 0)
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert same(state_of(tmp_path / "run"), state_of(whole[0]))
    for name in ("detections_bbox.json", "detections_segm.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_run_goes_on_with_its_own_annotations_backbone_and_detector_only(world, tmp_path):
    weights = ["--model.weights=" + str(world / "rn18.pth"), "--model.detector=faster_rcnn", "--optim.epochs=1",
               "--validation.every=1"]  # fmt: skip
    first = run(*arguments(world, tmp_path / "run", *weights))
    assert first.returncode == 0, first.stderr
    assert "| boxes |" in first.stdout and "| masks |" not in first.stdout
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "other.pth")
    write_coco(tmp_path / "else", "train", 12, seed=5)
    write_coco(tmp_path / "else", "val", 4)
    for more, says in (
        ([], "holds a run already: --resume=auto resumes it"),
        (["--resume=auto", f"--model.weights={tmp_path}/other.pth"], "is a run with another backbone"),
        (["--resume=auto", f"--data.folder={tmp_path}/else"], "is a run with another data.train"),
        (["--resume=auto", "--model.trainable_layers=5"], "is a run with model.trainable_layers=3; now it is 5"),
    ):
        refused = run(*arguments(world, tmp_path / "run", *weights, *more))
        assert refused.returncode == 1 and says in refused.stderr


def test_random_weights_are_the_seed_s(world, whole, tmp_path):
    more = ["--compute.seed=1", "--optim.epochs=1", "--validation.every=1"]
    assert run(*arguments(world, tmp_path / "run", *more)).returncode == 0
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "run", whole[0]))
    assert ours["data"]["backbone"] != theirs["data"]["backbone"] and ours["data"]["categories"] == {
        7: "wide",
        90: "tall",
    }


def test_the_folder_of_another_command_s_run_is_refused(world, tmp_path):
    state = {"model": {}, "epoch": 0, "step": 0, "settings": {"model.arch": "resnet18"}}
    torch.save(state, tmp_path / "checkpoint.pt")
    result = run(*arguments(world, tmp_path, "--resume=auto"))
    assert result.returncode == 1 and "is a run with model.detector=None; now it is mask_rcnn" in result.stderr


def test_two_processes_see_each_image_once_and_agree(world, tmp_path):
    command = arguments(world, tmp_path / "run", "--optim.epochs=1", "--validation.every=1", "--data.num_workers=1")
    result = run_together(2, *command)
    assert result.returncode == 0, result.stderr
    files = {kind: tmp_path / "run" / f"detections_{kind}.json" for kind in ("bbox", "segm")}
    measured = json.loads((tmp_path / "run" / "results.json").read_text())
    for kind, file in files.items():
        theirs = by_pycocotools(world / "annotations/instances_val.json", file, kind)
        assert measured[kind]["AR100"] == 100 * theirs["AR100"]
    found = json.loads(files["bbox"].read_text())
    assert {one["image_id"] for one in found} == set(range(996, 1001))
    keys = [(one["image_id"], *np.round(one["bbox"], 3), one["category_id"]) for one in found]
    assert len(set(keys)) == len(keys)
    assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "more, code, says",
    [
        (["--optim.lr.drop=11,8"], 2, "--optim.lr.drop is '11,8'; must be epochs in ascending order"),
        (["--model.detector=yolo"], 2, "--model.detector is 'yolo'; must be mask_rcnn | faster_rcnn"),
        (["--model.weights=nowhere.pth"], 1, "nowhere.pth: no such checkpoint"),
        (["--data.val=val2017"], 1, "instances_val2017.json: is not there; data.folder must hold SET/"),
        (["--optim.batch_size=64"], 1, "has 12 images to train on; optim.batch_size is 64: lower it"),
        (["--optim.lr.init=1e9", "--optim.warmup.steps=0"], 1, "the loss is nan at epoch 0"),
    ],
)
def test_a_mistake_is_one_message(world, tmp_path, more, code, says):
    result = run(*arguments(world, tmp_path / "run", *more))
    assert result.returncode == code and says in result.stderr and "Traceback" not in result.stderr


def test_a_bad_image_is_named_also_by_a_worker_process(world, tmp_path):
    write_coco(tmp_path, "train", 4)
    write_coco(tmp_path, "val", 2)
    (tmp_path / "train" / "002.png").write_bytes(b"no image")
    result = run(*arguments(tmp_path, tmp_path / "run", "--data.num_workers=1"))
    assert result.returncode == 1 and f"{tmp_path}/train/002.png: cannot be decoded" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_pycocotools_the_message_says_how_to_get_it(world, tmp_path):
    block = f"import sys; sys.modules['pycocotools'] = None; sys.argv = {arguments(world, tmp_path / 'run')!r}; "
    script = block + "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "pip install pycocotools" in result.stderr and "Traceback" not in result.stderr
