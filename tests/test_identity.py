"""A label is never silently wrong: every sample's label, map and listed labels are its own, in every command.

Each case is one that had wrong labels, or a message that did not help, with its right outcome; the property test at the
end builds random trees, stores and lists, and checks them against a plain dictionary.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, label_map_tensor, names_of, run, write_images, write_label_maps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from relabel.checkpoints import saved_classes
from relabel.data.beton import labels_of, read_header
from relabel.data.cleaning import cleaned_labels
from relabel.data.contents import read_contents
from relabel.data.folder_loader import evaluation_loader
from relabel.data.label_map_set import open_label_maps
from relabel.data.names import Identity
from relabel.data.packing import pack, packed_once
from relabel.data.reading import Reading
from relabel.data.settings import Packing
from relabel.errors import BadInput, BadSample
from relabel.evaluation.label_sets import read_multilabel_records, read_multilabels, read_real
from relabel.evaluation.predictions import predict
from relabel.label_maps.inspection import Samples
from relabel.models import build_model, load_weights
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize
from relabel.precision import precision_of
from relabel.processes import Processes, join
from relabel.sources.opening import open_source

ARCH, SIZE = "shufflenet_v2_x0_5", 64
IDENTITY_NAMES = ["a/a_0.png", "a/a_1.png", "b/b_0.png"]


def pack_folder(folder, path, **more):
    pack(Packing(data_dir=str(folder), write_path=str(path), num_workers=1, **more))
    return path


def color_of(name):
    return tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())


def write_colors(root, folders, count=2, shown=None):
    """Images of one color each, which is that of their folder's name (or of the name that `shown` has for it)."""
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = color_of((shown or {}).get(name, name))
            Image.new("RGB", (70, 64), color).save(root / name / f"{name}_{i}.png")
    return root


def perfect_network(file, classes, with_list=True):
    """A checkpoint that names each color of `classes`: random features, and a head solved for."""
    torch.manual_seed(0)
    network = build_model(ARCH, len(classes)).eval()
    head, network.fc = network.fc, torch.nn.Identity()
    colors = torch.tensor([color_of(name) for name in classes], dtype=torch.uint8)
    with torch.no_grad():
        images = colors[:, None, None].expand(-1, SIZE, SIZE, 3)
        features = torch.cat([network(normalize(images)), torch.ones(len(classes), 1)], 1).double()
        solved = torch.linalg.lstsq(features, torch.eye(len(classes)).double() * 20, driver="gelsd").solution.float()
        head.weight.copy_(solved[:-1].T)
        head.bias.copy_(solved[-1])
    network.fc = head
    torch.save({"model": network.state_dict()} | ({"classes": list(classes)} if with_list else {}), file)
    return file


def accuracy(checkpoint, path, num_classes):
    """Top-1 of a checkpoint on a folder or a `.beton`, as the commands measure it."""
    network = build_model(ARCH, num_classes)
    load_weights(network, str(checkpoint))
    processes = join(-1, "gloo")
    reading = Reading(num_classes, processes, 1, classes=saved_classes(str(checkpoint)))
    loader, _ = evaluation_loader(str(path), reading, 8, SIZE, 1.0)
    return predict(network, loader, precision_of("fp32", processes.device)).top(1)


NAMINGS = {
    "0 to 11": [str(i) for i in range(12)],
    "1 to 12": [str(i) for i in range(1, 13)],
    "padded": [f"{i:02d}" for i in range(12)],
    "mixed": ["3", "a", "10", "B", "0", "ä", "z z", "2"],
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_network_is_evaluated_in_its_own_class_order_whatever_the_names(tmp_path, naming, packed, capsys):
    names = NAMINGS[naming]
    classes = sorted(names)  # as its training's .beton had them
    checkpoint = perfect_network(tmp_path / "w.pth", classes)
    for what, folders in (("all", names), ("one missing", names[:2] + names[3:]), ("two", names[4:6])):
        path = write_colors(tmp_path / what, folders)
        path = pack_folder(path, tmp_path / f"{what}.beton", write_mode="raw") if packed else path
        assert accuracy(checkpoint, path, len(names)) == 100
        assert (what == "all") != ("matched by name" in capsys.readouterr().out)
    extra = write_colors(tmp_path / "extra", [*names, "unheard-of"])
    extra = pack_folder(extra, tmp_path / "extra.beton") if packed else extra
    with pytest.raises(BadInput, match="does not know its class 'unheard-of'"):
        accuracy(checkpoint, extra, len(names))


def test_the_commands_agree_on_numbered_folders(tmp_path):
    names = NAMINGS["0 to 11"]
    write_colors(tmp_path / "val", names)
    checkpoint = perfect_network(tmp_path / "w.pth", sorted(names))
    assert run("write_datasets.py", f"--cfg.data_dir={tmp_path}/val", f"--cfg.write_path={tmp_path}/val.beton",
               "--cfg.write_mode=raw").returncode == 0  # fmt: skip
    common = [f"--model.arch={ARCH}", "--model.num_classes=12", f"--data.image_size={SIZE}", "--data.crop_ratio=1.0"]
    tested = run(
        "train_imagenet.py", *common, f"--data.val_dataset={tmp_path}/val.beton", "--util.test_only=True",
        f"--util.test_weight_file={checkpoint}",
    )  # fmt: skip
    assert tested.returncode == 0 and "top_1 100%" in tested.stdout, tested.stderr
    for val in ("val", "val.beton"):
        found = run("evaluate_imagenet.py", *common, f"--model.weights={checkpoint}", f"--data.val={tmp_path}/{val}")
        assert "| ImageNet | top-1 % | 100.00 |" in found.stdout, found.stderr


def test_a_checkpoint_of_somebody_else_has_the_data_s_classes_if_they_are_as_many(tmp_path, capsys):
    names = NAMINGS["0 to 11"]
    checkpoint = perfect_network(tmp_path / "w.pth", sorted(names), with_list=False)
    assert accuracy(checkpoint, write_colors(tmp_path / "val", names), 12) == 100
    assert "the network has no class names; its classes are taken in this order" in capsys.readouterr().out
    with pytest.raises(BadInput, match="has 11 classes, the network 12, and no list of their names"):
        accuracy(checkpoint, write_colors(tmp_path / "fewer", names[1:]), 12)


def test_empty_folders_are_classes_and_hidden_ones_are_not(tmp_path):
    write_colors(tmp_path, ["a", "c", ".ipynb_checkpoints"])
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "a" / "a_0.png", tmp_path / "a" / ".ipynb_checkpoints" / "a_0-checkpoint.png")
    (tmp_path / "a" / "._a_0.png").write_bytes(b"\0\5\26\7")
    folder = open_source(tmp_path)
    assert folder.classes == ("a", "b", "c") and [i.name for i in folder.samples] == [
        "a/a_0.png", "a/a_1.png", "c/c_0.png", "c/c_1.png"
    ]  # fmt: skip
    assert [i.label for i in folder.samples] == [0, 0, 2, 2]
    assert "3 hidden files or folders were left out (._a_0.png, .ipynb_checkpoints)" in folder.remarks[0]


def test_files_that_are_no_images_are_counted(tmp_path):
    write_colors(tmp_path, ["a"])
    for name in ("x.avif", "y.avif", "z.jp2", "README"):
        (tmp_path / "a" / name).write_bytes(b"")
    (remark,) = open_source(tmp_path).remarks
    assert all(part in remark for part in ("2 .avif", "1 .jp2", "1 without ending"))


# --- samples --------------------------------------------------------------------------------------------------


def generator_command(images, maps, workers=0):
    """`generate_label_maps.py` for two classes, by a ResNet-18 with random weights, which lie beside `maps`."""
    weights = maps.with_name("net.pth")
    if not weights.exists():
        torch.save(build_model("resnet18", 2).state_dict(), weights)
    return [
        "generate_label_maps.py", f"--data.data_dir={images}", f"--maps.path={maps}", "--model.arch=resnet18",
        f"--model.weights={weights}", "--model.num_classes=2", "--maps.size=3", "--maps.top_k=2",
        f"--data.num_workers={workers}",
    ]  # fmt: skip


def equal_stems(root):
    write_colors(root, ["a", "b"], count=1)
    (root / "a" / "a_0.png").rename(root / "a" / "1.png")
    Image.open(root / "a" / "1.png").save(root / "a" / "1.jpg")
    return root


def test_images_that_differ_in_their_ending_share_no_label_map(tmp_path):
    images = equal_stems(tmp_path / "images")
    for path in ("maps", "maps.npy", "maps.beton"):
        made = run(*generator_command(images, tmp_path / path))
        assert made.returncode == 1 and "a/1.jpg differ only in" in made.stderr and "a/1.png: and" in made.stderr
    write_label_maps(tmp_path / "tree", [images / "a" / "1.png", images / "b" / "b_0.png"])
    with pytest.raises(BadSample, match="differ only in their ending"):
        pack_folder(images, tmp_path / "t.beton", label_map_dir=str(tmp_path / "tree"))
    shutil.copy(tmp_path / "tree" / "a" / "1.pt", tmp_path / "tree" / "a" / "1.p")
    with pytest.raises(BadSample, match="label maps of one name"):
        open_label_maps(tmp_path / "tree", ["a", "b"])


def nested(root, classes=("a", "b"), num_classes=8):
    """`CLASS/cam1/1.jpg` and `CLASS/cam2/1.jpg` with a map each that tells whose it is; returns the maps by name."""
    rng, maps = np.random.default_rng(0), {}
    for c in classes:
        for camera in ("cam1", "cam2"):
            (root / "images" / c / camera).mkdir(parents=True)
            Image.new("RGB", (40, 40), color_of(c + camera)).save(root / "images" / c / camera / "1.jpg")
            (root / "maps" / c / camera).mkdir(parents=True)
            maps[f"{c}/{camera}/1.jpg"] = tensor = label_map_tensor(rng, num_classes, 2, 3, 3)
            torch.save(tensor, root / "maps" / c / camera / "1.pt")
    return maps


def test_nested_folders_of_equal_names_keep_their_maps(tmp_path):
    maps = nested(tmp_path, num_classes=2)
    path = pack_folder(tmp_path / "images", tmp_path / "t.beton", label_map_dir=str(tmp_path / "maps"))
    stored = {sample.name: sample for sample in Samples(str(path))}
    assert sorted(stored) == sorted(maps)
    for name, tensor in maps.items():
        assert np.array_equal(stored[name].scores, tensor[0]) and stored[name].label == int(name[0] == "b")
    shown = Samples(str(tmp_path / "images"), str(tmp_path / "maps"), "yx", 2)
    for sample in shown:
        assert np.array_equal(sample.scores, maps[str(Path(sample.name).relative_to(tmp_path / "images"))][0])


def test_a_tree_that_the_generator_wrote_of_nested_folders_is_packed(tmp_path):
    nested(tmp_path)
    stored = {}
    for path in ("made", "made.npy", "made.beton"):
        made = run(*generator_command(tmp_path / "images", tmp_path / path))
        assert made.returncode == 0, made.stderr
        if not path.endswith(".beton"):
            pack_folder(tmp_path / "images", tmp_path / f"{path}.packed.beton", label_map_dir=str(tmp_path / path))
        beton = tmp_path / (path if path.endswith(".beton") else f"{path}.packed.beton")
        stored[path] = {sample.name: sample.scores for sample in Samples(str(beton))}
        assert sorted(stored[path]) == sorted(names_of(beton)) and len(stored[path]) == 4
    for name, scores in stored["made"].items():
        np.testing.assert_allclose(stored["made.npy"][name], scores, atol=1e-2)
        np.testing.assert_allclose(stored["made.beton"][name], scores, atol=1e-2)


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    write_colors(tmp_path / "elsewhere", ["x"])
    write_colors(tmp_path / "images", ["a", "b"])
    (tmp_path / "images" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "images" / "a" / "loop").symlink_to(tmp_path / "images" / "a")
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere" / "x")
    folder = open_source(tmp_path / "images")
    assert folder.classes == ("a", "b", "c")
    assert [image.name for image in folder.samples] == [
        "a/a_0.png", "a/a_1.png", "a/more/x_0.png", "a/more/x_1.png", "b/b_0.png", "b/b_1.png", "c/x_0.png", "c/x_1.png"
    ]  # fmt: skip


def test_a_folder_is_read_in_imagefolder_s_order(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in (
        "b/2.png",
        "b/1.png",
        "a/z/1.png",
        "a/y.png",
        "a/z-1/1.png",
        "a/z/a/1.png",
        "A/1.png",
        "10/1.png",
        "9/1.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    theirs = ImageFolder(tmp_path)
    ours = open_source(tmp_path)
    assert list(ours.classes) == theirs.classes
    assert [(str(ours.place(s.index)), s.label) for s in ours.samples] == theirs.samples


def test_a_part_of_the_classes_trains_with_the_whole_head(tmp_path, capsys):
    from relabel.data.classes import imagenet_classes

    wnids = imagenet_classes()
    files = [tmp_path / "images" / wnids[c] / f"{wnids[c]}_{i}.jpg" for c in (3, 700) for i in range(2)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (9, 200, 30)).save(file)
    maps = {"label_map_dir": str(tmp_path / "maps")}
    for c in (3, 700, 999):  # maps of a class that has no images here
        write_label_maps(tmp_path / "maps", [tmp_path / wnids[c] / f"{wnids[c]}_{i}.jpg" for i in range(2)], 1000)
    with pytest.raises(BadInput, match=r"cfg\.num_classes or cfg\.class_list"):
        pack_folder(tmp_path / "images", tmp_path / "a.beton", min_agreement=0, **maps)
    path = pack_folder(tmp_path / "images", tmp_path / "b.beton", num_classes=1000, min_agreement=0, **maps)
    assert "2 label maps of classes without images here are not used" in capsys.readouterr().out
    assert read_contents(read_header(str(path))).classes == wnids and sorted(labels_of(str(path))) == [3, 3, 700, 700]
    (tmp_path / "classes.txt").write_text("\ufeff" + "\n".join(reversed(wnids)) + "\n")
    path = pack_folder(
        tmp_path / "images", tmp_path / "c.beton", class_list=str(tmp_path / "classes.txt"), min_agreement=0, **maps
    )
    labels = dict(zip(names_of(path), labels_of(str(path)), strict=True))
    assert [labels[file.relative_to(tmp_path / "images").as_posix()] for file in files] == [996, 996, 299, 299]
    (tmp_path / "classes.txt").write_text("cat\n\n")
    with pytest.raises(BadInput, match="line 2: '' is no class name"):
        pack_folder(tmp_path / "images", tmp_path / "d.beton", class_list=str(tmp_path / "classes.txt"))
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(BadSample, match=r"has a class .*, none of the 2"):
        pack_folder(tmp_path / "images", tmp_path / "d.beton", class_list=str(tmp_path / "classes.txt"))


def test_maps_of_another_class_order_are_put_in_the_data_s(tmp_path):
    maps = nested(tmp_path, ("a", "b"), num_classes=2)
    manifest = {"axis_order": "yx", "scores": "logits", "classes": ["b", "a"]}
    (tmp_path / "maps" / "label_maps.json").write_text(json.dumps(manifest))
    path = pack_folder(tmp_path / "images", tmp_path / "t.beton", label_map_dir=str(tmp_path / "maps"))
    for sample in Samples(str(path)):
        assert np.array_equal(sample.classes, 1 - maps[sample.name][1].numpy())
    (tmp_path / "maps" / "label_maps.json").write_text(json.dumps(manifest | {"classes": ["b", "c"]}))
    with pytest.raises(BadInput, match="'c' is none of the images' 2"):
        pack_folder(tmp_path / "images", tmp_path / "u.beton", label_map_dir=str(tmp_path / "maps"))


# --- files as people have them --------------------------------------------------------------------------------


def test_names_that_are_not_utf_8_are_listed_or_packed(tmp_path):
    write_colors(tmp_path / "images", ["a"])
    good, bad = (os.fsdecode(name) for name in (b"caf\xe9.png", b"bro\xffken.png"))
    shutil.copy(tmp_path / "images" / "a" / "a_0.png", tmp_path / "images" / "a" / good)
    (tmp_path / "images" / "a" / bad).write_bytes(b"no image")
    stopped = run("write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.write_path={tmp_path}/t.beton")
    assert stopped.returncode == 1 and "cannot be decoded" in stopped.stderr and "Traceback" not in stopped.stderr
    result = run(
        "write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.write_path={tmp_path}/t.beton",
        "--cfg.on_error=skip",
    )  # fmt: skip
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert sorted(names_of(tmp_path / "t.beton")) == sorted(["a/a_0.png", "a/a_1.png", f"a/{good}"])
    assert b"bro\xffken.png\tcannot be decoded" in (tmp_path / "t.beton.skipped.tsv").read_bytes()


@pytest.mark.parametrize("side", [65501, 65535])
def test_sides_that_no_jpeg_has_are_named_and_skipped(tmp_path, side):
    write_colors(tmp_path / "images", ["a"])
    Image.new("L", (side, 1)).save(tmp_path / "images" / "a" / "long.png")
    with pytest.raises(BadSample, match=rf"long\.png: is {side} x 1; a JPEG has at most 65,500"):
        pack_folder(tmp_path / "images", tmp_path / "t.beton", max_resolution=0)
    pack_folder(tmp_path / "images", tmp_path / "t.beton", max_resolution=0, on_error="skip")
    assert sorted(names_of(tmp_path / "t.beton")) == ["a/a_0.png", "a/a_1.png"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("store", ["maps", "maps.npy", "maps.beton"])
def test_one_broken_image_does_not_stop_the_generator_for_good(tmp_path, workers, store):
    images = write_colors(tmp_path / "images", ["a", "b"], count=3)
    (images / "a" / "a_1.png").write_bytes(b"no image")
    command = generator_command(images, tmp_path / store, workers)
    stopped = run(*command)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert stopped.stderr.count("a_1.png: cannot be decoded") == 1
    skipped = run(*command, "--data.on_error=skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "a_1.png\tcannot be decoded" in (tmp_path / f"{store}.skipped.tsv").read_text()
    beton = tmp_path / "maps.beton"
    if store != "maps.beton":
        pack_folder(images, beton, label_map_dir=str(tmp_path / store), on_error="skip")
    assert sorted(names_of(beton)) == [f"{c}/{c}_{i}.png" for c in "ab" for i in range(3) if (c, i) != ("a", 1)]
    assert len(Samples(str(beton))) == 5


def test_imagenet_v2_s_folder_may_hold_archives_and_lists(tmp_path):
    from evaluate_imagenet import v2_variants

    for name in ("imagenetv2-matched-frequency-format-val", "imagenetv2-top-images-format-val"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.tar.gz").write_bytes(b"")
    (tmp_path / "threshold0.7.beton").write_bytes(b"")
    (tmp_path / "threshold0.7.beton.skipped.tsv").write_text("")
    assert [(v, Path(p).name) for v, p in v2_variants(str(tmp_path))] == [
        ("matched-frequency", "imagenetv2-matched-frequency-format-val"), ("threshold0.7", "threshold0.7.beton"),
        ("top-images", "imagenetv2-top-images-format-val"),
    ]  # fmt: skip
    (tmp_path / "top-images.beton").write_bytes(b"")
    with pytest.raises(BadInput, match="holds top-images twice"):
        v2_variants(str(tmp_path))


def test_a_full_dev_shm_is_named_with_its_fix(tmp_path, monkeypatch):
    write_colors(tmp_path / "images", ["a"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInput, match=r"/dev/shm: .* bytes of shared memory are needed.*--shm-size"):
        pack_folder(tmp_path / "images", tmp_path / "t.beton")
    assert os.listdir(tmp_path) == ["images"]


def test_sixteen_bits_are_said_to_be_lost(tmp_path, capsys):
    write_colors(tmp_path / "images", ["a"])
    gray = np.random.default_rng(0).integers(0, 65535, (20, 20), dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "images" / "a" / "deep.png")
    pack_folder(tmp_path / "images", tmp_path / "t.beton")
    assert "1 images of 16 bits lost their range" in capsys.readouterr().out


# --- label maps of the wrong kind -----------------------------------------------------------------------------


def peaked(root, count, num_classes, offset=0, probabilities=False, shape=(15, 15)):
    """Images and maps that name the label (plus `offset`) at every cell, four random classes beside it."""
    rng = np.random.default_rng(0)
    files = write_images(root / "images", count, num_classes)
    for file in files:
        label = (int(file.parent.name.removeprefix("class")) + offset) % num_classes
        others = rng.permutation([c for c in range(num_classes) if c != label])[:4]
        classes = np.broadcast_to(np.array([label, *others])[:, None, None], (5, *shape))
        scores = np.sort(rng.normal(0, 1, (5, *shape)), 0)[::-1] + 10 * (np.arange(5) == 0)[:, None, None]
        if probabilities:
            scores = np.exp(scores) / (np.exp(scores).sum(0) * 1.05)
        (root / "maps" / file.parent.name).mkdir(parents=True, exist_ok=True)
        tensor = torch.from_numpy(np.stack([scores, classes]).astype(np.float32))
        torch.save(tensor, root / "maps" / file.parent.name / f"{file.stem}.pt")
    return root / "images", root / "maps"


def test_the_kind_of_scores_is_found_stored_and_obeyed(tmp_path, capsys):
    targets = {}
    for kind in ("logits", "probabilities"):
        images, maps = peaked(tmp_path / kind, 16, 8, probabilities=kind == "probabilities")
        path = pack_folder(images, tmp_path / f"{kind}.beton", label_map_dir=str(maps))
        assert f"the scores are {kind}, as their values show" in capsys.readouterr().out
        assert read_header(str(path)).handlers["label_map"].scores == kind
        sample = Samples(str(path))[0]
        targets[kind] = sample.targets(np.array([[0.0, 0, 1, 1]]), 8, 1.0)[0]
        assert targets[kind].argmax() == sample.label and targets[kind].max() > 0.9
    images, maps = peaked(tmp_path / "sigmoid", 8, 8)
    for file in maps.rglob("*.pt"):
        tensor = torch.load(file)
        tensor[0] = tensor[0].sigmoid()
        torch.save(tensor, file)
    with pytest.raises(BadInput, match=r"say what they are: --cfg\.scores=logits"):
        pack_folder(images, tmp_path / "s.beton", label_map_dir=str(maps))
    pack_folder(images, tmp_path / "s.beton", label_map_dir=str(maps), scores="logits")


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("num_classes", [8, 40])
def test_maps_that_name_other_classes_are_refused(tmp_path, offset, num_classes, capsys):
    images, maps = peaked(tmp_path, 4 * num_classes, num_classes, offset)
    more = {"label_map_dir": str(maps)}
    with pytest.raises(BadInput, match=rf"the best class is the label \+{offset}|under cfg\.min_agreement=0\.5"):
        pack_folder(images, tmp_path / "t.beton", **more)
    assert sorted(os.listdir(tmp_path)) == ["images", "maps"]
    pack_folder(images, tmp_path / "t.beton", min_agreement=0, **more)
    assert "the label is the pooled map's best class in 0.0 %" in capsys.readouterr().out


def test_agreement_is_counted_and_said(tmp_path, capsys):
    images, maps = peaked(tmp_path, 16, 8)
    pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))
    said = capsys.readouterr().out
    assert "best class in 100.0 %, among its 4 best in 100.0 % of 16 images" in said


def test_the_shape_of_most_maps_counts_not_that_of_the_first(tmp_path):
    images, maps = peaked(tmp_path, 24, 8)
    first = min(maps.rglob("*.pt"))
    torch.save(torch.load(first)[..., :14, :14].clone(), first)
    with pytest.raises(BadSample, match=rf"{first.name}.*must be floats \[2, 5, 15, 15\] as most files'"):
        pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))
    pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps), on_error="skip")
    assert read_header(str(tmp_path / "t.beton")).num_samples == 23
    for i, file in enumerate(sorted(maps.rglob("*.pt"))):
        torch.save(torch.load(file)[..., : 12 + i % 3].clone(), file)
    with pytest.raises(BadSample, match="others have shapes"):
        pack_folder(images, tmp_path / "u.beton", label_map_dir=str(maps), on_error="skip")


def test_too_many_bad_samples_are_an_error_even_when_they_may_be_skipped(tmp_path):
    images = write_colors(tmp_path / "images", ["a", "b"], count=30)
    for file in sorted(images.rglob("*.png"))[:12]:
        file.write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"12 of 60 files are bad, more than cfg\.max_skipped=0\.01 allows"):
        pack_folder(images, tmp_path / "t.beton", on_error="skip")
    assert os.listdir(tmp_path) == ["images"]
    pack_folder(images, tmp_path / "t.beton", on_error="skip", max_skipped=0.2)
    assert len(names_of(tmp_path / "t.beton")) == 48


def test_when_all_samples_are_bad_the_reasons_are_said_and_nothing_is_left(tmp_path):
    images = write_colors(tmp_path / "images", ["a", "b"])
    for file in images.rglob("*.png"):
        file.write_bytes(b"no image")
    result = run(
        "write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.write_path={tmp_path}/t.beton", "--cfg.on_error=skip"
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr and "BufferError" not in result.stderr
    assert "no sample could be used" in result.stderr and "a_0.png: cannot be decoded" in result.stderr
    assert os.listdir(tmp_path) == ["images"]


def test_a_tensor_that_requires_grad_is_a_tensor(tmp_path):
    images, maps = peaked(tmp_path, 8, 8)
    for file in maps.rglob("*.pt"):
        torch.save(torch.load(file).requires_grad_(), file)
    pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))
    assert len(names_of(tmp_path / "t.beton")) == 8


@pytest.mark.parametrize("suffix", [".npy", ".pth"])
def test_a_folder_of_maps_with_other_endings_says_which_it_found(tmp_path, suffix):
    images, maps = peaked(tmp_path, 8, 8)
    for file in maps.rglob("*.pt"):
        file.rename(file.with_suffix(suffix))
    with pytest.raises(BadSample, match=rf"found {suffix}: give \.pt or \.p"):
        pack_folder(images, tmp_path / "t.beton", label_map_dir=str(maps))


# --- lists ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cameras(tmp_path_factory):
    """A `.beton` of three classes that share file names."""
    root = tmp_path_factory.mktemp("cameras")
    for name in ("cat/001.jpg", "cat/002.jpg", "dog/001.jpg", "dog/x/001.jpg", "owl/003.jpg"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), color_of(name)).save(root / "images" / name)
    return str(pack_folder(root / "images", root / "t.beton"))


@pytest.mark.parametrize(
    "lines, says",
    [
        ("001.jpg\tdog", "line 1: '001.jpg' fits cat/001.jpg and dog/"),
        ("003.jpg\tdog\ncat/001.jpg\towl\n003.jpg\tcat", "line 3: says 'cat' of '003.jpg'; .*line 1 says 'dog'"),
        ("nowhere.jpg\tdog", "line 1: 'nowhere.jpg' is no sample of"),
        ("003.jpg\tcow", "line 1: 'cow' is no class of"),
        ("003.jpg dog", "line 1: .* is not PATH<tab>LABEL"),
        ("".join(f"{n}\t-\n" for n in ("cat/001", "cat/002", "dog/001", "dog/x/001", "owl/003")), "leaves no sample"),
    ],
)
def test_a_cleaned_label_is_of_one_sample_and_said_once(cameras, tmp_path, lines, says):
    (tmp_path / "list.tsv").write_text(lines)
    with pytest.raises(BadInput, match=says):
        cleaned_labels(str(tmp_path / "list.tsv"), cameras)


def test_cleaned_labels_go_by_path(cameras, tmp_path):
    (tmp_path / "list.tsv").write_text("\ufeffcat/001.jpg\tdog\ndog/x/001\towl\n003.jpg\t-\n003\t-\nx/001.jpg\t2\n")
    cleaned = cleaned_labels(str(tmp_path / "list.tsv"), cameras)
    assert dict(zip(names_of(cameras), cleaned.tolist(), strict=True)) == {
        "cat/001.jpg": 1, "cat/002.jpg": 0, "dog/001.jpg": 1, "dog/x/001.jpg": 2, "owl/003.jpg": -1
    }  # fmt: skip


def test_where_classes_are_called_by_numbers_a_label_is_a_name(tmp_path):
    path = pack_folder(write_colors(tmp_path / "images", NAMINGS["0 to 11"], 1), tmp_path / "t.beton")
    (tmp_path / "list.tsv").write_text("0/0_0.png\t10\n")
    cleaned = cleaned_labels(str(tmp_path / "list.tsv"), str(path))
    assert cleaned[0] == 2 and sorted(NAMINGS["0 to 11"])[2] == "10"


def test_real_counts_in_the_network_s_order_and_each_image_once(tmp_path):
    from relabel.data.classes import imagenet_classes

    (tmp_path / "real.json").write_text("\ufeff" + json.dumps([[1, 3], [2], []]))
    names = [f"n/ILSVRC2012_val_{i:08d}.JPEG" for i in (2, 1)]
    file, network = str(tmp_path / "real.json"), tuple(reversed(imagenet_classes()))
    assert np.argwhere(read_real(file, names, 1000, network)).tolist() == [[0, 997], [1, 996], [1, 998]]
    with pytest.raises(BadInput, match=r"entry 1 fits n/ILSVRC2012_val_00000002\.JPEG and m/ILSVRC2012_val_00000002"):
        read_real(file, [*names, "m/ILSVRC2012_val_00000002.JPEG"], 1000)
    with pytest.raises(BadInput, match="no sample has a right class"):
        read_real(file, ["n/ILSVRC2012_val_00000003.JPEG"], 1000)
    with pytest.raises(BadInput, match="the network knows none of them"):
        read_real(file, names, 2, ("cat", "dog"))


RECORD = {"file_name": "ILSVRC2012_val_00000001.JPEG", "correct_multi_labels": [1], "wrong_multi_labels": [],
          "unclear_multi_labels": [], "is_problematic": False}  # fmt: skip


@pytest.mark.parametrize(
    "records, says",
    [
        ([RECORD | {"is_problematic": "False"}], "record 0 has 'is_problematic' 'False', must be a bool"),
        ([RECORD | {"correct_multi_labels": None}], "record 0 has 'correct_multi_labels' None, must be a list"),
        ([RECORD | {"correct_multi_labels": 3}], "record 0 has 'correct_multi_labels' 3, must be a list"),
        ([RECORD, RECORD], "records 0 and 1 are both of ILSVRC2012_val_00000001"),
        ([RECORD | {"is_problematic": True}], "no record that counts"),
        ([RECORD | {"correct_multi_labels": [8]}], "8 is none of the 8 classes"),
        ([7], "record 0 is 7, must be an object"),
        ({"a": 1}, "must be a list of the records"),
    ],
)
def test_records_of_another_form_are_named(tmp_path, records, says):
    (tmp_path / "r.json").write_text(json.dumps(records))
    with pytest.raises(BadInput, match=says):
        read_multilabel_records(str(tmp_path / "r.json"), ["n/ILSVRC2012_val_00000001.JPEG"], 8)


# --- provenance, copies, and two at once ----------------------------------------------------------------------


def test_a_run_that_packs_once_sees_that_it_is_asked_for_something_else(tmp_path, capsys):
    images, maps = peaked(tmp_path / "one", 16, 8)
    (tmp_path / "data").mkdir()
    shutil.copytree(images, tmp_path / "data" / "train")
    shutil.copytree(maps, tmp_path / "other_maps")
    data = str(tmp_path / "data")
    path = packed_once("train", "", data, str(maps))
    assert path == f"{data}/train_relabel.beton"
    written = os.stat(path).st_mtime_ns
    assert packed_once("train", "", data, str(maps)) == path and os.stat(path).st_mtime_ns == written
    packed_once("train", "", data, str(tmp_path / "other_maps"))
    assert "its label maps are" in capsys.readouterr().out and os.stat(path).st_mtime_ns > written
    with pytest.raises(BadInput, match="nowhere"):  # it used to train on the first maps
        packed_once("train", "", data, str(tmp_path / "nowhere"))
    packed_once("train", "", data, str(maps))
    (tmp_path / "data" / "train" / "class0" / "img000.jpg").unlink()
    os.rename(path, tmp_path / "mine.beton")
    with pytest.raises(BadInput, match=r"mine\.beton: .*train held 16 images, it holds 15 now"):
        packed_once("train", str(tmp_path / "mine.beton"), data, str(maps))


def test_images_in_a_folder_that_cannot_be_written_are_packed_elsewhere(tmp_path, monkeypatch, capsys):
    write_colors(tmp_path / "data" / "val", ["a"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    path = packed_once("val", "", str(tmp_path / "data"))
    assert path.startswith("runs/packed/data-") and sorted(names_of(path)) == ["a/a_0.png", "a/a_1.png"]
    assert f"cannot be written: packed files go to {os.path.dirname(path)}" in capsys.readouterr().out


def test_a_copy_that_was_damaged_on_its_way_is_found_and_its_samples_named(tmp_path):
    path = pack_folder(write_colors(tmp_path / "images", ["a", "b"]), tmp_path / "t.beton", write_mode="raw")
    whole = run("verify_datasets.py", f"--cfg.path={path}")
    assert whole.returncode == 0 and "4 samples" in whole.stdout, whole.stderr
    data = bytearray(path.read_bytes())
    pixels = data.index(np.asarray(Image.open(tmp_path / "images" / "b" / "b_0.png")).tobytes())
    data[pixels + 100] ^= 1
    path.write_bytes(data)
    damaged = run("verify_datasets.py", f"--cfg.path={path}")
    assert damaged.returncode == 1 and "b/b_0.png" in damaged.stderr and "1 of 4 samples" in damaged.stderr
    trained = run(
        "train_imagenet.py", f"--data.train_dataset={path}", f"--data.val_dataset={path}", "--data.verify=True"
    )
    assert trained.returncode == 1 and "b/b_0.png" in trained.stderr


SLOW_PACK = """
import sys
sys.path.insert(0, {root!r})
import relabel.data.packing as packing
read = packing.to_be_stored
def slow(*arguments):
    print("reading", flush=True)
    sys.stdin.readline()
    return read(*arguments)
packing.to_be_stored = slow
packing.pack(packing.Packing(data_dir={images!r}, write_path={path!r}, num_workers=1, overwrite="yes"))
"""


def test_a_second_packer_of_one_path_is_refused_with_the_other_s_number(tmp_path):
    images, path = write_colors(tmp_path / "images", ["a"], 1), tmp_path / "t.beton"
    script = SLOW_PACK.format(root=str(ROOT), images=str(images), path=str(path))
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert "reading\n" in first.stdout  # up to that line
    with pytest.raises(BadInput, match=rf"is being written by process {first.pid} on"):
        pack_folder(images, path, overwrite="yes")
    first.communicate("\n" * 5)
    assert first.returncode == 0 and sorted(os.listdir(tmp_path)) == ["images", "t.beton"]
    second = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert "reading\n" in second.stdout
    second.kill()
    second.wait()
    pack_folder(images, path, overwrite="yes")  # a killed owner's lock is gone
    assert sorted(os.listdir(tmp_path)) == ["images", "t.beton"]


def test_a_second_training_in_one_folder_is_refused(tmp_path):
    from relabel.training.run_folder import RunFolder

    holder = subprocess.Popen(
        [sys.executable, "-c",
         f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from relabel.training.run_folder import RunFolder\n"
         f"with RunFolder({str(tmp_path / 'run')!r}, {{}}).begin(None):\n"
         "    print('begun', flush=True); sys.stdin.readline()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "begun\n"
    with (
        pytest.raises(BadInput, match=f"is in use by process {holder.pid}"),
        RunFolder(str(tmp_path / "run"), {}).begin(None),
    ):
        raise AssertionError("two at once")
    holder.communicate("\n")
    with RunFolder(str(tmp_path / "run"), {}).begin(None):
        pass


def test_a_run_with_other_classes_is_not_resumed(tmp_path, monkeypatch):
    from relabel.training import run_folder
    from relabel.training.run_folder import RunFolder

    monkeypatch.setattr(run_folder, "FIXED", ())
    before = RunFolder(str(tmp_path), {}, classes=("a", "b", "c"))
    with before.begin(None):
        before.save({"model": {}, "epoch": 1, "step": 0})
    with pytest.raises(BadInput, match="class 1 was 'b', it is 'x'"):
        settings = dict.fromkeys(("a",), 0)
        RunFolder(str(tmp_path), settings, classes=("a", "x", "c"))._check_classes(
            tmp_path / "checkpoint.pt", ["a", "b", "c"]
        )


# --- the property ---------------------------------------------------------------------------------------------

CLASS_NAMES = st.sampled_from(["0", "1", "2", "10", "01", "a", "b", "B", "ä", "日本", "n01440764", "n01443537", "x y"])
STEMS = st.sampled_from(["1", "2", "10", "img", "ü", "cam1", "a.b"])
FOLDERS = st.sampled_from(["", "", "cam1/", "cam2/", "cam1/deep/", "1/"])
ENDINGS = st.sampled_from([".png", ".PNG", ".jpg", ".jpeg"])


@st.composite
def trees(draw):
    """`{class: [(folder and stem, ending), ...]}` with unique stems, and which classes' folders the validation has."""
    names = draw(st.lists(CLASS_NAMES, min_size=2, max_size=6, unique=True))
    tree = {}
    for name in names:
        stems = draw(st.lists(st.tuples(FOLDERS, STEMS), max_size=3, unique=True))
        tree[name] = [(folder + stem, draw(ENDINGS)) for folder, stem in stems]
    if not any(tree.values()):
        tree[names[0]] = [("1", ".png")]
    return tree, draw(st.lists(st.sampled_from(names), min_size=1, unique=True)), draw(st.booleans())


def batch_rows(batch):
    """A pixel of each image, and its label. On the CPU the loader normalizes, torchvision does not."""
    images = batch.images.float()
    if batch.images.is_floating_point():
        images = (images * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
    return zip(images[:, 8, 8].round().int().tolist(), batch.labels.tolist(), strict=True)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(trees(), st.integers(1, 2), st.sampled_from(["tree", "inner", "archive"]), st.randoms())
def test_every_sample_has_its_own_label_map_and_listed_labels(tmp_path_factory, tree, workers, store, random):
    """Against a plain dictionary: name -> (class, map, cleaned label, right classes)."""
    tree, val_classes, as_linked = tree
    root = tmp_path_factory.mktemp("tree")
    rng, classes = np.random.default_rng(random.randrange(2**32)), sorted(tree)
    expected, rows = {}, []
    for name in classes:
        (root / "images" / name).mkdir(parents=True)
        for stem, ending in tree[name]:
            file = root / "images" / name / f"{stem}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            color = tuple(rng.integers(0, 256, 3).tolist())
            Image.new("RGB", (24, 24), color).save(file, "PNG")
            classes_ = np.stack([rng.permutation(len(classes))[:2] for _ in range(9)], 1).reshape(2, 3, 3)
            scores = rng.normal(3, 4, (2, 3, 3)).astype(np.float16).astype(np.float32)
            expected[f"{name}/{stem}{ending}"] = (name, color, np.stack([scores, classes_]).astype(np.float32))
            rows.append(f"{name}/{stem}")
    if as_linked and len(expected) > 1:  # one class's folder is a link to another place
        (root / "elsewhere").mkdir()
        (root / "images" / classes[0]).rename(root / "elsewhere" / "moved")
        (root / "images" / classes[0]).symlink_to(root / "elsewhere" / "moved")
    maps = root / ("maps.npy" if store == "archive" else "maps")
    if store == "archive":
        packed = [
            np.stack([t[0].astype(np.float16).view(np.int16), t[1].astype(np.int16)]) for *_, t in expected.values()
        ]
        np.save(maps, np.stack(packed))
        (root / "maps.npy.json").write_text(
            json.dumps({"axis_order": "yx", "scores": "logits", "files": list(expected)})
        )
    else:
        for name, (_, _, tensor) in expected.items():
            file = (maps / "inner" if store == "inner" else maps) / f"{os.path.splitext(name)[0]}.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(tensor), file)
    path = root / "t.beton"
    pack(
        Packing(
            data_dir=str(root / "images"), label_map_dir=str(maps), write_path=str(path), write_mode="raw",
            num_workers=workers, chunk_size=1, axis_order="yx", scores="logits", min_agreement=0,
        )
    )  # fmt: skip
    for samples in (Samples(str(path)), Samples(str(root / "images"), str(maps), "yx", len(classes))):
        seen = set()
        for sample in samples:
            name = sample.name.removeprefix(f"{root / 'images'}/")
            label, color, tensor = expected[name]
            seen.add(name)
            assert classes[sample.label] == label and sample.image.getpixel((5, 5)) == color
            assert np.array_equal(sample.scores, tensor[0]) and np.array_equal(sample.classes, tensor[1])
        assert seen == set(expected) and samples.classes == tuple(classes)

    # A list that names each sample by its path without the ending, in any order.
    new = {row: random.choice([*classes, "-"]) for row in rows}
    new[rows[0]] = classes[-1]
    listed = list(new)
    random.shuffle(listed)
    (root / "list.tsv").write_text("".join(f"{row}\t{new[row]}\n" for row in listed))
    ambiguous = False
    try:
        cleaned = cleaned_labels(str(root / "list.tsv"), str(path), say=False)
    except BadInput as error:
        ambiguous = "fits" in str(error)
        assert ambiguous
    if not ambiguous:
        for name, label in zip(names_of(path), cleaned.tolist(), strict=True):
            assert new[os.path.splitext(name)[0]] == ("-" if label < 0 else classes[label])
    whole = {name: random.choice(classes) for name in expected}
    (root / "multi.json").write_text(json.dumps({name: [c] for name, c in whole.items()}))
    names = names_of(path)
    right = read_multilabels(
        str(root / "multi.json"), Identity(tuple(classes), np.arange(len(classes)), names), len(classes)
    )
    assert [classes[int(row.argmax())] for row in right] == [whole[name] for name in names]

    # The validation set holds some of the classes: its labels are the network's, from a folder as from a .beton.
    kept = [c for c in val_classes if tree[c]]
    if kept:
        for c in kept:
            shutil.copytree(root / "images" / c, root / "val" / c)
        pack_folder(root / "val", root / "val.beton", write_mode="raw")
        for source, world_size in ((root / "val", 3 - workers), (root / "val.beton", workers)):
            seen = {}
            for rank in range(world_size):
                processes = Processes(rank, world_size, rank, world_size, torch.device("cpu"))
                reading = Reading(len(classes), processes, 1, classes=tuple(classes))
                loader, val_names = evaluation_loader(str(source), reading, 4, 16, 1.0)
                parts = [(pixels, int(label)) for batch in loader.epoch(0) for pixels, label in batch_rows(batch)]
                for sample, (pixel, label) in zip(loader.order_of(0), parts, strict=True):
                    seen[val_names[sample]] = pixel, classes[label]
            assert sorted(seen) == sorted(val_names)
            for name, (pixel, label) in seen.items():
                assert label == expected[name][0] and np.abs(np.subtract(pixel, expected[name][1])).max() <= 3
