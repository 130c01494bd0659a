"""Stage ``fidelity``: how well a proxy's scores agree with the target's on the same examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from iprox.errors import ArtifactError, NumericsError
from iprox.numerics.correlation import (
    Measure,
    bootstrap,
    interval,
    kendall,
    pearson,
    spearman,
    top_overlap,
)
from iprox.stages.feature_store import Features, open_scored, restrict
from iprox.stages.texts import split_ids
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import FidelitySection, InfluenceSection

log = logging.getLogger(__name__)

MEAN = "mean"


def make(job: Job) -> Metrics:
    """Write ``fidelity.parquet``: ``task, metric, value, low, high, n``.

    Metrics are ``spearman``, ``kendall``, ``pearson`` and ``top_<percent>`` (shared part of the
    best examples); the task ``mean`` is their mean over tasks, and has the rows
    ``loss_mean_proxy``, ``loss_mean_target`` and ``loss_retention`` (target's loss over the
    proxy's) besides. ``low`` and ``high`` bound the 95 % bootstrap interval over examples.

    Returns:
        Number of examples compared and left out, and each metric's mean over tasks.

    Raises:
        ArtifactError: The two passes are of different examples or tasks.
        NumericsError: Fewer than two examples can be scored, or scores are constant.
    """
    section = job.section(FidelitySection, "fidelity")
    score = job.section(InfluenceSection, "influence").score
    proxy, target = (open_scored(job, r, f"{r}_query").read() for r in ("proxy", "target"))
    if "split" in job.parents:
        ids = split_ids(job.parents["split"], "fidelity")
        proxy, target = restrict(proxy, ids), restrict(target, ids)
    _check_same(proxy, target)
    pairs, scorable = score_pairs(proxy, target, score)
    rows = agreement(pairs, section) + losses(proxy, target, scorable, section)
    table = pd.DataFrame(rows)
    n_left_out = int((~scorable).sum())
    if n_left_out:
        log.warning("%d of %d examples cannot be scored", n_left_out, len(scorable))
    counts = {"examples": int(scorable.sum()), "left_out": n_left_out}
    write_table(job.out / "fidelity.parquet", table, {**counts, "score": score})
    means = table[table["task"] == MEAN]
    return {**counts, **dict(zip(means["metric"], means["value"].tolist(), strict=True))}


def score_pairs(
    proxy: Features, target: Features, score: str
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Scores of both models by task, for the examples that both can score.

    Returns:
        Task -> (proxy's scores, target's scores), and the mask (examples,) of who is in them.

    Raises:
        NumericsError: Fewer than two examples can be scored.
    """
    ours, theirs = proxy.scores(score), target.scores(score)
    scorable = np.ones(len(proxy.example_id), dtype=bool)
    for scores in (*ours.values(), *theirs.values()):
        scorable &= np.isfinite(scores)
    if scorable.sum() < 2:
        raise NumericsError(
            "agreement needs at least two examples that both models can score",
            where="split.fidelity",
            value=int(scorable.sum()),
        )
    return {t: (ours[t][scorable], theirs[t][scorable]) for t in ours}, scorable


def measures(section: FidelitySection) -> dict[str, Measure]:
    """All measures of agreement by the name they have in the table."""
    tops = {f"top_{100 * share:g}%": top_overlap(share) for share in section.top}
    return {"spearman": spearman, "kendall": kendall, "pearson": pearson, **tops}


def agreement(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of all measures for each task and for the mean over tasks.

    All tasks are resampled together, so that the interval of the mean is of one and the same
    draw of examples.

    Raises:
        NumericsError: A measure is undefined because all scores of a model are equal.
    """
    rows = []
    for metric, measure in measures(section).items():
        values, draws = [], []
        for task, (ours, theirs) in pairs.items():
            value = float(measure(ours.astype(np.float64), theirs.astype(np.float64)))
            if np.isnan(value):
                raise NumericsError(
                    "agreement is undefined: all scores of a model are equal",
                    where=f"task {task}, {metric}",
                )
            draw = bootstrap(measure, ours, theirs, section.bootstrap, section.seed)
            rows.append(_row(task, metric, value, draw, len(ours)))
            values.append(value)
            draws.append(draw)
        n = len(next(iter(pairs.values()))[0])
        rows.append(_row(MEAN, metric, float(np.mean(values)), np.mean(draws, axis=0), n))
    return rows


def losses(
    proxy: Features, target: Features, scorable: np.ndarray, section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of both models' mean losses, and of the share of the target's that the proxy keeps."""
    ours, theirs = proxy.loss[scorable], target.loss[scorable]
    wanted: dict[str, Measure] = {
        "loss_mean_proxy": lambda a, b: a.mean(-1),
        "loss_mean_target": lambda a, b: b.mean(-1),
        "loss_retention": lambda a, b: b.mean(-1) / a.mean(-1),
    }
    return [
        _row(
            MEAN,
            metric,
            float(measure(ours, theirs)),
            bootstrap(measure, ours, theirs, section.bootstrap, section.seed),
            len(ours),
        )
        for metric, measure in wanted.items()
    ]


def _row(task: str, metric: str, value: float, draws: np.ndarray, n: int) -> dict[str, Any]:
    low, high = interval(draws)
    return {"task": task, "metric": metric, "value": value, "low": low, "high": high, "n": n}


def _check_same(proxy: Features, target: Features) -> None:
    """Refuse to compare passes over different examples or tasks."""
    for what, ours, theirs in (
        ("examples", proxy.example_id.tolist(), target.example_id.tolist()),
        ("tasks", proxy.columns, target.columns),
    ):
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs))
            raise ArtifactError(
                f"the proxy's and the target's features are of different {what}",
                value=odd[:3],
                fix="make both with the same pool, split and queries",
            )
