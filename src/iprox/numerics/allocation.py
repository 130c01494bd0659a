"""One parameter budget, spent on the layers where it removes most error.

A layer whose weight is replaced by the solution of rank r errs by

    e(r) = Σ_{k > r} σ_k² + floor²,

with σ the singular values of its weighted weight R_d W R_x (:mod:`iprox.numerics.ipsvd`). The rows
of inputs and output gradients enter R_x and R_d in their own units, so e(r) is, up to damping, the
mean squared first-order change of a token's loss (arXiv:2602.17835, Eq. 5), and layers can be
compared: gradients c times as large make a layer's e c² times as large. (Errors weighted by inputs
alone, or not at all, are those of a layer's outputs or weights, which have no unit in common.)
Layers' changes are taken as independent, so errors add up.

Parameters are what is counted. Operations would give the same ranks: a linear layer costs two per
weight and token forward, two more backward, dense or factorised.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch import Tensor

from iprox.numerics.ranks import (
    DenseRule,
    Multiple,
    Rounding,
    layer_parameters,
    max_useful_rank,
    multiple_of,
    rank_for,
)


class Spectrum(NamedTuple):
    """What a layer loses at each rank."""

    out_dim: int
    in_dim: int
    singular_values: Tensor  # (min(out, in),), descending
    floor: float = 0.0  # norm of the error that no rank removes


def weighted_error(spectrum: Spectrum, rank: int | None) -> float:
    """e(r) of a layer, 0 of one that is kept dense (rank None)."""
    if rank is None:
        return 0.0
    return float(spectrum.singular_values[rank:].double().square().sum()) + spectrum.floor**2


def uniform_budget(
    shapes: Iterable[tuple[int, int]],
    sparsity: float,
    multiple: Multiple = "auto",
    rounding: Rounding = "ceil",
    dense_rule: DenseRule = "parameters",
) -> int:
    """Parameters that equal sparsities would leave, before ranks are rounded up.

    Layers that would stay dense count whole.

    Args:
        shapes: (out, in) of every layer.
        sparsity: As :func:`iprox.numerics.ranks.rank_for`, like all that follow.
        multiple: See there.
        rounding: See there.
        dense_rule: See there.

    Raises:
        ConfigError: As :func:`iprox.numerics.ranks.rank_for`.
    """
    total = Fraction(0)
    for out_dim, in_dim in shapes:
        rank = rank_for(out_dim, in_dim, sparsity, multiple, rounding, dense_rule)
        kept = Fraction(1) if rank is None else 1 - Fraction(str(sparsity))
        total += kept * out_dim * in_dim
    return math.floor(total)


def allocate(
    spectra: Sequence[Spectrum], budget: int, multiple: Multiple = "auto"
) -> list[int | None]:
    """Ranks of all layers that together err least within a budget.

    Every layer begins at its smallest rank, one multiple; one for which even that saves nothing
    stays dense. Then, again and again, the layer and the step up, to a higher multiple or to the
    dense layer, that remove most error per parameter are taken, as long as one fits. Steps may
    skip multiples: what lies beyond the last useful rank of a layer comes at once with its dense
    weight, and may be worth more than the multiples before.

    Up to the first step that no longer fits, no other choice of ranks that costs as much or less
    errs less: error removed per parameter falls from step to step along each layer's lower convex
    hull (Fox, Management Science 13, 1966). Steps that still fit fill up what is left.

    Args:
        spectra: The layers.
        budget: Parameters of all layers together. More are spent only if the smallest ranks need
            more; fewer if no step fits, or none removes anything.
        multiple: Ranks are multiples of this; ``auto`` as
            :func:`iprox.numerics.ranks.auto_multiple`.

    Returns:
        A rank per layer, None for dense.

    Raises:
        ConfigError: The multiple is not a positive integer.
    """
    ladders = [_ladder(spectrum, multiple) for spectrum in spectra]
    rungs = [0] * len(ladders)
    left = budget - sum(int(ladder.costs[0]) for ladder in ladders)
    steps: list[tuple[float, float, int, int]] = []

    def offer(layer: int) -> None:
        """Add the best affordable step of a layer; of equal ones the layer lowest on its ladder."""
        rung, ladder = rungs[layer], ladders[layer]
        found = ladder.best_step(rung, left)
        if found is not None:
            rate, to = found
            heapq.heappush(steps, (-rate, rung / len(ladder.ranks), layer, to))

    for layer in range(len(ladders)):
        offer(layer)
    while steps:
        _, _, layer, to = heapq.heappop(steps)
        cost = int(ladders[layer].costs[to] - ladders[layer].costs[rungs[layer]])
        if cost <= left:  # else it fitted when it was offered, and a smaller one may
            rungs[layer] = to
            left -= cost
        offer(layer)
    return [ladder.ranks[rung] for ladder, rung in zip(ladders, rungs, strict=True)]


@dataclass(frozen=True, eq=False)
class _Ladder:
    """The ranks a layer may have, from the cheapest to dense, with their costs and errors."""

    ranks: list[int | None]
    costs: np.ndarray  # (rungs,) parameters, ascending
    errors: np.ndarray  # (rungs,) descending

    def best_step(self, rung: int, left: int) -> tuple[float, int] | None:
        """Error removed per parameter and end of the best step up that costs ``left`` or less.

        None when no step fits, or none removes anything.
        """
        costs = self.costs[rung + 1 :] - self.costs[rung]
        n_affordable = int(np.searchsorted(costs, left, side="right"))
        if n_affordable == 0:
            return None
        rates = (self.errors[rung] - self.errors[rung + 1 :][:n_affordable]) / costs[:n_affordable]
        best = int(rates.argmax())
        return (float(rates[best]), rung + 1 + best) if rates[best] > 0 else None


def _ladder(spectrum: Spectrum, multiple: Multiple) -> _Ladder:
    out_dim, in_dim = spectrum.out_dim, spectrum.in_dim
    step = multiple_of(out_dim, in_dim, multiple)
    # whatever the rule for equal sparsities: factors larger than the layer are never worth it
    thin = list(range(step, max_useful_rank(out_dim, in_dim) + 1, step))
    ranks: list[int | None] = [*thin, None]
    tails = spectrum.singular_values.double().square().flip(0).cumsum(0).flip(0).cpu().numpy()
    return _Ladder(
        ranks,
        np.array([layer_parameters(out_dim, in_dim, rank) for rank in ranks], dtype=np.int64),
        np.array([*(tails[thin] + spectrum.floor**2), 0.0]),
    )
