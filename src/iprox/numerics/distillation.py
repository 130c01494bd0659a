"""Teaching a text encoder a teacher's influence scores: the loss, and how good the result is.

Influcoder (arXiv:2606.13668). A block is the scores of some queries (its rows) with some
candidates (its columns), by the encoder and by the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.correlation import spearman


class DistillationLoss(NamedTuple):
    """The loss of a block and its two parts."""

    total: Tensor
    pearson: Tensor  # 1 - correlation over all entries
    kl: Tensor  # mean over rows


def distillation_loss(
    scores: Tensor, labels: Tensor, alpha: float, temperature: float
) -> DistillationLoss:
    """``alpha (1 - pearson(S, Y)) + (1 - alpha) mean_rows KL(softmax(Y/T) || softmax(S/T))``.

    Args:
        scores: The encoder's scores S, (queries, candidates).
        labels: The teacher's scores Y, likewise.
        alpha: Weight of the correlation, 0 to 1.
        temperature: T.

    Raises:
        NumericsError: All labels are equal, so that nothing is to be learnt from them.
    """
    if labels.max() == labels.min():
        raise NumericsError(
            "all labels of a block are equal: there is nothing to learn",
            value=float(labels.flatten()[0]),
            fix="look at the teacher's scores; label more examples",
        )
    one_minus_r = 1 - _pearson(scores.flatten(), labels.flatten())
    wanted = torch.log_softmax(labels / temperature, dim=1)
    found = torch.log_softmax(scores / temperature, dim=1)
    kl = (wanted.exp() * (wanted - found)).sum(1).mean()
    return DistillationLoss(alpha * one_minus_r + (1 - alpha) * kl, one_minus_r, kl)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Linear correlation; 0, with a gradient that separates them, where all ``a`` are equal."""
    a, b = a - a.mean(), b - b.mean()
    tiny = torch.finfo(a.dtype).tiny ** 0.5
    return (a @ b) / (a.norm().clamp(min=tiny) * b.norm())


def per_anchor(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over queries of the rank correlation of their rows; a constant row counts 0.

    Args:
        scores: (queries, candidates).
        labels: (queries, candidates).
    """
    return float(np.nan_to_num(spearman(scores, labels), nan=0.0).mean())


def aggregated(scores: np.ndarray, labels: np.ndarray) -> float:
    """Rank correlation of the means over queries; 0 when one of them is constant.

    Args:
        scores: (queries, candidates).
        labels: (queries, candidates).
    """
    return float(np.nan_to_num(spearman(scores.mean(0), labels.mean(0)), nan=0.0))


def hard_pool(labels: np.ndarray, size: int) -> np.ndarray:
    """Candidates that the queries of a block score highest: the union of each query's best.

    Args:
        labels: The teacher's scores of the block's queries, (queries, candidates).
        size: Candidates that are to be drawn from it; each query contributes its best
            ``2 * size / queries``, rounded up.

    Returns:
        Places of candidates, ascending, at least ``size`` where there are so many.
    """
    n_queries, n_candidates = labels.shape
    each = min(n_candidates, max(1, -(-2 * size // n_queries)))
    order = np.argsort(-labels, axis=1, kind="stable")
    while True:
        best = np.unique(order[:, :each])
        if len(best) >= size or each >= n_candidates:
            return best
        each = min(n_candidates, 2 * each)


def draw_block(
    labels: np.ndarray,
    queries: np.ndarray,
    fresh: np.ndarray,
    hard_ratio: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Candidates of a block: some of its queries' best, the rest as they come.

    Args:
        labels: The teacher's scores, (queries, candidates).
        queries: Places of the block's queries.
        fresh: Candidates that are next in a random order of all; as many as the block has.
        hard_ratio: Share taken from the queries' best.
        generator: Draws.

    Returns:
        Places of candidates, as many as ``fresh``, none twice.
    """
    n_hard = int(hard_ratio * len(fresh))
    if n_hard == 0:
        return fresh
    hard = generator.permutation(hard_pool(labels[queries], n_hard))[:n_hard]
    rest = fresh[~np.isin(fresh, hard)][: len(fresh) - len(hard)]
    return np.concatenate([hard, rest])
