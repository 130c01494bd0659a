"""IFD, instruction-following difficulty: how little the prompt helps with the response.

``loss(response | prompt) / loss(response)`` under the warmed-up target (Li et al.,
arXiv:2308.12032). Near 1 the prompt does not help; above 1 it misleads, and the paper leaves such
examples out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from iprox.data.chat import IGNORED, Encoded
from iprox.models.flops import network_of
from iprox.numerics import flops
from iprox.numerics.flops import Load
from iprox.progress import track
from iprox.scorers import Corpus, Scores, preferred
from iprox.scorers.perplexity import losses
from iprox.stages.passes import open_model
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, ScorerSection


def score(job: Job, corpus: Corpus) -> Scores:
    """Ratio of the last response's losses with and without what stands before it.

    An example without a supervised token, or with a ratio above 1, has the score -inf.
    """
    section, chat = job.section(ScorerSection, "scorer"), job.section(ChatSection, "chat")
    reader = open_model(job, "warmup")
    ratios: list[np.ndarray] = []
    counts, lengths, supervised = Counter[str](), list[int](), 0
    with track(2 * len(corpus.ids), "examples", "ifd") as progress:
        for texts in corpus.encoded(reader.tokenizer, chat):
            asked = [last_response(e) for e in texts.encoded]
            alone = [without_prompt(e) for e in asked]
            ratios.append(losses(reader, asked, progress) / losses(reader, alone, progress))
            counts.update(texts.counts())
            lengths += [len(e) for e in asked + alone if e.supervised]
            supervised += sum(e.supervised for e in asked + alone)
    passed = flops.forward(network_of(reader.model), Load.of(lengths, supervised))
    ratio = np.concatenate(ratios)
    misled = ratio > 1
    scores = preferred(np.where(misled, np.nan, ratio), section.prefer)
    counted: Metrics = {**counts, "misled": int(misled.sum()), "flops": passed}
    return Scores(corpus.same_for_all(scores), counted)


def last_response(encoded: Encoded) -> Encoded:
    """The same tokens with a loss on the last supervised run of them alone."""
    start = _start(encoded)
    labels = [IGNORED] * start + encoded.labels[start:]
    return replace(encoded, labels=labels)


def without_prompt(encoded: Encoded) -> Encoded:
    """The last response behind the one token before it, so that the same tokens have a loss."""
    cut = max(0, _start(encoded) - 1)
    labels = [IGNORED, *encoded.labels[cut + 1 :]]
    return replace(encoded, input_ids=encoded.input_ids[cut:], labels=labels)


def _start(encoded: Encoded) -> int:
    """Place of the first token of the last supervised run; the end where there is none."""
    start = len(encoded.labels)
    for place in reversed(range(len(encoded.labels))):
        if encoded.labels[place] != IGNORED:
            start = place
        elif start < len(encoded.labels):
            break
    return start
