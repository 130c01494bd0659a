"""RepSim: cosine of hidden states of the warmed-up target, candidates against queries.

The last layer's states, at the last token (the RDS of LESS, arXiv:2402.04333) or as a mean
weighted by position (RDS+, arXiv:2503.01807).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from iprox.data.chat import Encoded
from iprox.engine.loss import hidden_states
from iprox.models.flops import network_of
from iprox.numerics import flops
from iprox.numerics.flops import Load
from iprox.numerics.pooling import POOLINGS
from iprox.progress import Track, track
from iprox.scorers import Corpus, OverQueries, Scores
from iprox.stages.passes import Reader, open_model
from iprox.stages.texts import query_texts
from iprox.store.job import Job
from iprox.study.schema import ChatSection, ScorerSection


def score(job: Job, corpus: Corpus) -> Scores:
    """Mean or largest cosine to a task's queries."""
    section, chat = job.section(ScorerSection, "scorer"), job.section(ChatSection, "chat")
    reader = open_model(job, "warmup")
    asked = {
        task: query_texts(folder, reader.tokenizer, chat).encoded
        for task, folder in job.roles("task").items()
    }
    parts: dict[str, list[np.ndarray]] = {task: [] for task in asked}
    counts, lengths = Counter[str](), [len(e) for texts in asked.values() for e in texts]
    with track(len(corpus.ids) + len(lengths), "examples", "repsim") as progress:
        queries = {
            task: representations(reader, encoded, section.pooling, progress)
            for task, encoded in asked.items()
        }
        for texts in corpus.encoded(reader.tokenizer, chat):
            rows = representations(reader, texts.encoded, section.pooling, progress)
            for task, directions in queries.items():
                over = OverQueries(section.over_queries, len(rows))
                over.add((directions @ rows.T).numpy())
                parts[task].append(over.scores())
            counts.update(texts.counts())
            lengths += map(len, texts.encoded)
    passed = flops.forward(network_of(reader.model), Load.of(lengths, 0), logits=0)
    by_task = {task: np.concatenate(found) for task, found in parts.items()}
    return Scores(by_task, {**counts, "flops": passed})


@torch.no_grad()
def representations(
    reader: Reader, encoded: list[Encoded], pooling: str, progress: Track
) -> Tensor:
    """Pooled last hidden states of texts at unit length, (texts, hidden) float32, on the CPU."""
    rows = torch.empty(len(encoded), reader.model.get_input_embeddings().weight.shape[1])
    for indices, batch in reader.batches(encoded):
        states = hidden_states(reader.model, batch).float()
        pooled = POOLINGS[pooling](states, batch.lengths)
        rows[indices] = torch.nn.functional.normalize(pooled, dim=-1).cpu()
        progress.advance(len(indices), tokens=int(batch.lengths.sum()))
    return rows
