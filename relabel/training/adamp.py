"""AdamP and LAMB over all parameters at once, without a value that the CPU waits for.

timm's (which these equal, see tests/test_optimizers.py) ask the GPU for a number once or twice a parameter (AdamP), and
under a float16 `GradScaler` once a step. Here every decision is made on the device by `torch.where`, also the scaler's:
after an overflow parameters and state are as they were.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..normalization import on_device


class MultiTensorAdam(torch.optim.Optimizer):
    """What AdamP and LAMB share: Adam's moments. The step is counted a group, in `group["step"]`, on the device."""

    _step_supports_amp_scaling = True  # GradScaler sets `grad_scale` and `found_inf` in place of asking for the latter

    def __init__(self, params: Iterable, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; `closure` is not supported."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [p.grad for _, params in groups for p in params]
        if not grads:
            return
        found_inf = getattr(self, "found_inf", None)
        overflow = torch.zeros((), dtype=torch.bool, device=grads[0].device) if found_inf is None else found_inf > 0
        if found_inf is not None:
            torch._foreach_mul_(grads, self.grad_scale.reciprocal())  # type: ignore[attr-defined]
            for grad in grads:
                grad.masked_fill_(overflow, 0)
        self.prepare(grads)
        for group, params in groups:
            if params:
                self.update(group, params, [p.grad for p in params if p.grad is not None], overflow)

    def prepare(self, grads: list[Tensor]) -> None:
        """Change all gradients in place, before anything else."""

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], overflow: Tensor) -> None:
        """Update a group's parameters; nothing changes where `overflow`, bool `[]`, is true."""
        raise NotImplementedError

    def moments(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], overflow: Tensor) -> Any:
        """Update Adam's moments.

        Returns:
            the first ones, the square roots of the second ones, corrected for their bias, plus epsilon; and the
            first ones' bias, float32 `[]`.
        """
        if "step" not in group:
            group["step"] = torch.zeros((), dtype=torch.float32, device=params[0].device)
        for p in params:
            if not self.state[p]:
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
        group["step"] += ~overflow
        step = group["step"].clamp(min=1).double()  # float32 has too few digits for 1 - 0.999
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(first, torch.where(overflow, 1.0, beta1))
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, torch.where(overflow, 1.0, beta2))
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**step).sqrt().float())
        torch._foreach_add_(denominators, group["eps"])
        return first, denominators, (1 - beta1**step).float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also timm's: AdamP's counts steps a parameter, LAMB's on the CPU."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            steps = [self.state[p].pop("step") for p in group["params"] if "step" in self.state[p]]
            group.setdefault("step", max(steps, default=0))
            group["step"] = torch.as_tensor(group["step"], dtype=torch.float32, device=group["params"][0].device)


class AdamP(MultiTensorAdam):
    """AdamP (Heo et al., ICLR 2021): the part of an update that is along scale-invariant weights is taken out.

    That is decided for each weight of 2 or more dimensions by the cosine between its gradient and itself, over output
    channels, then over all of it. `delta` 0.1 is the threshold; `wd_ratio` 0.1 is the share of the weight decay there.
    """

    def __init__(self, params: Iterable, lr: float, betas: tuple, weight_decay: float, nesterov: bool = False) -> None:
        super().__init__(
            params, lr=lr, betas=betas, weight_decay=weight_decay, nesterov=nesterov, eps=1e-8, delta=0.1, wd_ratio=0.1
        )
        self._layouts: dict[tuple, _Layout] = {}

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], overflow: Tensor) -> None:
        first, denominators, bias = self.moments(group, params, grads, overflow)
        if group["nesterov"]:
            beta1 = group["betas"][0]
            updates = torch._foreach_mul(first, beta1)
            torch._foreach_add_(updates, grads, alpha=1 - beta1)
            torch._foreach_div_(updates, denominators)
        else:
            updates = torch._foreach_div(first, denominators)
        del denominators
        step_size = torch.where(overflow, 0.0, group["lr"] / bias)
        decay = group["lr"] * group["weight_decay"]
        weights = [i for i, p in enumerate(params) if p.dim() > 1]
        if weights:
            self._shrink(group, [(params[i], grads[i], updates[i]) for i in weights], step_size, decay, overflow)
        others = [p for p in params if p.dim() <= 1]
        if others and decay:
            torch._foreach_mul_(others, torch.where(overflow, 1.0, 1 - decay))
        torch._foreach_mul_(updates, -step_size)
        torch._foreach_add_(params, updates)

    def _shrink(
        self, group: dict[str, Any], weights: list[tuple], step_size: Tensor, decay: float, overflow: Tensor
    ) -> None:
        """Weight decay, and the projection: `p *= 1 - decay * ratio + step_size * (p . update) / |p|^2`."""
        shapes = tuple(p.shape for p, _, _ in weights)
        if shapes not in self._layouts:
            self._layouts[shapes] = _Layout(shapes, step_size.device)
        layout, eps = self._layouts[shapes], group["eps"]
        values = [torch.stack(_products(p, grad, update)) for p, grad, update in weights]
        p_norm, g_norm, dot, along = layout.rows(torch.cat(values, 1))

        def parts(p_norm, g_norm, dot, along):
            cosine = dot.abs() / (p_norm.clamp(min=eps) * g_norm.clamp(min=eps))
            return cosine, along / (p_norm + eps).square()

        cosine, share = parts(p_norm, g_norm, dot, along)
        all_cosine, all_share = parts(
            *(torch.linalg.vector_norm(norm, dim=1, keepdim=True) for norm in (p_norm, g_norm)),
            *(product.sum(1, keepdim=True) for product in (dot, along)),
        )
        by_channel = cosine.amax(1, keepdim=True) < group["delta"] * layout.channel_scale
        by_layer = ~by_channel & (all_cosine < group["delta"] * layout.layer_scale)
        share = torch.where(by_channel, share, torch.where(by_layer, all_share, 0.0))
        ratio = torch.where(by_channel | by_layer, group["wd_ratio"], 1.0)
        factors = layout.flat(torch.where(overflow, 1.0, 1 - decay * ratio + step_size * share))
        for (p, _, _), factor in zip(weights, factors, strict=True):
            p.mul_(factor.view(-1, *(1,) * (p.dim() - 1)))


def _products(p: Tensor, grad: Tensor, update: Tensor) -> list[Tensor]:
    """Over a weight's output channels, each float32 `[channels]`: |p|, |grad|, p . grad, p . update."""
    over = tuple(range(1, p.dim()))
    norms = [torch.linalg.vector_norm(tensor, dim=over) for tensor in (p, grad)]
    return norms + [(p * tensor).sum(over) for tensor in (grad, update)]


class _Layout:
    """The output channels of weights, one after the other, as a matrix with a row a weight, filled up with zeros."""

    def __init__(self, shapes: tuple, device: torch.device) -> None:
        self.counts = [shape[0] for shape in shapes]
        counts, sizes = np.array(self.counts)[:, None], np.array([shape.numel() for shape in shapes])[:, None]
        places = np.arange(counts.max())
        inside, starts = places < counts, counts.cumsum(0).reshape(-1, 1) - counts
        index = np.where(inside, starts + places, counts.sum())  # the last is a zero
        self.index, self.back = on_device(index, device), on_device(np.flatnonzero(inside), device)
        self.channel_scale = on_device((sizes / counts).astype(np.float32) ** -0.5, device)
        self.layer_scale = on_device(sizes.astype(np.float32) ** -0.5, device)

    def rows(self, values: Tensor) -> Tensor:
        """`[N, all channels]` -> `[N, weights, width]`."""
        return torch.nn.functional.pad(values, (0, 1))[:, self.index]

    def flat(self, rows: Tensor) -> tuple[Tensor, ...]:
        """`[weights, width]` -> `[channels]` of each weight."""
        return rows.flatten()[self.back].split(self.counts)


class Lamb(MultiTensorAdam):
    """LAMB (You et al., ICLR 2020) as NVIDIA's: gradients clipped to a norm of 1 in all, decay within the update."""

    def __init__(self, params: Iterable, lr: float, betas: tuple, weight_decay: float) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=1e-6)

    def prepare(self, grads: list[Tensor]) -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_div_(grads, norm.clamp(min=1))

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], overflow: Tensor) -> None:
        first, denominators, bias = self.moments(group, params, grads, overflow)
        updates = torch._foreach_div(first, denominators)
        torch._foreach_div_(updates, bias)
        step_size = torch.where(overflow, 0.0, group["lr"])
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            norms, update_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, updates))
            known = (norms > 0) & (update_norms > 0)
            step_sizes = (step_size * torch.where(known, norms / update_norms, 1.0)).unbind()
            torch._foreach_mul_(updates, step_sizes)
        else:
            torch._foreach_mul_(updates, step_size)
        torch._foreach_sub_(params, updates)
