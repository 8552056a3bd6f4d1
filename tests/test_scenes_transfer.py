"""Scenes in COCO's format: boxes and masks are those of the objects that are seen; the table of the transfer study."""

import json

import numpy as np
from PIL import Image

from relabel.transfer.coco import read_coco
from relabel.transfer.samples import read_sample
from scenes import transfer
from scenes.coco import CATEGORIES, write_coco_scenes
from scenes.compose import CLASSES, SPLITS, compose, photographs_of


def test_boxes_and_masks_are_those_of_the_objects_in_the_scene(tmp_path):
    write_coco_scenes(tmp_path, "val", 20, seed=3)
    coco = read_coco(tmp_path, "val", masks=True, evaluated=True)
    assert not coco.remarks and coco.categories == {1 + i: name for i, name in enumerate(CLASSES)}
    rng, (photographs, labels) = np.random.default_rng([3, 20, SPLITS.index("val")]), photographs_of("val")
    inside, outside = [], []
    for image in coco.images:
        pixels, objects = compose(rng, photographs, labels)
        np.testing.assert_array_equal(np.asarray(Image.open(image.file)), pixels)
        assert (image.labels - 1).tolist() == [c for c, *_ in objects]
        _, target = read_sample(image, masks=True, flip=False)
        for (_, y, x, side), box, mask in zip(objects, target["boxes"].numpy(), target["masks"].numpy(), strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert x <= box[0] and y <= box[1] and box[2] <= x + side and box[3] <= y + side
        any_object = target["masks"].numpy().any(0)
        inside.append(pixels[any_object].mean())
        outside.append(pixels[~any_object].mean())
    assert np.mean(inside) > 1.5 * np.mean(outside)


def test_the_table_and_figure_of_the_study(tmp_path):
    found = {name: [{"bbox": 10.0 * i + s, "segm": 5.0 * i + s, "multilabel": 50.0 + s} for s in range(3)]
             for i, name in enumerate(transfer.ROWS)}  # fmt: skip
    rows = transfer.make_table(found, [0, 1, 2]).splitlines()
    assert rows[2].split(" | ")[1:3] == ["", "1.0 ± 0.6"] and rows[2].split(" | ")[4] == "-10.0 ± 0.0"
    assert "| ReLabel, strong annotator | 51.0 ± 0.6 | 31.0 ± 0.6 | 16.0 ± 0.6 | +20.0 ± 0.0 | +10.0 ± 0.0 |" in rows
    transfer.draw(found, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 500
    assert json.loads(json.dumps(CATEGORIES))[0] == {"id": 1, "name": "ankle boot"}
