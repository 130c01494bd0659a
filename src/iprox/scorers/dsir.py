"""DSIR: importance of a candidate's n-grams for a task (Xie et al., arXiv:2302.03169).

Texts are bags of words and pairs of words, hashed into buckets. A candidate's weight is the
ratio of its probability under the task's bag and under the pool's; the ranking is a draw in
proportion to the weights, as in the paper, or by the weights themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iprox.numerics.influence import random_scores
from iprox.numerics.ngrams import gumbel, log_ratio, log_weights
from iprox.progress import track
from iprox.scorers import Corpus, Scores
from iprox.store.job import Job
from iprox.study.schema import ScorerSection

WORDS = r"\w+|[^\w\s]+"
"""Words, and runs of punctuation, are the units that n-grams are made of."""


def score(job: Job, corpus: Corpus) -> Scores:
    """Log importance weights, with Gumbel noise where the ranking is to be a draw."""
    section = job.section(ScorerSection, "scorer")
    pool = ngrams(corpus.candidates(section.text), section.buckets)
    in_pool = np.asarray(pool.sum(axis=0)).ravel()
    noise = np.zeros(len(corpus.ids))
    if section.resample:
        noise = gumbel(random_scores(corpus.ids.to_pylist(), section.seed))
    by_task = {}
    queries = corpus.queries(section.text)
    with track(len(queries), "tasks", "dsir") as progress:
        for task, texts in queries.items():
            wanted = np.asarray(ngrams(texts, section.buckets).sum(axis=0)).ravel()
            by_task[task] = log_weights(pool, log_ratio(wanted, in_pool)) + noise
            progress.advance(1)
    return Scores(by_task, {"ngrams": int(in_pool.sum())})


def ngrams(texts: Any, buckets: int) -> Any:
    """Counts of hashed words and pairs of words, sparse (texts, buckets)."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        token_pattern=WORDS,
        ngram_range=(1, 2),
        n_features=buckets,
        alternate_sign=False,
        norm=None,
    )
    return hashing.transform(texts)
