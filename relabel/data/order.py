"""The order of a training epoch's samples, a pure function of the seed and the epoch, and that of packing.

FFCV's own quasi-random order depends on the epochs drawn before, so a restarted run would see another one, and it
keeps `2 * batch_size` pages of 8 MiB in memory.
"""

import numpy as np

WINDOW = 32  # pages among which samples are mixed: 256 MiB of FFCV's pages of 8 MiB


def packing_order(num_samples: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The order in which samples are packed: a random permutation, int64 `[num_samples]`.

    A window of `near_sequential_order` then holds the classes that as many random samples do. Of a file in class order
    it holds about one for each of its pages: too few for batch norm.

    Args:
        groups: `[num_samples]`, samples that are to be read together: the groups are put in random order, and the
            samples of each among themselves.
    """
    rng = np.random.default_rng([seed, num_samples, 0])
    if groups is None or num_samples == 0:
        return rng.permutation(num_samples)
    _, group_of = np.unique(groups, return_inverse=True)
    return np.lexsort((rng.random(num_samples), rng.permutation(group_of.max() + 1)[group_of]))


def random_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniformly random permutation, int64 `[num_samples]`."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def near_sequential_order(pages: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A permutation that reads each page of the file once: for files larger than memory.

    The pages are put in random order and cut into windows of `WINDOW` pages; within a window the samples are mixed.

    Args:
        pages: `[num_samples]`, the page in which each sample's data is.

    Returns:
        int64 `[num_samples]`.
    """
    rng = np.random.default_rng([seed, epoch])
    _, page_of = np.unique(pages, return_inverse=True)
    window = rng.permutation(page_of.max() + 1)[page_of] // WINDOW
    return np.lexsort((rng.random(len(pages)), window))


def classes_in_a_batch(labels: np.ndarray, order: np.ndarray, batch_size: int, most: int = 100) -> float:
    """How many classes a batch holds: the mean over the first `most` batches of an order (NaN where there is none)."""
    whole = len(order) // batch_size
    batches = labels[order[: min(whole, most) * batch_size]].reshape(-1, batch_size)
    return float(np.mean([len(np.unique(batch)) for batch in batches])) if whole else float("nan")


def share_of(order: np.ndarray, batch_size: int, rank: int, world_size: int, drop_last: bool) -> np.ndarray:
    """One process's samples: its `batch_size` of each global batch of `world_size * batch_size`.

    The samples left over at the end are dropped, or dealt out evenly: at most one more to one process than to
    another, so that every sample of `order` belongs to exactly one.
    """
    whole = len(order) // (batch_size * world_size) * batch_size * world_size
    mine = order[:whole].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)
    return mine if drop_last else np.concatenate([mine, order[whole + rank :: world_size]])
