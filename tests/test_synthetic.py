"""The experiment on made-up data: influences against autograd, and what the papers claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import job
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy

from iprox.numerics.synthetic import (
    Examples,
    Retention,
    Setting,
    compress,
    directions,
    draw_examples,
    influences,
    layer_rows,
    mean_loss,
    retention,
    train_network,
)
from iprox.stages import synthetic
from iprox.store.tables import read_table
from iprox.study.schema import SyntheticSection

SMALL = Setting(hidden=48, train=1000, test=40, scored=120, probe=256, epochs=6)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Examples, Examples]:
    generator = torch.Generator().manual_seed(5)
    train, test = draw_examples(SMALL, generator)
    return train_network(SMALL, train, generator), train, test


def first(data: Examples, n: int) -> Examples:
    return Examples(data.x[:n], data.y[:n])


def gradient(network: nn.Sequential, data: Examples, i: int) -> torch.Tensor:
    """Gradient of one example's loss with respect to all weights, by autograd, flattened."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
    for weight in weights:
        weight.requires_grad_(True)
    loss = cross_entropy(network(data.x[i : i + 1].double()), data.y[i : i + 1])
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_influences_equal_autograd(
    trained: tuple[nn.Sequential, Examples, Examples], sparsity: float | None
) -> None:
    network, train, test = trained
    if sparsity:
        network = compress(network, directions(SMALL, network, train)["ipsvd"], sparsity)
    tests, trains = first(test, 3), first(train, 4)
    found = influences(layer_rows(network, tests), layer_rows(network, trains))
    expected = torch.tensor(
        [
            [float(gradient(network, tests, i) @ gradient(network, trains, j)) for j in range(4)]
            for i in range(3)
        ]
    )
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-9)


def test_retention_is_a_ratio_of_losses_and_a_mean_of_correlations(
    trained: tuple[nn.Sequential, Examples, Examples],
) -> None:
    network, train, test = trained
    other = compress(network, directions(SMALL, network, train)["svd"], 0.5)
    found = retention(network, other, train, first(test, 5), 30)
    rows = [
        influences(layer_rows(net, first(test, 5)), layer_rows(net, first(train, 30))).numpy()
        for net in (other, network)
    ]
    correlations = [stats.spearmanr(a, b).statistic for a, b in zip(*rows, strict=True)]
    assert found.influence == pytest.approx(np.mean(correlations))
    assert found.loss == pytest.approx(mean_loss(network, train) / mean_loss(other, train))
    whole = retention(network, network, train, first(test, 5), 30)
    assert whole == pytest.approx(Retention(1.0, 1.0))


def test_the_network_of_the_experiment_does_not_interpolate() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = draw_examples(Setting(), generator)
    network = train_network(Setting(), train, generator)
    assert 0.4 < mean_loss(network, train) < 1.3
    assert mean_loss(network, test) < np.log(SMALL.classes)


def test_ranks_remove_the_share_asked_for(
    trained: tuple[nn.Sequential, Examples, Examples],
) -> None:
    network, train, _ = trained
    thin = compress(network, directions(SMALL, network, train)["svd"], 0.5)
    middle = thin[2]  # 48 x 48: half of its weights is rank 12
    assert [tuple(layer.weight.shape) for layer in middle] == [(12, 48), (48, 12)]
    torch.testing.assert_close(middle[1].bias, network[2].bias)


def test_ipsvd_keeps_more_influence_than_svd_and_no_less_loss() -> None:
    section = SyntheticSection(seeds=2, sparsities=[0.1, 0.3, 0.5, 0.7])
    means = synthetic.over_seeds(synthetic.measure(section, replace(SMALL, train=1500)))
    by_kind = means.pivot_table("mean", ["metric", "sparsity"], "kind")
    influence, loss = by_kind.loc["influence_retention"], by_kind.loc["loss_retention"]
    assert (influence["ipsvd"] > influence["svd"]).all()
    assert (loss["ipsvd"] >= loss["svd"]).all()


def test_the_stage_writes_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "Setting", lambda: replace(SMALL, train=200, epochs=1))
    section = {"seeds": 2, "sparsities": [0.4, 0.8]}
    out, again = tmp_path / "out", tmp_path / "again"
    synthetic.make(job("synthetic", out, {}, synthetic=section))
    table, seeds = read_table(out / "retention.parquet"), read_table(out / "seeds.parquet")
    assert len(seeds) == 2 * 2 * 2
    assert len(table) == 2 * 2 * 2
    row = table.query("kind == 'svd' and sparsity == 0.8 and metric == 'loss_retention'").iloc[0]
    values = seeds.query("kind == 'svd' and sparsity == 0.8")["loss_retention"]
    assert tuple(row[["mean", "low", "high"]]) == (values.mean(), values.min(), values.max())
    pd.testing.assert_frame_equal(pd.read_csv(out / "retention.csv"), table, check_dtype=False)
    assert "IPSVD, influence" in (out / "retention.svg").read_text()
    synthetic.make(job("synthetic", again, {}, synthetic=section))
    for path in out.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
