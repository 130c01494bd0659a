"""Regression: a linear function of an example's text embedding, fitted to a teacher's scores.

The Influence Scorer of MATES (arXiv:2406.06046), with a frozen encoder and a head for each task.
"""

from __future__ import annotations

from iprox.scorers import Corpus, Scores
from iprox.scorers.rows import mean_cosines
from iprox.store.job import Job


def score(job: Job, corpus: Corpus) -> Scores:
    """Predictions, less each task's intercept; a task has one row, its weights."""
    return mean_cosines(job, corpus)
