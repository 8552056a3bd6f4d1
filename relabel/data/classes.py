"""Classes are known by their names; an index means a place in a list of names.

The rules, in all commands:
- The list is made once, when a `.beton` is written: the class folders' names sorted as text, which is ImageFolder's
  order ("10" comes before "2"), or a list that is given. It travels with the `.beton` and with every checkpoint.
- Other data is aligned with a network by name: classes may be missing or in another order, but each must be known.
- Numbers are names like any others, with one exception: for a network of ImageNet-1k's classes, folders that are all
  called by numbers from 0 to 999 (ImageNetV2's) are class indices.
- A network without a list, say of somebody else's checkpoint, has ImageNet-1k's classes if it has 1,000, sorted by
  WordNet id, as everywhere; else those of the data, in the data's order, if they are as many.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ffcv_fields.label_map import MAX_CLASSES

from ..errors import BadInput
from ..imagenet import IMAGENET_CLASSES, imagenet_classes


def read_class_list(file: str) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the order of their indices.

    Raises:
        BadInput: it cannot be read, holds an empty line or a name twice, or has too many.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        names = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: cannot be read as a list of class names ({error})") from None
    seen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip() or "/" in name:
            raise BadInput(f"{file}, line {number}: {name!r} is no class name; give one a line, in order")
        if name in seen:
            raise BadInput(f"{file}, line {number}: class {name!r} stands in line {seen[name]} too")
        seen[name] = number
    if not 1 <= len(names) <= MAX_CLASSES:
        raise BadInput(f"{file}: has {len(names)} class names; give 1 to {MAX_CLASSES}")
    return tuple(names)


def network_classes(saved: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """A network's class list: the one saved with it, or ImageNet-1k's for 1,000 classes; None: not known."""
    if saved is not None:
        if len(saved) > num_classes or len(set(saved)) < len(saved):
            raise BadInput(
                f"the checkpoint names {len(saved)} classes ({len(set(saved))} different ones); the network has "
                f"{num_classes} outputs: give the model.num_classes that it was trained with"
            )
        return tuple(saved)
    return imagenet_classes() if num_classes == IMAGENET_CLASSES else None


def align(
    data: Sequence[str] | None, network: Sequence[str] | None, num_classes: int, where: str
) -> tuple[np.ndarray, str]:
    """The network's index of each class of some data.

    Args:
        data: the data's classes; None: only indices are known, as in a `.beton` of stock FFCV.
        network: the network's classes; None: not known.
        num_classes: outputs of the network.
        where: the data, for messages.

    Returns:
        int64, one index for each class of `data`; and a line that says what was done, empty where the lists are equal.

    Raises:
        BadInput: a class that the network does not know, named.
    """
    if data is None:
        return np.arange(num_classes), f"{where}: has no class names; its labels are taken for the network's indices"
    if network is None:
        if len(data) != num_classes:
            raise BadInput(f"{where}: has {len(data)} classes, the network {num_classes}, and no list of their names")
        return np.arange(num_classes), f"{where}: the network has no class names; its classes are taken in this order"
    if tuple(data) == tuple(network):
        return np.arange(len(data)), ""
    index = {name: i for i, name in enumerate(network)}
    unknown = [name for name in data if name not in index]
    if not unknown:
        return (
            np.array([index[name] for name in data], np.int64),
            f"{where}: its {len(data):,} classes are matched by name with the network's {len(network):,}",
        )
    if set(network) == set(imagenet_classes()) and all(_is_index(name) for name in data):
        indices = np.array([index[imagenet_classes()[int(name)]] for name in data], np.int64)
        return indices, f"{where}: its {len(data):,} folders are class indices of ImageNet-1k"
    raise BadInput(
        f"{where}: the network does not know its class {unknown[0]!r}"
        f"{f' and {len(unknown) - 1:,} more of its classes' if len(unknown) > 1 else ''}; the network's classes are "
        f"{', '.join(list(network)[:3])}{', ...' if len(network) > 3 else ''}"
    )


def _is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < IMAGENET_CLASSES
