"""ImageNet-9 of the Backgrounds Challenge (Xiao et al., ICLR 2021): its variations, its classes, and their map.

The archive holds a folder for each variation, `mixed_rand/val/00_dog/....JPEG`: nine classes, known by the numbers that
their folders' names begin with. A network of ImageNet's classes is right where its best class, of all 1,000, is mapped
to the image's; most of them are mapped to none. The images are of 224 px and neither resized nor cropped.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.beton import read_header
from ..data.classes import IMAGENET_CLASSES
from ..data.contents import read_contents
from ..errors import BadInput
from ..sources.opening import open_source
from .label_sets import imagenet_index, read_json

VARIATIONS = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg")
IN9_CLASSES = 9


def find_variations(path: str) -> dict[str, str]:
    """Where each variation's images are: `NAME/val` or `NAME.beton` below `path`, as far as they are there.

    Raises:
        BadInput: none is there, or one twice.
    """
    found: dict[str, str] = {}
    for name in VARIATIONS:
        for place in filter(Path.exists, (Path(path, name, "val"), Path(path, f"{name}.beton"))):
            if name in found:
                raise BadInput(f"{path}: holds {name} twice, {found[name]} and {place}; give one of them")
            found[name] = str(place)
    if not found:
        raise BadInput(f"{path}: holds none of ImageNet-9's variations, original/val, mixed_same/val, ... (or .beton)")
    return found


def variation_classes(path: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The class folders' names of a variation, in order, and each one's class of ImageNet-9, int64, 0 to 8.

    Raises:
        BadInput: a name without such a number, two with the same, or a `.beton` without names.
    """
    if Path(path).is_dir():
        names = open_source(path).classes
    elif contents := read_contents(read_header(path)):
        names = contents.classes
    else:
        raise BadInput(f"{path}: has no class names; write it again from the variation's folder")
    numbers: dict[int, str] = {}
    for name in names:
        match = re.fullmatch(r"0([0-8])_.+", name)
        if not match:
            raise BadInput(f"{path}: class folder {name!r} is none of ImageNet-9's, 00_dog to 08_fish")
        if int(match[1]) in numbers:
            raise BadInput(f"{path}: class folders {numbers[int(match[1])]!r} and {name!r} have one number")
        numbers[int(match[1])] = name
    return names, np.array(list(numbers), np.int64)


def read_in9_map(file: str, num_classes: int, classes: Sequence[str] | None) -> np.ndarray:
    """The official `in_to_in9.json`: `{"0": 8, ...}`, for each index of ImageNet-1k a class of ImageNet-9, -1: none.

    Args:
        num_classes: of the network.
        classes: the network's class list, in which ImageNet's are found by name.

    Returns:
        int64 `[num_classes]`: the class of ImageNet-9 that each of the network's is mapped to; -1: none.

    Raises:
        BadInput: the file is of another form; the network's classes are not known, or none of them is mapped to one of
            the nine.
    """
    content = read_json(file)
    if not isinstance(content, dict) or content.keys() != {str(i) for i in range(IMAGENET_CLASSES)}:
        raise BadInput(f"{file}: must be the Backgrounds Challenge's in_to_in9.json, an object with keys 0 to 999")
    if classes is None:
        raise BadInput(
            f"{file}: maps ImageNet-1k's classes; which of them the network's {num_classes} are is not known"
        )
    index, groups = imagenet_index(classes, num_classes, file), np.full(num_classes, -1, np.int64)
    for key, group in content.items():
        if isinstance(group, bool) or not isinstance(group, int) or not -1 <= group < IN9_CLASSES:
            raise BadInput(f"{file}: {key} is mapped to {group!r}, must be 0 to {IN9_CLASSES - 1}, or -1 for none")
        if index[int(key)] >= 0:
            groups[index[int(key)]] = group
    if missing := sorted(set(range(IN9_CLASSES)) - set(groups.tolist())):
        raise BadInput(f"{file}: the network knows no class that is mapped to class {missing[0]} of ImageNet-9")
    return groups
