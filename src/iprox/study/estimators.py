"""What can be done to query gradients before the pool is scored against them, each by name."""

from __future__ import annotations

ESTIMATORS: dict[str, tuple[str, ...]] = {
    "tracin": (),
    "kfac": ("curvature",),
    "ekfac": ("curvature", "eigenvalues"),
    "datainf": ("model", "pool", "split"),
}
"""Estimator -> what it reads besides a query. ``curvature`` and ``eigenvalues`` are the stages of
these names; ``model``, ``pool`` and ``split`` are the scoring model and the fisher split of the
pool, for an estimator that passes examples itself. What reads nothing leaves queries as they are;
every other one is the function ``preconditioner`` of ``iprox.estimators.<name>``."""
