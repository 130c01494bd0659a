"""How close two scorers' answers are."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Answer
from iprox.numerics.correlation import spearman


def cosines(answer: Answer, query_norms: Tensor, norms: Tensor) -> Tensor:
    """Cosines (examples, queries) in float64.

    Args:
        answer: Inner products, and norms where the scorer takes them.
        query_norms: Norms of the query gradients, (queries,).
        norms: Norms (examples,) that stand in where the scorer takes none.
    """
    taken = norms if answer.norms is None else answer.norms
    return answer.dots.double() / (taken.double()[:, None] * query_norms.double())


def compare(answer: Answer, reference: Answer, query_norms: Tensor) -> tuple[float, float]:
    """Largest absolute error of a cosine, and the lowest Spearman correlation of a query.

    Args:
        answer: What is judged; it may have fewer queries than the reference.
        reference: Answer with norms.
        query_norms: Norms of the reference's query gradients, (queries,).
    """
    assert reference.norms is not None
    n_queries = answer.dots.shape[1]
    theirs = cosines(answer, query_norms[:n_queries], reference.norms)
    truth = cosines(reference, query_norms, reference.norms)[:, :n_queries]
    error = float((theirs - truth).abs().max())
    return error, float(torch.tensor(spearman(theirs.T.numpy(), truth.T.numpy())).min())
