"""Mixed precision by name."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The dtype of images and activations on a device."""

    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler for float16; for other dtypes it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def precision_of(name: str, device: torch.device) -> Precision:
    """The precision called "fp32", "bf16" or "fp16"; "auto" is fp16 on a GPU, else fp32."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return Precision({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], device)
