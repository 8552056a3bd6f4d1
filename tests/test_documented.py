"""The commands that README and docs show, as they stand there, on small data in the official layouts.

What is added to a command is in SMALLER; what is not run is in NOT_RUN, with the reason.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache

import make_sources as make
import numpy as np
import pytest
import torch
import torchvision
from coco_data import write_coco
from conftest import ROOT, run
from PIL import Image
from test_docs import PAGES, code
from test_official import RELABEL
from test_train import OFFICIAL_BASE

from relabel.data.classes import imagenet_classes

START = re.compile(
    r"(?:\w+=(?:\"[^\"]*\"|\S+) )*(?:\.venv/bin/)?(?:python3?|torchrun|make|pip|bash|tar|\.|relabel-[a-z-]+) \S"
)
# What makes a documented command small enough for a test, by what it contains.
ONE_EPOCH = ["--model.arch=resnet18", "--optim.epochs=1", "--optim.batch_size=500"]
SMALLER = {
    "train_imagenet.py": ["--data.image_size=32", "--validation.batch_size=500"],
    "--logging.folder=runs/relabel_rn50": ONE_EPOCH,
    "--config-file-path": [*ONE_EPOCH, "--data.num_workers=1"],
    "evaluate_imagenet.py": ["--data.image_size=32"],
    "finetune_detector.py": [
        "--model.channels=8",
        "--model.rois=16",
        "--data.min_size=64",
        "--data.num_workers=0",
        "--optim.epochs=1",
    ],
    "inspect_label_maps.py --run": ["--most=20"],
    "page_speed.py": ["--count=20"],
    "generate_label_maps.py": ["--maps.image_size=64", "--maps.size=2"],
    "cfg.label_map_dir=birds_maps.npy": ["--cfg.min_agreement=0"],  # the annotator's weights are random
}
NOT_RUN = {
    r"-m scenes\.(demo|suite|strong_a|transfer)|--suite scenes": "minutes of training: tests/test_scenes*.py",
    r"-m (pytest|ruff|zensical|uv|build)": "tests, lint, site (test_site.py), lock and wheel (test_install.py)",
    r"\bpip install|activate|relabel-gpu-kit|bundle/install|setup/": "installs or collects packages",
    r"benchmarks\.(?!feeding)|tests/(faults|fuzz_beton|fuzz_jpeg|arm64)\.py": "minutes, or more tools",
    r"torchrun": "several GPUs or machines: test_distributed.py, test_two_hosts.py",
    r"=published": "downloads weights",
    r"--run --gpus 8": "trains ImageNet on 8 GPUs",
}
PATHS = {"/home/data/ILSVRC2015": "ILSVRC", "path/to/relabel": "relabel_imagenet"}
WRITES = re.compile(r"--(?:cfg\.write_path|maps\.path|logging\.folder)=(\S+)")


def documented():
    """Every command in a block or span of a page, once, without its comment; of `make`, the first that it runs."""
    commands, makefile = {}, re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text())
    for line in (line.strip() for page in PAGES for line in code(page)):
        if target := re.match(r"make ([\w-]+)", line):
            (recipe,) = re.findall(rf"^{target[1]}:.*\n(?:\t(.*))?", makefile, re.MULTILINE)
            line = re.sub(r"\$\((?:GPU_)?PY\)", "python", recipe)
        if START.match(line):
            commands[" ".join(shlex.split(line, comments=True, posix=False))] = None
    return list(commands)


RUN = [command for command in documented() if not re.search("|".join(NOT_RUN), command)]


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG")


def downloads(root):
    """The images and label maps in the forms that docs/datasets.md names."""
    train, val = root / "ILSVRC/train", root / "ILSVRC/val"
    ids = {name: i for i, name in enumerate(imagenet_classes(), 1)}
    make.train_tar(train, root / "ILSVRC2012_img_train.tar")
    make.val_tar(val, root / "ILSVRC2012_img_val.tar")
    make.devkit(val, root / "ILSVRC2012_devkit_t12.tar.gz", ids=ids)
    make.kaggle(val, train, root / "imagenet-object-localization-challenge", ids=ids)
    make.label_map_tar(root / "relabel_imagenet", root / "relabel_imagenet.tar")
    for tree, split in ((train, "train"), (val, "validation")):
        make.parquet(tree, root / "imagenet-1k", split=split)
        make.shards(tree, root / "imagenet-1k-wds", prefix=f"imagenet1k-{split}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages name: one small image of each of ImageNet's classes, maps, weights, lists."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    torch.manual_seed(0)
    for c, name in enumerate(imagenet_classes()):
        image = Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))
        save(image, root / "ILSVRC/train" / name / f"{name}_1.JPEG")
        save(image, root / "ILSVRC/val" / name / f"ILSVRC2012_val_{c + 1:08d}.JPEG")
        for variant in ("matched-frequency", "threshold0.7", "top-images") if c % 10 == 0 else ():
            save(image, root / f"imagenetv2/imagenetv2-{variant}-format-val/{c}/{c:04x}.jpeg")
        if c < 200:
            save(image, root / f"birds/{c:03d}.bird/{c}.jpg")
        scores, classes = torch.full((5, 15, 15), 2.0), (c + torch.arange(5.0))[:, None, None].expand(5, 15, 15) % 1000
        file = root / "relabel_imagenet" / name / f"{name}_1.pt"
        file.parent.mkdir(parents=True)
        torch.save(torch.stack([scores, classes]), file)
    for file, num_classes in (("rn50_relabel_78.9.pth", 1000), ("birds.pth", 200)):
        torch.save(torchvision.models.resnet50(num_classes=num_classes).state_dict(), root / file)
    for name in ("train", "val"):
        write_coco(root / "cells", name, 4)
    (root / "real.json").write_text(json.dumps([[c % 1000] for c in range(50_000)]))
    for variation in ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg"):
        for c in range(9):
            save(Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)),
                 root / f"bg_challenge/{variation}/val/0{c}_class/fg_{c}_bg_0.JPEG")  # fmt: skip
    (root / "in_to_in9.json").write_text(json.dumps({c: c % 10 - 1 for c in range(1000)}))
    downloads(root)
    (root / "configs").mkdir()
    (root / "configs/base.yaml").write_text(OFFICIAL_BASE)
    (root / "configs/relabel_train_resnet50.yaml").write_text(RELABEL)
    (root / "rn50_configs").symlink_to(ROOT / "rn50_configs")
    return root


@pytest.fixture(scope="module")
def result_of(world):
    """Runs a documented command, once, and before it those that write what it reads."""

    @cache
    def result_of(command):
        for other in RUN:
            if other != command and any(path in command for path in WRITES.findall(other)):
                assert result_of(other).returncode == 0
        words = [PATHS.get(word, word) for word in shlex.split(command)[1:]]
        if words[0] == "-m":
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            return subprocess.run([sys.executable, *words], cwd=world, env=environment, capture_output=True, text=True)
        more = [word for part, added in SMALLER.items() if part in command for word in added]
        return run(*words, *([] if "--help" in words else more), cwd=world)

    return result_of


@pytest.mark.parametrize("command", RUN, ids=[command[:80] for command in RUN])
def test_a_documented_command_runs(command, result_of):
    result = result_of(command)
    assert result.returncode == 0, result.stderr


def test_every_reason_not_to_run_a_command_is_one_of_a_command():
    assert len(RUN) >= 14
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in documented()), pattern
