"""The state of a training run: what its steps change, and its position."""

import resource
from copy import deepcopy
from dataclasses import dataclass
from os import sysconf
from typing import Any

import torch
from torch import nn

from ..files import in_units
from ..precision import Precision
from ..processes import Processes
from .optim import optimizer_bytes
from .run_folder import bytes_of


@dataclass(frozen=True)
class Plan:
    """The size of a run: `epochs` of `steps`, each on `batch_size` images, over all processes."""

    epochs: int
    steps: int
    batch_size: int


@dataclass
class Run:
    """What training changes, and its position: the next step is `step` of `epoch`."""

    network: nn.Module
    model: nn.Module  # `network` as it is trained: parallel, compiled
    optimizer: torch.optim.Optimizer
    precision: Precision
    processes: Processes
    ema: "Average | None" = None
    epoch: int = 0
    step: int = 0
    losses: torch.Tensor | None = None  # float32 [steps], of this epoch so far, zero beyond
    seconds: float = 0.0  # of this epoch so far
    waited: float = 0.0  # of these, for the loader

    @property
    def validated(self) -> nn.Module:
        """The network whose accuracy counts: the EMA of the weights where there is one."""
        return self.ema.module if self.ema else self.network

    def to_validate(self) -> nn.Module:
        """`validated`, with buffers that are the same in all processes."""
        self.processes.share_buffers(self.network, *([self.ema.module] if self.ema else []))
        return self.validated

    def sizes(self) -> tuple[int, int]:
        """Bytes of a checkpoint, and of the weights alone."""
        weights = bytes_of(self.network.state_dict())
        return (2 if self.ema else 1) * weights + optimizer_bytes(self.optimizer), weights

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss to this step's, float32 `[]`."""
        assert self.losses is not None  # made by Monitor.begin_epoch
        self.losses[self.step] += loss

    def optimizer_step(self) -> None:
        """Update the weights from the gradients, and the average of the weights; advance to the next step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.step += 1

    def __post_init__(self) -> None:
        self.scaler = self.precision.scaler()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema:
            state |= {"ema": self.ema.module.state_dict(), "ema_steps": torch.tensor(self.ema.steps)}
        return state | {name: getattr(self, name) for name in ("epoch", "step", "losses", "seconds", "waited")}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from `state`, in place."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and not state["scaler"]:
            if self.processes.first:
                print("resumed with another precision: float16's loss scaler starts anew")
        else:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("ema", state["model"]))
            self.ema.steps = int(state.get("ema_steps", 0))
        for name in ("epoch", "step", "losses", "seconds", "waited"):
            setattr(self, name, state[name])

    def next_epoch(self) -> None:
        self.epoch, self.step, self.losses, self.seconds, self.waited = self.epoch + 1, 0, None, 0.0, 0.0


class Average:
    """The exponential moving average (EMA) of a network's weights and buffers, by `torch._foreach_lerp_`.

    As torch's `AveragedModel` with `use_buffers`, which makes the CPU wait for the device twice a step and averages
    integers one by one: here they are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = deepcopy(network), decay, 0
        own, others = ([*n.parameters(), *n.buffers()] for n in (self.module, network))
        pairs = [(a.detach(), b.detach()) for a, b in zip(own, others, strict=True)]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._integers = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the network; the first makes it the network."""
        weight = 1 - self.decay if self.steps else 1.0
        for pairs, w in ((self._floats, weight), (self._integers, 1.0)):
            if not pairs:
                continue
            own, others = (list(tensors) for tensors in zip(*pairs, strict=True))
            if w == 1:
                torch._foreach_copy_(own, others)
            else:
                torch._foreach_lerp_(own, others, w)
        self.steps += 1


def average_of(network: nn.Module, decay: float) -> Average | None:
    """The EMA of `network`; None where `decay` is 0."""
    return Average(network, decay) if decay else None


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, in words."""
    peak = in_units(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    line = f"peak memory {peak} of {in_units(sysconf('SC_PHYS_PAGES') * sysconf('SC_PAGE_SIZE'))}"
    if device.type == "cuda":
        line += f", {in_units(torch.cuda.max_memory_reserved())} of the GPU's {in_units(torch.cuda.mem_get_info()[1])}"
    return line
