"""LabelPooling on the CPU against the official computation, and its errors."""

import numpy as np
import pytest
import torch
from ffcv_fields import label_pooling
from ffcv_fields.label_map import NO_LABEL_MAP
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_reference import pooled_scores, problems, random_maps, reference

FULL = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def pool(maps, boxes, num_classes, **keywords):
    return label_pooling(torch.from_numpy(maps), torch.from_numpy(boxes), num_classes, **keywords)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_agrees_with_roi_align(problem):
    maps, boxes, num_classes = problem
    ours = pool(maps, boxes, num_classes).numpy()
    assert np.abs(ours - reference(maps, boxes, num_classes)).max() <= 1e-5
    assert np.abs(ours.sum(1) - 1).max() <= 1e-5


def test_agrees_with_21_841_classes_and_with_a_temperature():
    rng = np.random.default_rng(0)
    maps = random_maps(rng, 2, 60, 5, 15, 15, "float16")
    maps[:, 1] = np.where(maps[:, 1] >= 0, maps[:, 1] * 364, -1)
    boxes = np.array([[0.1, 0.2, 0.7, 0.5], [0, 0, 1, 1]], np.float32)
    ours = pool(maps, boxes, 21841, temperature=2.5).numpy()
    assert np.abs(ours - reference(maps, boxes, 21841, 2.5)).max() <= 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 14))
def test_grids_of_targets_and_probabilities_agree_with_roi_align(problem, output_size):
    maps, boxes, num_classes = problem
    expected = pooled_scores(maps, boxes, num_classes, output_size)
    ours = pool(maps, boxes, num_classes, softmax=False, output_size=output_size).view(expected.shape)
    assert (ours - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())
    ours = pool(maps, boxes, num_classes, output_size=output_size).view(expected.shape)
    # In double: torch's float32 softmax over such an axis is off by up to 3e-5. Scores of up to 25 are pooled to
    # float32's last digits, 2e-6; the softmax shows a quarter of that times 25.
    assert (ours - torch.softmax(expected.double(), 1)).abs().max() <= 2e-5


def test_every_subnormal_and_extreme_half_is_read_exactly():
    halves = np.array([0x0001, 0x03FF, 0x0400, 0x7BFF, 0x8001, 0xFBFF, 0x3555, 0x8000], np.uint16).view(np.int16)
    for bits in halves:
        packed = np.full((1, 2, 1, 1, 1), bits, np.int16)
        packed[0, 1] = 0
        boxes = np.array([[0, 0, 1, 1]], np.float32)
        assert np.abs(pool(packed, boxes, 3).numpy() - reference(packed, boxes, 3)).max() <= 1e-6


def test_a_class_listed_twice_in_a_cell_counts_with_the_sum():
    twice = np.zeros((1, 2, 2, 1, 1), np.int16)
    twice[0, 0, :, 0, 0] = np.array([1.5, 2.0], np.float16).view(np.int16)
    once = twice[:, :, :1].copy()
    once[0, 0, 0] = np.array(3.5, np.float16).view(np.int16)
    boxes = np.array([[0, 0, 1, 1]], np.float32)
    assert torch.equal(pool(twice, boxes, 4), pool(once, boxes, 4))


def test_rows_and_columns_are_y_and_x():
    maps = np.full((1, 2, 1, 15, 15), -1, np.int16)
    maps[0, 0] = np.array(9.0, np.float16).view(np.int16)
    maps[0, 1, 0] = 0
    maps[0, 1, 0, :, :5] = 1  # the left third
    left, top = np.array([[0, 0, 0.3, 1]], np.float32), np.array([[0, 0, 1, 0.3]], np.float32)
    assert pool(maps, left, 2).argmax() == 1 and pool(maps, top, 2).argmax() == 0


def test_a_sample_without_label_map_gets_its_single_label():
    maps = random_maps(np.random.default_rng(0), 2, 10, 5, 15, 15, "float16")
    maps[1] = -1
    maps[1, 1, 0, 0, 0] = NO_LABEL_MAP
    boxes = np.array([[0, 0, 1, 1]] * 2, np.float32)
    targets = pool(maps, boxes, 10, labels=torch.tensor([3, 7]))
    assert torch.equal(targets[1], torch.nn.functional.one_hot(torch.tensor(7), 10).float())
    with pytest.raises(ValueError, match="sample 1 of the batch has no label map"):
        pool(maps, boxes, 10)


def test_a_cell_without_any_class_shares_evenly():
    maps = np.full((1, 2, 5, 15, 15), -1, np.int16)
    assert torch.allclose(pool(maps, FULL.numpy(), 8), torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_output_types_are_the_rounded_float32(dtype):
    maps = random_maps(np.random.default_rng(0), 3, 50, 5, 15, 15, "float16")
    boxes = np.array([[0.2, 0.2, 0.9, 0.5]] * 3, np.float32)
    assert torch.equal(pool(maps, boxes, 50, dtype=dtype), pool(maps, boxes, 50).to(dtype))


def test_an_empty_batch_is_an_empty_target():
    assert pool(np.zeros((0, 2, 5, 15, 15), np.int16), np.zeros((0, 4), np.float32), 10).shape == (0, 10)


MAPS = torch.zeros(1, 2, 5, 15, 15, dtype=torch.int16)


@pytest.mark.parametrize(
    "maps, boxes, keywords, named",
    [
        (MAPS.float(), FULL, {}, "int16 or int32"),
        (MAPS[0], FULL, {}, r"\[B, 2, top_k, H, W\]"),
        (MAPS, FULL.double(), {}, "crop_boxes is torch.float64"),
        (MAPS, FULL.expand(2, 4), {}, r"give float32 \[1, 4\]"),
        (MAPS, FULL, {"labels": torch.tensor([1.0])}, "labels is torch.float32"),
        (MAPS, FULL, {"dtype": torch.float64}, "dtype is torch.float64"),
        (MAPS, FULL, {"temperature": 0.0}, r"temperature is 0\.0"),
        (MAPS, FULL, {"output_size": 0}, "output_size is 0"),
        (MAPS, torch.tensor([[0, 0, float("nan"), 1]]), {}, "crop box 0"),
        (MAPS, torch.tensor([[0.0, 0.0, float("inf"), 1.0]]), {}, "crop box 0"),
        (MAPS, torch.tensor([[0.6, 0.0, 0.5, 1.0]]), {}, "x1 <= x2"),
        (MAPS, torch.tensor([[0.0, 0.6, 1.0, 0.5]]), {}, "y1 <= y2"),
        (MAPS + 12, FULL, {}, "names a class outside 0 to 9"),
        (MAPS - 5, FULL, {}, "names a class outside 0 to 9"),
    ],
)
def test_bad_input_is_named(maps, boxes, keywords, named):
    with pytest.raises(ValueError, match=named):
        label_pooling(maps, boxes, 10, **keywords)


def test_works_under_torch_compile_and_as_a_registered_op():
    maps = torch.from_numpy(random_maps(np.random.default_rng(0), 2, 10, 5, 15, 15, "float16"))
    boxes = FULL.repeat(2, 1)
    compiled = torch.compile(lambda m, b: label_pooling(m, b, 10) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(maps, boxes), label_pooling(maps, boxes, 10) * 2)
    arguments = (maps, boxes, 10, None, 1.0, True, 1, torch.float32)
    torch.library.opcheck(torch.ops.relabel.label_pooling.default, arguments)
