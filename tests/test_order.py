"""In which order samples are packed and read, and what must not depend on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from ffcv_fields import CropSampler
from conftest import names_of, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relabel.data import order as order_module
from relabel.data.beton import labels_of, read_header
from relabel.data.contents import read_contents
from relabel.data.names import Identity, path_order
from relabel.data.order import classes_in_a_batch, near_sequential_order, packing_order, random_order
from relabel.data.packing import pack
from relabel.data.reading import Reading, training_loader
from relabel.data.settings import Packing
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabels
from relabel.processes import join
from relabel.sources.opening import open_source

PAGE = 8 << 20


def pack_folder(folder, path, **more):
    pack(Packing(data_dir=str(folder), write_path=str(path), **({"num_workers": 1} | more)))
    return str(path)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**31))
def test_the_packing_order_is_a_permutation_of_its_seed(count, seed):
    order = packing_order(count, seed)
    assert np.array_equal(np.sort(order), np.arange(count)) and np.array_equal(order, packing_order(count, seed))
    if count > 20:
        assert not np.array_equal(order, packing_order(count, seed + 1)) and not np.array_equal(order, np.arange(count))
        assert not np.array_equal(order, random_order(count, seed, 0))  # a training's with the same seed


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 2**31))
def test_samples_of_a_group_stay_together(groups, seed):
    """As rows of a row group of a parquet file do, each of which is dear to open."""
    order = packing_order(len(groups), seed, np.array(groups))
    assert sorted(order.tolist()) == list(range(len(groups)))
    read = np.array(groups)[order]
    assert 1 + np.count_nonzero(np.diff(read)) == len(set(groups))


def test_a_file_is_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    write_images(tmp_path / "images", 60)
    big = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype=np.uint8)  # 6.75 MB as raw: pages end
    for i in range(0, 60, 15):
        Image.fromarray(big).save(tmp_path / "images" / "class0" / f"big{i}.png", compress_level=0)
    (tmp_path / "images" / "class1" / "bad.jpg").write_bytes(b"no image")
    raw = {"write_mode": "raw", "max_resolution": 0, "on_error": "skip"}
    one = pack_folder(tmp_path / "images", tmp_path / "1.beton", **raw)
    assert len(set(read_header(one).metadata["f0"]["data_ptr"] // PAGE)) > 2
    for workers, chunk in ((2, 3), (4, 1), (7, 100)):
        other = pack_folder(
            tmp_path / "images", tmp_path / f"{workers}.beton", num_workers=workers, chunk_size=chunk, **raw
        )
        assert Path(other).read_bytes() == Path(one).read_bytes()
    other = pack_folder(tmp_path / "images", tmp_path / "seed.beton", seed=1, **raw)
    assert names_of(other) != names_of(one) and sorted(names_of(other)) == sorted(names_of(one))
    recorded = read_contents(read_header(other)).provenance["settings"]
    assert (recorded["order"], recorded["seed"]) == ("random", 1)


def test_sorted_is_by_class_and_name_and_a_subset_is_of_the_first_names(tmp_path):
    write_images(tmp_path / "images", 24)
    names = [image.name for image in open_source(tmp_path / "images").samples]
    path = pack_folder(tmp_path / "images", tmp_path / "sorted.beton", order="sorted")
    assert names_of(path) == names and labels_of(path).tolist() == sorted(labels_of(path).tolist())
    part = names_of(pack_folder(tmp_path / "images", tmp_path / "part.beton", subset=10))
    assert part != names[:10] and sorted(part) == sorted(names[:10])


@pytest.mark.parametrize("batch_size, in_class_order, mixed", [(1024, 42, 645), (256, 35, 225)])
def test_a_batch_read_near_sequentially_holds_as_many_classes_as_a_random_one(batch_size, in_class_order, mixed):
    """ImageNet's numbers: classes of 732 to 1,300 images, 70 KB an image with its label map."""
    sizes = np.full(1000, 1300)
    sizes[np.random.default_rng(0).permutation(1000)[:105]] = 732 + 568 * np.linspace(0, 1, 105) ** 0.46
    labels = np.repeat(np.arange(1000), sizes)
    count = len(labels)
    pages = np.arange(count) // (PAGE // 70_000)
    read = near_sequential_order(pages, 0, 0)
    found = classes_in_a_batch(labels, read, batch_size, most=count)
    assert found == pytest.approx(in_class_order, abs=1.5)
    packed = labels[packing_order(count, 0)]
    found = classes_in_a_batch(packed, read, batch_size, most=count)
    assert found == pytest.approx(mixed, rel=0.01)
    assert found == pytest.approx(
        classes_in_a_batch(labels, random_order(count, 0, 0), batch_size, most=count), rel=0.01
    )


def test_a_file_in_class_order_that_is_read_near_sequentially_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 1)
    for c in range(8):
        (tmp_path / "images" / f"{c}").mkdir(parents=True)
        for i in range(22):
            Image.new("RGB", (500, 500)).save(tmp_path / "images" / f"{c}" / f"{i}.png")  # eleven on a page
    settings = {"write_mode": "raw", "max_resolution": 0, "num_workers": 2}
    for order in ("sorted", "random"):
        path = pack_folder(tmp_path / "images", tmp_path / f"{order}.beton", order=order, **settings)
        for in_memory in (True, False):
            capsys.readouterr()
            reading = Reading(8, join(-1, "gloo"), num_workers=1, in_memory=in_memory)
            training_loader(path, reading, 8, CropSampler(0), 16, label_maps=False)
            said = capsys.readouterr().out
            warned = [line for line in said.splitlines() if "is sorted by class" in line]
            assert len(warned) == (order == "sorted" and not in_memory)
            assert not warned or ("pack it again" in warned[0] and "data.in_memory=True" in warned[0])


# --- lists without names ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab.- z0", min_size=1, max_size=3), min_size=1, max_size=4), st.randoms())
def test_the_order_of_paths_is_the_one_in_which_a_folder_is_read(tmp_path_factory, parts, random):
    root = tmp_path_factory.mktemp("tree")
    parts = [part for part in parts if part.strip(".") and not part.startswith(".")] or ["a"]
    for _ in range(12):
        folder = root.joinpath(*(random.choice(parts) for _ in range(random.randint(1, 3))))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{random.choice(parts)}{random.randrange(3)}.jpg").write_bytes(b"")
        except FileExistsError:
            continue
    names = [image.name for image in open_source(root).samples]
    assert sorted(random.sample(names, len(names)), key=path_order) == names


def test_a_list_without_names_goes_by_path_whatever_the_order_of_the_file(tmp_path):
    write_images(tmp_path / "images", 48)
    folder = open_source(tmp_path / "images")
    right = [[image.label, (image.label + i) % 8] for i, image in enumerate(folder.samples)]
    (tmp_path / "list.json").write_text(json.dumps(right))
    expected = {image.name: set(classes) for image, classes in zip(folder.samples, right, strict=True)}
    for order in ("random", "sorted"):
        path = pack_folder(tmp_path / "images", tmp_path / f"{order}.beton", order=order)
        identity = Identity(folder.classes, np.arange(8), names_of(path), folder.classes)
        found = read_multilabels(str(tmp_path / "list.json"), identity, 8, labels_of(path))
        assert {n: set(np.flatnonzero(r).tolist()) for n, r in zip(names_of(path), found, strict=True)} == expected
        positions = [names_of(path).index(image.name) for image in folder.samples]
        (tmp_path / "other.json").write_text(json.dumps([right[positions.index(i)] for i in range(48)]))
        if order == "random":  # a list in the file's own order
            with pytest.raises(BadInput, match=r"other\.json: .* it is in another order; name the samples"):
                read_multilabels(str(tmp_path / "other.json"), identity, 8, labels_of(path))
