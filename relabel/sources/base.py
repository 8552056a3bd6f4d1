"""What every source of images hands out: names, classes, and the bytes of each image as they are stored.

A reader lists its samples without reading pixels. `read` and `place` are called in worker processes: a source can be
pickled, and opens its files where it is used.
"""

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ffcv_fields.label_map import MAX_CLASSES

from ..errors import BadInput, BadSample
from ..imagenet import IMAGENET_CLASSES, imagenet_classes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True)
class Sample:
    """An image: its name (`CLASS/FILE.jpg`, with slashes, at any depth), its class index, its number in the source."""

    name: str
    label: int
    index: int

    @property
    def key(self) -> str:
        """What label maps and lists know it by: its class folder and the path below that, without the ending."""
        return key_of(self.name)


def key_of(name: str) -> str:
    """The key of a sample's, or a label map's, name."""
    return os.path.splitext(name)[0]


def is_image(name: str) -> bool:
    """Whether a path is an image's, by its ending, and neither it nor a folder of it is hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot."""
    return name.startswith(".") or "/." in name


def in_order(of_number: dict[int, str]) -> list[str]:
    """Classes that have numbers, in the order of these; WordNet ids in their own, as label maps of ImageNet count."""
    names = [of_number[number] for number in sorted(of_number)]
    return sorted(names) if all(map(WNID.fullmatch, names)) else names


@dataclass(frozen=True)
class ClassChoice:
    """What a user says of the classes: how many there are (0: as many as are found), or their list, in order."""

    num_classes: int = 0
    given: tuple[str, ...] | None = None

    def of(self, found: Sequence[str], where: Any) -> tuple[str, ...]:
        """The class list: the one that was given, ImageNet-1k's where a part of it was found, or what was found.

        Args:
            found: the classes that the images have, in the order of their indices where nothing is said.
            where: what holds them, for messages.

        Raises:
            BadInput: `num_classes` fits neither the list nor the classes found, and these are not ImageNet-1k's.
            BadSample: a class that the list does not name, or more classes than can be stored.
        """
        if self.given is not None:
            if self.num_classes not in (0, len(self.given)):
                raise BadInput(f"cfg.num_classes is {self.num_classes}; cfg.class_list names {len(self.given)} classes")
            classes = self.given
        elif self.num_classes in (0, len(found)):
            classes = tuple(found)
        elif self.num_classes == IMAGENET_CLASSES and set(found) <= set(imagenet_classes()):
            classes = imagenet_classes()
        else:
            raise BadInput(
                f"{where}: has {len(found)} classes, not cfg.num_classes={self.num_classes}, and they are not WordNet "
                "ids of ImageNet-1k; give the names of all classes, one a line, in the file cfg.class_list"
            )
        known = set(classes)
        for name in found:
            if name not in known:
                raise BadSample(where, f"has a class {name!r}, none of the {len(classes):,} of the class list")
        if len(classes) > MAX_CLASSES:
            raise BadSample(where, f"holds {len(classes)} classes; at most {MAX_CLASSES} can be stored")
        return classes


@dataclass
class ImageSource(ABC):
    """Images, wherever they are.

    `what` says what was recognized, in a line; `classes` is the class list; `samples` are in the order of their
    `index`; `partial`: the class list is not that of the images alone, so that some of its classes may have none here;
    `remarks` say what was left out. `groups`, int64 `[len(samples)]`, is there where reading samples of one group
    together is cheap and jumping between groups dear, as row groups of parquet files are: None, all are alike. `labels`
    are the files that label the images, if the source itself does not.
    """

    root: Path
    what: str
    classes: tuple[str, ...]
    samples: list[Sample]
    partial: bool = False
    remarks: list[str] = field(default_factory=list)
    groups: np.ndarray | None = None
    labels: tuple[Path, ...] = ()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of a sample, as it is stored.

        Raises:
            BadSample: it cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> Any:
        """Where a sample is, for messages: its path, or the archive and its member."""

    @abstractmethod
    def files(self) -> Iterable[tuple[str, Path]]:
        """The files that the source consists of, by name: where one of them has changed, so have the images."""


def by_key(source: ImageSource, samples: Iterable[Sample] | None = None) -> dict[str, Sample]:
    """Samples of a source, all of them if none are given, by their keys.

    Raises:
        BadSample: two share a key: a label map or a list could not tell them apart; both are named.
    """
    found: dict[str, Sample] = {}
    for sample in source.samples if samples is None else samples:
        other = found.setdefault(sample.key, sample)
        if other is not sample:
            raise BadSample(
                source.place(sample.index),
                f"and {source.place(other.index)} differ only in their ending, and share one label map; rename one",
            )
    return found


def left_out(root: Any, hidden: Sequence[str], passed_over: Counter[str]) -> list[str]:
    """Remarks on the hidden files or folders, and on the files, counted by ending, that do not end as images do."""
    remarks = []
    if hidden:
        names = ", ".join(sorted(set(hidden))[:5])
        remarks.append(f"{root}: {len(hidden):,} hidden files or folders were left out ({names})")
    if passed_over:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.most_common(8))
        remarks.append(f"{root}: files that do not end as images were passed over: {kinds}")
    return remarks
