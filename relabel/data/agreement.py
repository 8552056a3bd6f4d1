"""Do label maps and single labels speak of the same classes? Counted while a `.beton` is packed.

A map pooled over its whole image should have the single label among the five best of the classes that it names. Where
it rarely has, the maps belong to other images, count classes from 1, or follow another class list: a training would
learn the neighbors' names.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import BadInput

MOST = 5
CERTAIN = 3.0  # standard errors below the threshold before it counts as below
CONSISTENT = 0.8  # share of samples whose best class is their class's usual one
FEW = 2  # samples of a class, on average, from which "usual" means something


@dataclass
class Agreement:
    """Of each sample with a label map: its single label, the pooled map's best class, and the label's rank there."""

    labels: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def add(self, label: int, scores: np.ndarray, classes: np.ndarray) -> None:
        """Count one map: scores and class indices, pooled over the whole image."""
        named, where = np.unique(classes, return_inverse=True)
        pooled = np.bincount(where.ravel(), weights=scores.ravel())
        order = named[np.argsort(-pooled, kind="stable")].tolist()
        self.labels.append(label)
        self.best.append(order[0])
        self.ranks.append(order.index(label) if label in order else len(order) + MOST)

    def merge(self, other: "Agreement") -> None:
        self.labels += other.labels
        self.best += other.best
        self.ranks += other.ranks

    def check(self, least: float, maps: str, names: Sequence[str]) -> str:
        """A line with the counts.

        Args:
            least: share of samples, 0 to 1; 0: nothing is refused.
            maps: where the maps come from, for messages.
            names: the class list.

        Raises:
            BadInput: significantly fewer agree than `least`, or the maps' classes are, consistently, others.
        """
        count = len(self.labels)
        labels, best = np.array(self.labels), np.array(self.best)
        most = max(1, min(MOST, len(names) // 2))  # of few classes, five would be most of them
        first, share = float((labels == best).mean()), float(np.mean(np.array(self.ranks) < most))
        line = (
            f"label maps against single labels: the label is the pooled map's best class in {100 * first:.1f} %, among "
            f"its {most} best in {100 * share:.1f} % of {count:,} images"
        )
        error = np.sqrt(least * (1 - least) / count)  # of a share that is `least`: few images decide little
        advice = "; is this the right class list, do indices start at 0? cfg.min_agreement=0 packs it all the same"
        if least > 0 and share + CERTAIN * error < least:
            raise BadInput(f"{maps}: {line}, under cfg.min_agreement={least:g}{advice}")
        usual, is_usual = self._usual(labels, best)
        distinct = len(set(usual.values())) >= CONSISTENT * len(usual)  # not one class for all, as of a bad annotator
        others = is_usual >= CONSISTENT and first < 1 - CONSISTENT and distinct and len(usual) > 1
        if least > 0 and others and count >= FEW * len(usual):
            shift, times = Counter(b - a for a, b in usual.items()).most_common(1)[0]
            what = f"the label {shift:+d}" if 2 * times > len(usual) else "always the same other class"
            raise BadInput(f"{maps}: {line}; for most labels the best class is {what}{advice}")
        swapped = [
            f"{names[a]} -> {names[b]}"
            for a, b in usual.items()
            if a != b
            and b < len(names)
            and (labels == a).sum() >= FEW
            and (best[labels == a] == b).mean() >= CONSISTENT
        ]
        if swapped:
            line += f"; WARNING: maps of these classes name another one: {', '.join(swapped[:10])}"
        return line

    @staticmethod
    def _usual(labels: np.ndarray, best: np.ndarray) -> tuple[dict[int, int], float]:
        """The commonest best class of each label, and the share of samples that have their label's."""
        usual, hits = {}, 0
        for label in np.unique(labels).tolist():
            counts = np.bincount(best[labels == label])
            usual[label] = int(counts.argmax())
            hits += int(counts.max())
        return usual, hits / len(labels)
