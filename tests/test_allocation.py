"""A global parameter budget against brute force, uniform ranks, and invariances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from iprox.errors import ConfigError
from iprox.numerics.allocation import Spectrum, allocate, uniform_budget, weighted_error
from iprox.numerics.ipsvd import DampedRoot, decompose
from iprox.numerics.ranks import layer_parameters, max_useful_rank, rank_for

SHAPES = [(6, 6), (4, 8), (9, 5), (6, 6)]


def spectrum(shape: tuple[int, int], seed: int, decay: float = 0.6) -> Spectrum:
    """Falling singular values with uneven steps, at a scale of the layer's own."""
    drawn = torch.Generator().manual_seed(seed)
    steps = decay + (1 - decay) * torch.rand(min(shape), generator=drawn, dtype=torch.float64)
    return Spectrum(*shape, 10 * torch.rand(1, generator=drawn) * steps.cumprod(0))


def cost(spectra: Sequence[Spectrum], ranks: Sequence[int | None]) -> int:
    pairs = zip(spectra, ranks, strict=True)
    return sum(layer_parameters(one.out_dim, one.in_dim, rank) for one, rank in pairs)


def error(spectra: Sequence[Spectrum], ranks: Sequence[int | None]) -> float:
    return sum(weighted_error(one, rank) for one, rank in zip(spectra, ranks, strict=True))


def options(one: Spectrum, multiple: int) -> list[int | None]:
    useful = max_useful_rank(one.out_dim, one.in_dim)
    return [*range(multiple, useful + 1, multiple), None]


def all_choices(
    spectra: Sequence[Spectrum], multiple: int
) -> list[tuple[int, float, tuple[int | None, ...]]]:
    """Every choice of ranks with its cost and error."""
    every = itertools.product(*(options(one, multiple) for one in spectra))
    return [(cost(spectra, ranks), error(spectra, ranks), ranks) for ranks in every]


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_that_costs_as_much_errs_less_along_the_hull(seed: int) -> None:
    spectra = [spectrum(shape, 10 * seed + i) for i, shape in enumerate(SHAPES)]
    choices = all_choices(spectra, 1)
    # a budget that the steps of the hull meet exactly: that of the best choice for a price of
    # parameters (every such choice is a point that the hull passes through)
    for price in (0.003, 0.03, 0.3):
        spent, best, ranks = min(choices, key=lambda c: c[1] + price * c[0])
        found = allocate(spectra, spent, multiple=1)
        assert tuple(found) == ranks
        assert best == min(e for c, e, _ in choices if c <= spent)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.9])
def test_any_budget_is_met_and_spent_nearly_as_well_as_can_be(seed: int, share: float) -> None:
    spectra = [spectrum(shape, 10 * seed + i) for i, shape in enumerate(SHAPES)]
    budget = int(share * sum(m * n for m, n in SHAPES))
    found = allocate(spectra, budget, multiple=1)
    spent = cost(spectra, found)
    one_rank_of_any = max(m + n for m, n in SHAPES)
    assert budget - one_rank_of_any < spent <= budget
    choices = all_choices(spectra, 1)
    # what is lost to a step that no longer fits is no more than that step would have cost
    largest_step = max(m * n for m, n in SHAPES)
    below = min(
        e for c, e, _ in choices if c <= max(min(c for c, _, _ in choices), budget - largest_step)
    )
    assert min(e for c, e, _ in choices if c <= budget) <= error(spectra, found) <= below


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_equal_layers_get_the_uniform_rank(sparsity: float) -> None:
    layers = [Spectrum(20, 20, 0.5 ** torch.arange(20, dtype=torch.float64))] * 5
    rank = rank_for(20, 20, sparsity, 1)
    assert rank == 10 * (1 - sparsity)
    budget = uniform_budget([(20, 20)] * 5, sparsity, 1)
    assert budget == 5 * 40 * rank
    assert allocate(layers, budget, 1) == [rank] * 5


def test_the_budget_is_that_of_ranks_not_rounded() -> None:
    # rank 5 of (10, 30) would do for 0.4 removed of 300: 180 parameters, 4.5 * 40
    assert uniform_budget([(10, 30)], 0.4, 1) == 180
    assert layer_parameters(10, 30, rank_for(10, 30, 0.4, 1)) == 200
    # at multiples of 8 it stays dense, and counts whole
    assert uniform_budget([(10, 30), (20, 20)], 0.4, 8) == 300 + 240


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("multiple", ["auto", 1, 8, 32])
@pytest.mark.parametrize("rule", ["parameters", "min_dim"])
def test_never_more_is_spent_than_by_equal_sparsities(
    sparsity: float, multiple: Any, rule: Any
) -> None:
    shapes = [(48, 48), (16, 48), (128, 48), (48, 128)]
    spectra = [spectrum(shape, i, 0.9) for i, shape in enumerate(shapes)]
    uniform = [rank_for(*shape, sparsity, multiple, dense_rule=rule) for shape in shapes]
    budget = uniform_budget(shapes, sparsity, multiple, dense_rule=rule)
    found = allocate(spectra, budget, multiple)
    assert cost(spectra, found) <= cost(spectra, uniform)


def test_a_layer_is_kept_dense_when_its_last_ranks_are_worth_most() -> None:
    flat = Spectrum(8, 8, torch.ones(8, dtype=torch.float64))
    steep = Spectrum(8, 8, 0.01 ** torch.arange(8, dtype=torch.float64))
    # dense costs as much as rank 4 and leaves nothing
    assert allocate([flat, steep], 64 + 16, 1) == [None, 1]
    assert allocate([flat, steep], 64 + 16 + 16, 1) == [None, 2]


def test_ranks_are_multiples_and_at_least_one_of_them() -> None:
    spectra = [spectrum((64, 96), i) for i in range(3)]
    ranks = allocate(spectra, 0, multiple=8)
    assert ranks == [8, 8, 8]
    ranks = allocate(spectra, 3 * 64 * 96 // 2, multiple=8)
    assert all(rank is None or rank % 8 == 0 for rank in ranks)
    assert allocate([spectrum((4, 4), 0)], 3, multiple=8) == [None]
    with pytest.raises(ConfigError, match="rank multiple"):
        allocate(spectra, 100, multiple=0)


def test_nothing_is_spent_on_directions_that_carry_nothing() -> None:
    empty = Spectrum(20, 20, torch.zeros(20, dtype=torch.float64))
    full = spectrum((20, 20), 0)
    ranks = allocate([empty, full], 10**6, 2)
    assert ranks == [2, None]


def test_a_floor_is_removed_by_the_dense_layer_only() -> None:
    values = torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    one = Spectrum(6, 6, values, floor=4.0)
    assert [weighted_error(one, r) for r in (0, 1, 2, 3, None)] == [29, 20, 16, 16, 0]


def test_order_of_layers_and_a_common_scale_change_nothing() -> None:
    spectra = [spectrum(shape, i) for i, shape in enumerate(SHAPES)]
    budget = 80
    found = allocate(spectra, budget, 1)
    assert allocate(spectra[::-1], budget, 1)[::-1] == found
    scaled = [one._replace(singular_values=8 * one.singular_values) for one in spectra]
    assert allocate(scaled, budget, 1) == found


def test_gradients_c_times_as_large_are_worth_c_squared_as_much() -> None:
    draw = torch.Generator().manual_seed(3)
    weight, inputs, grads = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((6, 8), (40, 8), (40, 6))
    )

    def of(scale: float) -> Spectrum:
        roots = (DampedRoot.from_rows(inputs, 0.1), DampedRoot.from_rows(scale * grads, 0.1))
        return Spectrum(6, 8, decompose(weight, *roots).singular_values)

    for rank in range(6):
        assert weighted_error(of(7.0), rank) == pytest.approx(49 * weighted_error(of(1.0), rank))
    # of two equal layers the one with the larger gradients gets the larger rank
    ranks = allocate([of(1.0), of(7.0)], 4 * 14, 1)
    assert ranks[0] is not None
    assert ranks[1] is None or ranks[1] > ranks[0]


def test_without_damping_the_error_is_the_mean_squared_change_of_the_loss() -> None:
    draw = torch.Generator().manual_seed(4)
    weight, inputs, grads = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((4, 5), (9, 5), (7, 4))
    )
    roots = (DampedRoot.from_rows(inputs, 0.0), DampedRoot.from_rows(grads, 0.0))
    solved = decompose(weight, *roots)
    for rank in (1, 2, 3):
        change = weight - solved.left[:, :rank] @ solved.right[:rank]
        pairs = [float(d @ change @ x) ** 2 for x in inputs for d in grads]
        expected = weighted_error(Spectrum(4, 5, solved.singular_values), rank)
        assert expected == pytest.approx(math.fsum(pairs) / len(pairs), rel=1e-8)
