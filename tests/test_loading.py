"""The loader: epochs on demand, failures that surface, threads that end, files that are refused."""

import threading

import numpy as np
import pytest
import torch
from ffcv_fields import CropBoxDecoder, CropSampler, LabelMapDecoder, RandomResizedCropDecoder
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.pipeline.operation import Operation
from ffcv.transforms import ToTensor

from relabel.data.beton import read_header
from relabel.data.loader import Loader
from relabel.data.order import WINDOW, near_sequential_order
from relabel.errors import BadInput


def make_loader(path, pipelines, batch_size=8, num_classes=8, **keywords):
    keywords = {"order": "random", "seed": 0, "num_workers": 2, "drop_last": True} | keywords
    return Loader(str(path), num_classes=num_classes, batch_size=batch_size, pipelines=pipelines, **keywords)


def labels_only():
    return {"image": None, "label_map": None, "label": [IntDecoder(), ToTensor()]}


def labels_of(loader, epoch):
    return torch.cat([batch.labels.clone() for batch in loader.epoch(epoch)]).tolist()


@pytest.mark.parametrize("order", ["random", "near_sequential"])
def test_an_epoch_is_the_same_whenever_it_is_asked_for(beton, order):
    loader = make_loader(beton, labels_only(), order=order, os_cache=False)
    first, third = labels_of(loader, 0), labels_of(loader, 2)
    assert sorted(first) == sorted(third) == sorted(list(range(8)) * 6) and first != third
    again = make_loader(beton, labels_only(), order=order, os_cache=False)
    assert labels_of(again, 2) == third and labels_of(loader, 0) == first
    assert labels_of(make_loader(beton, labels_only(), order=order, os_cache=False, seed=1), 0) != first


def test_near_sequential_reads_each_page_in_one_window_and_every_sample_once():
    pages = np.repeat(np.arange(10, 110), 7)
    order = near_sequential_order(pages, 0, 0)
    assert sorted(order) == list(range(700))
    read = pages[order]
    windows = [set(read[i : i + 7 * WINDOW]) for i in range(0, 700, 7 * WINDOW)]
    assert all(len(w) <= WINDOW for w in windows) and sum(len(w) for w in windows) == 100
    assert not np.array_equal(order, near_sequential_order(pages, 0, 1))
    assert len(set(np.diff(order[:50]))) > 10  # mixed within the window


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("order", ["random", "near_sequential", "sequential"])
def test_processes_share_each_epoch_s_samples_without_overlap(beton, order, world_size):
    seen = []
    for rank in range(world_size):
        loader = make_loader(beton, labels_only(), 5, order=order, drop_last=False, rank=rank, world_size=world_size)
        seen.append(loader.order_of(1))
        assert len(labels_of(loader, 1)) == len(seen[-1])
    assert sorted(np.concatenate(seen)) == list(range(48)) and max(map(len, seen)) - min(map(len, seen)) <= 1
    # The global batches are the same however many processes share them.
    alone = make_loader(beton, labels_only(), 5 * world_size, order=order, drop_last=True).order_of(1)
    together = np.stack([s[: len(alone) // world_size].reshape(-1, 5) for s in seen], 1).reshape(-1)
    assert np.array_equal(alone, together)


class Fails(Operation):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def declare_state_and_memory(self, previous_state):
        return previous_state, None

    def generate_code(self):
        def fail(inp, dst):
            raise self.error

        return fail


@pytest.mark.parametrize("error", [RuntimeError("this batch cannot be made"), MemoryError("none left")])
def test_a_failure_in_the_loader_s_thread_is_raised_where_batches_are_read(beton, error):
    pipelines = labels_only() | {"label": [IntDecoder(), ToTensor(), Fails(error)]}
    loader = make_loader(beton, pipelines)
    with pytest.raises(type(error), match=str(error)):
        labels_of(loader, 0)


@pytest.mark.parametrize("os_cache", [True, False])
def test_leaving_an_epoch_early_ends_its_threads(beton, os_cache):
    loader = make_loader(beton, labels_only(), batch_size=2, os_cache=os_cache)
    before = threading.active_count()
    for epoch in range(20):
        batches = loader.epoch(epoch)
        next(batches)
        batches.close()
    assert threading.active_count() == before


def test_threads_of_torch_are_left_as_they_were(beton):
    threads = torch.get_num_threads()
    loader = make_loader(beton, labels_only(), num_workers=1)
    labels_of(loader, 0)
    assert torch.get_num_threads() == threads


def test_more_workers_than_cores_are_not_an_error(beton):
    assert make_loader(beton, labels_only(), num_workers=1000).num_workers <= 1000


def test_image_size_changes_between_epochs_without_compiling(beton):
    crops = CropSampler(0)
    loader = make_loader(
        beton,
        {
            "image": [RandomResizedCropDecoder(32, crops), ToTensor()],
            "label": None,
            "label_map": [LabelMapDecoder(), ToTensor()],
            "crop_box": PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()]),
        },
    )
    shapes, compiled = [], []
    for epoch, size in enumerate((32, 48, 32)):
        loader.set_image_size(size)
        for batch in loader.epoch(epoch):
            shapes.append(tuple(batch.images.shape))
            assert batch.label_maps.shape == (8, 2, 5, 15, 15) and batch.label_maps.dtype == torch.int16
            assert batch.crop_boxes.shape == (8, 4) and batch.crop_boxes.dtype == torch.float32
        functions = [f for stage, _ in loader.code[0] for f in stage.__globals__.values() if hasattr(f, "signatures")]
        compiled.append(sum(len(f.signatures) for f in functions))
    assert shapes == [(8, 32, 32, 3)] * 6 + [(8, 48, 48, 3)] * 6 + [(8, 32, 32, 3)] * 6
    assert compiled[0] == compiled[1] == compiled[2] > 0


def test_labels_and_label_maps_outside_the_classes_are_refused(beton):
    with pytest.raises(BadInput, match=r"labels 0 to 7; model\.num_classes is 5"):
        make_loader(beton, labels_only(), num_classes=5)


def damaged(beton, tmp_path, change):
    data = bytearray(beton.read_bytes())
    changed = change(data)
    data = data if changed is None else changed
    path = tmp_path / "damaged.beton"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:0], lambda d: d[:3], lambda d: d[:30], lambda d: d[:4000], lambda d: d[: len(d) // 2],
     lambda d: d[:-1], lambda d: d[:-24], lambda d: b"PK" + d[2:], lambda d: d[:16] + b"\xff" * 8 + d[24:]],
)  # fmt: skip
def test_a_truncated_or_foreign_file_is_refused_by_name(beton, tmp_path, change):
    with pytest.raises(BadInput, match=r"damaged\.beton"):
        read_header(str(damaged(beton, tmp_path, change)))


def test_a_missing_file_is_named():
    with pytest.raises(BadInput, match=r"nowhere\.beton: no such file"):
        read_header("nowhere.beton")


def test_pointers_and_sizes_of_label_maps_are_checked(beton, tmp_path):
    header = read_header(str(beton))
    raw = beton.read_bytes()
    start = raw.index(header.metadata.tobytes())  # the metadata's offset is found from its bytes
    where = start + header.metadata.dtype.fields["f2"][1] + header.metadata["f2"].dtype.fields["data_ptr"][1]

    def point_elsewhere(data):
        data[where : where + 8] = np.uint64(len(data) + 10).tobytes()

    with pytest.raises(BadInput, match="label_map"):
        read_header(str(damaged(beton, tmp_path, point_elsewhere)))
