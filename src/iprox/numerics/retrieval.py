"""How early the sources of an answer come in a ranking of texts."""

from __future__ import annotations

import numpy as np

from iprox.errors import NumericsError


def reciprocal_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """One over the rank of the first relevant text, for every query.

    Equal scores share their last rank, so that a method which cannot tell texts apart is not
    rewarded for the order they happen to be in.

    Args:
        scores: Higher ranks first, (texts, queries).
        relevant: Which texts are sources, (texts, queries).

    Raises:
        NumericsError: A query has no relevant text.
    """
    return 1 / _ranks_of_relevant(scores, relevant).min(axis=0)


def recall_at(k: int, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Share of the relevant texts among the first k, for every query; arguments as above.

    Raises:
        NumericsError: A query has no relevant text.
    """
    ranks = _ranks_of_relevant(scores, relevant)
    return np.asarray((ranks <= k).sum(axis=0) / relevant.sum(axis=0))


def _ranks_of_relevant(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank of each relevant text, infinite for the others, (texts, queries)."""
    missing = np.flatnonzero(~relevant.any(axis=0))
    if len(missing):
        raise NumericsError("a query has no relevant text", where=f"query {missing[0]}")
    ranks = (scores[None, :, :] >= scores[:, None, :]).sum(axis=1)
    return np.where(relevant, ranks, np.inf)
