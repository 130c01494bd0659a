"""Influcoder: mean cosine of an example's text embedding to those of a task's queries.

With an encoder that has learnt a teacher's influence (arXiv:2606.13668); with an untaught one it
is plain similarity of sentence embeddings.
"""

from __future__ import annotations

from iprox.scorers import Corpus, Scores
from iprox.scorers.rows import mean_cosines
from iprox.store.job import Job


def score(job: Job, corpus: Corpus) -> Scores:
    """Mean over a task's queries or, for ``subtask_max``, the best mean over a subtask's."""
    return mean_cosines(job, corpus)
