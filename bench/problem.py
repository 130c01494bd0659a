"""The task that every scorer is timed on, and the form of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iprox.data.batches import collate
from iprox.data.chat import Encoded
from iprox.engine.gradients import mean_gradient
from iprox.engine.loss import Batch
from iprox.models.layers import scored_linears
from iprox.study.schema import LayersSection


@dataclass(frozen=True)
class Problem:
    """Inner products of the gradient of every pool example with every query gradient.

    The loss of an example is the mean over its supervised tokens; its gradient is that with
    respect to the weights of the block linears, all together.

    Attributes:
        model: A causal LM with frozen weights.
        layers: Its block linears (of a factorised layer, both factors), in model order.
        pool: The examples, longest first.
        queries: An example for each query gradient.
        gradients: Layer -> query gradients (queries, out, in).
        pad_id: Token id of padding.
    """

    model: Any
    layers: Mapping[str, nn.Linear]
    pool: Sequence[Encoded]
    queries: Sequence[Encoded]
    gradients: Mapping[str, Tensor]
    pad_id: int

    @property
    def tokens(self) -> int:
        """Tokens of the pool."""
        return sum(map(len, self.pool))

    def asking(self, n_queries: int) -> Problem:
        """The same with the first queries only."""
        first = {name: g[:n_queries].contiguous() for name, g in self.gradients.items()}
        return replace(self, queries=self.queries[:n_queries], gradients=first)

    def query_norms(self) -> Tensor:
        """Norms of the query gradients, (queries,) float64."""
        squares = [g.double().square().sum((1, 2)) for g in self.gradients.values()]
        return torch.stack(squares).sum(0).sqrt()


class Answer(NamedTuple):
    """What a scorer returns."""

    dots: Tensor  # (examples, queries)
    norms: Tensor | None  # (examples,); None where the scorer takes none


Scoring = Callable[[], Answer]
"""A whole pass over the pool of the problem that it was made for."""


def pose(model: Any, pool: Sequence[Encoded], queries: Sequence[Encoded], pad_id: int) -> Problem:
    """The problem for a model, with the query gradients taken at that model."""
    layers = scored_linears(model, LayersSection())
    one = torch.ones(1, dtype=torch.float64)
    taken = [mean_gradient(model, layers, [(batch_of([q], pad_id), one, None)]) for q in queries]
    gradients = {name: torch.stack([g[name] for g in taken]) for name in layers}
    longest_first = sorted(pool, key=len, reverse=True)
    return Problem(model, layers, longest_first, queries, gradients, pad_id)


def batch_of(examples: Sequence[Encoded], pad_id: int) -> Batch:
    """Examples as one right-padded batch."""
    return Batch(*collate(examples, pad_id))


def in_groups(examples: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    """Groups of neighbours, for libraries that are given batches and keep each gradient."""
    return [examples[i : i + size] for i in range(0, len(examples), size)]
