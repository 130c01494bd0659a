"""Probe positions: even over sequences, one per stratum, reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.errors import ConfigError
from iprox.numerics.sampling import (
    NEIGHBOURS,
    blend,
    draw_blends,
    spread,
    stratified_positions,
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    extra=st.integers(0, 300),
    seed=st.integers(0, 2**32),
)
def test_every_draw_keeps_the_rules(lengths: list[int], extra: int, seed: int) -> None:
    budget = max(1, sum(n > 0 for n in lengths)) + extra
    drawn = stratified_positions(lengths, budget, seed)

    assert sum(map(len, drawn)) == min(budget, sum(lengths))
    uncapped = [len(p) for p, n in zip(drawn, lengths, strict=True) if len(p) < n]
    fair = min(uncapped, default=max(lengths))
    assert all(len(p) <= fair + 1 for p in drawn)
    for positions, length in zip(drawn, lengths, strict=True):
        assert (len(positions) > 0) == (length > 0)
        count = len(positions)
        for stratum, position in enumerate(positions):
            assert stratum * length // count <= position < (stratum + 1) * length // count


def test_leftovers_go_around_and_caps_hold() -> None:
    assert spread(np.array([2, 100, 0, 100]), 15).tolist() == [2, 7, 0, 6]
    assert spread(np.array([2, 3]), 100).tolist() == [2, 3]


def test_draws_are_uniform_inside_a_stratum() -> None:
    drawn = np.stack([stratified_positions([12], 3, seed)[0] for seed in range(2000)])
    for stratum in range(3):
        counts = np.bincount(drawn[:, stratum] - 4 * stratum, minlength=4)
        assert (abs(counts - 500) < 100).all()


def test_same_seed_same_positions() -> None:
    first, again, other = (stratified_positions([50, 70], 20, seed) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    assert first[0].dtype == np.int64


def test_a_budget_below_the_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"probe\.tokens[\s\S]*at least 3"):
        stratified_positions([5, 5, 0, 5], 2, 0)
    with pytest.raises(ConfigError, match=r"probe\.tokens"):
        stratified_positions([], 0, 0)
    with pytest.raises(ValueError, match="negative"):
        stratified_positions([-1], 2, 0)


def test_blends_lie_between_a_row_that_stays_and_one_of_its_nearest() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6))
    blends = draw_blends(rows, 0.3, seed=1)
    assert len(blends.replaced) == len(set(blends.replaced)) == 12
    staying = set(range(40)) - set(blends.replaced)
    assert set(blends.kept) | set(blends.neighbours) <= staying
    mixed = blend(rows, blends)
    np.testing.assert_array_equal(mixed[sorted(staying)], rows[sorted(staying)])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for place, i, j, share in zip(*blends, strict=True):
        others = sorted(staying - {i}, key=lambda k: -unit[k] @ unit[i])
        assert j in others[:NEIGHBOURS]
        np.testing.assert_allclose(mixed[place], (1 - share) * rows[i] + share * rows[j])
    assert 0 <= blends.shares.min() < 0.5 < blends.shares.max() < 1


def test_blends_are_drawn_by_the_seed_and_apply_to_stacked_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    first, again, other = (draw_blends(rows, 0.5, seed) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first.replaced, other.replaced)
    both = blend(np.stack([rows, -rows]), first)
    np.testing.assert_array_equal(both[0], blend(rows, first))
    np.testing.assert_array_equal(both[1], -both[0])


def test_too_few_rows_to_blend_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"probe\.redundancy[\s\S]*5 of 10"):
        draw_blends(np.ones((10, 2)), 0.5, 0)
