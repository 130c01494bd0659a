"""dattri: LoGra, inner products of gradients projected on both sides of every layer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dattri.algorithm import LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader

from bench.problem import Answer, Problem, Scoring, batch_of
from iprox.data.chat import Encoded
from iprox.engine.loss import Batch, example_losses

PACKAGE = "dattri"
READS_QUERIES = True
DIFFERS = (
    "a sketch: its LoGra with the identity as Hessian and its default of 64 x 64 projections per "
    "layer, one text at a time. Its exact TracIn flattens all weights into one vector, whose every "
    "slice gets a gradient of full size: three texts took more than 160 s"
)


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """``LoGraAttributor``: ``cache`` the pool, then ``attribute`` the queries."""
    logging.disable(logging.WARNING)
    model = problem.model
    model.get_input_embeddings().requires_grad_(True)  # so that there is a graph

    def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        whole = torch.full((len(ids),), ids.shape[1])  # causal: padding at the right needs no mask
        return example_losses(model, Batch(ids, labels, whole)).sum()

    def collated(examples: Sequence[Encoded]) -> dict[str, Tensor]:
        batch = batch_of(examples, problem.pad_id)
        return {"input_ids": batch.input_ids, "labels": batch.labels}

    task = AttributionTask(loss, model, model.state_dict())
    pool = DataLoader(list(problem.pool), batch_size=1, collate_fn=collated)
    queries = DataLoader(list(problem.queries), batch_size=1, collate_fn=collated)

    def run() -> Answer:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:  # else it writes where it stands
            attributor = LoGraAttributor(
                task, list(problem.layers), hessian="Identity", cache_dir=folder
            )
            attributor.cache(pool)
            return Answer(attributor.attribute(pool, queries), None)

    return run
