"""TF-IDF: cosine of word counts weighted by rarity, candidates against queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from iprox.progress import track
from iprox.scorers import Corpus, OverQueries, Scores, blocks_of
from iprox.store.job import Job
from iprox.study.schema import ScorerSection

QUERY_ROWS = 64
"""Queries compared at once."""


def score(job: Job, corpus: Corpus) -> Scores:
    """Mean or largest cosine to a task's queries; words and weights are those of the pool."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    section = job.section(ScorerSection, "scorer")
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    pool = vectorizer.fit_transform(corpus.candidates(section.text))
    queries = {
        task: vectorizer.transform(texts) for task, texts in corpus.queries(section.text).items()
    }
    by_task = {}
    with track(sum(q.shape[0] for q in queries.values()), "queries", "tfidf") as progress:
        for task, rows in queries.items():
            over = OverQueries(section.over_queries, pool.shape[0])
            for block in blocks_of(range(rows.shape[0]), QUERY_ROWS):
                over.add(cosines(rows[block[0] : block[-1] + 1], pool))
                progress.advance(len(block))
            by_task[task] = over.scores()
    return Scores(by_task, {"words": len(vectorizer.vocabulary_)})


def cosines(queries: Any, pool: Any) -> np.ndarray:
    """Inner products of sparse rows of unit length, (queries, examples)."""
    return np.asarray((queries @ pool.T).toarray())
