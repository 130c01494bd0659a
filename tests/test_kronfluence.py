"""Our EK-FAC and K-FAC scores against those of kronfluence, an independent implementation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import exact_model, one_of, random_batch
from torch import Tensor, nn

from iprox.engine.capture import input_sites
from iprox.engine.curvature import Covariances, SquaredGradients, visit_examples
from iprox.engine.gradients import mean_gradient
from iprox.engine.loss import Batch, attention_mask, example_losses
from iprox.engine.scoring import Scorer
from iprox.models.layers import scored_linears
from iprox.numerics.kfac import Damping, LayerCurvature, eigenbasis
from iprox.study.schema import LayersSection

pytest.importorskip("kronfluence")

LENGTHS = [9, 14, 6, 11, 17, 8, 12, 10, 7, 15, 13, 5]
FISHER, POOL, QUERIES = range(8), range(12), (1, 4, 9)


@pytest.fixture
def model() -> Any:
    return exact_model()


@pytest.fixture
def batch() -> Batch:
    return random_batch(LENGTHS, [n // 3 for n in LENGTHS])


def rows_of(batch: Batch, rows: Any) -> list[tuple[Batch, list[str]]]:
    return [(one_of(batch, row), [str(row)]) for row in rows]


def our_scores(model: Any, batch: Batch, corrected: bool) -> Tensor:
    """Inner products (queries, pool) of preconditioned queries with the pool."""
    layers = scored_linears(model, LayersSection())
    sites = input_sites(model, layers, batch)
    sums = Covariances(layers, sites, 8192)
    visit_examples(model, layers, rows_of(batch, FISHER), sums)
    tokens = sum(LENGTHS[row] for row in FISHER)
    inputs = {n: eigenbasis(b, tokens) for n, b in sums.inputs.items()}
    grads = {n: eigenbasis(b, tokens) for n, b in sums.output_grads.items()}
    squares = SquaredGradients(inputs, grads, sites)
    visit_examples(model, layers, rows_of(batch, FISHER), squares)
    one = torch.ones(1, dtype=torch.float64)
    taken = [mean_gradient(model, layers, [(one_of(batch, q), one, None)]) for q in QUERIES]
    directions = {}
    for name in layers:
        values = squares.sums[name] / len(FISHER) if corrected else None
        of_layer = LayerCurvature(name, grads[name], inputs[sites[name]], 1.0, values)
        directions[name] = of_layer.solve(torch.stack([g[name] for g in taken]), Damping(0.1))
    scorer = Scorer(model, layers, directions)
    return torch.cat([scorer.score(one_of(batch, row)).dots for row in POOL]).mT


def their_scores(model: Any, batch: Batch, strategy: str, folder: Path) -> Tensor:
    """Pairwise scores (queries, pool) by kronfluence with the same loss, labels and damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    logging.disable(logging.WARNING)
    layers = list(scored_linears(model, LayersSection()))

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return example_losses(model, Batch(*batch)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return example_losses(model, Batch(*batch)).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return attention_mask(Batch(*batch))

    def data(rows: Any) -> list[tuple[Tensor, ...]]:
        return [tuple(t[row] for t in batch) for row in rows]

    double = torch.float64
    task = LanguageModelling()
    analyzer = Analyzer(
        "test",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(folder),
    )
    analyzer.fit_all_factors(
        "factors",
        data(FISHER),
        per_device_batch_size=4,
        factor_args=FactorArguments(
            strategy=strategy,
            use_empirical_fisher=True,
            activation_covariance_dtype=double,
            gradient_covariance_dtype=double,
            per_sample_gradient_dtype=double,
            lambda_dtype=double,
        ),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query_dataset=data(QUERIES),
        train_dataset=data(POOL),
        per_device_query_batch_size=1,
        per_device_train_batch_size=4,
        score_args=ScoreArguments(
            damping_factor=None,
            per_sample_gradient_dtype=double,
            precondition_dtype=double,
            score_dtype=double,
        ),
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].double()


@pytest.mark.filterwarnings("ignore::FutureWarning:kronfluence")
@pytest.mark.parametrize("strategy", ["ekfac", "kfac"])
def test_scores_are_equal(model: Any, batch: Batch, strategy: str, tmp_path: Path) -> None:
    ours = our_scores(model, batch, corrected=strategy == "ekfac")
    theirs = their_scores(model, batch, strategy, tmp_path)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * float(ours.abs().max()))
