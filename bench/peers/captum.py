"""captum: TracInCP at one checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.problem import Answer, Problem, Scoring, batch_of, in_groups
from iprox.engine.loss import Batch, example_losses

PACKAGE = "captum"
READS_QUERIES = True
DIFFERS = "exact inner products, no norms in the same pass; batches of 4, gradients kept per layer"


class _Losses(nn.Module):
    """A model whose output is the loss of each example: captum's models end before the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return example_losses(self.model, Batch(input_ids, labels, lengths))


class _Batches(DataLoader):
    """Batches made beforehand, each a tuple that ends in the labels captum expects."""

    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        super().__init__(batches, batch_size=None)
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _sum(losses: Tensor, labels: Tensor) -> Tensor:
    return losses.sum()


_sum.reduction = "sum"


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """``TracInCP.influence`` with the learning rate 1 and per-batch gradients of linear layers."""
    warnings.filterwarnings("ignore")
    model = _Losses(problem.model)
    # its hooks need inputs that require gradients, those of the first block as well
    model.model.get_input_embeddings().requires_grad_(True)

    def batch(examples: Any) -> tuple[Tensor, ...]:
        made = batch_of(examples, problem.pad_id)
        return (*made, made.labels)

    tracin = TracInCP(
        model,
        _Batches([batch(group) for group in in_groups(problem.pool, 4)]),
        checkpoints=["as it is"],
        checkpoints_load_func=lambda model, path: 1.0,
        layers=[f"model.{name}" for name in problem.layers],
        loss_fn=_sum,
        sample_wise_grads_per_batch=True,
    )
    queries = _Batches([batch(problem.queries)])
    return lambda: Answer(tracin.influence(queries).T, None)
