"""LESS: mean cosine of an example's Adam direction to the gradients of a task's queries.

arXiv:2402.04333. Directions and gradients are randomly projected; the mean is taken within each
subtask, summed over checkpoints by their learning rates where influence is, and the largest of the
subtasks counts.
"""

from __future__ import annotations

from iprox.scorers import Corpus, Scores
from iprox.scorers.rows import mean_cosines
from iprox.store.job import Job


def score(job: Job, corpus: Corpus) -> Scores:
    """The best of the subtasks' mean cosines."""
    return mean_cosines(job, corpus)
