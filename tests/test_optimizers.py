"""Our multi-tensor optimizers equal timm's, step by step; what a float16 overflow leaves; resuming."""

import copy
import io

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from relabel.training.adamp import AdamP, Lamb
from relabel.training.optim import build_optimizer
from relabel.training.run import Average

LIKE = {"adamp": timm.optim.AdamP, "lamb": timm.optim.Lamb}


def network():
    """Weights of all kinds: convolutions (one by groups, all channels last), batch norm, linear, a scalar."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def set_gradients(model, step, scale=1.0):
    """Gradients of many sizes; those of a weight are now along it (not projected), now across it."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=generator)
        along = 0.3 * p.detach() if (step + i) % 3 == 0 else 0
        p.grad = (((noise * 10.0 ** ((step + i) % 4 - 2)) + along) * scale).to(memory_format=torch.preserve_format)
        if p.dim() > 1 and (step + i) % 2:  # across: no part along any channel
            flat, weight = p.grad.reshape(len(p), -1), p.detach().reshape(len(p), -1)
            part = (flat * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True)
            p.grad = (flat - part * weight).reshape(p.shape)


def pair(name, nesterov=True, decay=0.05, decay_bn=False):
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours, name, 2e-3, 0.9, nesterov, decay, decay_bn)
    more = {"nesterov": nesterov} if name == "adamp" else {}
    norms = {id(p) for m in theirs.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups = [{"params": [p for p in theirs.parameters() if decay_bn or id(p) not in norms]}]
    if not decay_bn:
        groups.append({"params": [p for p in theirs.parameters() if id(p) in norms], "weight_decay": 0.0})
    return ours, optimizer, theirs, LIKE[name](groups, lr=2e-3, betas=(0.9, 0.999), weight_decay=decay, **more)


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("nesterov, decay, decay_bn", [(True, 0.05, True), (False, 0.0, True), (True, 0.05, False)])
@pytest.mark.parametrize("name", LIKE)
def test_they_are_timm_s_over_many_steps(name, nesterov, decay, decay_bn):
    ours, optimizer, theirs, reference = pair(name, nesterov, decay, decay_bn)
    assert isinstance(optimizer, {"adamp": AdamP, "lamb": Lamb}[name])
    start = network()
    for step in range(300):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            set_gradients(model, step)
            for group in stepped.param_groups:
                group["lr"] = 2e-3 * (1 + step % 5)
            stepped.step()
        # from one point, each step: what rounding makes of 300 of them is no property of the optimizer
        assert difference(ours, theirs) <= 1e-6, step
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.copy_(b)
    assert difference(theirs, start) > 0.1


def test_adamp_projects_some_weights_by_channel_some_as_a_whole_some_not(monkeypatch):
    """The gradients above make every case of the projection occur, so that the comparison above means something."""
    seen, projection = set(), timm.optim.adamp.projection

    def watched(p, grad, perturb, delta, wd_ratio, eps, caution=False):
        channel = torch.nn.functional.cosine_similarity(grad.flatten(1), p.flatten(1), dim=1, eps=eps).abs().max()
        result = projection(p, grad, perturb, delta, wd_ratio, eps, caution)
        by_channel = bool(channel < delta / p[0].numel() ** 0.5)
        seen.add((by_channel, result[1] < 1))
        return result

    monkeypatch.setattr(timm.optim.adamp, "projection", watched)
    _, _, theirs, reference = pair("adamp")
    for step in range(300):
        set_gradients(theirs, step)
        reference.step()
    assert seen == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", LIKE)
def test_an_overflow_changes_nothing_and_scaled_gradients_are_unscaled(name, first):
    """As `GradScaler` calls it: `found_inf` and `grad_scale` on the optimizer."""
    ours, optimizer, theirs, reference = pair(name)
    overflows = {0} if first else {3, 4}
    for step in range(8):
        set_gradients(ours, step, scale=1024.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(float(step in overflows))
        if step in overflows:
            next(ours.parameters()).grad[0] = float("inf")
            list(ours.parameters())[-1].grad[0] = float("nan")
        before = [p.clone() for p in ours.parameters()]
        optimizer.step()
        if step in overflows:
            assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
            continue
        set_gradients(theirs, step)
        reference.step()
        assert difference(ours, theirs) <= 1e-6


@pytest.mark.parametrize("name", ["adamp", "lamb", "sgd", "adamw"])
def test_a_resumed_optimizer_goes_on_to_the_last_bit(name):
    models = [network() for _ in range(2)]
    optimizers = [build_optimizer(model, name, 2e-3, 0.9, True, 0.05, False) for model in models]
    for step in range(6):
        set_gradients(models[0], step)
        optimizers[0].step()
        if step == 2:
            file = io.BytesIO()
            torch.save([models[0].state_dict(), optimizers[0].state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            models[1].load_state_dict(weights)
            optimizers[1].load_state_dict(state)
        if step > 2:
            set_gradients(models[1], step)
            optimizers[1].step()
    assert difference(*models) == 0


@pytest.mark.parametrize("name", LIKE)
def test_a_state_that_timm_wrote_is_understood(name):
    ours, optimizer, theirs, reference = pair(name)
    for step in range(4):
        set_gradients(theirs, step)
        reference.step()
    ours.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))  # it keeps the tensors it is given
    for step in range(4, 8):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            set_gradients(model, step)
            stepped.step()
    assert difference(ours, theirs) <= 1e-6


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_does_not_say_whether_the_optimizer_is_fused(name):
    model = network()
    here, there = (build_optimizer(model, name, 0.1, 0.9, True, 1e-4, True) for _ in range(2))
    there.param_groups[0]["fused"] = True  # of a GPU
    here.load_state_dict(there.state_dict())
    assert here.param_groups[0]["fused"] is False


def test_the_average_is_torch_s_to_the_last_bit():
    """But for integer buffers, which are copied: torch's rounds them down as it averages."""
    model = network()
    ours, theirs = Average(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = build_optimizer(model, "sgd", 0.1, 0.9, True, 0, True)
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)))
        ours.update()
        theirs.update_parameters(model)
        assert ours.steps == theirs.n_averaged
        for (name, a), b in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
            assert torch.equal(a, b if b.is_floating_point() else model.state_dict()[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["adamp", "lamb", "sgd", "adamw"])
def test_on_a_gpu_an_overflow_in_the_first_step_changes_nothing(name):
    model = network().cuda()
    optimizer, scaler = build_optimizer(model, name, 2e-3, 0.9, True, 0.05, True), torch.amp.GradScaler("cuda")
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if step == 0:
            next(model.parameters()).grad[0] = float("inf")
        before = [p.clone() for p in model.parameters()]
        torch.cuda.set_sync_debug_mode("error")
        scaler.step(optimizer)
        scaler.update()
        torch.cuda.set_sync_debug_mode("default")
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (step == 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())
