"""What is wrong with an archive, a list or a table is one line that names file, member and fix; nothing is written."""

import io
import json
import os
import shutil
import sys
import tarfile

import make_sources as make
import pytest
import torch
from test_sources import CLASSES, packed, write_tree

from relabel.data.label_map_files import find_label_maps
from relabel.errors import BadInput, BadSample
from relabel.sources.base import ClassChoice
from relabel.sources.opening import open_source
from relabel.sources.tar import BLOCK, index_tar


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return write_tree(root / "train"), write_tree(root / "val", val=True)


def refused(path, message, **more):
    with pytest.raises(BadInput, match=message) as error:
        open_source(path, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- tars ---------------------------------------------------------------------------------------------------------


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def last_of(path):
    """Where the last inner archive begins and how long it is."""
    with tarfile.open(path) as archive:
        member = archive.getmembers()[-1]
    return member.offset_data, member.size


def inside_a_member(path):
    offset, size = last_of(path)
    cut(path, offset + size // 2)


def between_two_members(path):
    cut(path, last_of(path)[0] - BLOCK)


def inside_an_inner_archive(path):
    """The last class's own archive was cut off before the outer one was made."""
    offset, size = last_of(path)
    data = bytearray(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data[offset : offset + size])) as inner:
        end = inner.getmembers()[-1].offset
    make_it = io.BytesIO()
    with tarfile.open(fileobj=make_it, mode="w") as archive:
        make.add(archive, f"{CLASSES[-1]}.tar", bytes(data[offset : offset + end]))
    path.write_bytes(make_it.getvalue())


def in_a_header(path):
    data = bytearray(path.read_bytes())
    data[last_of(path)[0] - BLOCK + 3] ^= 1
    path.write_bytes(data)


def joined(path):
    path.write_bytes(path.read_bytes() * 2)


TARS = {
    inside_a_member: r"train\.tar: member n01494475\.tar: is cut off, [\d,]+ bytes are missing; .* get it again",
    between_two_members: r"train\.tar: is cut off at byte [\d,]+, before its end mark; .* get it again",
    inside_an_inner_archive: r"train\.tar: member n01494475\.tar: is cut off at byte [\d,]+, before its end mark",
    in_a_header: r"train\.tar: is damaged at byte [\d,]+, in a header; get it again",
    joined: r"train\.tar: goes on behind its end mark at byte [\d,]+: archives joined by cat",
}


@pytest.mark.parametrize("damage", TARS, ids=lambda damage: damage.__name__)
def test_a_damaged_archive_is_named(trees, tmp_path, damage):
    path = make.train_tar(trees[0], tmp_path / "train.tar")
    damage(path)
    refused(path, TARS[damage])


@pytest.mark.parametrize("kind, command", [("w:gz", "gunzip"), ("w:xz", "unxz"), ("w:bz2", "bunzip2")])
def test_a_compressed_archive_is_refused_with_the_command(trees, tmp_path, kind, command):
    with tarfile.open(tmp_path / "train.tar", kind) as archive:
        archive.add(trees[0], "train")
    refused(tmp_path / "train.tar", f"is compressed .*; first: {command} it")
    os.rename(tmp_path / "train.tar", tmp_path / "train.tar.gz")
    refused(tmp_path / "train.tar.gz", "is compressed, so that nothing in it can be found: unpack it")


def add_link(archive):
    link = tarfile.TarInfo("n01440764/z.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "n01440764_10026.JPEG"
    archive.addfile(link)


MEMBERS = {
    "a link": (add_link, r"member n01440764/z\.JPEG: is a link; .* --dereference"),
    "a way out": (lambda a: make.add(a, "n01440764/../x.JPEG", b""), r"\.\./x\.JPEG: lies outside of the archive"),
    "one name twice": (lambda a: make.add(a, "./n01440764/n01440764_10026.JPEG", b"x"), "are one sample, n01440764/"),
    "a tar beside images": (lambda a: make.add(a, "x.tar", b""), "stands beside tars"),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_that_cannot_be_is_named(trees, tmp_path, kind):
    path = make.tree_tar(trees[0], tmp_path / "t.tar")
    with tarfile.open(path, "a") as archive:
        MEMBERS[kind][0](archive)
    refused(path, MEMBERS[kind][1])


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"<html>403</html>" * 100)
    refused(tmp_path / "t.tar", r"t\.tar: is no tar archive")
    (tmp_path / "t.tar").write_bytes(b"")
    refused(tmp_path / "t.tar", r"t\.tar: is cut off at byte 0")
    refused(tmp_path / "nothing.tar", r"nothing\.tar: does not exist; give a folder of class folders")


def test_a_size_beyond_8_gib_is_understood(tmp_path):
    """GNU's and pax's form: the file's 9 GiB are a hole."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = tarfile.TarInfo("n01440764/a.JPEG")
        member.size = 9 << 30
        header = member.tobuf(form)
        with open(tmp_path / "t.tar", "wb") as file:
            file.write(header)
            file.truncate(len(header) + member.size + 2 * BLOCK)
        index = index_tar(tmp_path / "t.tar")
        assert list(index.sizes) == [9 << 30] and list(index.offsets) == [len(header)]


def test_the_index_of_an_archive_is_reported_while_it_grows(trees, tmp_path):
    seen = []
    index = index_tar(make.train_tar(trees[0], tmp_path / "train.tar"), seen.append)
    assert len(seen) == 5 and sum(seen) == len(index) == 24


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_damaged_member_is_named_and_nothing_is_written(trees, tmp_path, on_error):
    path = make.train_tar(trees[0], tmp_path / "train.tar")
    source = open_source(path)
    _, offset, size = source.spans[7].tolist()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    name = source.samples[7].name
    member = f"{path}: member {name.replace('/', '.tar/')}"
    if on_error == "stop":
        with pytest.raises(BadSample, match="cannot be decoded") as error:
            packed(tmp_path, tmp_path / "t.beton", data_dir="train.tar")
        assert str(error.value).startswith(member) and os.listdir(tmp_path) == ["train.tar"]
    else:
        assert name not in packed(tmp_path, tmp_path / "t.beton", data_dir="train.tar", on_error="skip")
        assert (tmp_path / "t.beton.skipped.tsv").read_text().startswith(f"{member}\t")


# --- folders and patterns -----------------------------------------------------------------------------------------


def test_folders_of_splits_are_no_classes(trees, tmp_path):
    refused(trees[0].parent, "holds the folders train, val, which are no classes; give one of them")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(trees[0], "train")
        archive.add(trees[1], "val")
    refused(tmp_path / "t.tar", "holds the folders train, val, which are no classes")


def test_a_folder_s_name_in_an_archive_is_not_guessed_to_be_a_class(tmp_path):
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for name in ("pets/cat/1.jpg", "pets/dog/1.jpg"):
            make.add(archive, name, name.encode())
    refused(tmp_path / "pets.tar", "holds all images in the folder pets; is it a class")
    source = open_source(tmp_path / "pets.tar", ClassChoice(given=("cat", "dog")))
    assert [(sample.name, sample.label) for sample in source.samples] == [("cat/1.jpg", 0), ("dog/1.jpg", 1)]
    assert open_source(tmp_path / "pets.tar", ClassChoice(given=("pets",))).samples[1].name == "pets/dog/1.jpg"


def test_images_beside_class_folders_are_not_dropped_and_other_files_do_not_hide_a_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("README.txt", "a/n01440764/1.jpg", "a/n01443537/2.jpg", "a/._x.jpg"):
            make.add(archive, name, name.encode())
    assert [sample.name for sample in open_source(tmp_path / "a.tar").samples] == ["n01440764/1.jpg", "n01443537/2.jpg"]
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        make.add(archive, "3.jpg", b"")
    refused(tmp_path / "a.tar", r"holds images in class folders and beside them \(3\.jpg\)")


def test_flat_archives_are_class_tars_only_where_their_names_are_classes(trees, tmp_path):
    for folder in sorted(trees[0].iterdir()):
        with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.add(file, file.name)
    assert {s.name for s in open_source(tmp_path).samples} == {s.name for s in open_source(trees[0]).samples}
    (tmp_path / "n01440764.tar").rename(tmp_path / "images_0.tar")
    refused(tmp_path, r"images_0\.tar: holds images in no class folders; is its name their class")


def test_several_splits_kinds_or_missing_shards_are_refused(trees, tmp_path):
    make.parquet(trees[0], tmp_path)
    make.parquet(trees[1], tmp_path, split="validation")
    refused(tmp_path, r"holds several splits \(train-.*, validation-.*\); give a pattern")
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    refused(tmp_path / "data" / "train-*.parquet", "lacks 1 of 2 shards of train-, number 0 first; get them all")
    make.shards(trees[0], tmp_path / "data")
    refused(tmp_path / "data", r"holds \.parquet and \.tar files; give a pattern")
    refused(tmp_path / "data" / "imagenet1k-train-{0000..0003}.tar", r"imagenet1k-train-0003\.tar: does not exist")
    refused(tmp_path / "data" / "x-*.tar", "fits no file")
    (tmp_path / "data" / "more").mkdir()
    refused(tmp_path / "data", r"holds folders \(more\) and archives")


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flat(trees, tmp_path):
    return make.flat_folder(trees[1], tmp_path / "flat" / "images")


def test_images_without_labels_ask_for_them(flat):
    refused(flat, r"holds images in no class folders; say what labels them as cfg\.val_labels: .*devkit")


def test_labels_of_a_tree_are_refused(trees, tmp_path):
    make.devkit(trees[1], tmp_path / "devkit.tar.gz")
    refused(trees[0], r"says its images' classes itself .*; leave cfg\.val_labels out", labels=str(tmp_path))


@pytest.mark.parametrize("extracted", [False, True])
def test_the_devkit_of_another_year_or_of_other_images_is_refused(trees, flat, tmp_path, extracted):
    def labels(kit):
        if not extracted:
            return str(kit)
        with tarfile.open(kit) as archive:
            archive.extractall(tmp_path / f"{kit.stem}_extracted", filter="data")
        return str(tmp_path / f"{kit.stem}_extracted" / make.DEVKIT)

    assert len(open_source(flat, labels=labels(make.devkit(trees[1], tmp_path / "good.tar.gz"))).samples) == 24
    kit = make.devkit(trees[1], tmp_path / "2010.tar.gz", year=2010)
    refused(flat, r"has .*ILSVRC2010_.*ground_truth\.txt, not .*: the devkit of another year", labels=labels(kit))
    extra = shutil.copy(next(flat.iterdir()), flat / "ILSVRC2012_val_00000025.JPEG")
    refused(flat, rf"{extra}: has no label in .*, nor have 0 others", labels=labels(tmp_path / "good.tar.gz"))
    os.remove(extra)
    os.remove(flat / "ILSVRC2012_val_00000024.JPEG")
    message = "labels 1 images that are not in .*, ILSVRC2012_val_00000024 first; get them all"
    refused(flat, message, labels=labels(tmp_path / "good.tar.gz"))


def test_kaggle_s_solution_must_name_the_images_that_are_there(trees, tmp_path):
    images = make.kaggle(trees[1], trees[0], tmp_path)
    solution = tmp_path / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text("\n".join(lines[:-1]))
    refused(images, r"ILSVRC2012_val_00000001\.JPEG: has no label in .*LOC_val_solution\.csv")
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000099,n01440764 1 2 3 4 "]))
    refused(images, r"labels 1 images that are not in .*, ILSVRC2012_val_00000099 first")
    solution.write_text("\n".join([*lines, lines[-1]]))
    refused(images, "line 26: labels ILSVRC2012_val_00000001 a second time")
    solution.write_text("\n".join([*lines[:-1], "ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01443537 1 2 3 4"]))
    refused(images, "line 25: .* is not an image and the boxes of one class")


def test_numbers_in_a_list_are_places_in_a_list_of_classes_that_is_said(trees, flat, tmp_path):
    files, classes = make.flat_files(trees[1])
    rows = list(zip(files, classes, strict=True))
    path = tmp_path / "val.txt"
    path.write_text("".join(f"{name} {CLASSES.index(label)}\n" for name, label in rows))
    refused(flat, r"its labels are numbers; give .*cfg\.class_list, or cfg\.num_classes=1000", labels=str(path))
    choice = ClassChoice(given=tuple(CLASSES))
    found = open_source(flat, choice, str(path))
    assert [s.name for s in found.samples] == [s.name for s in open_source(trees[1]).samples]
    path.write_text("".join(f"{name} {CLASSES.index(label) + 1}\n" for name, label in rows))
    refused(flat, "'5' is none of the 5 classes", choice=choice, labels=str(path))
    path.write_text("a.JPEG\n")
    refused(flat, "line 1: 'a.JPEG' is not NAME LABEL", labels=str(path))


# --- parquet and WebDataset ---------------------------------------------------------------------------------------


def rewritten(folder, change):
    """Parquet files with one table changed."""
    import pyarrow.parquet as pq

    file = sorted((folder / "data").iterdir())[0]
    table = pq.read_table(file)
    pq.write_table(change(table), file)
    return folder


def with_image(table, **entries):
    import pyarrow as pa

    images = table.column("image").to_pylist()
    images[2] |= entries
    return table.set_column(0, "image", pa.array(images, table.schema.field("image").type))


def with_label(table, label):
    import pyarrow as pa

    labels = table.column("label").to_pylist()
    return table.set_column(1, "label", pa.array([*labels[:2], label, *labels[3:]]))


TABLES = {
    "no name": (lambda t: with_image(t, path=None), "row group 0, row 2: has no name in image.path"),
    "no WordNet id": (lambda t: with_image(t, path="a.JPEG"), r"has the name a\.JPEG, without the WordNet id"),
    "another class": (
        lambda t: with_label(t, 99),
        r"has label \d+ and the class n\d+; elsewhere (label|n\d+) ",
    ),
    "a test set": (lambda t: with_label(t, -1), "has label -1: is it a test set"),
    "no label": (lambda t: t.drop_columns(["label"]), "has the columns image; needed is label"),
    "no image": (lambda t: t.drop_columns(["image"]), r"has the columns label; needed are image \(bytes, path\)"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_cannot_be_read_surely_is_refused(trees, tmp_path, kind):
    refused(rewritten(make.parquet(trees[0], tmp_path), TABLES[kind][0]), TABLES[kind][1])


def test_a_table_without_bytes_truncated_or_without_pyarrow_is_named(trees, tmp_path, monkeypatch):
    folder = rewritten(make.parquet(trees[0], tmp_path), lambda table: with_image(table, bytes=None))
    with pytest.raises(BadSample, match=r"row group 0, row 2, .*: has no bytes, the path alone"):
        open_source(folder).read(2)
    file = sorted((folder / "data").iterdir())[1]
    cut(file, 1000)
    refused(folder, r"00001-of-00002\.parquet: is no parquet file, or truncated .*; get it again")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(folder, "parquet files are read by pyarrow; first: pip install pyarrow")


def test_classes_of_a_table_without_wordnet_ids_are_those_of_its_schema(tmp_path):
    for name in ("b/1.jpg", "a/2.jpg", "b/3.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    folder = make.parquet(tmp_path / "tree", tmp_path / "hf", names=["zebra, horse", "ant"])  # not sorted
    source = open_source(folder)
    assert source.classes == ("zebra, horse", "ant") and {s.name for s in source.samples} == {
        "zebra, horse/2.jpg", "ant/1.jpg", "ant/3.jpg"
    }  # fmt: skip
    assert all(source.read(s.index).decode().startswith("ab"[s.label]) for s in source.samples)


def test_a_class_list_that_is_given_holds_the_schema_s_names_or_replaces_them(tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)

    def found(names, *given):
        source = open_source(make.parquet(tmp_path / "tree", tmp_path, names=names), ClassChoice(given=given or None))
        return {source.read(s.index).decode()[0]: source.classes[s.label] for s in source.samples}

    assert found(["x", "y"], "y", "more", "x") == {"a": "x", "b": "y"}  # by name, whatever the order
    assert found(["x/1", "y/2"], "u", "v") == {"a": "u", "b": "v"}  # by number
    refused(tmp_path, r"hold a slash; give others as cfg\.class_list")
    make.parquet(tmp_path / "tree", tmp_path, names=["x", "y"])
    refused(tmp_path, "has a class 'x', none of the 3 of the class list", choice=ClassChoice(given=("u", "v", "w")))
    refused(tmp_path, "has a class 'x', none of the 2 of the class list", choice=ClassChoice(given=("u", "y")))


def shard(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, text in members:
            make.add(archive, name, text.encode())
    return path


GOOD = (("n01440764_1.jpg", "x"), ("n01440764_1.cls", "0"))
SHARDS = {
    "two classes": ([("n01440764_1.json", '{"label": 1}')], "is of class 0 by its .cls, of class 1 by"),
    "no image": ([("n2.cls", "0")], "sample n2: has no images among its members cls; one is needed"),
    "no class": ([("n2.jpg", "x")], r"sample n2: has no class: n2\.cls, or label in n2\.json"),
    "no number": ([("n2.jpg", "x"), ("n2.cls", "cat")], r"member n2\.cls: says class 'cat', which is no number"),
    "no name": ([("n2.jpg", "x"), ("n2.cls", "1")], r"class 1 has a number and no name; give .*cfg\.class_list"),
    "a second name": (
        [("n01443537_1.jpg", "x"), ("n01443537_1.cls", "0")], "in n01443537; elsewhere class 0 is n01440764"
    ),
    "a second number": (
        [("n01440764_2.jpg", "x"), ("n01440764_2.cls", "1")], "in n01440764; elsewhere n01440764 is class 0"
    ),
    "another folder": (
        [("n01440764_1.json", '{"label": 0, "filename": "n01443537/n01440764_1.JPEG"}')], "in a folder of another class"
    ),
    "damaged JSON": ([("n01440764_1.json", '{"label":')], r"member n01440764_1\.json: is no JSON"),
    "a key twice": ([("n01440764_1.jpg", "y")], r"member n01440764_1\.jpg: is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard_that_contradicts_itself_is_refused(tmp_path, kind):
    more, message = SHARDS[kind]
    refused(shard(tmp_path / "t.tar", *GOOD, *more), message)


def test_shards_that_are_missing_or_too_short_are_named(trees, tmp_path):
    pattern = make.shards(trees[0], tmp_path).with_name("imagenet1k-train-*.tar")
    lengths = [8, 8, 8]
    names = [f"imagenet1k-train-{i:04d}.tar" for i in range(4)]
    about = {
        "splits": {"train": {"name": "train", "num_samples": 24, "filenames": names[:3], "shard_lengths": lengths}}
    }
    (tmp_path / "_info.json").write_text(json.dumps(about))
    assert len(open_source(pattern).samples) == 24
    lengths[1] = 9
    (tmp_path / "_info.json").write_text(json.dumps(about))
    refused(pattern, r"0001\.tar: holds 8 samples, _info\.json says 9; get the shard again")
    about["splits"]["train"] |= {"filenames": names, "shard_lengths": [8, 8, 8, 8]}
    (tmp_path / "_info.json").write_text(json.dumps(about))
    refused(pattern, r"lacks 1 shards of _info\.json, imagenet1k-train-0003\.tar first; get them all")
    assert len(open_source(tmp_path / "imagenet1k-train-{0000..0001}.tar").samples) == 16  # as was said
    (tmp_path / "_info.json").write_text("{}")
    refused(pattern, r"_info\.json: does not list shards as timm's does")
    (tmp_path / "_info.json").unlink()
    (tmp_path / names[1]).unlink()
    refused(tmp_path, "lacks 1 shards of imagenet1k-train-, number 1 first; get them all")


def test_wordnet_ids_are_in_their_own_order_whatever_numbers_shards_give_them(tmp_path):
    path = shard(tmp_path / "t.tar", ("n01440764_1.jpg", "x"), ("n01440764_1.cls", "7"), ("n01443537_1.jpg", "x"),
                 ("n01443537_1.cls", "2"))  # fmt: skip
    source = open_source(path)
    assert source.classes == ("n01440764", "n01443537") and [sample.label for sample in source.samples] == [0, 1]


def test_the_class_numbers_of_shards_must_be_those_of_the_list_that_is_given(tmp_path):
    path = shard(tmp_path / "t.tar", *GOOD)
    assert open_source(path, ClassChoice(1000)).samples[0].label == 0
    refused(path, "its class 0 is n01440764, by the class list cat; give", choice=ClassChoice(given=("cat",)))
    path = shard(tmp_path / "t.tar", ("7.jpg", "x"), ("7.cls", "1"))
    source = open_source(path, ClassChoice(given=("cat", "dog")))
    assert [(s.name, s.label) for s in source.samples] == [("dog/7.jpg", 1)]
    refused(path, "its class 1 is not in it", choice=ClassChoice(given=("cat",)))


# --- label maps ---------------------------------------------------------------------------------------------------


def test_an_archive_of_label_maps_that_cannot_be_used_is_named(trees, tmp_path):
    for wnid in CLASSES:
        (tmp_path / "maps" / wnid).mkdir(parents=True)
        torch.save(torch.rand(2, 5, 3, 3), tmp_path / "maps" / wnid / f"{wnid}_1.pt")
    path = make.label_map_tar(tmp_path / "maps", tmp_path / "maps.tar")
    assert len(find_label_maps(path, CLASSES)) == 5
    with pytest.raises(BadSample, match=r"maps\.tar: holds no folder named as an image class"):
        find_label_maps(path, ["cat", "dog"])
    with tarfile.open(path, "a") as archive:
        make.add(archive, "more/n01440764/a.pt", b"")
    with pytest.raises(BadSample, match=r"maps\.tar: holds class folders in imagenet_.* and in more"):
        find_label_maps(path, CLASSES)
    cut(path, 3 * path.stat().st_size // 4)
    with pytest.raises(BadSample, match=r"maps\.tar: .*is cut off"):
        find_label_maps(path, CLASSES)
    with tarfile.open(tmp_path / "maps.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "maps", "maps")
    with pytest.raises(BadSample, match=r"maps\.tar\.gz: is no \.npy, \.tar or \.tsv .*unpack it first"):
        find_label_maps(tmp_path / "maps.tar.gz", CLASSES)
