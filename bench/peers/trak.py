"""TRAK: inner products of randomly projected gradients."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType
from trak.score_computers import BasicScoreComputer

from bench.peers.functional import example_loss
from bench.problem import Answer, Problem, Scoring, batch_of, in_groups

PACKAGE = "traker"
READS_QUERIES = True
PROJECTED = 8
DIFFERS = (
    f"a sketch: {PROJECTED} Gaussian projections (its CPU projector holds the whole matrix), "
    "without TRAK's inverse covariance; float32; gradients of all weights are formed"
)


class _Loss(AbstractModelOutput):
    """The problem's loss itself as the model output, so that its own gradient is scored."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(
        model: Any, weights: Any, buffers: Any, input_ids: Tensor, labels: Tensor
    ) -> Tensor:
        return example_loss(model, {**weights, **buffers}, input_ids, labels)

    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return torch.ones(len(batch[0]), 1)


class _PlainDots(BasicScoreComputer):
    """Features as they are, not whitened by the covariance of the pool's."""

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        return grads


class _Kept(BasicProjector):
    """A projection matrix that outlives the pool: TRAK frees it and then projects the queries."""

    def free_memory(self) -> None:
        pass


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """``featurize`` and ``score`` with ``TRAKer``, in batches of 2."""
    model = problem.model
    model.set_attn_implementation("eager")  # the fused kernel has no batching rule under vmap
    checkpoint = model.state_dict()
    pool = [batch_of(group, problem.pad_id) for group in in_groups(problem.pool, 2)]
    queries = batch_of(problem.queries, problem.pad_id)

    layers = problem.layers.values()
    projector = _Kept(
        grad_dim=sum(layer.weight.numel() for layer in layers),
        proj_dim=PROJECTED,
        seed=0,
        proj_type=ProjectionType.normal,
        device="cpu",
    )

    def run() -> Answer:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            traker = TRAKer(
                model=model,
                task=_Loss(),
                train_set_size=len(problem.pool),
                save_dir=folder,
                device="cpu",
                projector=projector,
                score_computer=_PlainDots,
                use_half_precision=False,
                grad_wrt=[f"{name}.weight" for name in problem.layers],
                logging_level=logging.ERROR,
            )
            traker.load_checkpoint(checkpoint, model_id=0)
            for batch in pool:
                traker.featurize((batch.input_ids, batch.labels), num_samples=len(batch.labels))
            traker.finalize_features()
            traker.start_scoring_checkpoint("bench", checkpoint, 0, len(problem.queries))
            traker.score((queries.input_ids, queries.labels), num_samples=len(queries.labels))
            scores = torch.as_tensor(traker.finalize_scores("bench"))
        # TRAK divides both sides by the root of the number of weights, and projects unscaled
        return Answer(scores * projector.grad_dim / PROJECTED, None)

    return run
