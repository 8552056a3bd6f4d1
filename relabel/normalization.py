"""ImageNet's mean and standard deviation, and images normalized by them."""

from functools import lru_cache

import numpy as np
import torch
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images of the loader -> `[B, 3, S, S]` of `dtype`, channels last, mean 0 and standard deviation 1 over ImageNet.

    Args:
        images: uint8 `[B, S, S, 3]` RGB, or float32 that the decoder normalized already.
    """
    if not images.is_floating_point():
        mean, inverse_std, shift = _constants(images.device)
        if images.device.type == "cpu":
            images = (images - mean) * inverse_std
        else:  # one kernel
            out = torch.empty(images.shape, dtype=dtype, device=images.device)
            images = torch.addcmul(shift, images, inverse_std, out=out)
    return images.to(dtype).permute(0, 3, 1, 2)


@lru_cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, 1 / standard deviation, and the former times the latter, negated, of RGB in 0..255; float32 `[3]`."""
    mean, inverse_std = torch.tensor(IMAGENET_MEAN) * 255, 1 / (torch.tensor(IMAGENET_STD) * 255)
    return mean.to(device), inverse_std.to(device), (-mean * inverse_std).to(device)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`, without making the CPU wait for what the device has to do before."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Renormalize(nn.Module):
    """Images normalized by ImageNet's mean and standard deviation -> by others."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        own = [torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD, mean, std)]
        self.register_buffer("scale", own[1] / own[3], persistent=False)
        self.register_buffer("shift", (own[0] - own[2]) / own[3], persistent=False)

    scale: torch.Tensor
    shift: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * self.scale + self.shift
