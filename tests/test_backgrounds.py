"""ImageNet-9 in the Backgrounds Challenge's format: classes, map, accuracy and BG-Gap by hand, and by the command."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import normalize, to_tensor

from relabel.data.classes import imagenet_classes
from relabel.errors import BadInput
from relabel.evaluation.backgrounds import VARIATIONS, find_variations, read_in9_map, variation_classes
from relabel.evaluation.predictions import Predictions
from relabel.models import build_model
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD

NAMES = ("00_dog", "01_bird", "02_wheeled vehicle", "03_reptile", "04_carnivore", "05_insect",
         "06_musical instrument", "07_primate", "08_fish")  # fmt: skip
GROUPS = np.arange(1000) % 13 - 1  # -1 to 11
GROUPS[GROUPS > 8] = -1
MAP = {str(i): int(group) for i, group in enumerate(GROUPS)}


def write_map(file, content=None):
    file.write_text(json.dumps(MAP if content is None else content))
    return str(file)


def write_variations(root, names=VARIATIONS, classes=NAMES, seed=0):
    """`root/VARIATION/val/CLASS/....JPEG` of 224 px, two for each class."""
    rng = np.random.default_rng(seed)
    for variation in names:
        for name in classes:
            (root / variation / "val" / name).mkdir(parents=True)
            for i in range(2):
                coarse = Image.fromarray(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8))
                coarse.resize((224, 224)).save(root / variation / "val" / name / f"fg_{i}_bg_{i}.JPEG", "JPEG")


def test_a_prediction_is_right_by_its_group_and_never_by_none():
    predictions = Predictions(np.array([[3, 0], [1, 0], [2, 0], [0, 3]]), np.ones(4), np.arange(4), 0.0)
    groups = np.array([-1, 8, 8, 0])
    assert predictions.grouped(groups, np.array([0, 8, 0, 5])) == 50  # the last one predicts a class of no group


def test_the_map_goes_by_the_names_of_the_network_s_classes(tmp_path):
    file, wordnet = write_map(tmp_path / "in_to_in9.json"), imagenet_classes()
    assert read_in9_map(file, 1000, wordnet).tolist() == GROUPS.tolist()
    assert read_in9_map(file, 1000, wordnet[::-1]).tolist() == GROUPS[::-1].tolist()
    some = read_in9_map(file, 200, (*wordnet[100:298], "bag", "coat"))
    assert some.tolist() == [*GROUPS[100:298], -1, -1]


@pytest.mark.parametrize(
    "change, classes, says",
    [
        ([1, 2], None, "an object with keys 0 to 999"),
        ({"0": 1}, None, "an object with keys 0 to 999"),
        (MAP | {"7": 9}, None, "7 is mapped to 9, must be 0 to 8"),
        (MAP | {"7": "fish"}, None, "7 is mapped to 'fish'"),
        (MAP | {"7": True}, None, "7 is mapped to True"),
        (MAP, ("bag", "coat"), "the network knows none of them"),
        (MAP, imagenet_classes()[:5], "knows no class that is mapped to class 4"),
        (MAP, (), "the network's 1000 are is not known"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path, change, classes, says):
    file = write_map(tmp_path / "in_to_in9.json", change)
    given = None if classes == () else classes or imagenet_classes()
    with pytest.raises(BadInput, match=f"in_to_in9.json: .*{says}"):
        read_in9_map(file, 1000, given)


def test_a_class_is_the_number_of_its_folder_s_name_wherever_it_stands(tmp_path):
    write_variations(tmp_path, ["only_fg"], [NAMES[7], NAMES[2], "03_Reptile"])
    names, numbers = variation_classes(str(tmp_path / "only_fg" / "val"))
    assert dict(zip(names, numbers.tolist(), strict=True)) == {NAMES[2]: 2, "03_Reptile": 3, NAMES[7]: 7}
    for name, says in (("03_snake", "'03_Reptile' and '03_snake' have one number"), ("dog", "none of ImageNet-9's")):
        write_variations(tmp_path / name, ["only_fg"], ["03_Reptile", name])
        with pytest.raises(BadInput, match=says):
            variation_classes(str(tmp_path / name / "only_fg" / "val"))


def test_variations_are_found_once(tmp_path):
    write_variations(tmp_path, ["mixed_rand", "no_fg"], NAMES[:1])
    (tmp_path / "original").mkdir()  # without val
    assert find_variations(str(tmp_path)) == {"mixed_rand": str(tmp_path / "mixed_rand" / "val")}
    (tmp_path / "mixed_rand.beton").touch()
    with pytest.raises(BadInput, match="holds mixed_rand twice"):
        find_variations(str(tmp_path))
    with pytest.raises(BadInput, match="holds none of ImageNet-9's variations"):
        find_variations(str(tmp_path / "no_fg"))


def pixels(image):
    return normalize(to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


def make_network(root):
    """Random weights, but for the last bias: without the images' mean answer, so that images get different ones."""
    torch.manual_seed(0)
    network = build_model("shufflenet_v2_x0_5", 1000).eval()
    images = torch.stack([pixels(image) for image, _ in ImageFolder(root / "original" / "val")])
    with torch.no_grad():
        network.fc.bias -= network(images).mean(0)
    return network


def expected(network, root, variation):
    """Accuracy by the official definition: ImageFolder, the pixels as they are, the best of 1,000 classes, mapped."""
    images = ImageFolder(root / variation / "val")
    right = 0
    for image, label in images:
        with torch.no_grad():
            best = network(pixels(image)[None]).argmax(1).item()
        right += MAP[str(best)] == label
    return 100 * right / len(images)


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_gives_the_official_accuracies_and_the_bg_gap(tmp_path, packed):
    data = tmp_path / "bg_challenge"
    write_variations(data)
    network = make_network(data)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    values = {variation: expected(network, data, variation) for variation in VARIATIONS}
    assert len(set(values.values())) > 2 and values["mixed_same"] != values["mixed_rand"]
    if packed:
        (tmp_path / "packed").mkdir()
        for variation in VARIATIONS:
            result = run("write_datasets.py", f"--cfg.data_dir={data}/{variation}/val", "--cfg.write_mode=raw",
                         f"--cfg.write_path={tmp_path}/packed/{variation}.beton")  # fmt: skip
            assert result.returncode == 0, result.stderr
        data = tmp_path / "packed"
    common = "--model.arch=shufflenet_v2_x0_5", f"--model.weights={tmp_path}/net.pth", f"--data.imagenet_9={data}"
    result = run("evaluate_imagenet.py", *common, f"--data.in9_map={write_map(tmp_path / 'in_to_in9.json')}",
                 f"--output.folder={tmp_path}/out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "evaluation.csv") as file:
        rows = {row["set"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*(f"ImageNet-9 {variation}" for variation in VARIATIONS), "ImageNet-9 BG-Gap"]
    for variation, value in values.items():
        assert float(rows[f"ImageNet-9 {variation}"]["value"]) == pytest.approx(value, abs=0.01)
        assert rows[f"ImageNet-9 {variation}"]["images"] == "18"
    gap = rows["ImageNet-9 BG-Gap"]
    assert float(gap["value"]) == pytest.approx(values["mixed_same"] - values["mixed_rand"]) and gap["images"] == "36"
    missing = run("evaluate_imagenet.py", *common)
    assert missing.returncode == 1 and "data.imagenet_9 needs data.in9_map" in missing.stderr
