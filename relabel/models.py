"""Networks by name (torchvision's, and timm's as `timm/NAME`), BlurPool, and weights from a checkpoint."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoints import plain_names, read_checkpoint, saved_classes
from .errors import BadInput
from .normalization import IMAGENET_MEAN, IMAGENET_STD, Renormalize

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # of Inception v3 and GoogLeNet


def build_model(
    arch: str,
    num_classes: int,
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-5,
    use_blurpool: bool = False,
) -> nn.Module:
    """A network with random weights, images float `[B, 3, S, S]` -> logits `[B, num_classes]`.

    Args:
        arch: the name of a torchvision classifier, or `timm/NAME`.
        num_classes: size of its head.
        bn_momentum: batch norm's momentum in torch's sense: the weight of the new batch.
        bn_eps: batch norm's epsilon.
        use_blurpool: blur before every strided convolution of 16 or more channels (Zhang, ICML 2019).

    Raises:
        BadInput: there is no such network; the message names the nearest.
    """
    if arch.startswith("timm/"):
        import timm  # takes time: not where it is not needed

        known = [f"timm/{name}" for name in (*timm.list_models(), *timm.list_pretrained())]
    else:
        known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        nearest = difflib.get_close_matches(arch, known, n=3)
        raise BadInput(
            f"model.arch is {arch!r}; "
            + (f"did you mean {', '.join(nearest)}?" if nearest else "give a torchvision classifier or timm/NAME")
        )
    if arch.startswith("timm/"):
        model = timm.create_model(arch.removeprefix("timm/"), num_classes=num_classes)
    else:
        keywords = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
        if keywords:
            keywords["aux_logits"] = False
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **keywords)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum, module.eps = bn_momentum, bn_eps
    if use_blurpool:
        _apply_blurpool(model)
    return model


def published_model(arch: str, num_classes: int) -> nn.Module:
    """A network with the weights that torchvision (its default ones) or timm publish; downloaded once.

    Raises:
        BadInput: there is no such network or no such weights, they cannot be had, or are for other classes.
    """
    build_model(arch, num_classes)  # a name that does not exist is named
    try:
        if arch.startswith("timm/"):
            import timm

            model = timm.create_model(arch.removeprefix("timm/"), pretrained=True)
        else:
            model = torchvision.models.get_model(arch, weights="DEFAULT")
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{arch}: its published weights cannot be had ({str(error).splitlines()[0]})") from None
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    if outputs and outputs[0] != num_classes:
        raise BadInput(
            f"{arch}: its published weights are for {outputs[0]} classes; model.num_classes is {num_classes}"
        )
    config = getattr(model, "pretrained_cfg", {})
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return model if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) else nn.Sequential(Renormalize(mean, std), model)


class BlurPoolConv2d(nn.Module):
    """A convolution after a fixed 3x3 binomial blur of its input."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        self.conv = conv
        self.register_buffer("blur_filter", kernel.expand(conv.in_channels, 1, 3, 3).contiguous())

    blur_filter: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def _apply_blurpool(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(module, name, BlurPoolConv2d(child))
        else:
            _apply_blurpool(child)


def start_from(network: nn.Module, file: str, classes: tuple[str, ...] | None) -> str:
    """Load the weights to start a training from; returns a line that says what was done.

    A head of another number of classes is re-initialized, and so is one of as many that the checkpoint names otherwise.
    """
    saved = saved_classes(file)
    others = saved is not None and classes is not None and saved != classes
    said = load_weights(network, file, new_head=True, other_classes=others)
    return f"{file}: loaded{said and f'; {said}'}"


def load_weights(model: nn.Module, file: str, new_head: bool = False, other_classes: bool = False) -> str:
    """Load a checkpoint: ours, the official project's, torchvision's, timm's, any state dict, plain or in a container.

    Averaged weights are preferred, prefixes that wrappers add are stripped, and Inception's and GoogLeNet's auxiliary
    heads, which training here does not use, are left out.

    Args:
        file: as `relabel.checkpoints.read_file` takes it.
        new_head: keep the model's own last layer where the checkpoint's is for another number of classes.
        other_classes: the checkpoint's last layer is for other classes, even if they are as many.

    Returns:
        What is to be said of it in a line: which of several weights, what was left out; empty if nothing.

    Raises:
        BadInput: no such file, not a checkpoint, one that would run code, or weights that do not fit `model`; named.
    """
    checkpoint, where = read_checkpoint(file)
    own = model.state_dict()
    checkpoint = plain_names(checkpoint, own)
    said = [f"its {where}"] if where else []
    auxiliary = [key for key in checkpoint if key not in own and key.startswith(AUXILIARY)]
    if auxiliary:
        said.append(f"without its auxiliary heads {', '.join(sorted({key.partition('.')[0] for key in auxiliary}))}")
        checkpoint = {key: value for key, value in checkpoint.items() if key not in auxiliary}
    if new_head:
        last = list(own)[-1].rpartition(".")[0]
        other = [
            key
            for key, value in checkpoint.items()
            if key in own and (value.shape != own[key].shape or (other_classes and key.rpartition(".")[0] == last))
        ]
        layers = {key.rpartition(".")[0] for key in other}
        if layers and layers <= set(head_layers(model)):
            said.append(f"{', '.join(sorted(layers))} is re-initialized, for other classes")
            checkpoint |= {key: own[key] for key in other}
    try:
        model.load_state_dict(checkpoint)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise BadInput(f"{file}: does not fit the network: {' '.join(line.strip() for line in lines[1:4])}") from None
    return "; ".join(said)


def head_layers(model: nn.Module) -> list[str]:
    """The names of the layers that give the logits: one, or several where timm's network has them (DeiT's two)."""
    own = list(model.state_dict())
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    known = [name for name in ((names,) if isinstance(names, str) else names) if f"{name}.weight" in own]
    return known or [own[-1].rpartition(".")[0]]


def set_prior(model: nn.Module, num_classes: int) -> None:
    """Let the sigmoid of each class begin at `1 / num_classes`, by the bias of the head, for a binary cross-entropy.

    Beginning at 1/2, 1,000 classes at once pull the logits down, at SGD's learning rates far beyond where they belong.
    """
    for name in head_layers(model):
        bias = getattr(model.get_submodule(name), "bias", None)
        if isinstance(bias, torch.Tensor):
            nn.init.constant_(bias, -math.log(num_classes - 1))


def compiled(model: nn.Module, sizes: int, **keywords: Any) -> nn.Module:
    """`model` by `torch.compile`: one graph with constant shapes for each size of images.

    Left to itself, torch makes one graph of any size when it sees the second, and compiles nothing more from the ninth
    on.

    Args:
        sizes: how many sizes of images it will see.
        keywords: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + sizes)
    return torch.compile(model, dynamic=False, **keywords)  # type: ignore[return-value]


def check_input(model: nn.Module, arch: str, batch_size: int, image_sizes: Iterable[int]) -> None:
    """Run `model` on shapes alone, without computing: what torch or the network would refuse is refused here.

    Args:
        arch: its name, for the message.
        batch_size: images in a forward pass; in train mode, one is too few for batch norm of a single position.
        image_sizes: sides of the images, in pixels.

    Raises:
        BadInput: the network does not take such a batch.
    """
    shapes = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    for size in sorted(set(image_sizes)):
        try:
            torch.func.functional_call(model, shapes, (torch.empty(batch_size, 3, size, size, device="meta"),))
        except (ValueError, AssertionError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if "meta" in reason:  # the network looks at values: it is left to the first step
                continue
            raise BadInput(
                f"{arch} does not take a batch of {batch_size} x 3 x {size} x {size} "
                f"{'in training' if model.training else 'in validation'}: {reason}"
            ) from None
