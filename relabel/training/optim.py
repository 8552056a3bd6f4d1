"""Optimizer, learning-rate schedule and image-size schedule of the recipes."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adamp import AdamP, Lamb


def build_optimizer(
    model: nn.Module,
    optimizer: str,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    decay_bn: bool,
) -> torch.optim.Optimizer:
    """SGD, AdamP (Heo et al., ICLR 2021), AdamW or LAMB; the last three with betas `(momentum, 0.999)`.

    On CUDA none of them makes the CPU wait, also with a float16 loss scaler.

    Args:
        model: whose parameters are trained, but for those that are frozen.
        optimizer: "sgd", "adamp", "adamw" or "lamb".
        lr: learning rate at its peak.
        momentum: SGD's momentum, the others' first beta.
        nesterov: Nesterov's variant of SGD and AdamP, as in the official code; the others have none.
        weight_decay: on all parameters; without `decay_bn` not on batch norm's.
        decay_bn: whether batch norm's parameters decay.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if decay_bn or id(p) not in norms]}]
    if not decay_bn:
        groups.append({"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0})
    adam: dict[str, Any] = {"lr": lr, "betas": (momentum, 0.999), "weight_decay": weight_decay}
    if optimizer == "adamp":
        return AdamP(groups, nesterov=nesterov, **adam)
    if optimizer == "lamb":
        return Lamb(groups, **adam)
    fused = next(model.parameters()).is_cuda
    if optimizer == "adamw":
        return _keeping_fused(torch.optim.AdamW(groups, fused=fused, **adam), fused)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)
    if fused and momentum:  # else an overflow in the first step would leave them with what was in memory
        for parameters in sgd.param_groups:
            for p in parameters["params"]:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return _keeping_fused(sgd, fused)


def _keeping_fused(optimizer: torch.optim.Optimizer, fused: bool) -> torch.optim.Optimizer:
    """Whether it is fused is a matter of this machine: a checkpoint of another would change it."""

    def keep(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": [g | {"fused": fused, "foreach": None} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep)
    return optimizer


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer's moments take, also before the first step: two with betas, one with SGD's momentum."""
    moments = 2 if "betas" in optimizer.defaults else bool(optimizer.defaults["momentum"])
    return moments * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


def learning_rate(
    epoch: float, epochs: int, peak: float, decay_type: str, warmup_lr: float, warmup_epochs: float
) -> float:
    """The learning rate at a (fractional) epoch: linear warm-up to `peak`, then decay over the remaining epochs.

    Args:
        epoch: epochs done so far, 0 to `epochs`.
        epochs: length of the run.
        peak: `optim.lr.init`.
        decay_type: "cos" and "linear" end at 0; "step" (officially "default") divides by 10 every 30 epochs, counted
            from the start.
        warmup_lr: where the warm-up begins.
        warmup_epochs: how long it lasts.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * epoch / warmup_epochs
    if decay_type in ("step", "default"):
        return peak * 0.1 ** (epoch // 30)
    done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return peak * (1 - done if decay_type == "linear" else (1 + math.cos(math.pi * done)) / 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for all parameters."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
