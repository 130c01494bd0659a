"""Stage ``ranking``: every pool example's score and rank for every task."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd

from iprox.numerics.influence import descending, random_scores
from iprox.stages.features import read_features
from iprox.stages.texts import pool_ids
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import InfluenceSection, ScorerSection

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``ranking.parquet``: ``task, rank, example_id, score``, sorted by task and rank.

    Rank 1 is the most useful example. Scores are float32 and equal ones are ranked by
    ``example_id``. An example without supervised tokens or, by cosine, without a gradient has
    the score -inf and ranks last.

    Returns:
        Number of examples and tasks, and of examples that could not be scored.

    Raises:
        ArtifactError: The features are of other tasks, or incomplete.
    """
    scorer = job.section(ScorerSection, "scorer")
    settings: dict[str, Any] = {"scorer": scorer.kind}
    if scorer.kind == "random":
        ids = np.array(pool_ids(job.parents["pool"]), dtype=str)
        drawn = random_scores(list(ids), scorer.seed).astype(np.float32)
        scores = dict.fromkeys(sorted(job.params["tasks"]), drawn)
        settings |= {"seed": scorer.seed}
    else:
        section = job.section(InfluenceSection, "influence")
        features = read_features(job.parents["features"])
        ids, scores = features.example_id, features.scores(section.score)
        settings |= {"influence": section.model_dump()}
    counts: Metrics = {
        "examples": len(ids),
        "tasks": len(scores),
        "unscorable": int(np.isneginf(next(iter(scores.values()))).sum()),
    }
    if counts["unscorable"]:
        log.warning(
            "%d of %d examples have no gradient and rank last", counts["unscorable"], len(ids)
        )
    write_table(job.out / "ranking.parquet", rank(scores, ids), {**settings, **counts})
    return counts


def rank(scores: dict[str, np.ndarray], ids: np.ndarray) -> pd.DataFrame:
    """Rows ``task, rank, example_id, score`` from each task's scores (examples,)."""
    tables = []
    for task in sorted(scores):
        order = descending(scores[task], ids)
        tables.append(
            pd.DataFrame(
                {
                    "task": task,
                    "rank": np.arange(1, len(order) + 1),
                    "example_id": ids[order],
                    "score": scores[task][order],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
