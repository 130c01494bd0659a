"""Scores from a row for every example and a row for every query, sketches or embeddings."""

from __future__ import annotations

from iprox.errors import ArtifactError
from iprox.scorers import Corpus, Scores
from iprox.stages.ranking import open_checkpoints, score_all
from iprox.store.job import Job


def mean_cosines(job: Job, corpus: Corpus) -> Scores:
    """Mean cosines of every example to a task's queries, summed over checkpoints if there are some.

    Args:
        job: Has the parents ``features`` and ``query/<task>``, and ``influence.val_agg``.
        corpus: The pool.

    Raises:
        ArtifactError: The rows are of other settings, or of another pool.
    """
    ids, scores = score_all(open_checkpoints(job), "cosine")
    if not ids.equals(corpus.ids):
        raise ArtifactError(
            "the features are of other examples than the pool's",
            where=job.parents["features"],
            value=f"{len(ids)} examples, where the pool has {len(corpus.ids)}",
            fix="delete this artifact's folder and run Snakemake again",
        )
    return Scores(scores)
