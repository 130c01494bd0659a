"""Agreement of two sets of scores for the same examples, with bootstrap intervals.

Every measure takes paired scores (..., examples), so that thousands of resamples are measured
at once, and is 1 for equal orders. scipy.stats takes longer to import than most jobs that only
pass by here, so it is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Measure of two arrays (resamples, examples) -> (resamples,)."""

CHUNK = 2**22
"""Scores held at once per array while resampling."""


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Linear correlation of paired values, (...); NaN where either is constant."""
    a = a - a.mean(-1, keepdims=True)
    b = b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    products = (a * b).sum(-1)
    undefined = np.full(products.shape, np.nan)
    return np.asarray(np.divide(products, scale, out=undefined, where=scale > 0))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation, ties sharing their mean rank, (...); NaN where either is constant."""
    from scipy import stats

    return pearson(stats.rankdata(a, axis=-1), stats.rankdata(b, axis=-1))


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b, (...); NaN where either is constant."""
    from scipy import stats

    rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return np.array([stats.kendalltau(x, y).statistic for x, y in rows]).reshape(a.shape[:-1])


def top_overlap(share: float) -> Measure:
    """Measure of how much of the best ``share`` of examples is the same by both scores.

    ``k = floor(share * examples)``, at least 1; equal scores in the order of the examples.
    """

    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        k = max(1, int(share * a.shape[-1] + 1e-9))
        chosen = _top(a, k) & _top(b, k)
        return np.asarray(chosen.sum(-1) / k)

    return measure


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Mask (..., examples) of the k highest scores."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def resamples(examples: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of ``n`` bootstrap resamples, in chunks (some, examples)."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK // max(examples, 1))
    for start in range(0, n, size):
        yield generator.integers(0, examples, size=(min(size, n - start), examples))


def bootstrap(measure: Measure, a: np.ndarray, b: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A measure on bootstrap resamples of the examples, (n,).

    Args:
        measure: What is measured.
        a: Scores, (examples,).
        b: The other scores of the same examples, (examples,).
        n: Number of resamples.
        seed: Seed of the draws: the same seed draws the same examples, so that values of
            several measures or tasks belong together resample by resample.
    """
    parts = [measure(a[i], b[i]) for i in resamples(len(a), n, seed)]
    return np.concatenate(parts) if parts else np.zeros(0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap values; NaN without values.

    Resamples on which a measure is undefined (all examples tied) are left out.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def pivotal_interval(values: np.ndarray, estimate: float) -> tuple[float, float]:
    """95 % interval that takes the bias of resampling back: percentiles mirrored at the estimate.

    A rank correlation r of n pairs lies about ``3 (r - tau) / (n + 1)`` below the population's, and
    that of a resample, whose repeated pairs are ties, as much again below r. So percentiles of
    resamples lie too low, which matters where a mean over many queries is narrow
    (Davison and Hinkley, Bootstrap Methods and their Application, 1997, Eq. 5.6).
    """
    low, high = interval(values)
    return 2 * estimate - high, 2 * estimate - low
