"""Processes killed at random moments, again and again: what is left must be complete or absent, and a rerun succeeds.

    python tests/faults.py --conversions 50 --trainings 20

The tests run a few rounds of each; this is the long form. Prints how many rounds were interrupted and that all held.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
IMAGES = 200  # of a conversion


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def shared_memory() -> set[str]:
    """The names of Python's shared memory on this machine."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def in_form(form: str, tree: Path) -> Path:
    """The images of a tree of class folders in another form, beside it; returns what `cfg.data_dir` is."""
    import make_sources as make

    if form == "folders":
        return tree
    if form == "tar":
        return make.train_tar(tree, tree.with_name("train.tar"))
    if form == "parquet":
        return make.parquet(tree, tree.with_name("parquet"), names=sorted(folder.name for folder in tree.iterdir()))
    return make.shards(tree, tree.with_name("shards"))


def conversion_rounds(folder: Path, rounds: int, seed: int, form: str = "folders") -> dict[str, int]:
    """Conversions of which the parent or a worker is killed at a random moment. Returns counts of how they ended.

    Each round: the file is complete or absent, no process and no shared memory is left; at the end a run that is
    not disturbed succeeds.
    """
    from conftest import ROOT, run
    from PIL import Image

    from relabel.data.beton import read_header

    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    images = folder / "images" / "n01440764"
    images.mkdir(parents=True)
    for i in range(IMAGES):
        Image.fromarray(noise).save(images / f"n01440764_{i}.JPEG")
    rng, counts = np.random.default_rng(seed), {"parent killed": 0, "worker killed": 0, "finished before": 0}
    common = ["write_datasets.py", f"--cfg.data_dir={in_form(form, images.parent)}",
              f"--cfg.write_path={folder}/t.beton", "--cfg.num_workers=2", "--cfg.chunk_size=1",
              "--cfg.overwrite=yes"]  # fmt: skip
    whole, shard = ("t.beton", IMAGES, common), ("t-2-of-2.beton", IMAGES // 2, [*common, "--cfg.shard=2/2"])
    for number in range(rounds):
        name, count, arguments = (whole, shard)[number // 2 % 2]  # the parent and a worker of each
        path, growing = folder / name, folder / f"{name}.part"
        path.unlink(missing_ok=True)
        growing.unlink(missing_ok=True)
        shared = shared_memory()
        # A process of its own, not a fork of the tests': that would share their tracker of shared memory.
        process = subprocess.Popen([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], stdout=-3, stderr=-3)
        while process.poll() is None and not growing.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        below = descendants(process.pid)
        workers = [p for p in below if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()]
        victim = process.pid if number % 2 == 0 or not workers else int(rng.choice(workers))
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        code = process.wait(60)
        kind = "parent killed" if code == -signal.SIGKILL else "worker killed" if code else "finished before"
        counts[kind] += 1
        if code == 0:
            assert path.exists()
        if path.exists():
            assert read_header(str(path)).num_samples == count
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (any(map(alive, below)) or shared_memory() - shared):
            time.sleep(0.05)
        assert not any(map(alive, below)), "processes are left"
        left = shared_memory() - shared
        assert not left, f"shared memory is left: {left}, {kind}"
    for name, count, arguments in (whole, shard):
        assert run(*arguments).returncode == 0 and read_header(str(folder / name)).num_samples == count
        assert not (folder / f"{name}.part").exists()
    return counts


def training_rounds(arguments: list[str], uninterrupted: Path, folder: Path, rounds: int, seed: int) -> int:
    """One training, killed `rounds` times at random moments and resumed; it must end as `uninterrupted` did.

    Returns how often it was killed before it was done.
    """
    from conftest import Command, run
    from test_restart import EPOCHS, STEPS, same_in_the_end, wait_for_steps

    rng, kills = np.random.default_rng(seed), 0
    moments = np.sort(rng.uniform(0, EPOCHS * STEPS - 1, rounds)).astype(int)
    for at in moments:
        process = Command(*arguments, f"--logging.folder={folder}")
        wait_for_steps(folder, max(1, at), process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        kills += process.wait().returncode == -signal.SIGKILL
    last = run(*arguments, f"--logging.folder={folder}")
    assert last.returncode == 0, last.stderr
    same_in_the_end(folder, uninterrupted)
    return kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversions", type=int, default=50, help="rounds")
    parser.add_argument("--trainings", type=int, default=20, help="rounds")
    parser.add_argument(
        "--form", choices=("folders", "tar", "parquet", "shards"), default="folders", help="of the images"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        from conftest import run
        from test_restart import training_arguments

        if options.conversions:
            counts = conversion_rounds(Path(temporary), options.conversions, options.seed, options.form)
            print("conversions:", counts, flush=True)
        if options.trainings:
            settings = training_arguments(Path(temporary) / "data")
            assert run(*settings, f"--logging.folder={temporary}/uninterrupted").returncode == 0
            killed = training_rounds(
                settings, Path(temporary) / "uninterrupted", Path(temporary) / "killed", options.trainings, options.seed
            )
            print(
                f"training: killed {killed} times in {options.trainings} rounds; weights equal to an undisturbed run's"
            )
