"""Means, and how far to trust them."""

import numpy as np


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for one value)."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def in_words(values: list[float], sign: str = "") -> str:
    """`MEAN ± ERROR`, or the one value; with `sign` "+", the mean's sign always."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f} ± {error:.1f}" if len(values) > 1 else f"{mean:{sign}.1f}"
