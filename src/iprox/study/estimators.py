"""What can be done to query gradients before the pool is scored against them, each by name."""

from __future__ import annotations

ESTIMATORS: dict[str, tuple[str, ...]] = {
    "tracin": (),
    "graddot": (),
    "kfac": ("curvature",),
    "ekfac": ("curvature", "eigenvalues"),
    "datainf": ("model", "pool", "split"),
    "multistage": (
        "curvature",
        "eigenvalues",
        "finetuned",
        "finetuned_curvature",
        "finetuned_eigenvalues",
    ),
}
"""Estimator -> what it reads besides a query. ``curvature`` and ``eigenvalues`` are the stages of
these names; ``model``, ``pool`` and ``split`` are the scoring model and the fisher split of the
pool, for an estimator that passes examples itself; ``finetuned`` is the model of the section of
this name, at which queries are then measured, with a curvature of its own. What reads nothing
leaves queries as they are (``graddot`` is ``tracin`` by dot product); every other one is the
function ``preconditioner`` of ``iprox.estimators.<name>``."""
