"""BM25: how well each candidate answers the queries as searches (Robertson and Zaragoza, 2009)."""

from __future__ import annotations

import numpy as np

from iprox.progress import track
from iprox.scorers import Corpus, OverQueries, Scores
from iprox.store.job import Job
from iprox.study.schema import ScorerSection

K1, B = 1.5, 0.75
"""Saturation of repeated words, and how far long texts are penalised: the usual values."""


def score(job: Job, corpus: Corpus) -> Scores:
    """Mean or largest BM25 score over a task's queries, each a search in the pool."""
    import bm25s

    section = job.section(ScorerSection, "scorer")
    words = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25(k1=K1, b=B)
    tokens = bm25s.tokenize(list(corpus.candidates(section.text)), **words)
    index.index(tokens, show_progress=False)
    queries = corpus.queries(section.text)
    by_task = {}
    with track(sum(map(len, queries.values())), "queries", "bm25") as progress:
        for task, texts in queries.items():
            over = OverQueries(section.over_queries, len(corpus.ids))
            for asked in bm25s.tokenize(texts, return_ids=False, **words):
                over.add(np.atleast_2d(index.get_scores(asked)))
                progress.advance(1)
            by_task[task] = over.scores()
    return Scores(by_task, {"words": len(index.vocab_dict)})
