"""Scores from a row for every example and a row for every query, sketches or embeddings."""

from __future__ import annotations

import numpy as np

from iprox.errors import ArtifactError
from iprox.scorers import Corpus, Scores
from iprox.stages.feature_store import open_scored
from iprox.store.job import Job


def mean_cosines(job: Job, corpus: Corpus) -> Scores:
    """Mean cosines of every example to a task's queries, read block by block.

    Args:
        job: Has the parents ``features`` and ``query/<task>``, and ``influence.val_agg``.
        corpus: The pool.

    Raises:
        ArtifactError: The rows are of other settings, or of another pool.
    """
    parts: dict[str, list[np.ndarray]] = {}
    examples = 0
    for block in open_scored(job, "features", "query").blocks():
        if not block.example_id.equals(corpus.ids.slice(examples, len(block.example_id))):
            raise ArtifactError(
                "the features are of other examples than the pool's",
                where=job.parents["features"],
                fix="delete this artifact's folder and run Snakemake again",
            )
        examples += len(block.example_id)
        for task, scores in block.scores("cosine").items():
            parts.setdefault(task, []).append(scores)
    if examples != len(corpus.ids):
        raise ArtifactError(
            "the features lack examples of the pool", value=f"{examples} of {len(corpus.ids)}"
        )
    return Scores({task: np.concatenate(found) for task, found in parts.items()})
