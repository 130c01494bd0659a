"""Ridge regression: predictions of examples it was not fitted on, and a penalty chosen by them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PENALTIES = np.logspace(-6, 6, 49)
"""Penalties tried, in units of the features' mean square."""


class Linear(NamedTuple):
    """A linear prediction ``features @ weights + intercept``."""

    weights: np.ndarray  # (features,)
    intercept: float


def leave_one_out_ridge(features: np.ndarray, values: np.ndarray) -> tuple[Linear, float]:
    """The ridge regression whose penalty predicts left-out examples best, in closed form.

    With the intercept not penalised, the error of the example i when it is left out is
    ``(y_i - p_i) / (1 - h_i)``, p the predictions of the fit to all and h the diagonal of the
    hat matrix (Allen, Technometrics 1974), so one decomposition serves every penalty.

    Args:
        features: (examples, features).
        values: What is predicted, (examples,).

    Returns:
        The prediction, and the penalty added to the diagonal of the centred products.
    """
    mean, centred = features.mean(0), features - features.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    y = values - values.mean()
    along = u.T @ y
    scale = max(float((centred**2).sum() / centred.shape[1]), np.finfo(float).tiny)
    best = (np.inf, 0.0)
    for penalty in PENALTIES * scale:
        shrink = s**2 / (s**2 + penalty)
        hat = (u**2) @ shrink + 1 / len(y)
        left_out = (y - u @ (shrink * along)) / np.maximum(1 - hat, 1e-12)
        best = min(best, (float((left_out**2).mean()), float(penalty)))
    weights = vt.T @ (s / (s**2 + best[1]) * along)
    return Linear(weights, float(values.mean() - mean @ weights)), best[1]


def cross_validated_ridge(
    features: np.ndarray, values: np.ndarray, folds: int = 5, penalty: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Predictions of every example's value by a fit to the other folds.

    Features are standardised over all examples. Predictions are of the difference from the mean:
    the intercept of a fold is left out, because the mean of the examples outside a fold falls
    where the fold's own values are high, which would correlate predictions of different folds
    negatively with the values even if the features said nothing.

    Args:
        features: (examples, features); a constant feature says nothing.
        values: What is predicted, (examples,).
        folds: Parts that are left out in turn; at most one per example.
        penalty: Added to the diagonal of the sum of the standardised features' products.
        seed: Seed of who is in which fold.

    Returns:
        Predictions, (examples,) float64; all zero when every feature is constant.
    """
    n = len(values)
    centred = features - features.mean(0)
    spread = features.std(0)
    standard = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    fold = np.random.default_rng(seed).permutation(n) % min(folds, n)
    predictions = np.zeros(n)
    for left_out in range(min(folds, n)):
        x, y = standard[fold != left_out], values[fold != left_out]
        x_mean, y_mean = x.mean(0), y.mean()
        moments = (x - x_mean).T @ (x - x_mean) + penalty * np.eye(x.shape[1])
        weights = np.linalg.solve(moments, (x - x_mean).T @ (y - y_mean))
        predictions[fold == left_out] = standard[fold == left_out] @ weights
    return predictions
