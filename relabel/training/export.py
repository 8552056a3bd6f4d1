"""What a finished run hands on: its validated weights, as torchvision and timm name them, in two files.

weights.safetensors    with its model card in the metadata: arch, num_classes, classes, head, measured, settings
weights.pth            the same state dict as torch.save writes it, with the class list as its attribute `classes`

A network with BlurPool keeps the names of its blurred convolutions (`layer2.0.conv2.conv.weight`, `...blur_filter`): a
plain network refuses them, where under plain names it would take them and compute something else.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..files import atomic
from ..models import head_layers

WEIGHTS = ("weights.safetensors", "weights.pth")


def export_weights(
    network: nn.Module,
    folder: Path,
    settings: dict[str, Any],
    measured: dict[str, Any],
    classes: Sequence[str] | None = None,
) -> None:
    """Write the weights of `network` into `folder`.

    Args:
        settings: of the run, by dotted name.
        measured: the last line of its log.
        classes: the network's class list; None: not known.

    Raises:
        BadInput: there is no room for them.
    """
    state = OrderedDict(
        (name, value.detach().cpu().contiguous().clone()) for name, value in network.state_dict().items()
    )
    state.classes = classes and list(classes)  # type: ignore[attr-defined]  # an attribute: it stays a state dict
    card = {
        "format": "pt",  # what safetensors' readers look for
        "arch": settings["model.arch"],
        "num_classes": str(settings["model.num_classes"]),
        "classes": json.dumps(classes and list(classes)),
        "head": json.dumps(head_layers(network)),
        "measured": json.dumps(measured),
        "settings": json.dumps(settings),
    }
    size = sum(value.nbytes for value in state.values())
    for name in WEIGHTS:
        with atomic(folder / name, size=size) as temporary, open(temporary, "wb") as file:
            if temporary.suffixes[0] == ".safetensors":
                file.write(save(state, card))
            else:
                torch.save(state, file)
