"""Linear datamodeling score: do influence scores predict what training on a subset would do?

A score for every training example predicts that a model trained on a subset does as well on a
query as the scores of the subset's examples add up to. The linear datamodeling score (Park et
al., TRAK, arXiv:2303.14186, Eq. 2) is the rank correlation of these sums with what models that
were really trained on random subsets measure, query by query. It needs no scale: only the order
of subsets is compared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from iprox.errors import NumericsError
from iprox.numerics.correlation import pivotal_interval, resamples, spearman


class Score(NamedTuple):
    """A mean over queries and retrained groups, with its 95 % interval."""

    mean: float
    low: float
    high: float


def draw_subsets(examples: int, subsets: int, fraction: float, seed: int) -> np.ndarray:
    """Random subsets of equal size, without replacement: masks (subsets, examples).

    Raises:
        NumericsError: A subset would be empty or whole, so that subsets do not differ.
    """
    size = round(fraction * examples)
    if not 0 < size < examples:
        raise NumericsError(
            "subsets must leave some examples out and keep some",
            value=f"{size} of {examples}",
            allowed=f"1..{examples - 1}",
        )
    order = np.random.default_rng(seed).random((subsets, examples)).argsort(axis=1)
    return np.asarray(order < size)


def subset_predictions(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sums of the scores (examples, queries) over subsets (subsets, examples): (queries, subsets).

    Raises:
        NumericsError: A score is not finite.
    """
    if not np.isfinite(scores).all():
        example, query = np.argwhere(~np.isfinite(scores))[0]
        raise NumericsError(
            "a score is not finite",
            where=f"example {example}, query {query}",
            value=float(scores[example, query]),
        )
    return np.asarray((masks.astype(np.float64) @ scores).T)


def datamodeling_scores(
    scores: np.ndarray, masks: np.ndarray, losses: np.ndarray, picked: np.ndarray | None = None
) -> np.ndarray:
    """Linear datamodeling score of every query.

    Args:
        scores: Influence of every training example, positive where it lowers the query's loss,
            (examples, queries).
        masks: Which examples each model was trained on, (subsets, examples).
        losses: Loss of these models on the queries, (subsets, queries).
        picked: Subsets to count, repetitions allowed, (resamples, subsets); all once if absent.

    Returns:
        (queries,), or (resamples, queries); NaN where losses or predictions do not differ.
    """
    predicted, measured = subset_predictions(scores, masks), -losses.T
    if picked is None:
        return spearman(predicted, measured)
    return np.stack([spearman(predicted[:, rows], measured[:, rows]) for rows in picked])


def with_interval(
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]], bootstrap: int, seed: int
) -> tuple[Score, np.ndarray]:
    """Mean score over groups of retrained models, one group for each seed of training.

    Args:
        groups: Scores, masks and losses of each group, as in :func:`datamodeling_scores`.
        bootstrap: Resamples of the subsets inside every group.
        seed: Seed of the resamples: with the same seed the resamples of several methods belong
            together, so that differences have intervals too.

    Returns:
        The mean with its interval, and the resampled means (bootstrap,).
    """
    mean = float(np.mean([np.nanmean(datamodeling_scores(*group)) for group in groups]))
    resampled = np.zeros(bootstrap)
    for number, group in enumerate(groups):
        drawn = list(resamples(len(group[1]), bootstrap, seed + number))
        picked = np.concatenate(drawn) if drawn else np.zeros((0, len(group[1])), dtype=int)
        if len(picked):
            resampled += np.nanmean(datamodeling_scores(*group, picked), axis=1) / len(groups)
    return Score(mean, *pivotal_interval(resampled, mean)), resampled
