"""Label sets in their official formats, by values computed by hand, and the evaluation command on all of them."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from relabel.data.classes import align, imagenet_classes
from relabel.data.folder_loader import evaluation_loader
from relabel.data.reading import Reading
from relabel.errors import BadInput
from relabel.evaluation.label_sets import read_multilabel_records, read_real
from relabel.evaluation.predictions import Predictions, average_precision, predict
from relabel.models import build_model
from relabel.normalization import Renormalize
from relabel.precision import precision_of
from relabel.processes import join

WNIDS = list(imagenet_classes())


def write_colors(root, images, num_classes=1000):
    """`[(class folder, name, class shown)]`: gray images whose brightness is the class that `Brightness` predicts."""
    for folder, name, shown in images:
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50), (round(255 * shown / num_classes),) * 3).save(root / folder / name, format="PNG")


class Brightness(torch.nn.Module):
    """A network whose answer is the image's brightness, in steps of `step` classes."""

    def __init__(self, num_classes=1000, step=40):
        super().__init__()
        self.num_classes, self.step = num_classes, step

    def forward(self, images):
        brightness = (images[:, 0] * 0.229 + 0.485).mean((1, 2)) * self.num_classes
        nearest = (brightness / self.step).round() * self.step
        return -(torch.arange(self.num_classes) - nearest[:, None]).abs()


def look(path, **more):
    processes = join(-1, "gloo")
    loader, files = evaluation_loader(str(path), Reading(1000, processes, 1, classes=imagenet_classes()), 4, 32, 0.875)
    return predict(Brightness(), loader, precision_of("fp32", processes.device), **more), files


def test_classes_are_aligned_by_name():
    network = imagenet_classes()
    assert align([WNIDS[7], WNIDS[2]], network, 1000, "x")[0].tolist() == [7, 2]
    numbers = sorted(map(str, range(1000)))
    assert align(numbers, network, 1000, "x")[0].tolist() == [int(n) for n in numbers]  # "10" comes before "2"
    assert align(["bag", "coat"], ["bag", "coat"], 2, "x") == (pytest.approx([0, 1]), "")
    assert align(["coat"], ["bag", "coat"], 2, "x")[0].tolist() == [1]
    assert align(["10", "2"], ["0", "1", "10", "2"], 4, "x")[0].tolist() == [2, 3]  # names, not indices
    for data, network_, says in (
        (["bag", "hat"], ["bag", "coat"], "x: the network does not know its class 'hat'"),
        (["bag", "coat"], None, "x: has 2 classes, the network 3, and no list"),
        (["0", "1000"], network, "does not know its class '0' and 1 more"),
        (["07"], network, "does not know its class '07'"),
    ):
        with pytest.raises(BadInput, match=says):
            align(data, network_, 3, "x")


@pytest.mark.parametrize("packed", [False, True])
def test_imagenet_v2_s_numeric_folders_and_a_variant_s_subset(tmp_path, packed):
    shown = [("40", 40), ("120", 120), ("200", 200), ("360", 80), ("520", 520)]  # one wrong
    write_colors(tmp_path / "v2", [(folder, f"{i}.png", c) for i, (folder, c) in enumerate(shown)])
    write_colors(tmp_path / "a", [(WNIDS[c], f"{c}.png", c + 3) for c in (80, 400, 801)])
    paths = tmp_path / "v2", tmp_path / "a"
    if packed:
        for path in paths:
            result = run(
                "write_datasets.py", f"--cfg.data_dir={path}", f"--cfg.write_path={path}.beton", "--cfg.write_mode=raw"
            )
            assert result.returncode == 0, result.stderr
        paths = [path.with_name(f"{path.name}.beton") for path in paths]
    v2, files = look(paths[0])
    assert dict(zip(files, v2.labels.tolist(), strict=True)) == {
        "40/0.png": 40, "120/1.png": 120, "200/2.png": 200, "360/3.png": 360, "520/4.png": 520
    }  # fmt: skip
    assert v2.top(1) == pytest.approx(80)
    a, _ = look(paths[1])
    assert a.top(1) == pytest.approx(200 / 3)  # 801 is read as 800
    subset, _ = look(paths[1], classes=np.unique(a.labels))
    assert subset.top(1) == 100 and subset.best[:, 0].tolist() == a.labels.tolist()  # 800 is not one of its classes


def test_real_counts_a_prediction_in_the_list_and_leaves_empty_lists_out(tmp_path):
    (tmp_path / "real.json").write_text("[[1, 3], [], [2], [5]]")
    names = [f"n0/ILSVRC2012_val_{i:08d}.JPEG" for i in (3, 1, 4, 2)]
    right = read_real(str(tmp_path / "real.json"), names, 8)
    assert [np.flatnonzero(row).tolist() for row in right] == [[2], [1, 3], [5], []]
    predictions = Predictions(np.array([[2, 0], [3, 0], [4, 5], [7, 0]]), np.ones(4), np.zeros(4, int), 0.0)
    assert predictions.multilabel(right) == pytest.approx(200 / 3)
    with pytest.raises(BadInput, match=r"no entry for n0/ILSVRC2012_val_00000005"):
        read_real(str(tmp_path / "real.json"), ["n0/ILSVRC2012_val_00000005.JPEG"], 8)
    with pytest.raises(BadInput, match=r"entry 0 is \[1, 3\]; 3 is none of the 3 classes"):
        read_real(str(tmp_path / "real.json"), names, 3)


def record(number, correct=(), wrong=(), unclear=(), problematic=False):
    return {
        "file_name": f"ILSVRC2012_val_{number:08d}.JPEG", "correct_multi_labels": list(correct),
        "wrong_multi_labels": list(wrong), "unclear_multi_labels": list(unclear), "is_problematic": problematic,
    }  # fmt: skip


def test_shankar_s_accuracy_is_the_mean_of_the_classes(tmp_path):
    records = [record(1, [0]), record(2, [0, 4], [3]), record(3, [0], [], [5]), record(4, [1]),
               record(5, [1], [], [], True), record(9, [1])]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    names = [f"n0/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]  # the sixth has no record, the ninth no image
    right, counts, line = read_multilabel_records(str(tmp_path / "records.json"), names, 8)
    assert "4 of 6 images count; 1 records are of other images (ILSVRC2012_val_00000009.JPEG)" in line
    assert counts.tolist() == [True, True, True, True, False, False]
    best = np.array([[7], [4], [5], [1], [1], [1]])  # wrong; correct; unclear; correct; problematic; none
    predictions = Predictions(best, np.ones(6), np.array([0, 0, 0, 1, 1, 1]), 0.0)
    assert predictions.class_averaged_multilabel(right, counts) == pytest.approx((200 / 3 + 100) / 2)
    del records[1]["is_problematic"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    with pytest.raises(BadInput, match="record 1 has 'is_problematic' None, must be a bool"):
        read_multilabel_records(str(tmp_path / "records.json"), names, 8)


def test_shankar_s_published_file_is_read_as_its_records_are(tmp_path):
    wordnet = imagenet_classes()
    image = "ILSVRC2012_val_{:08d}.JPEG".format
    published = {
        "initial_annots": {
            image(1): {"wrong": [wordnet[5]], "correct": [wordnet[0]]},
            image(2): {"correct": [wordnet[0], wordnet[4]], "unclear": [wordnet[3]], "wrong": []},
            image(3): {"unclear": [wordnet[6]]},
            image(4): {"correct": [wordnet[1]]},
            "0a1b2c.jpg": {"correct": [wordnet[2]]},  # ImageNetV2's
        },
        "problematic_images": {image(4): {"reason": "wnid is marked wrong", "reviewer": "ludwig"}},
        "imagenet_m": [image(1)],
    }
    records = [
        record(1, [0], [5]),
        record(2, [0, 4], [], [3]),
        record(3, [], [], [6]),
        record(4, [1], problematic=True),
    ]
    names = [f"n0/{image(i)}" for i in (3, 1, 5, 4, 2)]
    for classes in (None, wordnet, wordnet[:5][::-1]):  # in another order, and without one that the file names
        both = []
        for content in (published, records):
            (tmp_path / "labels.json").write_text(json.dumps(content))
            both.append(read_multilabel_records(str(tmp_path / "labels.json"), names, 1000, classes))
        (right, counts, line), (expected, expected_counts, expected_line) = both
        assert np.array_equal(right, expected) and right.sum() == (5 if classes is None or len(classes) > 5 else 4)
        assert counts.tolist() == expected_counts.tolist() == [True, True, False, False, True]
        assert line == expected_line


@pytest.mark.parametrize(
    "content, message",
    [
        ({"initial_annots": {}}, "must be a list of the records"),
        ({"initial_annots": [], "problematic_images": {}}, "must be a list of the records"),
        ("text", "must be a list of the records"),
        ({"initial_annots": {"ILSVRC2012_val_00000001.JPEG": ["n0"]}, "problematic_images": {}}, "must be an object"),
        ({"initial_annots": {"ILSVRC2012_val_00000001.JPEG": {"correct": "n0"}}, "problematic_images": {}}, "a list"),
        ({"initial_annots": {"ILSVRC2012_val_00000001.JPEG": {"correct": ["n0"]}}, "problematic_images": {}}, "'n0'"),
        ({"initial_annots": {"other.jpg": {}}, "problematic_images": {}}, "no record that counts"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_shankar_s_is_refused(tmp_path, content, message):
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        read_multilabel_records(str(tmp_path / "labels.json"), ["n0/ILSVRC2012_val_00000001.JPEG"], 1000)


def test_average_precision_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(4), positive) == pytest.approx(0.5)


def test_renormalize_gives_what_the_network_was_trained_on():
    pixels = torch.rand(2, 3, 4, 4)
    images = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(Renormalize((0.5,) * 3, (0.5,) * 3)(images), (pixels - 0.5) / 0.5)


def test_the_command_evaluates_everything_in_one_go(tmp_path):
    torch.manual_seed(0)
    torch.save(build_model("shufflenet_v2_x0_5", 1000).state_dict(), tmp_path / "net.pth")
    write_colors(
        tmp_path / "val", [(WNIDS[c], f"ILSVRC2012_val_{i + 1:08d}.JPEG", c) for i, c in enumerate(range(0, 400, 40))]
    )
    for variant in ("imagenetv2-matched-frequency-format-val", "imagenetv2-threshold0.7-format-val"):
        write_colors(tmp_path / "v2" / variant, [(str(c), "a.png", c) for c in (2, 10)])
    for name in ("a", "r", "o"):
        write_colors(tmp_path / name, [(WNIDS[c], "a.png", c) for c in (40, 80, 120)])
    for corruption in ("fog", "snow"):
        for severity in (1, 2):
            write_colors(
                tmp_path / "c" / "weather" / corruption / str(severity), [(WNIDS[c], "a.png", c) for c in (0, 999)]
            )
    (tmp_path / "real.json").write_text(json.dumps([[i] for i in range(5)] + [[]] * 5))
    (tmp_path / "records.json").write_text(json.dumps([record(1, [0]), record(2, [40])]))
    result = run(
        "evaluate_imagenet.py", "--model.arch=shufflenet_v2_x0_5", f"--model.weights={tmp_path}/net.pth",
        f"--data.val={tmp_path}/val", f"--data.real={tmp_path}/real.json",
        f"--data.multilabel_records={tmp_path}/records.json", f"--data.imagenet_v2={tmp_path}/v2",
        f"--data.imagenet_a={tmp_path}/a", f"--data.imagenet_r={tmp_path}/r", f"--data.imagenet_o={tmp_path}/o",
        f"--data.imagenet_c={tmp_path}/c", "--data.image_size=32", "--data.num_workers=1",
        f"--output.folder={tmp_path}/out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "evaluation.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["set"], row["images"]) for row in rows] == [
        ("ImageNet", "10"), ("ImageNet", "10"), ("ReaL", "5"), ("Shankar et al.", "2"),
        ("ImageNetV2 matched-frequency", "2"), ("ImageNetV2 threshold0.7", "2"), ("ImageNet-A", "3"),
        ("ImageNet-R", "3"), ("ImageNet-O", "6"), ("ImageNet-C snow", "4"), ("ImageNet-C fog", "4"),
        ("ImageNet-C", "8"),
    ]  # fmt: skip
    assert "mean over 2 of 15 corruptions" in result.stdout and "| ImageNet-A | top-1 % of 3 classes |" in result.stdout
    fog = next(row for row in rows if row["set"] == "ImageNet-C fog")
    assert float(fog["value"]) * 0.819324 / 25 == pytest.approx(round(float(fog["value"]) * 0.819324 / 25))  # 4 images
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"][0]["measure"] == "top-1 %"
    nothing = run("evaluate_imagenet.py", f"--model.weights={tmp_path}/net.pth", "--model.arch=shufflenet_v2_x0_5")
    assert nothing.returncode == 1 and "nothing to evaluate on" in nothing.stderr
