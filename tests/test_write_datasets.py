"""write_datasets.py: what it packs, and how each kind of bad data ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv_fields.label_map import unpack_label_map
from conftest import ROOT, names_of, run, write_images, write_label_maps
from PIL import Image

from relabel.data.beton import read_header
from relabel.data.packing import pack
from relabel.data.settings import Packing
from relabel.errors import BadInput


def write(images, path, **settings):
    """The command in this process, where it starts sooner."""
    settings = {"num_workers": 2, "axis_order": "yx"} | {k: str(v) if "dir" in k else v for k, v in settings.items()}
    pack(Packing(data_dir=str(images), write_path=str(path), **settings))


def run_write(images, path, *more):
    return run(
        "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.write_path={path}", "--cfg.num_workers=2", *more
    )


def stored_maps(path):
    """{name: (scores, classes)} read straight from the file."""
    reader, raw = read_header(str(path)), np.memmap(path, mode="r")
    field = reader.handlers["label_map"]
    found = []
    for entry in reader.metadata[f"f{reader.field_names.index('label_map')}"]:
        at = int(entry["data_ptr"])
        packed = np.frombuffer(raw[at : at + field.nbytes].tobytes(), field.packed_dtype).reshape(field.packed_shape)
        found.append(unpack_label_map(packed))
    return dict(zip(names_of(path), found, strict=True))


def name_of(file):
    return f"{file.parent.name}/{file.name}"


@pytest.fixture
def copy(folders, tmp_path):
    """A private copy of the small data set, to be damaged: (images, maps, files)."""
    images, maps, files, _ = folders
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(maps, tmp_path / "maps")
    return tmp_path / "images", tmp_path / "maps", [tmp_path / "images" / f.relative_to(images) for f in files]


def map_of(maps, file):
    return maps / file.parent.name / f"{file.stem}.pt"


@pytest.mark.parametrize("axis_order, inner, suffix", [("yx", "", ".pt"), ("xy", "", ".p"), ("yx", "archive", ".pt")])
def test_maps_are_stored_bit_for_bit_rows_first(tmp_path, capsys, axis_order, inner, suffix):
    files = write_images(tmp_path / "images", 12)
    maps = write_label_maps(tmp_path / "maps" / inner, files, suffix=suffix)
    path = tmp_path / "t.beton"
    write(tmp_path / "images", path, label_map_dir=tmp_path / "maps", axis_order=axis_order)
    said = capsys.readouterr().out
    assert "12 images of 8 classes, 12 with label map, 0 without" in said
    assert "rounded" not in said
    header = read_header(str(path))
    assert header.handlers["label_map"].imported_axis_order == axis_order
    assert list(header.metadata["f1"]) == [int(name[len("class")]) for name in names_of(path)]
    stored = stored_maps(path)
    assert sorted(stored) == sorted(map(name_of, files)) and list(stored) != sorted(stored)
    for file in files:
        scores, classes = stored[name_of(file)]
        expected = maps[file.parent.name, file.stem]
        if axis_order == "xy":
            expected = expected.swapaxes(-1, -2)
        assert np.array_equal(scores, expected[0]) and np.array_equal(classes, expected[1].astype(np.int64))
    assert sorted(os.listdir(tmp_path)) == ["images", "maps", "t.beton"]


def test_rounding_is_said_and_float32_avoids_it(copy, tmp_path, capsys):
    images, maps, files = copy
    tensor = torch.load(map_of(maps, files[3]))
    tensor[0, 0, 0, 0] = 1.00011
    torch.save(tensor, map_of(maps, files[3]))
    write(images, tmp_path / "a.beton", label_map_dir=maps)
    said = capsys.readouterr().out
    assert "largest error 0.00011" in said and files[3].stem in said and "--cfg.score_dtype=float32" in said
    write(images, tmp_path / "b.beton", label_map_dir=maps, score_dtype="float32")
    assert "rounded" not in capsys.readouterr().out
    assert stored_maps(tmp_path / "b.beton")[name_of(files[3])][0][0, 0, 0] == np.float32(1.00011)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def damage(kind, images, maps, files, tmp_path):
    """Damage one file; returns it and what the message must say."""
    file, label_map = files[20], map_of(maps, files[20])
    if kind == "truncated jpeg":
        file.write_bytes(file.read_bytes()[:-200])
        return file, "cannot be decoded"
    if kind == "not an image":
        file.write_text("hello")
        return file, "cannot be decoded"
    if kind == "empty image":
        file.write_bytes(b"")
        return file, "cannot be decoded"
    if kind == "missing map":
        label_map.unlink()
        return file, "has no label map"
    if kind == "orphan map":
        orphan = label_map.with_name("nobody.pt")
        shutil.copy(label_map, orphan)
        return orphan, "no image"
    if kind == "truncated map":
        label_map.write_bytes(label_map.read_bytes()[:3000])
        return label_map, "cannot be read"
    if kind == "empty map":
        label_map.write_bytes(b"")
        return label_map, "cannot be read"
    if kind == "pickle that executes":
        torch.save(Bomb(tmp_path / "executed"), label_map)
        return label_map, "nothing in it was executed"
    if kind == "dictionary":
        torch.save({"scores": torch.zeros(5)}, label_map)
        return label_map, "holds a dict"
    tensor = torch.load(label_map)
    expected = {
        "wrong shape": r"must be floats [2, 5, 15, 15]",
        "index out of range": "class index 8 at entry 1, y 2, x 3",
        "negative index": "class index -1",
        "fractional index": "class index 1.5",
        "nan score": "score nan at entry 4, y 14, x 0",
        "infinite score": "score inf",
        "class twice": "is listed twice",
        "beyond float16": "use cfg.score_dtype=float32",
        "integers": "must be floats",
    }[kind]
    if kind == "wrong shape":
        tensor = tensor[..., :14]
    elif kind in ("nan score", "infinite score", "beyond float16"):
        tensor[0, 4, 14, 0] = {"n": float("nan"), "i": float("inf"), "b": 70000.0}[kind[0]]
    elif kind == "class twice":
        tensor[1, 1, 2, 3] = tensor[1, 0, 2, 3]
    elif kind == "integers":
        tensor = tensor.long()
    else:
        tensor[1, 1, 2, 3] = {"i": 8.0, "n": -1.0, "f": 1.5}[kind[0]]
    torch.save(tensor, label_map)
    return label_map, expected


KINDS = [
    "truncated jpeg", "not an image", "empty image", "missing map", "orphan map", "truncated map", "empty map",
    "pickle that executes", "dictionary", "wrong shape", "index out of range", "negative index", "fractional index",
    "nan score", "infinite score", "class twice", "beyond float16", "integers",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_is_named_and_nothing_is_published(kind, copy, tmp_path):
    images, maps, files = copy
    named, reason = damage(kind, images, maps, files, tmp_path)
    path = tmp_path / "t.beton"
    with pytest.raises(BadInput) as error:
        write(images, path, label_map_dir=maps)
    assert str(named) in str(error.value) and reason in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["images", "maps"]  # no .beton, no .part, nothing executed


def test_skipping_leaves_out_and_lists_every_bad_sample(copy, tmp_path):
    images, maps, files = copy
    kinds = ["truncated jpeg", "nan score", "missing map", "orphan map", "pickle that executes"]
    bad = [damage(k, images, maps, files[i * 4 : i * 4 + 1] * 21, tmp_path)[0] for i, k in enumerate(kinds)]
    path = tmp_path / "t.beton"
    write(images, path, label_map_dir=maps, on_error="skip")
    listed = [line.split("\t")[0] for line in (tmp_path / "t.beton.skipped.tsv").read_text().splitlines()]
    assert sorted(listed) == sorted(map(str, bad))
    kept = [f for i, f in enumerate(files) if i not in (0, 4, 8, 16)]
    header, stored = read_header(str(path)), stored_maps(path)
    assert list(header.metadata["f1"]) == [int(name[len("class")]) for name in names_of(path)]
    assert sorted(stored) == sorted(map(name_of, kept))
    for file in kept:
        scores, _ = stored[name_of(file)]
        assert np.array_equal(scores, torch.load(map_of(maps, file))[0].numpy())
    assert not (tmp_path / "executed").exists()


def test_an_image_too_large_for_a_page_is_named(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (2600, 2600, 3), dtype=np.uint8)
    for name in ("a.png", "c.png"):
        Image.fromarray(noise[:50, :50]).save(tmp_path / "images" / "a" / name)
    Image.fromarray(noise).save(tmp_path / "images" / "a" / "b.png", compress_level=0)
    with pytest.raises(BadInput, match=r"b\.png: takes .* lower cfg\.max_resolution"):
        write(tmp_path / "images", tmp_path / "t.beton", max_resolution=0, jpeg_quality=100)
    write(tmp_path / "images", tmp_path / "t.beton", max_resolution=0, jpeg_quality=100, on_error="skip")
    assert list(read_header(str(tmp_path / "t.beton")).metadata["f0"]["height"]) == [50, 50]


def test_an_existing_file_is_kept_unless_told(copy, tmp_path):
    images, _, _ = copy
    path = tmp_path / "t.beton"
    path.write_text("precious")
    result = run_write(images, path)
    assert result.returncode == 1 and "cfg.overwrite=yes" in result.stderr and path.read_text() == "precious"
    write(images, path, overwrite="yes")
    assert read_header(str(path)).num_samples == 48


@pytest.mark.parametrize("victim", ["worker", "command"])
def test_a_killed_process_ends_the_command_and_leaves_nothing(tmp_path, victim):
    files = write_images(tmp_path / "images", 64, num_classes=2)
    big = np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), dtype=np.uint8)
    for file in files[8:]:  # slow enough to be killed at work
        Image.fromarray(big).save(file)
    process = subprocess.Popen(
        [sys.executable, ROOT / "write_datasets.py", f"--cfg.data_dir={tmp_path / 'images'}",
         f"--cfg.write_path={tmp_path / 't.beton'}", "--cfg.num_workers=2", "--cfg.chunk_size=1"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = []
    while len(children) < 2 and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [c for c in children if "resource_tracker" not in Path(f"/proc/{c}/cmdline").read_text()]
        time.sleep(0.02)
    time.sleep(0.5)
    if victim == "worker":
        os.kill(int(children[0]), signal.SIGKILL)
    else:
        process.terminate()
    _, stderr = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1 and "was killed by SIGKILL" in stderr and str(tmp_path / "images") in stderr
    else:
        assert process.returncode == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["images"]
    assert not any(os.path.exists(f"/proc/{c}") for c in children)


def test_images_are_stored_as_torchvision_shows_them(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 30), dtype=np.uint8)).save(folder / "gray.png")
    Image.fromarray(rng.integers(0, 255, (20, 30, 4), dtype=np.uint8), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / "png_named.jpeg", format="PNG")
    path = tmp_path / "t.beton"
    write(tmp_path / "images", path, write_mode="raw")
    header, raw = read_header(str(path)), np.memmap(path, mode="r")
    for entry, name in zip(header.metadata["f0"], names_of(path), strict=True):
        expected = np.asarray(Image.open(tmp_path / "images" / name).convert("RGB"))
        at = int(entry["data_ptr"])
        assert np.array_equal(raw[at : at + expected.size].reshape(expected.shape), expected)


@pytest.mark.parametrize("mode, modes", [("jpg", {0}), ("raw", {1}), ("smart", {1}), ("proportion", {0, 1})])
def test_write_modes_and_max_resolution(folders, tmp_path, mode, modes):
    path = tmp_path / "t.beton"
    write(folders[0], path, write_mode=mode, max_resolution=50, subset=20)
    images = read_header(str(path)).metadata["f0"]
    assert len(images) == 20 and set(images["mode"]) == modes
    assert max(images["height"].max(), images["width"].max()) <= 50


@pytest.mark.parametrize("settings, markers", [({}, True), ({"restart_interval": 0}, False)])
def test_stored_jpegs_have_restart_markers(folders, tmp_path, settings, markers):
    write(folders[0], tmp_path / "t.beton", subset=4, **settings)
    first = (tmp_path / "t.beton").read_bytes().split(b"\xff\xd8")[1]
    assert (b"\xff\xd0" in first) == (b"\xff\xdd" in first) == markers  # RST0, and DRI, which says how often


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["--cfg.data_dir=/nowhere"], 1, "/nowhere: does not exist; give a folder"),
        (["--cfg.data_dirr=x"], 2, "did you mean cfg.data_dir?"),
        (["--cfg.num_workers=0"], 2, "an integer, 1 or more"),
        (["--cfg.axis_order=zz"], 2, "xy | yx"),
    ],
)
def test_bad_settings_are_named(folders, tmp_path, arguments, code, says):
    result = run_write(folders[0], tmp_path / "t.beton", *arguments)
    assert result.returncode == code and says in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_help_names_every_setting():
    result = run("write_datasets.py", "--help")
    assert result.returncode == 0
    for name in ("data_dir", "label_map_dir", "axis_order", "score_dtype", "on_error", "overwrite", "subset"):
        assert f"--cfg.{name}" in result.stdout
