"""Measures of agreement against scipy and hand-made cases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from iprox.numerics import correlation
from iprox.numerics.correlation import (
    bootstrap,
    interval,
    pivotal_interval,
    resamples,
    spearman,
    top_overlap,
)


def pair(n: int, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=n)
    b = a + generator.normal(size=n)
    return (a.round(), b.round()) if ties else (a, b)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (correlation.pearson, stats.pearsonr),
        (correlation.spearman, stats.spearmanr),
        (correlation.kendall, stats.kendalltau),
    ],
)
def test_measures_equal_scipys(ours: Callable, theirs: Callable, ties: bool) -> None:
    a, b = pair(40, ties=ties)
    assert float(ours(a, b)) == pytest.approx(theirs(a, b).statistic, rel=1e-12)
    rows = [pair(40, seed, ties) for seed in range(3)]
    together = ours(*(np.stack(side) for side in zip(*rows, strict=True)))
    assert together == pytest.approx([theirs(*row).statistic for row in rows], rel=1e-12)


def test_kendall_counts_pairs() -> None:
    a, b = pair(12)
    signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in combinations(range(12), 2)]
    assert float(correlation.kendall(a, b)) == pytest.approx(np.mean(signs), rel=1e-12)


def test_constant_scores_have_no_correlation() -> None:
    a = np.arange(5.0)
    assert np.isnan(correlation.pearson(a, np.ones(5)))
    assert np.isnan(correlation.spearman(np.ones(5), a))


@pytest.mark.parametrize(("share", "expected"), [(0.25, 1.0), (0.5, 0.5), (0.01, 1.0), (1.0, 1.0)])
def test_overlap_of_the_best(share: float, expected: float) -> None:
    a = np.array([9.0, 8, 1, 2])  # best: 0, 1
    b = np.array([9.0, 1, 8, 2])  # best: 0, 2
    assert float(top_overlap(share)(a, b)) == expected


def test_overlap_takes_the_floor_of_the_share() -> None:
    a, b = np.arange(10.0), -np.arange(10.0)
    b[9] = 5
    assert float(top_overlap(0.29)(a, b)) == 0.5  # of the best two, one is the same
    assert float(top_overlap(0.3)(np.arange(10.0), np.arange(10.0))) == 1


def test_resamples_are_seeded_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(7, 20, 1)))
    assert whole.shape == (20, 7)
    assert 0 <= whole.min() <= whole.max() < 7
    monkeypatch.setattr(correlation, "CHUNK", 21)
    np.testing.assert_array_equal(np.concatenate(list(resamples(7, 20, 1))), whole)
    assert (np.concatenate(list(resamples(7, 20, 2))) != whole).any()


def test_bootstrap_is_the_measure_of_each_resample() -> None:
    a, b = pair(30)
    draws = np.concatenate(list(resamples(30, 15, 4)))
    expected = [stats.spearmanr(a[i], b[i]).statistic for i in draws]
    assert bootstrap(correlation.spearman, a, b, 15, 4) == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    a = np.random.default_rng(0).normal(size=400)
    low, high = interval(bootstrap(lambda x, _: x.mean(-1), a, a, 2000, 0))
    error = 1.96 * a.std() / 20
    assert low == pytest.approx(a.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(a.mean() + error, abs=0.15 * error)


def test_resamples_of_a_rank_correlation_lie_too_low_and_its_interval_does_not() -> None:
    rng, linear = np.random.default_rng(0), 0.8
    a = rng.standard_normal((300, 40))
    b = linear * a + (1 - linear**2) ** 0.5 * rng.standard_normal(a.shape)
    population = 6 / np.pi * np.arcsin(linear / 2)
    estimate = float(spearman(a, b).mean())
    drawn = np.concatenate(list(resamples(40, 200, seed=1)))
    means = np.array([spearman(a[:, rows], b[:, rows]).mean() for rows in drawn])
    assert np.median(means) < estimate < population
    assert interval(means)[1] < population
    low, high = pivotal_interval(means, estimate)
    assert low < population < high


def test_no_resamples_give_no_interval() -> None:
    a, b = pair(5)
    values = bootstrap(correlation.pearson, a, b, 0, 0)
    assert values.shape == (0,)
    assert np.isnan(interval(values)).all()
