"""From inner products and norms to scores, and from scores to an order.

A higher score means a more useful example: a step along its gradient lowers the queries' loss
more (TracIn, arXiv:2002.08484; with cosines as in LESS, arXiv:2402.04333).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from iprox.errors import NumericsError

UNSCORABLE = -np.inf
"""Score of an example without a gradient direction; it ranks last."""


def influence(
    dots: np.ndarray, norms: np.ndarray, query_norms: np.ndarray, score: str
) -> np.ndarray:
    """Scores of examples against query gradients.

    Args:
        dots: Inner products with the query gradients, (examples, queries).
        norms: Norms of the examples' gradients, (examples,).
        query_norms: Norms of the query gradients, (queries,).
        score: ``cosine``, ``dot``, or ``half``: the cosine by norms that are not Euclidean.

    Returns:
        (examples, queries) float64; by ``cosine`` -inf where the example's gradient is zero.

    Raises:
        NumericsError: A query norm is not positive.
    """
    if score == "dot":
        return np.asarray(dots, dtype=np.float64)
    if not (query_norms > 0).all():
        raise NumericsError("a query gradient has no direction", value=query_norms.tolist())
    zero = norms == 0
    scale = np.where(zero, 1.0, norms)[:, None] * query_norms
    return np.where(zero[:, None], UNSCORABLE, dots / scale)


def descending(scores: np.ndarray) -> np.ndarray:
    """Indices from the highest score to the lowest; equal scores in the order they are given."""
    return np.argsort(-np.asarray(scores), kind="stable")


def random_scores(example_ids: Sequence[str], seed: int) -> np.ndarray:
    """Uniform scores in [0, 1) that depend on the seed and each example's id alone.

    So an example keeps its score whatever the order of the pool and whoever else is in it.
    """
    uniform = (_uniform(f"{seed}\n{example_id}") for example_id in example_ids)
    return np.fromiter(uniform, dtype=np.float64, count=len(example_ids))


def _uniform(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
