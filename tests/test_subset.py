"""Subsets against brute force, naive greedy and their definitions."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from iprox.errors import NumericsError
from iprox.numerics import subset
from iprox.numerics.minhash import NearDuplicates, jaccard, normalised, shingles


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def covered(similarities: np.ndarray, quality: np.ndarray, chosen: list[int], mu: float) -> float:
    """sum_i max_j sim_ij + mu sum_j quality_j, as it is written."""
    total = mu * sum(quality[j] for j in chosen)
    return total + sum(max(similarities[i, j] for j in chosen) for i in range(len(similarities)))


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_lazy_facility_location_is_plain_greedy_and_near_the_optimum(seed: int, mu: float) -> None:
    features, quality = unit(10, 3, seed), np.random.default_rng(seed).random(10)
    similarities = subset.coverage(features)
    chosen = subset.facility_location(similarities, quality, 3, mu)
    greedy: list[int] = []
    for _ in range(3):
        left = [j for j in range(10) if j not in greedy]
        values = [covered(similarities, quality, [*greedy, j], mu) for j in left]
        greedy.append(left[int(np.argmax(values))])
    assert chosen.places.tolist() == greedy
    value = covered(similarities, quality, greedy, mu)
    assert chosen.gains.sum() == pytest.approx(value, rel=1e-12)
    best = max(
        covered(similarities, quality, list(c), mu) for c in itertools.combinations(range(10), 3)
    )
    assert (1 - 1 / math.e) * best <= value <= best + 1e-12


def test_few_gains_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Counter[str]()
    maximum = np.maximum

    def counted(*args: object, **kwargs: object) -> object:
        computed["maxima"] += 1
        return maximum(*args, **kwargs)

    similarities = subset.coverage(unit(200, 8))
    monkeypatch.setattr(subset.np, "maximum", counted)
    subset.facility_location(similarities, np.zeros(200), 20, 0.0)
    assert computed["maxima"] < 200 + 20 * 60  # plain greedy: 20 * 190


def test_equal_examples_are_taken_in_their_order() -> None:
    features = np.repeat(np.eye(3), 2, axis=0)
    quality = np.zeros(6)
    similarities = subset.coverage(features)
    assert subset.facility_location(similarities, quality, 3, 1.0).places.tolist() == [0, 2, 4]
    assert subset.k_centre(features, 3).places.tolist() == [0, 2, 4]
    assert subset.dpp_map(features, quality, 3, 1.0).places.tolist() == [0, 2, 4]


@pytest.mark.parametrize("seed", range(3))
def test_the_gains_of_a_determinantal_process_multiply_to_its_determinant(seed: int) -> None:
    features, quality = unit(12, 6, seed), np.random.default_rng(seed).random(12)
    weight = 1.5
    scale = np.exp(weight * quality / 2)
    kernel = scale[:, None] * (features @ features.T) * scale
    chosen = subset.dpp_map(features, quality, 4, weight)
    for size in range(1, 5):
        part = chosen.places[:size]
        expected = np.linalg.det(kernel[np.ix_(part, part)])
        assert np.prod(chosen.gains[:size]) == pytest.approx(expected, rel=1e-10)
        before = list(chosen.places[: size - 1])
        others = [
            np.linalg.det(kernel[np.ix_([*before, j], [*before, j])])
            for j in range(12)
            if j not in before
        ]
        assert expected == pytest.approx(max(others), rel=1e-10)


def test_a_process_cannot_choose_more_than_there_are_directions() -> None:
    with pytest.raises(NumericsError, match="directions"):
        subset.dpp_map(unit(9, 3), np.zeros(9), 4, 1.0)


def test_k_centre_is_farthest_first_and_within_twice_the_optimum() -> None:
    features = unit(10, 2, seed=3)
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    chosen = subset.k_centre(features, 4)
    assert chosen.places[0] == 0
    for step in range(1, 4):
        nearest = distances[:, chosen.places[:step]].min(axis=1)
        assert chosen.gains[step] == pytest.approx(nearest.max(), rel=1e-7)
        assert nearest[chosen.places[step]] == pytest.approx(nearest.max())
    radius = distances[:, chosen.places].min(axis=1).max()
    best = min(
        distances[:, list(c)].min(axis=1).max() for c in itertools.combinations(range(10), 4)
    )
    assert radius <= 2 * best


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_no_two_chosen_are_more_alike_than_the_limit(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subset, "THRESHOLD_ROWS", rows)
    features, limit = unit(60, 3), 0.8
    naive: list[int] = []
    for i in range(60):
        if len(naive) < 12 and all(features[i] @ features[j] <= limit for j in naive):
            naive.append(i)
    chosen = subset.below_similarity(features, 12, limit)
    assert chosen.places.tolist() == naive
    closest = [
        max((features[i] @ features[j] for j in naive[:p]), default=-1) for p, i in enumerate(naive)
    ]
    np.testing.assert_allclose(chosen.gains, closest, atol=1e-6)
    refused = subset.below_similarity(features, 12, limit, accept=lambda i: i % 2 == 0)
    assert all(i % 2 == 0 for i in refused.places)


def test_round_robin_is_balanced_and_takes_the_best_left() -> None:
    draw = np.random.default_rng(0)
    orders = [draw.permutation(30) for _ in range(4)]
    taken = subset.round_robin(orders, 14, lambda _: True)
    counts = Counter(task for task, _ in taken)
    assert max(counts.values()) - min(counts.values()) <= 1
    gone: set[int] = set()
    for turn, (task, example) in enumerate(taken):
        assert task == turn % 4
        assert example == next(e for e in orders[task].tolist() if e not in gone)
        gone.add(example)
    assert len(gone) == 14
    even = subset.round_robin(orders, 14, lambda e: e % 2 == 0)
    assert {e % 2 for _, e in even} == {0}
    assert len(subset.round_robin(orders, 99, lambda _: True)) == 30


def test_calibrated_scores_do_not_see_scale() -> None:
    scores = np.array([3.0, -np.inf, 1.0, 2.0, 2.0])
    for how in ("zscore", "rank"):
        one, two = subset.calibrate(scores, how), subset.calibrate(100 * scores - 7, how)
        np.testing.assert_allclose(one, two, rtol=1e-12)
        assert np.isneginf(one[1])
    assert subset.calibrate(scores, "rank")[[0, 2, 3]].tolist() == [1.0, 0.0, 0.5]
    z = subset.calibrate(scores, "zscore")[[0, 2, 3, 4]]
    assert z.mean() == pytest.approx(0, abs=1e-12)
    assert z.std() == pytest.approx(1)
    with pytest.raises(NumericsError, match="constant"):
        subset.calibrate(np.ones(4), "rank")


@pytest.mark.parametrize(("n", "size", "k"), [(10, 10, 3), (10, 3, 7), (1000, 64, 50), (5, 2, 5)])
def test_parts_cover_everything_and_share_the_budget(n: int, size: int, k: int) -> None:
    parts = list(subset.partition(n, size, k, seed=1))
    assert sorted(np.concatenate([p for p, _ in parts]).tolist()) == list(range(n))
    assert sum(share for _, share in parts) == k
    for part, share in parts:
        assert len(part) <= size
        assert 0 <= share <= len(part)
        assert abs(share - k * len(part) / n) <= 1


def test_first_takes_what_may_be_taken() -> None:
    assert subset.first(10, 3, lambda i: i % 3 == 1).places.tolist() == [1, 4, 7]
    assert subset.first(5, 9, lambda _: True).places.tolist() == [0, 1, 2, 3, 4]


TEXT = "the quick brown fox jumps over the lazy dog and then runs far away into the dark forest"


def test_shingles_are_sets_of_five_words() -> None:
    words = TEXT.split()
    grams = {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
    assert len(shingles(TEXT)) == len(grams)
    assert len(shingles("a b c")) == len(shingles("")) == 1
    changed = " ".join([*words[:-1], "wood"])
    expected = len(grams) - 1
    assert jaccard(shingles(TEXT), shingles(changed)) == pytest.approx(expected / (expected + 2))


def test_normalised_texts_differ_in_words_alone() -> None:
    assert normalised("  Hello,\n WORLD! ") == normalised("hello world") == "hello world"
    assert normalised("hello worlds") != normalised("hello world")


def test_near_duplicates_are_those_above_the_limit() -> None:
    draw = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(400)]
    texts = []
    for _ in range(40):
        words = list(draw.choice(vocabulary, 60))
        texts.append(" ".join(words))
        for place in draw.integers(0, 60, int(draw.integers(0, 4))):
            words[place] = "changed"
        texts.append(" ".join(words))
    limit, kept = 0.75, []
    found = NearDuplicates(limit)
    for text in texts:
        new = all(jaccard(shingles(text), shingles(other)) < limit for other in kept)
        assert found.add(text) == new
        if new:
            kept.append(text)
    assert 40 < len(kept) < 80
