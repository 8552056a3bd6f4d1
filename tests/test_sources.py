"""Each form in which people have ImageNet gives the samples of the tree: names, labels, maps, pixels; or one error."""

import pickle

import make_sources as make
import numpy as np
import pytest
from conftest import run, write_label_maps
from PIL import Image
from test_write_datasets import stored_maps

from relabel.data.beton import column, read_header
from relabel.data.contents import read_contents, read_sample_list
from relabel.data.packing import pack
from relabel.data.settings import Packing
from relabel.data.sources.opening import open_source

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
    make.val_tar(val, root / "img_val" / "ILSVRC2012_img_val.tar") if (root / "img_val").mkdir() is None else None
    make.devkit(val, root / "img_val" / f"{make.DEVKIT}.tar.gz")
    make.kaggle(val, train, root / "kaggle")
    make.flat_folder(val, root / "flat")
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
    split, settings = SOURCES[kind]
    labels = settings.get("val_labels")
    source = open_source(official / settings["data_dir"], labels=str(official / labels) if labels else "")
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
    maps = stored_maps(path) if "label_map" in header.field_names else [None] * len(names)
    starts = [int(image["data_ptr"]) for image in column(header, "image")]
    rows = zip(names, column(header, "label").tolist(), starts, maps, strict=True)
    return {
        name: (label, data[at : at + sizes[at]].tobytes(), None if m is None else (m[0].tobytes(), m[1].tobytes()))
        for name, label, at, m in rows
    }


def packed(root, path, **settings):
    for name in ("data_dir", "val_labels", "label_map_dir"):
        if name in settings:
            settings[name] = str(root / settings[name])
    pack(Packing(write_path=str(path), num_workers=2, axis_order="yx", min_agreement=0, **settings))
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
    split, settings = SOURCES[kind]
    maps = {"label_map_dir": "relabel_imagenet.tar"} if split == "train" else {}
    assert packed(official, tmp_path / "t.beton", **settings, **maps) == from_trees[split]
    said = capsys.readouterr().out.splitlines()[0]
    assert settings["data_dir"] in said and "24 images of 5 classes" in said


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
