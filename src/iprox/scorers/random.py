"""Random order, the same for every task: what any selection must beat."""

from __future__ import annotations

from iprox.numerics.influence import random_scores
from iprox.scorers import Corpus, Scores
from iprox.store.job import Job
from iprox.study.schema import ScorerSection


def score(job: Job, corpus: Corpus) -> Scores:
    """Uniform scores that depend on the seed and each example's id alone."""
    seed = job.section(ScorerSection, "scorer").seed
    return Scores(corpus.same_for_all(random_scores(corpus.ids.to_pylist(), seed)))
