"""Crops: a pure function of (seed, epoch, index), torchvision's distribution, and one crop for two readers."""

import math

import numpy as np
import pytest
import torch
from ffcv_fields import CropBoxDecoder, CropSampler, RandomResizedCropDecoder
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.pipeline import PipelineSpec
from ffcv.transforms import ToTensor
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from relabel.data.loader import Loader
from relabel.data.writer import Workers, write_beton


def test_the_sampler_is_a_function_of_seed_epoch_and_index():
    a, b, other_seed = CropSampler(7), CropSampler(7), CropSampler(8)
    sample_a, flips_a = a.compile()
    sample_b, flips_b = b.compile()
    sample_c, _ = other_seed.compile()
    crops = [sample_a(i, 300, 400) for i in range(50)]
    assert crops == [sample_b(i, 300, 400) for i in reversed(range(50))][::-1]
    assert [flips_a(i) for i in range(50)] == [flips_b(i) for i in range(50)]
    assert sum(c == sample_c(i, 300, 400) for i, c in enumerate(crops)) < 5
    a.epoch = 1
    assert sum(c == sample_a(i, 300, 400) for i, c in enumerate(crops)) < 5
    assert len(sample_a.signatures) == 1  # no second compilation for the second epoch
    a.epoch = 0
    assert crops == [sample_a(i, 300, 400) for i in range(50)]


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (60, 400), (400, 30)])
def test_crops_are_distributed_as_torchvision_s(height, width):
    sample, flips = CropSampler(3).compile()
    ours = np.array([sample(i, height, width) for i in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()
    assert abs(np.mean([flips(i) for i in range(4000)]) - 0.5) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_images_still_give_a_crop_inside(size):
    sample, _ = CropSampler(0).compile()
    for i in range(200):
        y, x, h, w = sample(i, *size)
        assert h >= 1 and w >= 1 and y >= 0 and x >= 0 and y + h <= size[0] and x + w <= size[1]


@pytest.mark.parametrize(
    "keywords, named",
    [({"seed": -1}, "seed"), ({"scale": (0.5, 0.2)}, "scale"), ({"scale": (0, 1)}, "scale"),
     ({"ratio": (0, 1)}, "ratio"), ({"flip_prob": 1.5}, "flip_prob")],
)  # fmt: skip
def test_bad_parameters_are_named(keywords, named):
    with pytest.raises(ValueError, match=named):
        CropSampler(**{"seed": 0} | keywords)


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory):
    """Images whose pixels say where they are: red = 255 x / width, green = 255 y / height, raw mode."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(120, 260, (42, 2))

    def load(i):
        height, width = sizes[i]
        x = (np.arange(width) + 0.5) / width * 255
        y = (np.arange(height) + 0.5) / height * 255
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = x[None].round(), y[:, None].round()
        return pixels, i

    path = tmp_path_factory.mktemp("coordinates") / "c.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    write_beton(path, fields, range(len(sizes)), load, Workers(1, 10))
    return path


def make_loader(path, num_workers, seed=5, batch_size=14):
    crops = CropSampler(seed)
    return Loader(
        str(path), num_classes=100, batch_size=batch_size, num_workers=num_workers, seed=seed,
        order="random", os_cache=True, drop_last=True,
        pipelines={
            "image": [RandomResizedCropDecoder(64, crops), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
            "crop_box": PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()]),
        },
    )  # fmt: skip


def read_epoch(loader, epoch):
    batches = [[part.clone() for part in (b.images, b.labels, b.crop_boxes)] for b in loader.epoch(epoch)]
    images, labels, boxes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images.numpy(), labels.numpy(), boxes.numpy()


def test_the_box_is_the_region_of_the_pixels_and_workers_do_not_matter(coordinates):
    loaders = {n: make_loader(coordinates, n) for n in (1, 2, 7)}
    for epoch in (0, 3):
        images, labels, boxes = read_epoch(loaders[1], epoch)
        assert sorted(labels) == list(range(42))
        for pixels, (x1, y1, x2, y2) in zip(images.astype(float) / 255, boxes, strict=True):
            red, green = pixels[..., 0], pixels[..., 1]
            # The outermost output pixels average 1/64 of the box: their centers are half of that inside.
            left, right = red[:, 0].mean(), red[:, -1].mean()
            left, right = min(left, right), max(left, right)  # flipped or not
            inset_x, inset_y = (x2 - x1) / 128, (y2 - y1) / 128
            expected = [x1 + inset_x, x2 - inset_x, y1 + inset_y, y2 - inset_y]
            assert np.abs(np.array([left, right, green[0].mean(), green[-1].mean()]) - expected).max() < 0.01
        for n in (2, 7):
            for one, other in zip((images, labels, boxes), read_epoch(loaders[n], epoch), strict=True):
                assert np.array_equal(one, other)
    first, again = read_epoch(loaders[2], 0), read_epoch(loaders[2], 1)
    by_label = dict(zip(first[1], first[2], strict=True))
    same = sum(np.array_equal(by_label[label], box) for label, box in zip(again[1], again[2], strict=True))
    assert same < 4  # other crops in another epoch
    fresh = read_epoch(make_loader(coordinates, 2), 3)  # as in a resumed run
    assert all(np.array_equal(a, b) for a, b in zip(fresh, read_epoch(loaders[2], 3), strict=True))


def test_half_of_the_images_are_flipped(coordinates):
    images, _, _ = read_epoch(make_loader(coordinates, 2), 0)
    flipped = [pixels[:, 0, 0].mean() > pixels[:, -1, 0].mean() for pixels in images]
    assert 8 <= sum(flipped) <= 34
