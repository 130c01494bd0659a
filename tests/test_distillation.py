"""Influcoder's loss and measures against their definitions (arXiv:2606.13668)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.distillation import (
    aggregated,
    distillation_loss,
    draw_block,
    hard_pool,
    per_anchor,
)


def block(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores, labels = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    return scores, labels


def obvious(scores: Tensor, labels: Tensor, alpha: float, temperature: float) -> float:
    """The definition, entry by entry."""
    r = stats.pearsonr(scores.flatten(), labels.flatten()).statistic
    kls = []
    for s, y in zip(scores.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in y]
        q = [math.exp(v / temperature) for v in s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return alpha * (1 - r) + (1 - alpha) * sum(kls) / len(kls)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_loss_is_its_definition(alpha: float) -> None:
    scores, labels = block()
    found = distillation_loss(scores, labels, alpha, 0.5)
    assert float(found.total) == pytest.approx(obvious(scores, labels, alpha, 0.5), abs=1e-12)


def test_a_rising_line_has_no_correlation_loss() -> None:
    _, labels = block()
    found = distillation_loss(3 * labels + 2, labels, 0.5, 1.0)
    assert float(found.pearson) == pytest.approx(0, abs=1e-12)
    assert float(found.kl) > 0.1


def test_equal_scores_have_no_loss() -> None:
    _, labels = block()
    found = distillation_loss(labels, labels, 0.5, 0.05)
    assert float(found.total) == pytest.approx(0, abs=1e-12)


def test_falling_scores_have_the_most_correlation_loss() -> None:
    _, labels = block()
    found = distillation_loss(-labels, labels, 1.0, 0.05)
    assert float(found.total) == pytest.approx(2, abs=1e-12)


def test_the_gradient_is_numeric() -> None:
    scores, labels = block()
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, labels, 0.3, 0.5).total, scores.requires_grad_()
    )


def test_the_order_of_queries_and_candidates_is_indifferent() -> None:
    scores, labels = block()
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0, 3, 2])
    one = distillation_loss(scores, labels, 0.5, 0.05)
    two = distillation_loss(scores[rows][:, columns], labels[rows][:, columns], 0.5, 0.05)
    assert float(one.total) == pytest.approx(float(two.total), abs=1e-12)


def test_constant_labels_are_refused() -> None:
    scores, _ = block()
    with pytest.raises(NumericsError, match="nothing to learn"):
        distillation_loss(scores, torch.full_like(scores, 0.2), 0.5, 0.05)


def test_equal_scores_of_an_encoder_still_have_a_gradient() -> None:
    _, labels = block()
    scores = torch.full_like(labels, 0.1).requires_grad_()
    distillation_loss(scores, labels, 0.5, 0.05).kl.backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad.abs().sum() > 0


SCORES = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1]])
LABELS = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [3, 1, 2, 2]])


def test_per_anchor_is_the_mean_over_queries() -> None:
    """Rows of 1, of -1, and a constant one that counts 0."""
    assert per_anchor(SCORES, LABELS) == pytest.approx(0)
    assert per_anchor(SCORES[:1], LABELS[:1]) == pytest.approx(1)
    assert per_anchor(SCORES[1:], LABELS[1:]) == pytest.approx(-0.5)


def test_ties_share_their_rank() -> None:
    a, b = np.array([[1.0, 1, 2, 3]]), np.array([[1.0, 2, 3, 3]])
    assert per_anchor(a, b) == pytest.approx(stats.spearmanr(a[0], b[0]).statistic)


def test_aggregated_correlates_the_means() -> None:
    """Means 2, 2, 2, 2 of the scores are constant and count 0; of the first two rows too."""
    assert aggregated(SCORES, LABELS) == 0
    means = SCORES[[0, 2]].mean(0), LABELS[[0, 2]].mean(0)
    expected = stats.spearmanr(*means).statistic
    assert aggregated(SCORES[[0, 2]], LABELS[[0, 2]]) == pytest.approx(expected)


def test_the_hard_pool_holds_each_querys_best() -> None:
    labels = np.array([[9.0, 1, 2, 8, 0, 3], [0, 7, 1, 2, 9, 3]])
    assert hard_pool(labels, 2).tolist() == [0, 1, 3, 4]
    assert hard_pool(labels, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_a_block_has_its_share_of_hard_candidates(ratio: float) -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(size=(6, 40))
    fresh = draw.permutation(40)[:8]
    queries = np.array([1, 4])
    found = draw_block(labels, queries, fresh, ratio, draw)
    assert len(set(found.tolist())) == len(found) == 8
    hard = hard_pool(labels[queries], int(8 * ratio)) if ratio else np.zeros(0, int)
    assert np.isin(found[: int(8 * ratio)], hard).all()
    assert set(found[int(8 * ratio) :].tolist()) <= set(fresh.tolist())
