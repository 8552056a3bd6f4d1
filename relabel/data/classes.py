"""Which class a folder's name stands for."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from timm.data import ImageNetInfo

from ..errors import BadInput


@cache
def imagenet_classes() -> dict[str, int]:
    """WordNet id -> class index, of ImageNet-1k."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


@cache
def imagenet_names() -> list[str]:
    """The first name of each of ImageNet-1k's classes."""
    return [text.split(",")[0] for text in ImageNetInfo("imagenet-1k").label_descriptions()]


def class_indices(folders: Sequence[str], num_classes: int, where: str) -> np.ndarray:
    """The class index that each class folder's name stands for, int64.

    WordNet ids are ImageNet's classes (all or, as in ImageNet-A, -R and -O, some); numbers are class indices
    themselves (ImageNetV2's folders 0 to 999, whose alphabetical order is another); other names count in
    alphabetical order, if there are as many as classes.

    Raises:
        BadInput: the folders are none of these; `where` names them.
    """
    known = imagenet_classes()
    if num_classes == len(known) and all(name in known for name in folders):
        return np.array([known[name] for name in folders])
    if all(name.isdigit() and int(name) < num_classes for name in folders):
        return np.array([int(name) for name in folders])
    if len(folders) == num_classes:
        return np.argsort(np.argsort(list(folders)))
    raise BadInput(
        f"{where}: its {len(folders)} class folders ({', '.join(list(folders)[:3])}, ...) are neither WordNet ids nor "
        f"class indices, nor are they {num_classes}"
    )
