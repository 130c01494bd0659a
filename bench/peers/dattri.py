"""dattri: TracIn at one checkpoint ("Grad-Dot")."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from dattri.algorithm import TracInAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader

from bench.peers.functional import example_loss
from bench.problem import Answer, Problem, Scoring, batch_of
from iprox.data.chat import Encoded

PACKAGE = "dattri"
READS_QUERIES = True
DIFFERS = (
    "exact inner products, no norms in the same pass; batches of 4, whose every one takes the "
    "query gradients again; its random projection, on by default, is switched off"
)


def prepare(problem: Problem) -> Scoring:
    """``TracInAttributor.attribute`` with weight 1."""
    model = copy.deepcopy(problem.model)
    for name in problem.layers:  # dattri takes gradients of what requires them
        model.get_submodule(name).weight.requires_grad_()

    def loss(weights: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        return example_loss(model, weights, *data)

    attributor = TracInAttributor(
        AttributionTask(loss, model, model.state_dict()),
        weight_list=torch.ones(1),
        normalized_grad=False,
    )
    attributor.projector_kwargs = None  # None as an argument keeps the default projection

    def collated(examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        batch = batch_of(examples, problem.pad_id)
        return batch.input_ids, batch.labels

    pool = DataLoader(list(problem.pool), batch_size=4, collate_fn=collated)
    queries = DataLoader(
        list(problem.queries), batch_size=len(problem.queries), collate_fn=collated
    )
    return lambda: Answer(attributor.attribute(pool, queries), None)
