"""White-box attacks on a network: FGSM (Goodfellow, Shlens and Szegedy, ICLR 2015)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import cross_entropy

from ..normalization import IMAGENET_MEAN, IMAGENET_STD

LEVELS = 255  # gray levels of an 8-bit image above 0


@dataclass(frozen=True)
class Fgsm:
    """One step of `epsilon` along the sign of the gradient, of every pixel and channel, that raises the loss.

    `clip(x + epsilon * sign(d cross_entropy(network(x), label) / dx), 0, 1)`: `epsilon` in pixels of 0..1, the loss by
    the single label, the pixels those that the network sees (after resizing and cropping), not rounded to 8 bits.
    """

    epsilon: float

    def __call__(
        self, network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The attacked images, as `images` are.

        Args:
            network: normalized images, float32 -> logits; in eval mode, else an image's gradient depends on the others.
            images: `[B, 3, S, S]`, normalized by ImageNet's mean and standard deviation.
            labels: int64 `[B]`.
        """
        with torch.inference_mode(False), torch.enable_grad():  # the caller may be in inference mode
            clean = images.float().clone().requires_grad_()
            loss = cross_entropy(network(clean), labels.clone(), reduction="sum")  # a mean's gradients are smaller
            (gradient,) = torch.autograd.grad(loss, clean)
        std, darkest, brightest = _bounds(images.device)
        moved = clean.detach() + self.epsilon / std * gradient.sign()
        return moved.clamp(darkest, brightest).to(images.dtype)

    def __str__(self) -> str:
        return f"FGSM, epsilon {self.epsilon * LEVELS:g}/{LEVELS}"


@lru_cache
def _bounds(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard deviation, and pixels 0 and 1 normalized; float32 `[3, 1, 1]`."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return std, -mean / std, (1 - mean) / std
