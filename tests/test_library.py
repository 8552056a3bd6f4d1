"""ffcv_fields without the rest: the examples of docs/library.md, as they stand there, on small data."""

import os
import re

import numpy as np
import pytest
from conftest import ROOT
from pooling_reference import reference
from torchvision.transforms.functional import resized_crop, to_tensor

FFCV, TORCHVISION = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def run_example(folders, beton, tmp_path_factory):
    """Runs an example where `train.beton`, `images` and `maps` are, and returns the names that it leaves."""
    folder, before = tmp_path_factory.mktemp("library"), os.getcwd()
    for name, path in (("train.beton", beton), ("images", folders[0]), ("maps", folders[1])):
        (folder / name).symlink_to(path)

    def run(example):
        names = {}
        exec(compile(example, "docs/library.md", "exec"), names)
        return names

    os.chdir(folder)
    yield run
    os.chdir(before)


@pytest.mark.parametrize("example", [FFCV, TORCHVISION], ids=["ffcv", "torchvision"])
def test_an_example_has_twenty_lines_and_pools_as_the_reference_does(example, run_example):
    assert sum(bool(line) for line in example.splitlines()) <= 20
    names = run_example(example)
    images, maps, boxes = names["images"], names["label_maps"].numpy(), names["crop_boxes"].numpy()
    assert images.shape[1:] == (3, 224, 224) and len(images) == len(names["labels"]) == 16
    assert np.allclose(names["targets"], reference(maps, boxes, 8), atol=1e-5)
    assert len({tuple(box) for box in boxes}) > 1


def test_the_torchvision_example_s_box_is_where_the_crop_came_from(run_example):
    data = run_example(TORCHVISION)["Crops"]("images")
    for index in (0, 20, 47):
        crop, box, _, label = data[index]
        path, expected = data.samples[index]
        image = data.loader(path)
        x1, y1, x2, y2 = (round(v) for v in (box.numpy() * [*image.size, *image.size]).tolist())
        assert label == expected
        assert np.array_equal(crop, to_tensor(resized_crop(image, y1, x1, y2 - y1, x2 - x1, [224, 224])))
