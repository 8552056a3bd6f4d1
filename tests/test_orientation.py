"""Which axis of label maps is the image's vertical: found where there is something to find, and not where not."""

import numpy as np
import pytest
from conftest import write_images, write_label_maps

from relabel.data.label_map_set import open_label_maps
from relabel.data.orientation import LEAST, orientation


def photograph_like(rng, strength, size=15):
    """The best scores of a map whose top differs from its bottom, in the same way in all of them, under much noise."""
    rows = np.linspace(-1, 1, size)[:, None]
    return strength * rows + rng.normal(0, 1, (size, size)) + rng.normal(0, 0.5) * rows.T  # tilts that cancel out


def estimate(strength, count, seed=0, transposed=False):
    rng = np.random.default_rng(seed)
    maps = (photograph_like(rng, strength) for _ in range(count))
    return orientation(m.T if transposed else m for m in maps)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strength", [0.3, -0.3, 1.0])
def test_the_vertical_is_found(strength, transposed):
    found = estimate(strength, 400, transposed=transposed)
    assert found.order == ("xy" if transposed else "yx") and found.count == 400


def test_maps_without_a_vertical_tell_nothing():
    decided = [estimate(0.0, 200, seed).order for seed in range(200)]
    assert decided.count(None) == 200


def test_the_estimate_is_unbiased_and_its_error_is_right():
    found = [estimate(0.2, 60, seed) for seed in range(300)]
    differences = np.array([f.first - f.second for f in found])
    assert 0.9 < np.mean([f.error for f in found]) / differences.std() < 1.4  # the jackknife errs on the safe side
    none = [estimate(0.0, 60, seed) for seed in range(300)]
    values = np.array([f.first for f in none])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)


def test_few_or_flat_maps_tell_nothing():
    assert estimate(5.0, LEAST - 1).order is None
    assert orientation([np.ones((3, 3))] * 100).order is None and orientation([]).order is None


@pytest.mark.parametrize("said", ["auto", "xy", "yx"])
def test_packing_finds_it_or_warns_of_a_contradiction(tmp_path, said):
    import torch

    files = write_images(tmp_path / "images", 64)
    write_label_maps(tmp_path / "maps", files)
    rng = np.random.default_rng(0)
    for file in (tmp_path / "maps").rglob("*.pt"):
        tensor = torch.load(file)
        tensor[0] = torch.from_numpy(photograph_like(rng, 1.0).T.copy()).float() - torch.arange(5.0)[:, None, None]
        torch.save(tensor, file)
    maps = open_label_maps(tmp_path / "maps", [f"class{i}" for i in range(8)], said)
    assert maps.format.axis_order == ("xy" if said == "auto" else said)
    if said == "auto":
        assert "axis order xy, found from the maps" in maps.remarks[0]
    else:
        assert any("WARNING" in remark for remark in maps.remarks) == (said == "yx")
