"""The state of a training run: what its steps change, and where it stands."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..precision import Precision
from ..processes import Processes


@dataclass(frozen=True)
class Plan:
    """The size of a run: `epochs` of `steps`, each on `batch_size` images, over all processes."""

    epochs: int
    steps: int
    batch_size: int


@dataclass
class Run:
    """What training changes, and where it stands: the next step to do is `step` of `epoch`."""

    network: nn.Module
    model: nn.Module  # `network` as it is trained: parallel, compiled
    optimizer: torch.optim.Optimizer
    precision: Precision
    processes: Processes
    ema: AveragedModel | None = None
    epoch: int = 0
    step: int = 0
    losses: torch.Tensor | None = None  # float32 [steps], of this epoch so far, zero beyond
    seconds: float = 0.0  # of this epoch so far
    waited: float = 0.0  # of these, for the loader

    def to_validate(self) -> nn.Module:
        """The network whose accuracy counts, the same in all processes: the EMA of the weights where there is one."""
        networks = [self.network, *([self.ema.module] if self.ema else [])]
        self.processes.share_buffers(*networks)
        return networks[-1]

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a part of this step's loss, float32 `[]`."""
        assert self.losses is not None  # made by Monitor.begin_epoch
        self.losses[self.step] += loss

    def optimizer_step(self) -> None:
        """Update the weights by the gradients, and the average of the weights; on to the next step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.network)
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
            state |= {"ema": self.ema.module.state_dict(), "ema_steps": self.ema.n_averaged}
        return state | {name: getattr(self, name) for name in ("epoch", "step", "losses", "seconds", "waited")}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from `state`, in place."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state.get("ema", state["model"]))
            self.ema.n_averaged.copy_(state.get("ema_steps", torch.tensor(0)))
        for name in ("epoch", "step", "losses", "seconds", "waited"):
            setattr(self, name, state[name])

    def next_epoch(self) -> None:
        self.epoch, self.step, self.losses, self.seconds, self.waited = self.epoch + 1, 0, None, 0.0, 0.0


def average_of(network: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average (EMA) of the weights; None where `decay` is 0."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
