"""The order of a training epoch's samples: a pure function of the seed and the epoch.

FFCV's own quasi-random order depends on the epochs drawn before, so a restarted run would see another one, and it
keeps `2 * batch_size` pages of 8 MiB in memory.
"""

import numpy as np

WINDOW = 32  # pages among which samples are mixed: 256 MiB of FFCV's pages of 8 MiB


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


def share_of(order: np.ndarray, batch_size: int, rank: int, world_size: int, drop_last: bool) -> np.ndarray:
    """One process's samples: its `batch_size` of each global batch of `world_size * batch_size`.

    The samples left over at the end are dropped, or dealt out evenly: at most one more to one process than to
    another, so that every sample of `order` belongs to exactly one.
    """
    whole = len(order) // (batch_size * world_size) * batch_size * world_size
    mine = order[:whole].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)
    return mine if drop_last else np.concatenate([mine, order[whole + rank :: world_size]])
