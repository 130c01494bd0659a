"""Ridge regression whose predictions are of examples it was not fitted on."""

from __future__ import annotations

import numpy as np


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
