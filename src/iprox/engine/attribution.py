"""Influence of training examples on single queries by every estimator, with all in memory.

What the stages query, covariance, curvature, eigenvalues, direction and features do on disk and
for models of any size, this does for a model that is small enough to keep the gradient of every
query: the same passes and the same solves, called one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iprox.engine.capture import input_sites
from iprox.engine.curvature import Covariances, Labels, SquaredGradients, visit_examples
from iprox.engine.gradients import weighted_gradients
from iprox.engine.loss import Batch
from iprox.engine.scoring import Scorer
from iprox.errors import ConfigError, NumericsError
from iprox.numerics.datainf import swapped_inverse_weights
from iprox.numerics.ghost import widen
from iprox.numerics.kfac import Damping, Eigenbasis, LayerCurvature, eigenbasis

IDENTITY = ("tracin", "graddot")
ESTIMATORS = (*IDENTITY, "kfac", "ekfac", "datainf")
Gradients = dict[str, Tensor]
"""Layer -> (queries, out, in)."""


class Examples(NamedTuple):
    """Examples in batches, in their order."""

    batches: list[Batch]
    ids: list[list[str]]

    def __len__(self) -> int:
        return sum(map(len, self.ids))


class Influences(NamedTuple):
    """Scores of all training examples on all queries, (examples, queries) float64."""

    dots: Tensor  # <P g(query), g(example)>
    cosines: Tensor  # the same over the norms of both


@dataclass(frozen=True)
class Attribution:
    """A model, what it was trained on, and the queries whose loss is explained.

    Attributes:
        model: A causal LM with frozen weights.
        layers: Layers whose weights' gradients count.
        train: Examples that are scored, and that curvature is fitted on.
        queries: Queries.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        labels: Labels of the curvature, as in :func:`iprox.engine.curvature.visit_examples`.
        seed: Seed of sampled labels.
    """

    model: Any
    layers: Mapping[str, nn.Linear]
    train: Examples
    queries: Examples
    reduction: str = "token_mean"
    labels: Labels = "empirical"
    seed: int = 0

    @cached_property
    def query_gradients(self) -> Gradients:
        """Gradient of every query."""
        return query_gradients(self.model, self.layers, self.queries, self.reduction)

    @cached_property
    def curvature(self) -> dict[str, LayerCurvature]:
        """K-FAC's curvature of every layer."""
        sites = input_sites(self.model, self.layers, self.train.batches[0])
        sums = Covariances(self.layers, sites, max_factor_dim=2**31)
        self._visit(sums)
        inputs = {s: eigenbasis(sums.inputs[s], sums.tokens[s]) for s in sums.inputs}
        return {
            name: LayerCurvature(
                name,
                eigenbasis(sums.output_grads[name], sums.tokens[name]),
                inputs[sites[name]],
                sums.tokens[name] / len(self.train),
            )
            for name in self.layers
        }

    @cached_property
    def corrected(self) -> dict[str, LayerCurvature]:
        """EK-FAC's."""
        kfac = self.curvature
        squares = SquaredGradients(
            {n: _narrow(c.inputs, self.layers[n].weight) for n, c in kfac.items()},
            {n: _narrow(c.grads, self.layers[n].weight) for n, c in kfac.items()},
            {n: n for n in kfac},
        )
        self._visit(squares)
        return {
            name: replace(c, corrected=squares.sums[name].double() / len(self.train))
            for name, c in kfac.items()
        }

    def directions(self, estimator: str, damping: Damping) -> Gradients:
        """Query gradients as an estimator changes them, in float64.

        Raises:
            ConfigError: There is no such estimator.
            NumericsError: A curvature cannot be inverted.
        """
        gradients = self.query_gradients
        if estimator in IDENTITY:
            return gradients
        if estimator == "datainf":
            return self._datainf(gradients, damping)
        if estimator not in ESTIMATORS:
            raise ConfigError("unknown estimator", value=estimator, allowed=", ".join(ESTIMATORS))
        curvature = self.curvature if estimator == "kfac" else self.corrected
        return {n: curvature[n].solve(v.double(), damping) for n, v in gradients.items()}

    def influences(self, directions: Gradients) -> Influences:
        """Scores of the training examples against directions."""
        return score_examples(self.model, self.layers, self.train, directions, self.reduction)

    def _visit(self, visitor: Any) -> None:
        pairs = zip(self.train.batches, self.train.ids, strict=True)
        visit_examples(
            self.model, self.layers, pairs, visitor, self.reduction, self.labels, self.seed
        )

    def _datainf(self, gradients: Gradients, damping: Damping) -> Gradients:
        scorer = Scorer(self.model, self.layers, gradients, self.reduction)
        parts = [
            scorer.by_layer(batch, ids)
            for batch, ids in zip(self.train.batches, self.train.ids, strict=True)
        ]
        dots = torch.cat([p.dots for p in parts], dim=1).double()
        squares = torch.cat([p.squared_norms for p in parts], dim=1).double()
        weights, amounts = {}, {}
        for place, (name, layer) in enumerate(self.layers.items()):
            share = float(squares[place].mean()) / layer.weight.numel()
            amounts[name] = damping.amount * (share if damping.mode == "relative" else 1.0)
            weights[name] = swapped_inverse_weights(dots[place], squares[place], amounts[name])
        starts = _starts(self.train)
        batches = (
            (batch, {n: w[:, start : start + len(ids)] for n, w in weights.items()}, ids)
            for start, batch, ids in zip(starts, *self.train, strict=True)
        )
        sums = weighted_gradients(self.model, self.layers, batches, self.reduction)
        return {n: gradients[n].double() / amounts[n] + sums[n].double() for n in sums}


def query_gradients(
    model: Any, layers: Mapping[str, nn.Linear], queries: Examples, reduction: str
) -> Gradients:
    """The gradient of every query's own loss."""
    unit = torch.eye(len(queries))
    batches = (
        (batch, dict.fromkeys(layers, unit[:, start : start + len(ids)]), ids)
        for start, batch, ids in zip(_starts(queries), *queries, strict=True)
    )
    return weighted_gradients(model, layers, batches, reduction)


def score_examples(
    model: Any,
    layers: Mapping[str, nn.Linear],
    examples: Examples,
    directions: Gradients,
    reduction: str,
) -> Influences:
    """Scores of examples against directions.

    Raises:
        NumericsError: A direction is zero, so that no cosine with it is defined.
    """
    scorer = Scorer(model, layers, directions, reduction)
    scores = [scorer.score(b, ids) for b, ids in zip(examples.batches, examples.ids, strict=True)]
    dots = torch.cat([s.dots for s in scores])
    norms = torch.cat([s.squared_norms for s in scores]).sqrt()
    lengths = torch.stack([v.double().square().sum((1, 2)) for v in directions.values()])
    of_queries = lengths.sum(0).sqrt()
    if not bool((of_queries > 0).all()):
        raise NumericsError("the gradient of a query is zero", value=int(of_queries.argmin()))
    return Influences(dots, dots / norms[:, None].clamp(min=1e-300) / of_queries)


def _starts(examples: Examples) -> Sequence[int]:
    """Place of each batch's first example."""
    sizes = torch.tensor([0, *map(len, examples.ids)])
    return [int(n) for n in sizes.cumsum(0)[:-1]]


def _narrow(basis: Eigenbasis, like: Tensor) -> Eigenbasis:
    """A basis in the precision in which rows of a layer are summed."""
    dtype = widen(like[:0]).dtype
    return Eigenbasis([q.to(dtype) for q in basis.blocks], basis.values.to(dtype))
