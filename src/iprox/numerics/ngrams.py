"""Importance of texts by hashed n-grams: DSIR (Xie et al., arXiv:2302.03169)."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_ratio(target: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Log ratio of two bag-of-n-grams distributions, one added to every count.

    Args:
        target: Counts of n-grams in the texts that are wanted, (buckets,).
        pool: Counts of n-grams in the pool, (buckets,).

    Returns:
        (buckets,) float64.
    """

    def log_share(counts: np.ndarray) -> np.ndarray:
        smoothed = np.asarray(counts, dtype=np.float64) + 1
        return np.log(smoothed) - np.log(smoothed.sum())

    return log_share(target) - log_share(pool)


def log_weights(counts: Any, ratio: np.ndarray) -> np.ndarray:
    """Log importance weights ``sum_j counts_ij log(p_target(j) / p_pool(j))``, (examples,).

    Args:
        counts: N-grams of each example, (examples, buckets), dense or sparse.
        ratio: From :func:`log_ratio`.
    """
    return np.asarray(counts @ ratio, dtype=np.float64)


def gumbel(uniforms: np.ndarray) -> np.ndarray:
    """Gumbel noise from numbers in [0, 1).

    The k largest of ``log w + noise`` are k examples drawn without replacement in proportion to
    their weights w (Kool et al., arXiv:1903.06059).
    """
    inside = np.clip(uniforms, np.finfo(np.float64).tiny, None)
    return np.asarray(-np.log(-np.log(inside)))
