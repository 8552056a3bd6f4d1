"""LabelMapField: its header, its exact storage, its decoder."""

import numpy as np
import pytest
from ffcv_fields import LabelMapDecoder, LabelMapField
from ffcv_fields.label_map import NO_LABEL_MAP, pack_label_map, unpack_label_map
from conftest import label_map_tensor
from ffcv.fields import IntField
from ffcv.fields.decoders import IntDecoder
from ffcv.transforms import ToTensor

from relabel.data.loader import Loader
from relabel.data.writer import Workers, write_beton


def pack(tensor, score_dtype="float16"):
    return pack_label_map(tensor[0].numpy(), tensor[1].numpy().astype(np.int64), score_dtype)


def test_the_header_keeps_every_parameter():
    field = LabelMapField(7, 18, 12, 21841, "float32", "xy")
    read = LabelMapField.from_binary(field.to_binary())
    assert vars(read) == vars(field)


@pytest.mark.parametrize(
    "keywords, named",
    [({"top_k": 0}, "top_k is 0"), ({"top_k": 33}, "top_k is 33"), ({"height": 0}, "height"),
     ({"width": 1025}, "width"),
     ({"num_classes": 32768}, "num_classes is 32768"), ({"score_dtype": "int8"}, "score_dtype is 'int8'"),
     ({"imported_axis_order": "zz"}, "imported_axis_order")],
)  # fmt: skip
def test_bad_parameters_are_named(keywords, named):
    with pytest.raises(ValueError, match=named):
        LabelMapField(**keywords)


@pytest.mark.parametrize("at, value", [(0, 1), (4, 9), (8, 0), (24, 3), (28, 2)])
def test_a_damaged_header_is_refused(at, value):
    binary = LabelMapField().to_binary()
    binary[0][at] = value
    with pytest.raises(ValueError, match="label map field"):
        LabelMapField.from_binary(binary)


def test_bytes_an_image_for_labels():
    field = LabelMapField()
    alloc_table_entry = 24
    assert field.nbytes + field.metadata_type.itemsize + alloc_table_entry <= 4600


def test_float16_scores_come_back_bit_for_bit():
    every_half = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every_half[np.isfinite(every_half)].astype(np.float32)
    scores = np.resize(finite, (32, 64, 64))
    classes = np.zeros(scores.shape, np.int64)
    again, _ = unpack_label_map(pack_label_map(scores, classes, "float16"))
    assert np.array_equal(again.view(np.uint32), scores.view(np.uint32))


@pytest.mark.parametrize(
    "top_k, height, width, num_classes, score_dtype",
    [(5, 15, 15, 1000, "float16"), (5, 18, 18, 1000, "float32"), (1, 7, 7, 21841, "float16"),
     (32, 3, 5, 32767, "float16")],
)  # fmt: skip
def test_maps_come_out_of_the_loader_as_they_went_in(tmp_path, top_k, height, width, num_classes, score_dtype):
    rng = np.random.default_rng(0)
    maps = [pack(label_map_tensor(rng, max(top_k, 40), top_k, height, width), score_dtype) for _ in range(11)]
    maps[0][1, 0, 0, 0] = num_classes - 1
    maps[4] = None  # a sample without label map
    field = LabelMapField(top_k, height, width, num_classes, score_dtype)
    path = tmp_path / "m.beton"
    write_beton(path, {"label": IntField(), "label_map": field}, maps, lambda i: (i, maps[i]), Workers(2, 2))
    loader = Loader(
        str(path), num_classes=32767, batch_size=4, num_workers=2, order="sequential", drop_last=False,
        pipelines={"label": [IntDecoder(), ToTensor()], "label_map": [LabelMapDecoder(), ToTensor()]},
    )  # fmt: skip
    out = [row for batch in loader.epoch(0) for row in batch.label_maps.numpy().copy()]
    assert len(out) == 11
    for i, (row, packed) in enumerate(zip(out, maps, strict=True)):
        if i == 4:
            assert row[1, 0, 0, 0] == NO_LABEL_MAP
        else:
            assert row.dtype == packed.dtype and np.array_equal(row, packed)


def test_a_map_of_another_shape_is_not_written():
    field, destination = LabelMapField(), np.zeros(1, LabelMapField().metadata_type)
    with pytest.raises(ValueError, match=r"\[2, 5, 7, 7\]"):
        field.encode(destination, np.zeros((2, 5, 7, 7), np.int16), None)
