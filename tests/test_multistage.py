"""Influence across stages of training, against finite differences and retraining."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from iprox.errors import NumericsError
from iprox.numerics.correlation import spearman
from iprox.numerics.ghost import truncate_queries
from iprox.numerics.kfac import (
    Damping,
    Eigenbasis,
    LayerCurvature,
    add_squared_gradients,
    eigenbasis,
)
from iprox.numerics.multistage import LaterStage, proximity_of, through_stages

NONE = Damping(0.0, "absolute")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(hessian: Tensor) -> LayerCurvature:
    """A Hessian of one row of weights as curvature of a layer with one output."""
    one = torch.ones(1, dtype=torch.float64)
    return LayerCurvature("w", Eigenbasis([one[:, None]], one), eigenbasis([hessian], 1))


def positive(dim: int, seed: int) -> Tensor:
    root = normal(dim, dim + 3, seed=seed)
    return root @ root.mT / dim


def test_two_stages_are_the_derivative_of_training_twice() -> None:
    h_p, h_f, alpha = positive(6, 1), positive(6, 2), 0.7
    centre, target, query, gradient = (normal(6, seed=s) for s in (3, 4, 5, 6))

    def measured(weight: float) -> Tensor:
        pretrained = centre - weight * torch.linalg.solve(h_p, gradient)
        damped = h_f + alpha * torch.eye(6, dtype=h_f.dtype)
        tuned = torch.linalg.solve(damped, h_f @ target + alpha * pretrained)
        return 0.5 * (tuned - query) @ (tuned - query)

    damped = h_f + alpha * torch.eye(6, dtype=h_f.dtype)
    at = torch.linalg.solve(damped, h_f @ target + alpha * centre)
    stage = LaterStage(exactly(h_f), alpha)
    direction = through_stages((at - query)[None, None], [stage], exactly(h_p), NONE)
    score = float(direction[0, 0] @ gradient)
    step = 1e-4
    difference = float(measured(step) - measured(-step)) / (2 * step)
    assert -score == pytest.approx(difference, rel=1e-6)


def test_a_strong_proximity_term_is_influence_at_the_pretrained_model() -> None:
    h_p, h_f, query = positive(6, 1), positive(6, 2), normal(1, 1, 6, seed=5)
    single = through_stages(query, [], exactly(h_p), NONE)
    double = through_stages(query, [LaterStage(exactly(h_f), 1e9)], exactly(h_p), NONE)
    torch.testing.assert_close(double, single, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(single, torch.linalg.solve(h_p, query[0, 0])[None, None])
    weak = through_stages(query, [LaterStage(exactly(h_f), 0.1)], exactly(h_p), NONE)
    assert not torch.allclose(weak, single, rtol=0.1)


def test_stages_are_undone_from_the_newest_to_the_oldest() -> None:
    hessians = [positive(6, seed) for seed in (1, 2, 3)]
    query, eye = normal(1, 1, 6, seed=5), torch.eye(6, dtype=torch.float64)
    stages = [LaterStage(exactly(hessians[2]), 0.3), LaterStage(exactly(hessians[1]), 2.0)]
    found = through_stages(query, stages, exactly(hessians[0]), NONE)[0, 0]
    newest = 0.3 * torch.linalg.solve(hessians[2] + 0.3 * eye, query[0, 0])
    older = 2.0 * torch.linalg.solve(hessians[1] + 2.0 * eye, newest)
    torch.testing.assert_close(found, torch.linalg.solve(hessians[0], older))


def test_leaving_out_the_pretrained_curvature_changes_the_order() -> None:
    h_p = torch.diag(torch.tensor([100.0, 0.1], dtype=torch.float64))
    query = torch.tensor([[[1.0, 0.5]]], dtype=torch.float64)
    candidates = torch.eye(2, dtype=torch.float64)  # one along the stiff axis, one along the soft
    stage = LaterStage(exactly(torch.eye(2, dtype=torch.float64)), 1.0)
    scores = through_stages(query, [stage], exactly(h_p), NONE)[0, 0] @ candidates
    omitted = stage.proximity * stage.curvature.solve(query, Damping(1.0, "absolute"))[0, 0]
    assert scores.argmax() == 1
    assert (omitted @ candidates).argmax() == 0


class Logistic:
    """Logistic pre-training and ridge-proximal fine-tuning by Newton's method."""

    def __init__(self) -> None:
        self.x, self.x_f = normal(40, 4, seed=1), normal(30, 4, seed=2)
        truth = normal(4, seed=3)
        self.y = (torch.sigmoid(self.x @ truth + normal(40, seed=4)) > 0.5).double()
        self.y_f = (torch.sigmoid(self.x_f @ (truth + 0.5)) > 0.5).double()
        self.ridge, self.alpha = 0.05, 0.3

    def pretrained(self, weights: Tensor) -> Tensor:
        return self._newton(self.x, self.y, weights / 40, self.ridge, torch.zeros(4).double())

    def tuned(self, start: Tensor) -> Tensor:
        weights = torch.full((30,), 1 / 30, dtype=torch.float64)
        return self._newton(self.x_f, self.y_f, weights, self.alpha, start)

    def _newton(self, x: Tensor, y: Tensor, weights: Tensor, pull: float, to: Tensor) -> Tensor:
        w = to.clone()
        for _ in range(50):
            p = torch.sigmoid(x @ w)
            slope = x.mT @ (weights * (p - y)) + pull * (w - to)
            hessian = (x * (weights * p * (1 - p))[:, None]).mT @ x + pull * torch.eye(4).double()
            w = w - torch.linalg.solve(hessian, slope)
        return w


def fisher_of(x: Tensor, w: Tensor, corrected: bool) -> LayerCurvature:
    """The exact Fisher matrix of a logistic regression, or EK-FAC's estimate of it."""
    p = torch.sigmoid(x @ w)
    d = (p * (1 - p)).sqrt()[:, None]  # its square is the mean of (p - y)^2 over labels
    if not corrected:
        return exactly((x * d).mT @ (x * d) / len(x))
    grads, inputs = eigenbasis([d.mT @ d], len(x)), eigenbasis([x.mT @ x], len(x))
    total = torch.zeros(1, x.shape[1], dtype=x.dtype)
    add_squared_gradients(total, grads.into(d), inputs.into(x), [1] * len(x))
    return LayerCurvature("w", grads, inputs, corrected=total / len(x))


@pytest.mark.parametrize(("corrected", "least"), [(False, 0.99), (True, 0.9)])
def test_two_stages_foresee_training_without_an_example(corrected: bool, least: float) -> None:
    study = Logistic()
    everyone = torch.ones(40, dtype=torch.float64)
    w_p = study.pretrained(everyone)
    w_f = study.tuned(w_p)
    x_test, y_test = normal(4, seed=9), 1.0

    def loss(w: Tensor) -> float:
        return float(
            nn.functional.binary_cross_entropy_with_logits(
                x_test @ w, torch.tensor(y_test).double()
            )
        )

    query = (torch.sigmoid(x_test @ w_f) - y_test) * x_test
    later = LaterStage(fisher_of(study.x_f, w_f, corrected), study.alpha)
    first = fisher_of(study.x, w_p, corrected)
    damping = Damping(study.ridge, "absolute")
    direction = through_stages(query[None, None], [later], first, damping)[0, 0]
    gradients = (torch.sigmoid(study.x @ w_p) - study.y)[:, None] * study.x
    truth = []
    for left_out in range(40):
        weights = everyone.clone()
        weights[left_out] = 0
        truth.append(loss(study.tuned(study.pretrained(weights))) - loss(w_f))
    found = float(spearman((gradients @ direction).numpy(), torch.tensor(truth).numpy()))
    assert found > least


def test_what_cannot_be_is_refused() -> None:
    stage = LaterStage(exactly(positive(6, 1)), 0.0)
    with pytest.raises(NumericsError, match="proximity"):
        through_stages(normal(1, 1, 6), [stage], exactly(positive(6, 2)), NONE)
    with pytest.raises(NumericsError, match="without steps"):
        proximity_of([])
    assert proximity_of([0.1, 0.3]) == pytest.approx(2.5)


def test_queries_cut_at_full_rank_are_exact() -> None:
    query = normal(2, 1, 6, seed=5)
    direction = through_stages(
        query, [LaterStage(exactly(positive(6, 1)), 0.3)], exactly(positive(6, 2)), NONE
    )
    wide = direction * normal(4, 1, seed=6)  # (queries, out, in) of more than one row
    thin, lost = truncate_queries(wide, 4)
    torch.testing.assert_close(thin.matrices(), wide, rtol=1e-10, atol=1e-12)
    assert float(lost.max()) < 1e-20
