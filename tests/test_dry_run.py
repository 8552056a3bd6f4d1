"""util.dry_run: what a run will take, said before it begins, and nothing written."""

import re
from types import SimpleNamespace

import pytest
from conftest import run
from test_distributed import train as train_in_processes
from test_train import arguments_of, small, train  # noqa: F401

import train_imagenet
from relabel.official import OFFICIAL
from relabel.settings import load_settings


def files(*folders):
    """Every file below `folders`, with its size and time."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for folder in folders for p in folder.rglob("*")}


def test_it_says_steps_time_disk_and_memory_and_writes_nothing(small, tmp_path):  # noqa: F811
    before = files(small)
    result = train(
        small, tmp_path / "run", "--util.dry_run", "--optim.epochs=5", "--validation.every=2", "--model.weights=",
        "--resolution.min_res=32", "--resolution.max_res=64", "--resolution.start_ramp=2", "--resolution.end_ramp=3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, room, time, memory, last = result.stdout.splitlines()
    assert first.endswith("epoch 0, step 0 of 5 epochs of 4 steps, 20 in all")
    assert re.fullmatch(r".*run: checkpoints of [\d.]+ MB; at most [\d.]+ MB more .* free", room)
    assert re.fullmatch(
        r"time about 0:00:\d\d; steps: 12 of [\d.]+ s at 32 px, 8 of [\d.]+ s at 64 px; "
        r"validations: 3 of [\d.]+ s", time
    )  # fmt: skip
    assert re.fullmatch(r"peak memory [\d.]+ [MG]B of [\d.]+ GB", memory) and "nothing was written" in last
    assert files(small) == before and not list(tmp_path.iterdir())


def test_of_a_resumed_run_it_says_what_is_left(small, tmp_path):  # noqa: F811
    result = train(small, tmp_path / "run", "--optim.epochs=1", "--util.print_freq=1")
    assert result.returncode == 0
    assert len(re.findall(r"^about 0:00:\d\d of training left; peak memory .* GB$", result.stdout, re.MULTILINE)) == 1
    before = files(small, tmp_path)
    result = train(small, tmp_path / "run", "--util.dry_run=True", "--optim.epochs=3")
    assert result.returncode == 1 and "holds a run already" in result.stderr
    result = train(small, tmp_path / "run", "--util.dry_run=True", "--optim.epochs=3", "--resume=auto")
    assert result.returncode == 0 and "epoch 1, step 0 of 3 epochs" in result.stdout
    assert "steps: 8 of " in result.stdout
    assert files(small, tmp_path) == before


def test_without_room_it_fails(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("sys.argv", ["train_imagenet.py", *arguments_of(small, tmp_path / "run"), "--util.dry_run"])
    settings = load_settings(train_imagenet.Settings, "", OFFICIAL)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert train_imagenet.main(settings) == 1
    assert "NOT ENOUGH ROOM" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_found(small, tmp_path):  # noqa: F811
    result = train(small, tmp_path / "run", "--util.dry_run", "--optim.lr.init=1e30", "--optim.warmup.epochs=0")
    assert result.returncode == 1 and "at 32 px are not finite" in result.stderr


@pytest.mark.parametrize("more", [(), ("--compute.distributed.use=True",)])
def test_it_packs_nothing(folders, tmp_path, more):
    images, maps, _, _ = folders
    root = tmp_path / "data"
    root.mkdir()
    for split in ("train", "val"):
        (root / split).symlink_to(images)
    result = run(
        "train_imagenet.py", f"--data.data_path={root}", f"--data.relabel.path={maps}", "--util.dry_run", *more,
        f"--logging.folder={tmp_path}/run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1 and "no such file; pack it first with write_datasets.py" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]
    assert sorted(p.name for p in root.iterdir()) == ["train", "val"]


def test_two_processes_say_it_once(small, tmp_path):  # noqa: F811
    result = train_in_processes(
        small, tmp_path / "run", 2, "--util.dry_run", "--optim.batch_size=32", "--optim.epochs=2"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("time about") == 1 and "steps: 8 of " in result.stdout and not list(tmp_path.iterdir())


def test_an_evaluation_is_no_dry_run(tmp_path):
    result = run("train_imagenet.py", "--util.dry_run", "--util.test_only", "--util.test_weight_file=w.pth")
    assert result.returncode == 1 and "util.dry_run" in result.stderr
