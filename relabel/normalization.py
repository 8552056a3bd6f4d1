"""ImageNet's mean and standard deviation, and images normalized by them."""

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
        mean = torch.tensor(IMAGENET_MEAN, device=images.device) * 255
        inverse_std = 1 / (torch.tensor(IMAGENET_STD, device=images.device) * 255)
        images = (images - mean) * inverse_std
    return images.to(dtype).permute(0, 3, 1, 2)


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
