"""Shards: several files that are read as the one file would be."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ffcv_fields import CropSampler
from conftest import label_map_tensor, names_of, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from relabel.data.cleaning import cleaned_labels
from relabel.data.dataset import open_dataset
from relabel.data.folder_loader import evaluation_loader
from relabel.data.packing import pack, packed_once
from relabel.data.parts import bounds_of
from relabel.data.reading import Reading, training_loader
from relabel.data.settings import Packing
from relabel.data.storage import PagedFiles, map_files
from relabel.data.verification import verify
from relabel.errors import BadInput
from relabel.label_maps.inspection import Samples
from relabel.processes import Processes

CLASSES, COUNT = 4, 60


def write_tree(root: Path, count: int = COUNT, side: int = 300, seed: int = 0) -> dict[str, str]:
    """Images of one color each, raw files of 270 KB of which 29 fill a page, and their label maps."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        folder, stem = f"c{i % CLASSES}", f"{i:03d}"
        for kind in ("images", "maps"):
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist())).save(
            root / f"images/{folder}/{stem}.png"
        )
        torch.save(label_map_tensor(rng, CLASSES, 2, 3, 3), root / f"maps/{folder}/{stem}.pt")
    return {"data_dir": str(root / "images"), "label_map_dir": str(root / "maps"), "axis_order": "yx",
            "scores": "logits", "min_agreement": 0, "write_mode": "raw"}  # fmt: skip


def write(path, given, **more):
    pack(Packing(write_path=str(path), **({"num_workers": 1} | given | more)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of `one.beton` and `part-K-of-3.beton`, the settings they were packed by)."""
    root = tmp_path_factory.mktemp("shards")
    given = write_tree(root)
    write(root / "one.beton", given)
    for number in (1, 2, 3):
        write(root / "part.beton", given, shard=f"{number}/3", num_workers=number)
    return root, given


def loader_of(path, rank=0, world_size=1, in_memory=True, batch_size=6, **more):
    reading = Reading(CLASSES, Processes(rank, world_size, rank, world_size, torch.device("cpu")), 1, in_memory)
    return training_loader(str(path), reading, batch_size // world_size, CropSampler(5), 24, **more)


def batches_of(loader, epoch, first=0):
    """Everything that an epoch hands out: images, labels, label maps, crop boxes, as bytes, a batch each."""
    return [
        tuple(part.numpy().tobytes() for part in (batch.images, batch.labels, batch.label_maps, batch.crop_boxes))
        for batch in loader.epoch(epoch, first)
    ]


def contents_of(path):
    """{name: (label, pixels, label map)}, straight from the files."""
    dataset, found = open_dataset(str(path)), {}
    names, numbers = dataset.sample_list().names, range(dataset.num_samples)
    pages, label_map = PagedFiles(dataset), dataset.handlers["label_map"]
    with pages.schedule_epoch([np.array([i]) for i in numbers]) as epoch:
        memory, addresses, sizes, slots = epoch.state
        for i in numbers:
            epoch.start_batch(i)
            pieces = []
            for field in ("image", "label_map"):
                at = int(dataset.column(field)["data_ptr"][i])
                size = int(sizes[np.searchsorted(addresses, np.uint64(at))])
                page = memory[slots[at // dataset.page_size]]
                pieces.append(page[at % dataset.page_size :][:size].tobytes())
            assert len(pieces[1]) == label_map.nbytes
            found[names[i]] = (int(dataset.column("label")[i]), *pieces)
    return found


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.data())
def test_shards_are_a_partition_in_order(count, extra, data):
    total = count + extra
    found = []
    for number in range(1, count + 1):
        settings = Packing(data_dir="d", write_path="w", shard=f"{number}/{count}")
        first, end = bounds_of(total, settings)
        assert end - first in (total // count, -(-total // count))
        found += range(first, end)
    assert found == list(range(total))


def test_shards_together_are_the_single_file(files):
    root, _ = files
    one, parts = open_dataset(f"{root}/one.beton"), open_dataset(f"{root}/part-*-of-3.beton")
    assert [Path(header.file_name).name for header in parts.headers] == [f"part-{k}-of-3.beton" for k in (1, 2, 3)]
    assert parts.sample_list().names == tuple(names_of(root / "one.beton")) == one.sample_list().names
    assert np.array_equal(parts.column("label"), one.column("label"))
    assert np.array_equal(parts.sample_list().checksums, one.sample_list().checksums)
    assert contents_of(f"{root}/part-*-of-3.beton") == contents_of(f"{root}/one.beton")
    assert one.contents.part.samples == parts.contents.part.samples and one.contents.part.count == 1
    assert verify(f"{root}/part-*-of-3.beton") == COUNT and verify(f"{root}/part-2-of-3.beton") == 20


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_on_shards_is_training_on_the_single_file_also_after_a_resume(files, world_size):
    root, _ = files
    for rank in range(world_size):
        one = loader_of(root / "one.beton", rank, world_size)
        shards = loader_of(f"{root}/part-*-of-3.beton", rank, world_size)
        for epoch in (0, 3):
            whole = batches_of(one, epoch)
            assert len(whole) == COUNT // 6 and batches_of(shards, epoch) == whole
            assert batches_of(shards, epoch, first=4) == whole[4:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_are_read_page_by_page_with_the_same_crops(files, world_size):
    """Near-sequentially: not in the single file's order, whose pages are others, but with the same crops."""
    root, _ = files
    one = loader_of(root / "one.beton", batch_size=1)
    seen = {}
    for sample, parts in zip(one.order_of(2), batches_of(one, 2), strict=True):
        seen[int(sample)] = parts
    read = {}
    for rank in range(world_size):
        loader = loader_of(f"{root}/part-*-of-3.beton", rank, world_size, in_memory=False, batch_size=world_size)
        order, batches = loader.order_of(2), batches_of(loader, 2)
        assert batches_of(loader, 2, first=7) == batches[7:]
        read |= {int(sample): parts for sample, parts in zip(order, batches, strict=True)}
    assert read == seen


def test_pages_of_shards_are_read_in_one_stretch(files):
    root, _ = files
    loader = loader_of(f"{root}/part-*-of-3.beton", in_memory=False)
    pages = loader.storage.pages[loader.order_of(0)][:, 0]
    assert len(set(pages)) == 3 and set(np.unique(loader.storage.pages, axis=1).ravel()) == set(pages)


def test_labels_from_a_list_belong_to_their_samples_in_any_shard(files, tmp_path):
    root, _ = files
    names = names_of(root / "one.beton")
    new = {name: f"c{(i * 7) % CLASSES}" for i, name in enumerate(sorted(names))}
    (tmp_path / "list.tsv").write_text("".join(f"{name}\t{label}\n" for name, label in new.items()))
    for path in (f"{root}/one.beton", f"{root}/part-*-of-3.beton"):
        labels = cleaned_labels(str(tmp_path / "list.tsv"), path, say=False)
        assert [f"c{label}" for label in labels] == [new[name] for name in names]
        loader = loader_of(path, labels=labels)
        read = np.concatenate([batch.labels.numpy().copy() for batch in loader.epoch(1)])
        assert np.array_equal(read, labels[loader.order_of(1)])


def test_evaluation_and_inspection_take_shards(files):
    root, _ = files
    found = []
    for path in (f"{root}/one.beton", f"{root}/part-*-of-3.beton"):
        reading = Reading(CLASSES, Processes(0, 1, 0, 1, torch.device("cpu")), 1, classes=("c3", "c2", "c1", "c0"))
        loader, names = evaluation_loader(path, reading, 7, 24, 1.0)
        images = np.concatenate([batch.images.numpy().copy() for batch in loader.epoch(0)])
        maps = [(sample.name, sample.label, sample.scores.tobytes()) for sample in Samples(path)]
        found.append((names, loader.labels.tolist(), images.tobytes(), maps))
    assert found[0] == found[1]
    names, labels, _, maps = found[0]
    assert [f"c{3 - label}" for label in labels] == [name[:2] for name in names] and len(maps) == COUNT


# --- what is no whole set -----------------------------------------------------------------------------------------


@pytest.fixture
def copies(files, tmp_path):
    root, given = files
    for file in root.glob("*.beton"):
        shutil.copy(file, tmp_path)
    return tmp_path, given


def refused(path, says):
    with pytest.raises(BadInput, match=says) as caught:
        open_dataset(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_and_one_that_is_there_twice_are_named(copies):
    root, _ = copies
    (root / "part-2-of-3.beton").rename(root / "elsewhere")
    refused(f"{root}/part-*.beton", r"part-\*\.beton: of 3 shards, one is missing: 2; write .* --cfg\.shard=2/3")
    refused(f"{root}/part-1-of-3.beton", r"some are missing: 2, 3; ")
    (root / "elsewhere").rename(root / "part-2-of-3.beton")
    shutil.copy(root / "part-2-of-3.beton", root / "part-9.beton")
    refused(f"{root}/part-*.beton", r"shard 2 of 3 is there twice, .*part-2-of-3\.beton and .*part-9\.beton")
    refused(f"{root}/none-*.beton", r"none-\*\.beton: no file fits this pattern")
    refused(f"{root}/part-1-of-3.beton,{root}/nowhere.beton", r"nowhere\.beton: no such file")
    refused(f"{root}/part-1-of-3.beton,{root}/one.beton", r"one\.beton: is no shard")
    order = [f"{root}/part-{k}-of-3.beton" for k in (3, 1, 2)]
    assert open_dataset(",".join(order)).sample_list().names == open_dataset(f"{root}/one.beton").sample_list().names


@pytest.mark.parametrize(
    "change, says",
    [({"seed": 1}, "cfg.seed is 1, not 0"), ({"order": "sorted"}, "cfg.order is 'sorted', not 'random'"),
     ({"score_dtype": "float32"}, "cfg.score_dtype is 'float32', not 'float16'"), ({"shard": "2/4"}, "one of 4 shards"),
     ({"write_mode": "jpg"}, "cfg.write_mode is 'jpg', not 'raw'"), ({"label_map_dir": ""}, "images or label maps"),
     ("maps", "images or label maps have other contents"), ("images", "its images have other names or labels"),
     ("classes", "its classes are others")],
)  # fmt: skip
def test_shards_of_other_packings_are_refused(copies, change, says):
    root, given = copies
    if isinstance(change, str):
        write_tree(root, seed=1)
        given = given | {"data_dir": str(root / "images")}
        if change == "maps":
            given = given | {"data_dir": str(Path(given["label_map_dir"]).parent / "images")}
            given = given | {"label_map_dir": str(root / "maps")}
        if change == "images":
            (root / "images/c0/000.png").rename(root / "images/c0/xyz.png")
            (root / "maps/c0/000.pt").rename(root / "maps/c0/xyz.pt")
            given = given | {"label_map_dir": str(root / "maps")}
        if change == "classes":
            (root / "images" / "new").mkdir()
        change = {}
    write(root / "other.beton", given, **({"shard": "2/3"} | change))
    (other,) = root.glob("other-*.beton")
    os.replace(other, root / "part-2-of-3.beton")
    refused(f"{root}/part-*.beton", f"part-2-of-3.beton: is of another packing than .*part-1-of-3.beton: .*{says}")


def test_a_shard_is_never_taken_for_the_whole_or_packed_over(copies, tmp_path):
    root, given = copies
    with pytest.raises(BadInput, match="exists already"):
        write(root / "part.beton", given, shard="2/3")
    with pytest.raises(BadInput, match=r"fewer than cfg\.shard=2/90 has shards"):
        write(root / "new.beton", given, shard="2/90")
    for bad in ("0/3", "4/3", "3", "a/b"):
        result = run("write_datasets.py", "--cfg.data_dir=x", "--cfg.write_path=y", f"--cfg.shard={bad}")
        assert result.returncode == 2 and "K/N, from 1/N to N/N" in result.stderr
    (tmp_path / "data").mkdir()
    os.symlink(given["data_dir"], tmp_path / "data" / "train")
    shards = f"{root}/part-*.beton"
    assert packed_once("train", shards, str(tmp_path / "data"), given["label_map_dir"]) == shards
    with pytest.raises(BadInput, match="its label maps are"):
        packed_once("train", shards, str(tmp_path / "data"))


def test_a_sample_that_is_left_out_is_left_out_of_its_shard_alone(tmp_path):
    given = write_tree(tmp_path, count=24, side=20) | {"on_error": "skip", "subset": 22}
    for name in ("c0/000", "c1/005"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"no image")
    write(tmp_path / "one.beton", given)
    for number in (1, 2, 3, 4, 5):
        write(tmp_path / "part.beton", given, shard=f"{number}/5")
    one, parts = (open_dataset(f"{tmp_path}/{name}").sample_list() for name in ("one.beton", "part-*.beton"))
    assert parts.names == one.names and len(one.names) == 20
    assert sorted(parts.left_out) == sorted(one.left_out) and len(parts.left_out) == 4
    lists = sorted(tmp_path.glob("part-*.skipped.tsv"))
    assert sum(len(file.read_text().splitlines()) for file in lists) == 2


def test_a_damaged_shard_is_named_and_one_that_shrinks_ends_the_epoch(copies):
    root, _ = copies
    file, shards = root / "part-2-of-3.beton", f"{root}/part-*.beton"
    data = bytearray(file.read_bytes())
    data[(8 << 20) + 1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(BadInput, match=r"part-2-of-3\.beton: 1 of 20 samples are damaged"):
        verify(shards)
    loader = loader_of(shards, in_memory=False)
    os.truncate(file, (8 << 20) + 5000)
    with pytest.raises(BadInput, match=r"part-2-of-3\.beton: has become shorter"):
        batches_of(loader, 0)
    refused(shards, r"part-2-of-3\.beton: truncated or damaged")


def test_a_list_in_yaml_names_shards_too(files, tmp_path):
    root, _ = files
    parts = [f"{root}/part-{k}-of-3.beton" for k in (2, 3, 1)]
    (tmp_path / "c.yaml").write_text(f"cfg:\n  path: [{', '.join(parts)}]\n")
    result = run("verify_datasets.py", f"--config-file={tmp_path}/c.yaml")
    assert result.returncode == 0 and f"{COUNT} samples are as they were written" in result.stdout


def test_what_was_mapped_is_given_back(files):
    root, _ = files

    def mapped():
        return Path("/proc/self/maps").read_text().count("part-2-of-3.beton")

    before = mapped()
    memory = map_files(open_dataset(f"{root}/part-*.beton"))
    assert mapped() > before
    part = memory[-10:]
    del memory
    gc.collect()
    assert mapped() > before and part.sum() >= 0  # a view keeps it
    del part
    gc.collect()
    assert mapped() == before


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.integers(CLASSES, 30),
    st.integers(1, 6),
    st.integers(0, 9),
    st.integers(1, 3),
    st.sampled_from(["random", "sorted"]),
)
def test_any_number_of_shards_is_the_single_file(tmp_path_factory, count, shards, seed, workers, order):
    root, shards = tmp_path_factory.mktemp("set"), min(count, shards)
    given = write_tree(root, count, side=int(np.random.default_rng(seed).integers(8, 500)))
    given |= {"seed": seed, "order": order, "num_workers": workers, "chunk_size": 3}
    write(root / "one.beton", given)
    for number in range(1, shards + 1):
        write(root / "part.beton", given, shard=f"{number}/{shards}" if shards > 1 else "")
    assert contents_of(f"{root}/part*.beton") == contents_of(f"{root}/one.beton")
    names = [open_dataset(f"{root}/{name}.beton").sample_list().names for name in ("one", "part*")]
    assert names[0] == names[1] and sorted(names[0]) == sorted(f"c{i % CLASSES}/{i:03d}.png" for i in range(count))
