"""Stage ``head``: a linear function of text embeddings that predicts a teacher's scores.

The Influence Scorer of MATES (arXiv:2406.06046) as IProX (arXiv:2602.17835) compares with it: a
frozen encoder, its mean-pooled states, and a regression head for each task, fitted to the scores
that the run's scoring model gives the examples of the ``teach`` split.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from iprox.data.leaks import Group, refuse_overlap
from iprox.errors import NumericsError
from iprox.numerics.correlation import bootstrap, interval, spearman
from iprox.numerics.regression import Linear, leave_one_out_ridge
from iprox.stages.feature_store import QuerySketches, open_features, open_scored, restrict
from iprox.stages.query_rows import write_rows
from iprox.store.arrays import open_store
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import InfluenceSection, ScorerSection

log = logging.getLogger(__name__)

LR, WEIGHT_DECAY, EPOCHS, BATCH = 1e-5, 1e-2, 5, 8
"""Adam's settings in IProX's comparison with MATES; the batch is not stated there."""

RESAMPLES = 1000


def make(job: Job) -> Metrics:
    """Write ``rows.zarr``, the weights as the one row of the task, and ``quality.parquet``.

    Labels are standardised; the intercept, which changes no order, is left out of the row.
    ``quality.parquet`` has the columns ``task, examples, value, low, high, n``: rank correlation
    with the teacher's scores of the examples ``taught`` and of the ``heldout`` fidelity slice.

    Returns:
        Counts, the penalty (ridge) and the held-out rank correlation.

    Raises:
        ArtifactError: The teacher's features are of other settings.
        DataError: The splits overlap.
        NumericsError: All labels are equal, or none can be used.
    """
    section = job.section(ScorerSection, "scorer")
    task = job.params["task"]["name"]
    taught, heldout = (labels(job, role, task) for role in ("teach", "heldout"))
    refuse_overlap(
        Group("labelled examples", list(taught), list(taught)),
        Group("held-out examples", list(heldout), list(heldout)),
    )
    x, about = embedded(job.parents["embeddings"], list(taught))
    held_x, _ = embedded(job.parents["embeddings"], list(heldout))
    y, held_y = (np.array(list(found.values())) for found in (taught, heldout))
    _check(y, task)
    standard = (y - y.mean()) / y.std()
    linear, penalty = fit(x, standard, section.fit, section.seed)
    write_rows(job.out, linear.weights[None], [task], [task], about)
    rows = [
        _quality(task, "taught", x @ linear.weights, y),
        _quality(task, "heldout", held_x @ linear.weights, held_y),
    ]
    write_table(job.out / "quality.parquet", pd.DataFrame(rows), {"fit": section.fit})
    return {
        "examples": len(y),
        "examples_heldout": len(held_y),
        "penalty": penalty,
        "spearman_taught": rows[0]["value"],
        "spearman_heldout": rows[1]["value"],
    }


def labels(job: Job, role: str, task: str) -> dict[str, float]:
    """The teacher's scores for a task, by example; those it cannot score are left out."""
    found = open_scored(job, role, "query").read()
    scores = found.scores(job.section(InfluenceSection, "influence").score)[task]
    usable = np.isfinite(scores)
    if not usable.all():
        log.warning("%d of %d examples cannot be scored", int((~usable).sum()), len(usable))
    ids = found.example_id.to_pylist()
    return {i: float(s) for i, s, ok in zip(ids, scores, usable, strict=True) if ok}


def embedded(folder: Path, ids: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Embeddings of some pool examples in ascending order of ids, and the encoder's settings.

    Returns:
        (examples, dim) float64, and what rows compared with embeddings must agree with.

    Raises:
        ArtifactError: An example has none.
    """
    shard = open_store(sorted(folder.glob("shard-*.zarr"))[0])
    about = dict(shard.attrs)
    dim = int(about["dim"])
    each = QuerySketches([str(i) for i in range(dim)], np.eye(dim, dtype=np.float32), about)
    return restrict(open_features(folder, each).read(), ids).dots, about


def fit(x: np.ndarray, y: np.ndarray, how: str, seed: int) -> tuple[Linear, float]:
    """A linear function of embeddings, and the penalty it was found with.

    Args:
        x: Embeddings, (examples, dim).
        y: Labels, (examples,).
        how: ``ridge`` in closed form, the penalty by leaving one out; or ``adam``, as published.
        seed: Of Adam's initial weights and order.
    """
    if how == "ridge":
        return leave_one_out_ridge(x, y)
    generator = torch.Generator().manual_seed(seed)
    inputs, wanted = torch.from_numpy(x), torch.from_numpy(y)
    bound = x.shape[1] ** -0.5  # as nn.Linear is initialised
    weights = (2 * torch.rand(x.shape[1], generator=generator, dtype=inputs.dtype) - 1) * bound
    intercept = torch.zeros(1, dtype=inputs.dtype)
    parameters = [weights.requires_grad_(), intercept.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = (inputs[rows] @ weights + intercept - wanted[rows]).square().mean()
            loss.backward()
            optimizer.step()
    return Linear(weights.detach().numpy(), float(intercept.detach())), WEIGHT_DECAY


def _quality(task: str, name: str, ours: np.ndarray, teachers: np.ndarray) -> dict[str, Any]:
    low, high = interval(bootstrap(spearman, ours, teachers, RESAMPLES, seed=0))
    value = float(spearman(ours, teachers))
    return {"task": task, "examples": name, "value": value, "low": low, "high": high} | {
        "n": len(ours)
    }


def _check(values: np.ndarray, task: str) -> None:
    """Refuse labels that tell no example from another.

    Raises:
        NumericsError: They are all equal, or there are none.
    """
    if len(values) == 0 or values.min() == values.max():
        raise NumericsError(
            "the teacher's scores are all equal: there is nothing to learn",
            where=f"task {task}",
            value=f"{len(values)} labelled examples",
            fix="raise split.teach, or look at the teacher's features",
        )
