"""TRAK: inner products of randomly projected gradients."""

from __future__ import annotations

import copy
import logging
import tempfile
from typing import Any

import torch
from torch import Tensor
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.score_computers import BasicScoreComputer

from bench.peers.functional import example_loss
from bench.problem import Answer, Problem, Scoring, batch_of, in_fours

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


def prepare(problem: Problem) -> Scoring:
    """``featurize`` and ``score`` with ``TRAKer``, in batches of 4."""
    model = copy.deepcopy(problem.model)
    checkpoint = model.state_dict()
    pool = [batch_of(four, problem.pad_id) for four in in_fours(problem.pool)]
    queries = batch_of(problem.queries, problem.pad_id)

    def run() -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                model=model,
                task=_Loss(),
                train_set_size=len(problem.pool),
                save_dir=folder,
                device="cpu",
                proj_dim=PROJECTED,
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
        n_weights = sum(layer.weight.numel() for layer in problem.layers.values())
        return Answer(scores * n_weights / PROJECTED, None)

    return run
