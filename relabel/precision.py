"""Mixed precision by name."""

from collections.abc import Callable
from functools import partial

import torch


def precision_of(name: str, device: torch.device) -> tuple[torch.dtype, Callable]:
    """The dtype of images and activations, and the maker of a forward pass's context.

    Args:
        name: "fp32", "bf16", "fp16", or "auto": fp16 on a GPU, else fp32.
    """
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    mixed = dtype != torch.float32
    return dtype, partial(torch.autocast, device.type, dtype if mixed else None, enabled=mixed)
