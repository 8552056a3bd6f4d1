"""Each form in which people have ImageNet gives the samples of the tree: names, labels, maps, pixels."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import make_sources as make
import numpy as np
import pytest
import torch
from conftest import ROOT, run, write_label_maps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_write_datasets import stored_maps

from relabel.data import tensors
from relabel.data.beton import column, read_header
from relabel.data.contents import read_contents, read_sample_list
from relabel.data.folder_loader import evaluation_loader
from relabel.data.packing import pack, packed_once
from relabel.data.reading import Reading
from relabel.data.settings import Packing
from relabel.errors import BadSample
from relabel.imagenet import imagenet_classes
from relabel.label_maps.inspection import Samples
from relabel.processes import Processes
from relabel.progress import Progress, in_words
from relabel.sources.base import ClassChoice
from relabel.sources.opening import open_source, split_of
from relabel.sources.parquet import _groups
from relabel.sources.tree import SPLITS

CLASSES = sorted(make.IDS)


def write_tree(root, val=False):
    """24 images of five of ImageNet's classes by their official names, the training or the validation set's."""
    rng = np.random.default_rng(int(val))
    for i in range(24):
        wnid = CLASSES[i * 7 % 5]
        name = f"ILSVRC2012_val_{i + 1:08d}.JPEG" if val else f"{wnid}_{10026 + i}.JPEG"
        (root / wnid).mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + i, 40), Image.Resampling.BICUBIC).save(root / wnid / name, quality=95)
    return root


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with `train/`, `val/`, `maps/`, and what is made of them."""
    root = tmp_path_factory.mktemp("official")
    train, val = write_tree(root / "train"), write_tree(root / "val", val=True)
    write_label_maps(root / "maps", sorted(train.rglob("*.JPEG")), num_classes=5)
    make.train_tar(train, root / "ILSVRC2012_img_train.tar")
    (root / "img_val").mkdir()
    make.val_tar(val, root / "img_val" / "ILSVRC2012_img_val.tar")
    make.devkit(val, root / "img_val" / f"{make.DEVKIT}.tar.gz")
    make.kaggle(val, train, root / "kaggle")
    make.flat_folder(val, root / "flat")
    make.flat_folder(val, root / "flat_with_devkit")
    shutil.copy(root / "img_val" / f"{make.DEVKIT}.tar.gz", root / "flat_with_devkit")
    make.shards(train, root / "shards")
    make.shards(train, root / "keys", with_json=False)
    make.parquet(train, root / "huggingface")
    make.tree_tar(train, root / "tree.tar")
    make.tree_tar(train, root / "inner.tar", "imagenet/")
    make.label_map_tar(root / "maps", root / "relabel_imagenet.tar")
    lines = zip(*make.flat_files(val), strict=True)
    (root / "list.txt").write_text("".join(f"{name} {label}\n" for name, label in lines))
    return root


SOURCES = {  # of which split, and the settings
    "the official training archive": ("train", {"data_dir": "ILSVRC2012_img_train.tar"}),
    "the official validation archive": ("val", {"data_dir": "img_val/ILSVRC2012_img_val.tar"}),
    "Kaggle's training folder": ("train", {"data_dir": "kaggle/ILSVRC/Data/CLS-LOC/train"}),
    "Kaggle's validation folder": ("val", {"data_dir": "kaggle/ILSVRC/Data/CLS-LOC/val"}),
    "a flat folder with the devkit": ("val", {"data_dir": "flat", "val_labels": f"img_val/{make.DEVKIT}.tar.gz"}),
    "a flat folder with a list": ("val", {"data_dir": "flat", "val_labels": "list.txt"}),
    "a flat archive with a list": ("val", {"data_dir": "img_val/ILSVRC2012_img_val.tar", "val_labels": "list.txt"}),
    "Hugging Face's parquet": ("train", {"data_dir": "huggingface"}),
    "a pattern of parquet files": ("train", {"data_dir": "huggingface/data/train-*.parquet"}),
    "WebDataset shards by braces": ("train", {"data_dir": "shards/imagenet1k-train-{0000..0002}.tar"}),
    "a folder of WebDataset shards": ("train", {"data_dir": "shards"}),
    "WebDataset shards without JSON": ("train", {"data_dir": "keys"}),
    "a packed tree": ("train", {"data_dir": "tree.tar"}),
    "a packed tree in a folder": ("train", {"data_dir": "inner.tar"}),
}


def contents(source):
    """{name: (class, bytes)}"""
    return {s.name: (source.classes[s.label], source.read(s.index)) for s in source.samples}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_lists_the_tree_s_names_classes_and_bytes(official, kind):
    split, more = SOURCES[kind]
    labels = more.get("val_labels")
    source = open_source(official / more["data_dir"], labels=str(official / labels) if labels else "")
    tree = open_source(official / split)
    assert contents(source) == contents(tree) and source.classes == tree.classes
    assert [sample.index for sample in source.samples] == list(range(24))
    if "parquet" not in kind and "WebDataset" not in kind:  # these keep the order that they are stored in
        assert [sample.name for sample in source.samples] == [sample.name for sample in tree.samples]
    copy = pickle.loads(pickle.dumps(source))  # as a process that is not forked gets it
    assert contents(copy) == contents(tree)
    assert all(path.exists() for _, path in source.files())


def stored(path):
    """{name: (label, JPEG, scores and classes of the map)}"""
    header = read_header(str(path))
    names, data = read_sample_list(header).names, np.fromfile(path, np.uint8)
    sizes = dict(zip(header.alloc_table["ptr"].tolist(), header.alloc_table["size"].tolist(), strict=True))
    maps = stored_maps(path) if "label_map" in header.field_names else dict.fromkeys(names)
    starts = [int(image["data_ptr"]) for image in column(header, "image")]
    rows = zip(names, column(header, "label").tolist(), starts, maps.values(), strict=True)
    return {
        name: (label, data[at : at + sizes[at]].tobytes(), None if m is None else (m[0].tobytes(), m[1].tobytes()))
        for name, label, at, m in rows
    }


def packed(root, path, **more):
    for name in ("data_dir", "val_labels", "label_map_dir"):
        if name in more:
            more[name] = str(root / more[name])
    pack(Packing(write_path=str(path), num_workers=2, axis_order="yx", min_agreement=0, **more))
    return stored(path)


@pytest.fixture(scope="module")
def from_trees(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("betons")
    return {
        "train": packed(official, folder / "train.beton", data_dir="train", label_map_dir="maps"),
        "val": packed(official, folder / "val.beton", data_dir="val"),
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_is_packed_as_the_tree_is(official, from_trees, tmp_path, kind, capsys):
    split, more = SOURCES[kind]
    maps = {"label_map_dir": "relabel_imagenet.tar"} if split == "train" else {}
    assert packed(official, tmp_path / "t.beton", **more, **maps) == from_trees[split]
    said = capsys.readouterr().out.splitlines()[0]
    assert more["data_dir"] in said and "24 images of 5 classes" in said


def test_the_command_packs_an_archive_with_an_archive_of_label_maps(official, from_trees, tmp_path):
    result = run(
        "write_datasets.py", f"--cfg.data_dir={official}/ILSVRC2012_img_train.tar", "--cfg.axis_order=yx",
        f"--cfg.label_map_dir={official}/relabel_imagenet.tar", f"--cfg.write_path={tmp_path}/t.beton",
        "--cfg.min_agreement=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert stored(tmp_path / "t.beton") == from_trees["train"]
    assert "an archive of 5 class tars, 24 images of 5 classes" in result.stdout
    provenance = read_contents(read_header(str(tmp_path / "t.beton"))).provenance
    assert provenance["data_dir"] == str(official / "ILSVRC2012_img_train.tar") and provenance["files"] == 24


ALONE = """
import os, sys, time
from relabel.sources.opening import open_source
for path in sys.argv[1:]:
    source = open_source(path)
    source.read(0)
    end = time.monotonic() + 5  # a thread that was joined may not have left the system yet
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    print(len(os.listdir("/proc/self/task")))
"""


def test_a_source_leaves_no_threads_in_a_process_that_is_to_be_forked(official):
    paths = [str(official / name) for name in ("huggingface", "shards", "ILSVRC2012_img_train.tar", "train")]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", ALONE, *paths], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["1"] * 4, result.stderr


# --- label sets ---------------------------------------------------------------------------------------------------


def test_tokenlabeling_s_maps_are_packed_from_folder_and_archive(official, tmp_path, capsys):
    """float16 [2, 5, 18, 18]: logits, rows first, as generate_label.py of TokenLabeling writes them."""
    rng, expected = np.random.default_rng(0), {}
    for file in sorted((official / "train").rglob("*.JPEG")):
        scores, classes = rng.normal(3, 4, (5, 18, 18)), rng.random((5, 18, 18)).argsort(0)
        path = tmp_path / "label_top5_train_nfnet" / file.parent.name / f"{file.stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor = torch.from_numpy(np.stack([scores, classes])).half()
        torch.save(tensor, path)
        key = file.relative_to(official / "train").as_posix()
        expected[key] = tensor[0].float().numpy().tobytes(), classes.astype(np.int64).tobytes()
    make.tree_tar(tmp_path / "label_top5_train_nfnet", tmp_path / "nfnet.tar", "label_top5_train_nfnet/")
    for maps in ("label_top5_train_nfnet", "nfnet.tar"):
        path = tmp_path / "t.beton"
        found = packed(official, path, data_dir="train", label_map_dir=tmp_path / maps, overwrite="yes")
        assert {name: label_map for name, (_, _, label_map) in found.items()} == expected
        assert read_header(str(path)).handlers["label_map"].scores == "logits"
    assert "the scores are logits, as their values show" in capsys.readouterr().out


def multi_label_list(official, path):
    """The list of "Unlocking ImageNet's Multi-Object Nature"."""
    lines = []
    for i, file in enumerate(sorted((official / "train").rglob("*.JPEG"))):
        own = CLASSES.index(file.parent.name)
        other = (own + 1) % 5
        indices, probabilities = [(f"{own}", "1.0000"), (f"{other},{own}", "0.2500,1.0000"), ("", "")][i % 3]
        lines.append(f"{file.parent.name}/{file.name}\t{own}\t{indices}\t{probabilities}\n")
    path.write_text("".join(lines))
    return path


def test_a_multi_label_list_becomes_maps_of_one_cell_that_sum_to_one(official, tmp_path, capsys):
    maps = multi_label_list(official, tmp_path / "multilabel_annotations.tsv")
    packed(official, tmp_path / "t.beton", data_dir="ILSVRC2012_img_train.tar", label_map_dir=maps)
    header = read_header(str(tmp_path / "t.beton"))
    field = header.handlers["label_map"]
    assert (field.top_k, field.height, field.width, field.scores) == (2, 1, 1, "probabilities")
    names = sorted(read_sample_list(header).names)  # as the list is
    for (name, (scores, classes)), own in zip(
        stored_maps(tmp_path / "t.beton").items(), column(header, "label").tolist(), strict=True
    ):
        two = names.index(name) % 3 == 1
        assert scores.ravel() == pytest.approx([0.8, 0.2] if two else [1, 0], abs=1e-3)
        assert classes.ravel().tolist() == ([own, (own + 1) % 5] if two else [own, -1])
    assert "8 images without a class there keep their single label" in capsys.readouterr().out


BAD_LINES = {
    "n01440764/a.JPEG\t0\t0": "is not FILE, INDEX, INDICES, PROBABILITIES",
    "n01440764/a.JPEG\t0\t0,1\t0.5": "is not FILE, INDEX, INDICES, PROBABILITIES",
    "n01440764/a.JPEG\t0\t0,391\t0.5,1.0": "class index 391 is none of the 5 classes",
    "n01440764/a.JPEG\t1\t0\t1.0": "has the single label 1, which is n01443537: another class list",
    "n01440764/a.JPEG\t0\t0\t1.5": "are not probabilities above 0, up to 1",
    "n01440764/a.JPEG\t0\t0\tnan": "are not probabilities above 0, up to 1",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_of_a_multi_label_list_is_named(official, tmp_path, line):
    maps = multi_label_list(official, tmp_path / "labels.tsv")
    maps.write_text(maps.read_text() + line + "\n")
    with pytest.raises(BadSample, match=rf"labels\.tsv, line 25.*{BAD_LINES[line]}"):
        packed(official, tmp_path / "t.beton", data_dir="train", label_map_dir=maps)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_known_files_are_read_as_torch_reads_them(tmp_path, old, dtype):
    for i in range(6):
        tensor = (torch.rand(2, 3, 4 + i // 4, 5) * 100).to(dtype)
        torch.save(tensor, tmp_path / f"n{i}.pt", _use_new_zipfile_serialization=not old)
        data = (tmp_path / f"n{i}.pt").read_bytes()
        known = len(tensors._known)
        found = tensors.tensor_of(data, "here")
        assert torch.equal(found, tensor) and found.dtype == dtype
        assert i % 4 == 0 or len(tensors._known) == known  # the second of its kind is known
        with pytest.raises(BadSample):
            tensors.tensor_of(data[:-9], "here")
    assert torch.equal(tensors.tensor_of(data, "here"), torch.load(tmp_path / "n5.pt"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_as_torch_reads_it_or_refused(data):
    """What is read directly is what torch reads, or what was written, whatever byte is another."""
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2)
    for old in (False, True):
        file = io.BytesIO()
        torch.save(tensor, file, _use_new_zipfile_serialization=not old)
        content = bytearray(file.getvalue())
        tensors.tensor_of(bytes(content), "good")
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            theirs = torch.load(io.BytesIO(content), weights_only=True)
        except Exception:
            theirs = tensor  # a zip's checksums say that its numbers are whole, where torch reads it no more
        try:
            ours = tensors.tensor_of(bytes(content), "bad")
        except BadSample:
            ours = None
        if ours is not None:
            assert ours.numpy().tobytes() in (theirs.numpy().tobytes(), tensor.numpy().tobytes())


# --- odd names ----------------------------------------------------------------------------------------------------

LETTERS = st.sampled_from("abZ09 _-~é日\u0301'#%&,")
WORDS = st.text(LETTERS, min_size=1, max_size=12).map(str.strip).filter(bool)
LONG = st.just("long" * 40)
TREES = st.dictionaries(
    WORDS | LONG,
    st.sets(st.tuples(st.lists(WORDS | LONG, max_size=2).map(tuple), WORDS | LONG), max_size=3),
    min_size=2, max_size=4,
).filter(lambda tree: any(tree.values()) and not SPLITS.issuperset(tree))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES)
def test_any_tree_is_the_same_from_an_archive_shards_and_parquet(tree):
    """Odd, long, nested and non-ASCII names, and empty classes; the bytes are not looked at."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "tree"
        for number, (folder, names) in enumerate(tree.items()):
            (root / folder).mkdir(parents=True)
            for inner, stem in names:
                file = root.joinpath(folder, *inner, f"{stem}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(f"{number} {inner} {stem}".encode() * 30)
        expected, listed = contents(open_source(root)), ClassChoice(given=tuple(sorted(tree)))
        names = [sample.name for sample in open_source(root).samples]
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            source = open_source(make.train_tar(root, root.with_name(f"{form}.tar"), form), listed)
            assert contents(source) == expected and [sample.name for sample in source.samples] == names
            assert source.classes == tuple(sorted(tree))
        source = open_source(make.tree_tar(root, root.with_name("packed.tar")), listed)
        assert contents(source) == expected and [sample.name for sample in source.samples] == names
        make.shards(root, root.with_name("shards"), count=1, numbered=True)
        assert contents(open_source(root.with_name("shards"), listed)) == expected
        flat = {(folder, stem) for folder, files in tree.items() for inner, stem in files if not inner}
        if len(flat) == len(expected):
            make.parquet(root, root.with_name("parquet"), count=1, names=sorted(tree))
            assert contents(open_source(root.with_name("parquet"))) == expected


# --- read without packing -----------------------------------------------------------------------------------------


def test_an_archive_is_evaluated_and_inspected_as_the_tree_is(official):
    reading = Reading(1000, Processes(0, 1, 0, 1, torch.device("cpu")), 1, classes=imagenet_classes())
    found = []
    for path in (official / "val", official / "img_val" / "ILSVRC2012_img_val.tar", official / "flat_with_devkit"):
        loader, names = evaluation_loader(str(path), reading, 8, 32, 0.875)
        batches = list(loader.epoch(0))
        found.append((names, torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])))
    for names, images, labels in found[1:]:
        assert names == found[0][0] and torch.equal(images, found[0][1]) and torch.equal(labels, found[0][2])
    assert found[0][2].tolist() == sorted(found[0][2].tolist()) and found[0][2].max() == 4
    tree, tar = (
        list(Samples(str(official / images), str(official / maps), "yx", 5))
        for images, maps in (("train", "maps"), ("ILSVRC2012_img_train.tar", "relabel_imagenet.tar"))
    )
    for a, b in zip(tree, tar, strict=True):
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image)) and np.array_equal(a.scores, b.scores)
        assert a.label == b.label and np.array_equal(a.classes, b.classes)


# --- packed when training starts ----------------------------------------------------------------------------------

DOWNLOADS = {
    "folders": lambda root, train, val: [shutil.copytree(tree, root / tree.name) for tree in (train, val)],
    "archives": lambda root, train, val: [
        make.train_tar(train, root / "ILSVRC2012_img_train.tar"), make.val_tar(val, root / "ILSVRC2012_img_val.tar"),
        make.devkit(val, root / f"{make.DEVKIT}.tar.gz"),
    ],
    "Kaggle": lambda root, train, val: make.kaggle(val, train, root),
    "Hugging Face": lambda root, train, val: [
        make.parquet(train, root), make.parquet(val, root, split="validation")
    ],
    "WebDataset": lambda root, train, val: [
        make.shards(train, root), make.shards(val, root, prefix="imagenet1k-validation")
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_training_packs_downloads_once_and_again_when_they_change(
    official, from_trees, tmp_path, kind, capsys, monkeypatch
):
    monkeypatch.setattr("relabel.data.packing.pack_apart", pack)  # in this process, where it starts sooner
    root = tmp_path / "data"
    root.mkdir()
    DOWNLOADS[kind](root, official / "train", official / "val")
    for split in ("train", "val"):
        path = packed_once(split, "", str(root))
        assert {n: row[:2] for n, row in stored(path).items()} == {n: row[:2] for n, row in from_trees[split].items()}
    assert capsys.readouterr().out.count("there is none yet") == 2
    packed_once("train", "", str(root))
    assert "packing" not in capsys.readouterr().out
    changed = next(iter(open_source(split_of(str(root), "train")).files()))[1]
    os.utime(changed, ns=(0, 0))
    packed_once("train", "", str(root))
    assert "have been" in capsys.readouterr().out.partition("\n")[0]
    os.utime(changed)


def test_row_groups_are_read_whole_and_those_of_one_class_together_with_others():
    rows = np.arange(40_000)
    places = np.stack([rows // 20_000, rows % 20_000 // 100, rows % 100], 1)  # two files of 200 row groups
    mixed, sorted_ = np.random.default_rng(0).integers(0, 1000, len(rows)), rows // 40
    assert np.array_equal(_groups(places, mixed, 1 << 20), rows // 100)
    groups = _groups(places, sorted_, 1 << 20)
    assert len(np.unique(groups)) == 50 and all(len(np.unique(groups[i : i + 100])) == 1 for i in range(0, 40_000, 100))
    assert np.array_equal(np.bincount(groups), np.full(50, 800))
    assert len(np.unique(_groups(places, sorted_, 200 << 20))) == 400  # not more than is kept in memory


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_every_few_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("relabel.progress.time.monotonic", lambda: now[0])
    with Progress("train", 1_281_167, "images") as progress, Progress("x", 10, "images", hidden=True) as hidden:
        for _ in range(300):
            now[0] += 1
            progress.update(300)
            hidden.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1,500 of 1,281,167 images (0 %), 300/s, 1 h 11 min left"
    assert 15 < len(lines) < 40 and all(line.startswith("train: ") for line in lines)
    assert Progress("index", None, "members").line(2.0) == "index: 0 members, 0/s"
    assert [in_words(s) for s in (20, 100, 4000)] == ["20 s", "2 min", "1 h 7 min"]
