"""Siblings of the cases in test_identity.py, found by trying the commands as somebody who had not written them."""

import json
import os
import shutil
from contextlib import suppress

import ffcv_fields  # noqa: F401 - before FFCV
import numpy as np
import pytest
import torch
from conftest import names_of, run
from ffcv.types import HeaderType
from PIL import Image
from test_identity import (
    ARCH,
    IDENTITY_NAMES,
    accuracy,
    generator_command,
    nested,
    pack_folder,
    peaked,
    perfect_network,
    write_colors,
)

from relabel.checkpoints import saved_classes
from relabel.data.beton import labels_of, read_header
from relabel.data.classes import network_classes
from relabel.data.cleaning import cleaned_labels
from relabel.data.label_map_set import open_label_maps
from relabel.data.names import Identity
from relabel.data.packing import packed_once
from relabel.data.verification import verify
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.models import build_model, load_weights
from relabel.training.export import export_weights


def test_what_a_run_hands_on_knows_its_classes(tmp_path):
    names = [str(i) for i in range(12)]
    checkpoint = perfect_network(tmp_path / "w.pth", names[::-1])  # a class order that no folder has
    network = build_model(ARCH, 12)
    load_weights(network, str(checkpoint))
    export_weights(network, tmp_path, {"model.arch": ARCH, "model.num_classes": 12}, {}, names[::-1])
    val = write_colors(tmp_path / "val", names)
    for file in ("weights.pth", "weights.safetensors"):
        assert saved_classes(tmp_path / file) == tuple(names[::-1])
        assert accuracy(tmp_path / file, val, 12) == 100
    build_model(ARCH, 12).load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))  # a state dict still


@pytest.mark.parametrize("classes, outputs", [(["a", "b", "c"], 2), (["a", "a"], 2)])
def test_a_class_list_that_does_not_fit_its_network_is_refused(tmp_path, classes, outputs):
    torch.save({"model": build_model(ARCH, outputs).state_dict(), "classes": classes}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match=rf"names {len(classes)} classes .* {outputs} outputs"):
        network_classes(saved_classes(tmp_path / "w.pth"), outputs)


def change_nothing(data, maps):
    pass


def move(data, maps):
    os.rename(data / "class0" / "img000.jpg", data / "class1" / "img000.jpg")


def swap(data, maps):
    for before, after in (("class0", "x"), ("class1", "class0"), ("x", "class1")):
        os.rename(data / before, data / after)


def remove_class(data, maps):
    (data / "class9").rmdir()


def add_class(data, maps):
    (data / "class8").mkdir()


def rewrite_map(data, maps):
    file = next(maps.rglob("*.pt"))
    torch.save(torch.load(file), file)
    os.utime(file, (1, 1))


@pytest.mark.parametrize("change", [change_nothing, move, swap, remove_class, add_class, rewrite_map])
def test_whatever_changed_since_packing_is_seen(tmp_path, capsys, change):
    images, maps = peaked(tmp_path, 16, 8)
    (images / "class9").mkdir()
    shutil.copytree(images, tmp_path / "data" / "train")
    path = packed_once("train", "", str(tmp_path / "data"), str(maps))
    change(tmp_path / "data" / "train", maps)
    capsys.readouterr()
    if change is swap:
        with pytest.raises(BadInput, match="has no label map"):  # packed again, and the maps do not fit any more
            packed_once("train", "", str(tmp_path / "data"), str(maps))
        return
    if change is move:  # its map has not moved with it
        with pytest.raises(BadInput, match="has no label map"):
            packed_once("train", "", str(tmp_path / "data"), str(maps))
        return
    assert packed_once("train", "", str(tmp_path / "data"), str(maps)) == path
    assert ("packing" in capsys.readouterr().out) == (change is not change_nothing)


def test_a_part_that_was_packed_is_not_the_whole(tmp_path):
    write_colors(tmp_path / "data" / "train", ["a", "b"])
    pack_folder(tmp_path / "data" / "train", tmp_path / "data" / "train.beton", subset=2)
    assert len(names_of(packed_once("train", "", str(tmp_path / "data")))) == 4


@pytest.mark.parametrize("dtype, num_classes", [(torch.bfloat16, 300), (torch.float16, 2100)])
def test_numbers_that_cannot_hold_the_class_indices_are_refused(tmp_path, dtype, num_classes):
    nested(tmp_path, ("a", "b"), 2)
    for file in (tmp_path / "maps").rglob("*.pt"):
        torch.save(torch.load(file).to(dtype), file)
    names = [*(f"c{i:05d}" for i in range(num_classes - 2)), "a", "b"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    with pytest.raises(BadInput, match="write it as float32"):
        pack_folder(
            tmp_path / "images", tmp_path / "t.beton", label_map_dir=str(tmp_path / "maps"), min_agreement=0,
            class_list=str(tmp_path / "classes.txt"),
        )  # fmt: skip


def test_one_odd_map_does_not_decide_the_kind_of_scores(tmp_path):
    _, maps = peaked(tmp_path, 24, 8, probabilities=True)
    file = min(maps.rglob("*.pt"))
    torch.save(torch.load(file)[..., :14] * 10, file)
    classes = [f"class{i}" for i in range(8)]
    assert open_label_maps(maps, classes).scores == "probabilities"
    torch.save(torch.load(max(maps.rglob("*.pt"))) * 10, max(maps.rglob("*.pt")))
    with pytest.raises(BadInput, match="1 of 23 maps hold logits"):
        open_label_maps(maps, classes)


def test_a_row_of_a_sample_that_was_left_out_means_no_other(tmp_path, capsys):
    images = tmp_path / "images"
    for name in ("a/b/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(images / name)
    (images / "b" / "1.png").write_bytes(b"no image")
    path = str(pack_folder(images, tmp_path / "t.beton", on_error="skip"))
    (tmp_path / "list.tsv").write_text("b/1.png\tb\na/2.png\t-\n")
    assert dict(zip(names_of(path), cleaned_labels(str(tmp_path / "list.tsv"), path).tolist(), strict=True)) == {
        "a/2.png": -1, "a/b/1.png": 0, "b/2.png": 1
    }  # fmt: skip
    assert "1 rows are of images that are not in" in capsys.readouterr().out
    (tmp_path / "list.tsv").write_text("1.png\tb\n2.png\t-\n")
    with pytest.raises(BadInput, match=r"'1.png' fits a/b/1.png and b/1.png"):
        cleaned_labels(str(tmp_path / "list.tsv"), path)


def test_a_sample_named_twice_in_a_multilabel_file_is_an_error(tmp_path):
    identity = Identity(("a", "b"), np.arange(2), IDENTITY_NAMES, ("a", "b", "c"))
    file = tmp_path / "m.json"
    for text in ('{"a/a_0.png": ["a"], "a_0.png": ["b"]}', '{"a/a_0.png": ["a"], "a/a_0.png": ["b"]}'):
        file.write_text(text)
        with pytest.raises(BadInput, match=r"one sample|stands there twice"):
            read_multilabels(str(file), identity, 3)
    file.write_text('{"a/a_0.png": ["a", "c"]}')  # of a class that only the network has
    assert read_multilabels(str(file), identity, 3)[0].tolist() == [True, False, True]


def test_some_swapped_classes_are_named(tmp_path, capsys):
    images, maps = peaked(tmp_path, 40, 10)
    os.rename(maps / "class1", maps / "x")
    os.rename(maps / "class2", maps / "class1")
    os.rename(maps / "x", maps / "class2")
    for a, b in (("class1", "class2"), ("class2", "class1")):  # the files keep their own images' names
        for file, other in zip(sorted((images / a).iterdir()), sorted((maps / a).iterdir()), strict=True):
            os.rename(other, other.with_name(f"_{file.stem}"))
        for file in (maps / a).iterdir():
            os.rename(file, file.with_name(f"{file.name[1:]}.pt"))
        assert b
    pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))
    said = capsys.readouterr().out
    assert "WARNING: maps of these classes name another one: class1 -> class2, class2 -> class1" in said


def test_damage_of_a_file_s_head_is_found(tmp_path):
    images, maps = peaked(tmp_path, 8, 8)
    path = pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))
    assert verify(str(path)) == 8
    data = path.read_bytes()
    for at in range(0, HeaderType.itemsize + read_header(str(path)).field_descriptors.nbytes, 7):
        flipped = bytearray(data)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with suppress(BadInput):
            assert verify(str(path)) == 8 and at < HeaderType.itemsize  # a part of it that nobody reads
    path.write_bytes(data)
    assert sorted(labels_of(str(path)).tolist()) == list(range(8))


@pytest.mark.parametrize(
    "manifest",
    [{"classes": 6}, {"classes": "c0"}, {"classes": ["a", "a"]}, {"files": 5}, {"files": [1]}, {"skipped": 3}],
)
def test_manifests_with_odd_values_are_named(tmp_path, manifest):
    nested(tmp_path, num_classes=2)
    (tmp_path / "maps" / "label_maps.json").write_text(json.dumps({"axis_order": "yx"} | manifest))
    with pytest.raises(BadInput, match=r"label_maps\.json.*must be a list of different names"):
        open_label_maps(tmp_path / "maps", ["a", "b"])


def test_an_image_that_was_skipped_and_repaired_gets_its_map(tmp_path):
    images = write_colors(tmp_path / "images", ["a", "b"], count=3)
    good = (images / "a" / "a_1.png").read_bytes()
    (images / "a" / "a_1.png").write_bytes(b"no image")
    command = [*generator_command(images, tmp_path / "maps.npy"), "--data.on_error=skip"]
    assert "5 label maps" in run(*command).stdout
    (images / "a" / "a_1.png").write_bytes(good)
    again = run(*command)
    assert again.returncode == 0 and "1 of 6 images to do" in again.stdout and "6 label maps" in again.stdout
    pack_folder(images, tmp_path / "t.beton", label_map_dir=str(tmp_path / "maps.npy"), min_agreement=0)
    assert len(names_of(tmp_path / "t.beton")) == 6
