"""This project's exact scorer, as the features stage runs it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from bench.problem import Answer, Problem, Scoring
from iprox.engine.loss import Batch
from iprox.engine.scoring import Scorer
from iprox.models.device import pick_device
from iprox.stages.passes import Reader
from iprox.store.mapped import MappedTensors


def prepare(
    problem: Problem,
    query_rank: int = 0,
    query_dtype: torch.dtype = torch.float32,
    on_disk: bool = False,
) -> Scoring:
    """Scores of the pool in the stages' batches; exact unless queries are cut or rounded."""
    scorer = Scorer(
        problem.model,
        dict(problem.layers),
        problem.gradients,
        query_rank=query_rank,
        query_dtype=query_dtype,
        home=MappedTensors() if on_disk else None,
    )
    batches = batched(problem)

    def run() -> Answer:
        dots = torch.empty(len(problem.pool), len(problem.queries), dtype=torch.float64)
        squares = torch.empty(len(problem.pool), dtype=torch.float64)
        for indices, batch in batches:
            scores = scorer.score(batch)
            dots[indices], squares[indices] = scores.dots, scores.squared_norms
        return Answer(dots, squares.sqrt())

    return run


def batched(problem: Problem) -> Sequence[tuple[list[int], Batch]]:
    """The pool in the batches of the stages, each with its examples' places in the pool."""
    tokenizer = SimpleNamespace(pad_token_id=problem.pad_id, eos_token_id=problem.pad_id)
    reader = Reader(problem.model, tokenizer, dict(problem.layers), pick_device())
    return list(reader.batches(problem.pool))
