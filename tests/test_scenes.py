"""The study on Scenes: what scenes, annotators and damages are, that trainings are kept, and what tables say."""

import json

import numpy as np
import pytest
import torch
from test_train import small  # noqa: F401  (a fixture)

from relabel.data.label_map_files import read_tensor
from relabel.errors import BadInput
from relabel.label_maps.annotator import DenseAnnotator
from scenes import compose, crop_study, data, figures, robustness, suite, weak_annotator
from scenes.annotator import Annotator, annotate, quality
from scenes.data import Data
from scenes.statistics import in_words, mean_and_error
from scenes.strong_annotator import scenes_of, strong_annotator, train
from scenes.trainings import Training, run_all


def test_scenes_are_what_their_json_says(small):  # noqa: F811
    layout = json.loads((small / "train.json").read_text())
    files = sorted(str(p.relative_to(small / "train")) for p in (small / "train").rglob("*.jpg"))
    assert layout["files"] == files and len(files) == 128
    for file, objects, present in zip(files, layout["objects"], layout["multilabels"], strict=True):
        assert compose.CLASSES[objects[0][0]] == file.split("/")[0]
        assert present == sorted({c for c, *_ in objects})
        assert 2 <= len(objects) <= 4
        for _, y, x, side in objects:
            assert 0 <= y <= compose.CANVAS - side and 0 <= x <= compose.CANVAS - side


def test_no_photograph_is_in_two_splits():
    annotators, training = (compose.photographs_of(split)[0] for split in ("annotator", "train"))
    both, _ = compose.read_photographs("train")
    assert np.array_equal(np.concatenate([annotators, training]), both) and len(annotators) == len(training)
    assert len(compose.photographs_of("val")[0]) == 8000


def test_the_same_objects_stand_before_another_background():
    dark, light = robustness.scenes_before(count=8), robustness.scenes_before(robustness.bright, count=8)
    assert np.array_equal(dark.labels, light.labels) and np.array_equal(dark.present, light.present)
    assert (light.pixels[:, 0, 0] > dark.pixels[:, 0, 0] + 20).all()  # a corner's
    present = robustness.scenes_before(robustness.clutter(), count=2).present
    assert (present.sum(1) >= 1).all()


def test_damages_grow_with_their_severity():
    clean = robustness.scenes_before(count=4)
    for damage in robustness.DAMAGES.values():
        after = [robustness.damaged(clean, damage, severity).pixels.astype(int) for severity in (1, 3, 5)]
        apart = [np.abs(pixels - clean.pixels).mean() for pixels in after]
        assert 0.5 < apart[0] < apart[1] < apart[2], damage


def test_an_accuracy_under_attack_is_of_the_attacked_images():
    torch.manual_seed(0)
    images, right = torch.randn(6, 3, 8, 8), np.eye(8, dtype=bool)[[0, 1, 2, 3, 4, 5]]

    class Brightest(torch.nn.Module):  # predicts class 7 where an image is bright, else the right one
        def forward(self, images):
            logits = torch.eye(8)[:6] * 1.0
            logits[:, 7] = 10 * images.mean((1, 2, 3))
            return logits

    assert robustness.accuracy(Brightest(), torch.full_like(images, -1), right) == 100
    attacked = robustness.accuracy(Brightest(), torch.full_like(images, -1), right, lambda n, x, y: torch.ones_like(x))
    assert attacked == 0


def test_the_annotators_dense_logits_average_to_their_logits(small):  # noqa: F811
    torch.manual_seed(1)
    weak = Annotator(weak_annotator.CELL * 15, weak_annotator.LAYERS).eval()
    for network in (weak, strong_annotator()):
        size = network.input.image_size
        images, dense = torch.randn(2, 3, size, size), DenseAnnotator(network, size)
        with torch.inference_mode():
            assert dense(images).shape == (2, 8, 15, 15)
            assert torch.allclose(dense(images).mean((2, 3)), network(images), atol=1e-4)
    file = next((small / "label_maps").rglob("*.pt"))
    assert read_tensor(file).shape == (2, 5, 15, 15) and read_tensor(file).dtype == torch.float32


def test_the_strong_annotator_knows_scenes_that_it_has_not_seen(small):  # noqa: F811
    found = quality(small / "train.json", small / "label_maps")
    assert found["multilabel"] > 90 and found["localization"] > 75 and found["top_1"] > 40, found


def test_quality_is_counted_by_cell(small, tmp_path):  # noqa: F811
    class Columns(Annotator):  # says class 0 on the left half of a scene, class 1 on the right
        def forward(self, images):
            return self.head(self.features(images).mean((2, 3)))

    network = Columns(15, [(8, 1)]).eval()
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.arange(8, 0, -1.0))  # class 0 everywhere
    annotate(network, small / "train", tmp_path / "maps")
    layout = json.loads((small / "train.json").read_text())
    found = quality(small / "train.json", tmp_path / "maps")
    assert found["top_1"] == pytest.approx(100 * np.mean([o[0][0] == 0 for o in layout["objects"]]))
    assert found["multilabel"] == pytest.approx(100 * np.mean([0 in present for present in layout["multilabels"]]))
    counts = [(len(_inside(y, s)) * len(_inside(x, s)), c == 0) for o in layout["objects"] for c, y, x, s in o]
    assert found["localization"] == pytest.approx(100 * sum(n for n, hit in counts if hit) / sum(n for n, _ in counts))


def _inside(start, side):
    """The cells of a row whose centers, in pixels, lie in the middle half of a frame."""
    return [i for i in range(15) if start + side / 4 < (i + 0.5) * 72 / 15 < start + 3 * side / 4]


def test_the_strong_annotator_s_training_repeats(monkeypatch):
    pixels, labels = scenes_of(64, 0)
    assert pixels.shape == (64, 3, 72, 72) and len(set(labels.tolist())) > 4
    first, second = (train(64, 2).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_trainings_are_kept_and_failures_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "VAL_SCENES", 64)
    monkeypatch.setattr(weak_annotator, "STEPS", 2)
    monkeypatch.setattr(suite, "ROWS", {r: suite.ROWS[r] for r in (suite.SINGLE, "label cleaning", suite.RELABEL)})
    study = suite.Suite(tmp_path, seeds=(0,), jobs=2, scenes=256, epochs=1)
    suite.ablation(study)
    table = json.loads((tmp_path / "ablation.json").read_text())["results"]
    assert list(table) == [
        "single label | none", "label cleaning | weak", "label cleaning | strong",
        "localized, multi (ReLabel) | weak", "localized, multi (ReLabel) | strong",
    ]  # fmt: skip
    for values in table.values():
        assert len(values["multilabel"]) == 1 and all(0 <= v <= 100 for v in values["train_multilabel"])
    assert (tmp_path / "ablation.png").stat().st_size > 5000 and "5/5" in capsys.readouterr().out
    suite.ablation(study)  # nothing is trained again
    assert "trainings, 2 at a time" not in capsys.readouterr().out
    trained = study.training(suite.RELABEL, 0, study.data())
    found = robustness.study([trained], tmp_path / "trainings", count=16)
    assert len(found) == 5 + len(robustness.DAMAGES) + len(robustness.EPSILONS)
    assert all(0 <= values[suite.RELABEL][0] <= 100 and len(values[suite.RELABEL]) == 1 for values in found.values())
    assert robustness.make_table(found).splitlines()[2].startswith(f"| {robustness.UNCHANGED} | ")
    figures.robustness(found, tmp_path / "robustness.png")
    bad = Training("bad", study.data(), 0, ("--optim.epochs=0",))
    with pytest.raises(BadInput, match=r"bad, seed 0, failed: 2; see .*output\.txt"):
        run_all([bad], tmp_path / "trainings", 1)
    (output,) = (tmp_path / "trainings").glob("bad_*/output.txt")
    assert "optim.epochs" in output.read_text()


def test_a_curve_has_as_many_steps_at_each_number_of_scenes(tmp_path, monkeypatch):
    asked = []

    def run(self, trainings):
        asked.extend(trainings)
        return {t: {"multilabel": 50.0 + len(t.row), "train_multilabel": 60.0} for t in trainings}

    monkeypatch.setattr(suite.Suite, "run", run)
    suite.scenes(suite.Suite(tmp_path, seeds=(0, 1)))
    assert {t.data.scenes for t in asked} == set(suite.SCENE_COUNTS) and len(asked) == 4 * len(suite.SCENE_COUNTS)
    for training in asked:
        (epochs,) = (int(s.rpartition("=")[2]) for s in training.settings if s.startswith("--optim.epochs"))
        assert training.data.scenes * epochs == suite.SCENES * suite.EPOCHS
    gain = len(suite.RELABEL) - len(suite.SINGLE)
    single, relabel = 50.0 + len(suite.SINGLE), 50.0 + len(suite.RELABEL)
    lines = (tmp_path / "scenes.md").read_text().splitlines()
    assert lines[2] == f"| 200 | {suite.SINGLE} | {single:.1f} ± 0.0 |  | 60.0 ± 0.0 |"
    assert lines[3] == f"| 200 | {suite.RELABEL} | {relabel:.1f} ± 0.0 | +{gain}.0 ± 0.0 | 60.0 ± 0.0 |"
    assert (tmp_path / "scenes.png").stat().st_size > 5000


def test_the_length_of_training_is_tried_for_each_kind_of_label(tmp_path, monkeypatch):
    def run(self, trainings):
        assert len(trainings) == len(set(trainings)) == 4 * len(suite.EPOCH_COUNTS)
        lengths = {t: int(t.settings[-2].rpartition("=")[2]) for t in trainings}
        assert all(t.settings[-2].startswith("--optim.epochs=") for t in trainings)
        gains = {suite.SINGLE: 0, suite.LOCALIZED_SINGLE: 1, suite.RELABEL: 2, suite.CUTMIX: -3}
        return {t: {"multilabel": lengths[t] / 10 + gains[t.row], "train_multilabel": 60.0} for t in trainings}

    monkeypatch.setattr(suite.Suite, "run", run)
    suite.epochs(suite.Suite(tmp_path, seeds=(0,)))
    lines = (tmp_path / "epochs.md").read_text().splitlines()
    assert len(lines) == 2 + 4 * len(suite.EPOCH_COUNTS)
    assert lines[10] == "| 30 | single label | 3.0 |  | 60.0 |"
    assert lines[13] == "| 30 | ReLabel + CutMix | 0.0 | -3.0 | 60.0 |"
    assert (tmp_path / "epochs.png").stat().st_size > 5000


def test_short_recipes_are_one_change_each(tmp_path, monkeypatch):
    def run(self, trainings):
        assert len(trainings) == 2 * len(suite.RECIPES)
        return {
            t: dict.fromkeys(suite.KEYS, 70.0 + t.seed + ("EMA" in t.row)) | {"cpu_seconds": 9.0} for t in trainings
        }

    monkeypatch.setattr(suite.Suite, "run", run)
    suite.recipes(suite.Suite(tmp_path, seeds=(0, 1)))
    lines = (tmp_path / "recipes.md").read_text().splitlines()
    assert "difference to progressive resizing" in lines[0] and len(lines) == 2 + len(suite.RECIPES)
    assert lines[2] == "| progressive resizing | strong | 70.5 ± 0.5 | 70.5 ± 0.5 |  | 70.5 ± 0.5 | 9 |"
    row = "progressive resizing, EMA | strong"
    assert lines[6] == f"| {row} | 71.5 ± 0.5 | 71.5 ± 0.5 | +1.0 ± 0.0 | 71.5 ± 0.5 | 9 |"


def test_the_transposed_region_is_paired_by_seed(tmp_path, monkeypatch):
    def run(self, trainings):
        return {t: {"multilabel": 80.0 + t.seed - 2.5 * (t.row == suite.TRANSPOSED)} for t in trainings}

    monkeypatch.setattr(suite.Suite, "run", run)
    suite.transposed(suite.Suite(tmp_path, seeds=(0, 2)))
    text = (tmp_path / "transposed.md").read_text()
    assert "own region 81.0 ± 1.0 %, the transposed one 78.5 ± 1.0 %; difference -2.5 ± 0.0" in text


def test_a_training_of_other_settings_has_another_folder(tmp_path):
    first = Training("a", Data(tmp_path, 8), 0, ("--x",))
    others = [Training("a", Data(tmp_path, 9), 0, ("--x",)), Training("a", Data(tmp_path, 8, "weak"), 0, ("--x",)),
              Training("a", Data(tmp_path, 8), 1, ("--x",)), Training("a", Data(tmp_path, 8), 0, ("--y",))]  # fmt: skip
    assert len({t.name for t in (first, *others)}) == 5


def test_the_ablation_s_table_pairs_rows_by_seed():
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0)) and np.isnan(mean_and_error([1.0])[1])
    assert in_words([1.0]) == "1.0" and in_words([1.0, 1.0], "+") == "+1.0 ± 0.0"
    results = {
        "single label | none": {"top_1": [50.0, 52.0], "multilabel": [70.0, 72.0]},
        "ReLabel | strong": {"top_1": [51.0, 53.0], "multilabel": [72.0, 74.0]},
    }
    for values in results.values():
        values |= {"train_multilabel": [80.0, 90.0], "cpu_seconds": [10.0, 20.0]}
    lines = suite.make_table(results, 2).splitlines()
    assert lines[2] == "| single label | none | 51.0 ± 1.0 | 71.0 ± 1.0 |  | 85.0 ± 5.0 | 15 |"
    assert lines[3] == "| ReLabel | strong | 52.0 ± 1.0 | 73.0 ± 1.0 | +2.0 ± 0.0 | 85.0 ± 5.0 | 15 |"


def test_overlaps_of_crops_and_objects():
    crops = np.array([[0, 0, 10, 10], [20, 0, 30, 20]], float)
    objects = np.array([[5, 5, 15, 15], [0, 0, 10, 10]], float)
    iou, share = crop_study.overlaps(crops, objects)
    np.testing.assert_allclose(iou, [[25 / 175, 1], [0, 0]])
    np.testing.assert_allclose(share, [[0.25, 1], [0, 0]])


def test_the_crop_study_of_scenes_and_its_figure(small, tmp_path):  # noqa: F811
    found = crop_study.study(small / "train.json", small / "label_maps")
    assert {len(values) for values in found.values()} == {128 * crop_study.CROPS}
    assert found["single_right"][found["iou"] > 0.5].all()  # a crop that is half the labeled object holds it
    assert 0 < (found["iou"] == 0).mean() < 0.5 and not found["single_right"][found["empty"]].any()
    assert "do not touch the labeled object" in crop_study.summary(found)
    crop_study.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000
