"""kronfluence: pairwise scores with the identity in place of a curvature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from bench.problem import Answer, Problem, Scoring, batch_of
from iprox.data.chat import Encoded
from iprox.engine.loss import Batch, attention_mask, example_losses

PACKAGE = "kronfluence"
READS_QUERIES = True
DIFFERS = "exact inner products, no norms in the same pass; batches of 4"


class _LanguageModelling(Task):
    """The problem's loss, summed over a batch, for training examples and queries alike."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return example_losses(model, Batch(*batch)).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return example_losses(model, Batch(*batch)).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        return attention_mask(Batch(*batch))


def _analyzer(problem: Problem, scratch: Path) -> Analyzer:
    logging.disable(logging.WARNING)
    task = _LanguageModelling(list(problem.layers))
    model = prepare_model(problem.model, task)
    analyzer = Analyzer("bench", model, task, cpu=True, disable_tqdm=True, output_dir=str(scratch))

    def collated(examples: Sequence[Encoded]) -> list[Tensor]:
        return list(batch_of(examples, problem.pad_id))

    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collated))
    return analyzer


def fit(problem: Problem, scratch: Path) -> tuple[Callable[[], None], ...]:
    """The steps of an EK-FAC fit on the pool: covariances, eigenbases, corrected eigenvalues."""
    analyzer, pool = _analyzer(problem, scratch), list(problem.pool)
    arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)

    def first_pass() -> None:
        analyzer.fit_covariance_matrices(
            "ekfac", pool, 4, factor_args=arguments, overwrite_output_dir=True
        )

    def eigenbases() -> None:
        analyzer.perform_eigendecomposition(
            "ekfac", factor_args=arguments, overwrite_output_dir=True
        )

    def second_pass() -> None:
        analyzer.fit_lambda_matrices(
            "ekfac", pool, 4, factor_args=arguments, overwrite_output_dir=True
        )

    return first_pass, eigenbases, second_pass


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """``Analyzer.compute_pairwise_scores`` with the strategy ``identity``."""
    analyzer = _analyzer(problem, scratch)
    analyzer.fit_all_factors(
        "identity", list(problem.queries), factor_args=FactorArguments(strategy="identity")
    )

    def run() -> Answer:
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="identity",
            query_dataset=list(problem.queries),
            train_dataset=list(problem.pool),
            per_device_query_batch_size=len(problem.queries),
            per_device_train_batch_size=4,
            overwrite_output_dir=True,
        )
        return Answer(analyzer.load_pairwise_scores("scores")["all_modules"].T, None)

    return run
