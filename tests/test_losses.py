"""Losses of soft targets: by the formulas, timm's, and in parts; and what they ask of a network."""

import pytest
import timm.loss
import torch
from torch.nn.functional import cross_entropy, one_hot

from relabel.models import build_model, head_layers, set_prior
from relabel.training.targets import soft_loss


def batch(count=6, classes=7):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits.requires_grad_(), torch.randn(count, classes, generator=generator).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_soft_targets_is_the_paper_s(smoothing):
    """`-(t * log_softmax(logits)).sum(1).mean()`, of targets of which a share is spread evenly over all classes."""
    logits, targets = batch()
    smooth = targets * (1 - smoothing) + smoothing / 7
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(soft_loss(logits, targets, "ce", smoothing), expected, atol=1e-6)
    assert torch.equal(
        soft_loss(logits, targets, "ce", smoothing), cross_entropy(logits, targets, label_smoothing=smoothing)
    )


def test_binary_cross_entropy_is_timm_s_with_its_gradients():
    """Of soft targets, and of smoothed single labels, which timm makes by itself."""
    logits, targets = batch()
    labels = torch.tensor([0, 3, 6, 6, 1, 2])
    for ours, theirs in (
        (soft_loss(logits, targets, "bce"), timm.loss.BinaryCrossEntropy(0.0, sum_classes=True)(logits, targets)),
        (soft_loss(logits, one_hot(labels, 7).float(), "bce", 0.1),
         timm.loss.BinaryCrossEntropy(0.1, sum_classes=True)(logits, labels)),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients)


def test_binary_cross_entropy_by_hand_and_of_saturated_answers():
    loss = soft_loss(torch.zeros(1, 3), torch.tensor([[0.2, 0.3, 0.5]]), "bce")
    assert loss.item() == pytest.approx(3 * 0.693147, abs=1e-5)
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = soft_loss(logits, torch.tensor([[0.25, 0.75]]), "bce")
    assert loss.item() == pytest.approx(0.75 * 200 + 0.75 * 200)  # finite, as log(sigmoid) in float32 is not
    assert torch.autograd.grad(loss, logits)[0].tolist() == [[0.75, -0.75]]


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_a_batch_s_loss_is_the_mean_of_its_parts(kind):
    """What micro-batches and several processes make of it: each the mean of its own, then the mean of these."""
    logits, targets = batch()
    parts = [soft_loss(logits[part], targets[part], kind, 0.1) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(soft_loss(logits, targets, kind, 0.1), sum(parts) / 2)


def test_binary_cross_entropy_is_least_where_each_sigmoid_is_its_target():
    """As the cross-entropy is where the softmax is the targets: a teacher's soft labels are what is learned."""
    _, targets = batch()
    at_best = targets.logit().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_loss(at_best, targets, "bce"), at_best)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("arch", ["resnet18", "timm/rexnet_100", "timm/test_vit"])
def test_each_sigmoid_begins_at_its_share_of_the_classes(arch):
    model, images = build_model(arch, 100).eval(), torch.zeros(1, 3, 160, 160)
    set_prior(model, 100)
    (head,) = head_layers(model)
    assert torch.allclose(model.get_submodule(head).bias.sigmoid(), torch.full((100,), 0.01))
    assert model(images).sigmoid().mean().item() == pytest.approx(0.01, abs=0.005)
    target = torch.full((1, 100), 0.01)
    assert soft_loss(model(images), target, "bce").item() == pytest.approx(5.6, abs=0.6)  # 100 x the entropy of 0.01


def test_with_its_prior_the_first_steps_of_1_000_classes_do_not_overshoot():
    """SGD at a small learning rate: without it the logits are pulled from 0 to far below log(1/1000) = -6.9."""
    deepest = {}
    for prior in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(512, 1000))
        if prior:
            set_prior(model, 1000)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        logits = []
        for _ in range(12):
            images, labels = torch.rand(16, 512), torch.randint(1000, (16,))  # as after ReLU and pooling: positive
            logits.append(model(images))
            optimizer.zero_grad()
            soft_loss(logits[-1], one_hot(labels, 1000).float(), "bce").backward()
            optimizer.step()
        deepest[prior] = min(answer.mean().item() for answer in logits)
    assert deepest[True] > -9 and deepest[False] < -20
