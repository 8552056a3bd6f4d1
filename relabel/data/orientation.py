"""Which axis of label maps is the image's vertical, found from the maps alone.

Photographs are symmetric left to right on average, and not top to bottom: what stands at the top of one is like what
stands at the top of others. Of each map take the best score at each cell, standardized over the map, as `z`, and
`d = z - flip(z)` along an axis. The mean of `d_i . d_j` over pairs of *different* maps estimates the squared mean
asymmetry along that axis, without bias. The axis with the larger one is the image's vertical.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ENOUGH = 4.0  # standard errors of the difference
LEAST = 30  # maps; with fewer nothing is said


@dataclass(frozen=True)
class Orientation:
    """The squared asymmetry along the rows' direction (`first`, the first axis) and along the columns' (`second`).

    `error` is the standard error of their difference, by the jackknife over the `count` maps.
    """

    first: float
    second: float
    error: float
    count: int

    @property
    def order(self) -> str | None:
        """ "yx" if the first axis is the image's vertical, "xy" if the second is; None: cannot be told."""
        difference = self.first - self.second
        if self.count < LEAST or not abs(difference) > ENOUGH * self.error:
            return None
        return "yx" if difference > 0 else "xy"

    def __str__(self) -> str:
        return (
            f"asymmetry {self.first:.4f} along the first axis, {self.second:.4f} along the second, standard error of "
            f"the difference {self.error:.4f}, {self.count:,} maps"
        )


def orientation(best_scores: Iterable[np.ndarray]) -> Orientation:
    """Estimate it from the best score at each cell, one `[H, W]` a map, axes as they are stored."""
    along: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for scores in best_scores:
        deviation = scores.std()
        if deviation > 0:
            z = (scores - scores.mean()) / deviation
            for axis in (0, 1):
                along[axis].append((z - np.flip(z, axis)).ravel().astype(np.float64))
    count = len(along[0])
    if count < 3:
        return Orientation(0.0, 0.0, float("inf"), count)
    means, left_out = zip(*(_mean_product(np.stack(d)) for d in along), strict=True)
    spread = left_out[0] - left_out[1]
    error = float(np.sqrt((count - 1) / count * ((spread - spread.mean()) ** 2).sum()))
    return Orientation(means[0], means[1], error, count)


def _mean_product(d: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of `d_i . d_j` over pairs `i != j`, per cell; and the same without each of the maps."""
    count, cells = d.shape
    total, own = d.sum(0), (d**2).sum(1)
    without = ((total - d) ** 2).sum(1) - (own.sum() - own)
    mean = ((total**2).sum() - own.sum()) / (count * (count - 1))
    return float(mean / cells), without / ((count - 1) * (count - 2) * cells)
