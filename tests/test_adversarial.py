"""FGSM: parity with the formula, written out in pixels; what it may and may not change; and the row of the command."""

import csv

import numpy as np
import pytest
import torch
from conftest import run
from test_evaluate import WNIDS, write_colors

from relabel.data.classes import imagenet_classes
from relabel.data.folder_loader import evaluation_loader
from relabel.data.reading import Reading
from relabel.evaluation.adversarial import Fgsm
from relabel.evaluation.predictions import predict
from relabel.models import build_model
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD
from relabel.precision import precision_of
from relabel.processes import join

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))


def network(num_classes=10):
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes).eval()
    for parameter in model.fc.parameters():
        parameter.data *= 20  # else what an untrained network answers hardly depends on the image
    return model


def by_the_formula(model, pixels, labels, epsilon):
    """The attacked pixels, one image at a time, normalization inside the network as in other libraries."""
    attacked = []
    for image, label in zip(pixels, labels, strict=True):
        image = image[None].clone().requires_grad_()
        probability = model((image - MEAN) / STD).softmax(1)[0, label]
        (-probability.log()).backward()
        attacked.append((image + epsilon * image.grad.sign()).detach().clamp(0, 1))
    return torch.cat(attacked)


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255])
def test_fgsm_is_the_formula_in_pixels(epsilon):
    model, generator = network(), torch.Generator().manual_seed(1)
    pixels, labels = torch.rand(6, 3, 64, 64, generator=generator), torch.arange(6)
    pixels[0] = 0
    pixels[1] = 1  # can be moved to one side only
    with torch.inference_mode():
        attacked = Fgsm(epsilon)(model, (pixels - MEAN) / STD, labels) * STD + MEAN
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = by_the_formula(model, pixels, labels, epsilon)
    different = (attacked - expected).abs() > 1e-5
    assert different.float().mean() < 1e-4  # where a gradient is 0 up to rounding, its sign is either
    change = (attacked - pixels).abs()
    assert change.max() == pytest.approx(epsilon, abs=1e-6) and attacked.min() > -1e-6 and attacked.max() < 1 + 1e-6
    assert (change[2:] > 0.99 * epsilon).float().mean() > 0.9


def test_each_image_is_attacked_by_its_own_label_alone():
    model, images = network(), torch.randn(4, 3, 64, 64)
    together = Fgsm(4 / 255)(model, images, torch.arange(4))
    alone = torch.cat([Fgsm(4 / 255)(model, images[i : i + 1], torch.tensor([i])) for i in range(4)])
    assert ((together - alone).abs() > 1e-4).float().mean() < 1e-3
    other = Fgsm(4 / 255)(model, images, torch.arange(4).flip(0))
    assert ((together - other).abs() > 1e-4).float().mean() > 0.2


@pytest.mark.parametrize("flip_average", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions_under_attack_are_those_of_the_attacked_images(tmp_path, flip_average, precision):
    rng, model = np.random.default_rng(0), network(1000)
    write_colors(tmp_path, [(WNIDS[c], f"{c}.png", c) for c in rng.integers(0, 1000, 10)])
    processes = join(-1, "gloo")
    reading = Reading(1000, processes, 1, classes=imagenet_classes())
    loader, _ = evaluation_loader(str(tmp_path), reading, 4, 32, 0.875)
    arguments = model, loader, precision_of(precision, processes.device), flip_average
    clean, attacked = predict(*arguments), predict(*arguments, attack=Fgsm(8 / 255))
    assert attacked.loss > clean.loss
    seen = []
    predict(*arguments, attack=lambda of, images, labels: seen.append((of, images, labels)) or images)
    loss = 0
    for of, images, labels in seen:
        images = Fgsm(8 / 255)(of, images, labels)
        with torch.no_grad(), precision_of(precision, processes.device).autocast():
            logits = model(images)
            logits = ((logits + model(images.flip(3))) / 2 if flip_average else logits).float()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert attacked.loss == pytest.approx(loss / 10, rel=1e-4)


def test_the_command_attacks_the_validation_images(tmp_path):
    torch.save(network(1000).state_dict(), tmp_path / "net.pth")
    write_colors(tmp_path / "val", [(WNIDS[c], f"{c}.png", c) for c in range(0, 400, 40)])
    common = "--model.arch=resnet18", f"--model.weights={tmp_path}/net.pth", "--data.image_size=32"
    result = run("evaluate_imagenet.py", *common, f"--data.val={tmp_path}/val", "--data.fgsm=8",
                 f"--output.folder={tmp_path}/out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "evaluation.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert (row["set"], row["measure"], row["images"]) == ("ImageNet, FGSM, epsilon 8/255", "top-1 %", "10")
    alone = run("evaluate_imagenet.py", *common, "--data.fgsm=8", f"--data.imagenet_a={tmp_path}/val")
    assert alone.returncode == 1 and "data.fgsm needs data.val" in alone.stderr
