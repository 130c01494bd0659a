"""bergson: scores on the fly against gradients held in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from bergson import GradientProcessor, IndexConfig, Scorer, collect_gradients
from bergson.data import allocate_batches
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset

from bench.problem import Answer, Problem, Scoring

PACKAGE = "bergson"
READS_QUERIES = False
DIFFERS = "exact; its own batches of 2,048 padded tokens; head at every position"


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """``collect_gradients`` with a ``Scorer`` that divides by the example's norm."""
    logging.disable(logging.WARNING)
    # as its own loader does: all frozen but the input embedding, so that there is a graph
    model = problem.model
    model.get_input_embeddings().requires_grad_(True)
    prefix = model.base_model_prefix + "."
    queries = {n.removeprefix(prefix): g.flatten(1) for n, g in problem.gradients.items()}
    lengths = [len(e) for e in problem.pool]
    data = Dataset.from_dict(
        {
            "input_ids": [e.input_ids for e in problem.pool],
            "labels": [e.labels for e in problem.pool],
            "length": lengths,
        }
    )

    def run() -> Answer:
        config = IndexConfig(
            run_path=str(scratch / "scores"), projection_dim=0, loss_reduction="mean"
        )
        Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)
        writer = InMemorySequenceScoreWriter(len(data), len(problem.queries))
        collect_gradients(
            model,
            data,
            GradientProcessor(projection_dim=None),
            config,
            batches=allocate_batches(lengths, config.token_batch_size),
            target_modules=set(queries),
            scorer=Scorer(
                queries,
                list(queries),
                writer,
                torch.device("cpu"),
                torch.float32,
                unit_normalize=True,
            ),
        )
        return Answer(writer.scores, torch.ones(len(data)))

    return run
