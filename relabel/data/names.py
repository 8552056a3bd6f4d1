"""Finding the samples that a list's rows mean, by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from ..sources.base import key_of


@dataclass(frozen=True)
class Identity:
    """How a set of samples is known: its class list (None: not known), the network's index of each of its classes,
    int64, the samples' names in order, and the network's class list (None: not known).
    """

    classes: tuple[str, ...] | None
    index: np.ndarray
    names: list[str]
    network: tuple[str, ...] | None = None

    def by_path(self) -> list[int]:
        """The samples' numbers in torchvision ImageFolder's order: what a list without names means.

        Samples whose names are not known stay as they are.
        """
        numbers = range(len(self.names))
        return sorted(numbers, key=lambda i: path_order(self.names[i])) if self.classes is not None else [*numbers]


def path_order(name: str) -> tuple[str, str, str]:
    """What a sample's name is sorted by, to be in ImageFolder's order: class, folder, file."""
    folder, _, file = name.rpartition("/")
    return name.partition("/")[0], folder, file


class SampleNames:
    """The names of a set's samples, paths below the data folder, to be looked up.

    A row means a sample by its whole path, by the path below its class folder, or by the file's name, each with or
    without the ending. Where all rows are whole paths they are taken for that, else each must fit one sample only.

    Args:
        names: of the samples, in order.
        where: what holds them, for messages.
        left_out: names of samples that are not in the set; rows of theirs mean none, and no other sample.
    """

    def __init__(self, names: Sequence[str], where: str, left_out: Sequence[str] = ()) -> None:
        self._names, self._where, self._count = [*names, *left_out], where, len(names)
        self._forms: dict[str, int] = {}  # made when a list needs it: ImageNet has millions
        self._shared: dict[str, int] = {}  # of the forms that fit several samples, another one

    def find(self, rows: Iterable[tuple[str, str]], strict: bool = True) -> list[int | None]:
        """The number of the sample that each row means.

        Args:
            rows: `(name, where it stands)`.
            strict: a name that fits no sample is an error; else None stands for it, as for one that was left out.

        Raises:
            BadInput: a name that fits several samples, or (`strict`) none.
        """
        rows = list(rows)
        whole = {name: i for i, name in enumerate(self._names)}
        if all(name in whole for name, _ in rows):
            return [self._kept(whole[name]) for name, _ in rows]
        if not self._forms:
            self._make_forms()
        return [self._one(name, where, strict) for name, where in rows]

    def _make_forms(self) -> None:
        for i, name in enumerate(self._names):
            below = name.partition("/")[2] or name
            for form in (name, below, name.rpartition("/")[2]):
                for other in (form, key_of(form)):
                    if self._forms.setdefault(other, i) != i:
                        self._shared[other] = i

    def _one(self, name: str, row: str, strict: bool) -> int | None:
        found = self._forms.get(name)
        if name in self._shared and found is not None:
            first, second = self._names[found], self._names[self._shared[name]]
            raise BadInput(f"{row}: {name!r} fits {first} and {second} of {self._where}; give whole paths in all rows")
        if found is None and strict:
            raise BadInput(f"{row}: {name!r} is no sample of {self._where}")
        return self._kept(found)

    def _kept(self, sample: int | None) -> int | None:
        return None if sample is None or sample >= self._count else sample
