"""Perplexity of the response under the warmed-up target, given its prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from iprox.data.chat import Encoded
from iprox.engine.loss import example_losses
from iprox.models.flops import network_of
from iprox.numerics import flops
from iprox.numerics.flops import Load
from iprox.progress import Track, track
from iprox.scorers import Corpus, Scores, preferred
from iprox.stages.passes import Reader, open_model
from iprox.store.job import Job
from iprox.study.schema import ChatSection, ScorerSection


def score(job: Job, corpus: Corpus) -> Scores:
    """Mean loss over the response's tokens, the log of its perplexity; high, low or middle first.

    An example without a supervised token has no loss and the score -inf.
    """
    section, chat = job.section(ScorerSection, "scorer"), job.section(ChatSection, "chat")
    reader = open_model(job, "warmup")
    found: list[np.ndarray] = []
    counts, lengths = Counter[str](), list[int]()
    with track(len(corpus.ids), "examples", "perplexity") as progress:
        for texts in corpus.encoded(reader.tokenizer, chat):
            found.append(losses(reader, texts.encoded, progress))
            counts.update(texts.counts())
            lengths += [len(e) for e in texts.encoded if e.supervised]
    passed = flops.forward(network_of(reader.model), Load.of(lengths, counts["supervised"]))
    scores = preferred(np.concatenate(found), section.prefer)
    return Scores(corpus.same_for_all(scores), {**counts, "flops": passed})


@torch.no_grad()
def losses(reader: Reader, encoded: Sequence[Encoded], progress: Track) -> np.ndarray:
    """Mean loss of every text over its supervised tokens, (texts,) float64.

    NaN for a text without supervised tokens, which is not passed.
    """
    found = np.full(len(encoded), np.nan)
    kept = [i for i, e in enumerate(encoded) if e.supervised]
    for indices, batch in reader.batches([encoded[i] for i in kept]):
        found[[kept[i] for i in indices]] = example_losses(reader.model, batch).cpu().numpy()
        progress.advance(len(indices), tokens=int(batch.lengths.sum()))
    progress.advance(len(encoded) - len(kept))
    return found
