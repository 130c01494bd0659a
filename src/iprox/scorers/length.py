"""Length of the response, a strong and cheap baseline (Zhao et al., arXiv:2402.04833)."""

from __future__ import annotations

import numpy as np

from iprox.scorers import Corpus, Scores, preferred
from iprox.store.job import Job
from iprox.study.schema import ScorerSection


def score(job: Job, corpus: Corpus) -> Scores:
    """Characters of the assistant's turns; long, short or middling ones first."""
    prefer = job.section(ScorerSection, "scorer").prefer
    lengths = np.array([len(text) for text in corpus.candidates("response")], dtype=np.float64)
    return Scores(corpus.same_for_all(preferred(lengths, prefer)))
