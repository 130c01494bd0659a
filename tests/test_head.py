"""Heads on embeddings: ridge against leaving one out, Adam as published, and the stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artifacts import job

from iprox.errors import DataError, NumericsError
from iprox.numerics.regression import PENALTIES, leave_one_out_ridge
from iprox.stages import head
from iprox.stages.query_rows import read_rows
from iprox.store.arrays import create_store, put
from iprox.store.tables import read_table

IDS = [f"e{i:02d}" for i in range(60)]
WEIGHTS = np.random.default_rng(9).normal(size=5)


def data(n: int = 12, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, 5)) + 3
    return x, x @ WEIGHTS + noise * draw.normal(size=n) + 7


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The definition: least squares with the penalty on the weights alone."""
    wide = np.column_stack([x, np.ones(len(x))])
    gram = wide.T @ wide + penalty * np.diag([1.0] * x.shape[1] + [0.0])
    solution = np.linalg.solve(gram, wide.T @ y)
    return solution[:-1], solution[-1]


def test_ridge_is_its_definition() -> None:
    x, y = data()
    found, penalty = leave_one_out_ridge(x, y)
    weights, intercept = ridge(x, y, penalty)
    np.testing.assert_allclose(found.weights, weights, atol=1e-9)
    assert found.intercept == pytest.approx(intercept)


def test_the_penalty_is_the_one_that_predicts_left_out_examples_best() -> None:
    x, y = data(noise=3.0)
    scale = ((x - x.mean(0)) ** 2).sum() / 5

    def left_out(penalty: float) -> float:
        errors = []
        for i in range(len(y)):
            rest = np.arange(len(y)) != i
            weights, intercept = ridge(x[rest], y[rest], penalty)
            errors.append(y[i] - x[i] @ weights - intercept)
        return float(np.mean(np.square(errors)))

    best = min(PENALTIES * scale, key=left_out)
    assert leave_one_out_ridge(x, y)[1] == pytest.approx(best)


def test_adam_hardly_moves_from_its_start() -> None:
    """At the published rate a weight moves by at most the rate at each of the few steps."""
    x, y = data(40)
    one, two = (head.fit(x, labels, "adam", seed=3)[0].weights for labels in (y, -y))
    assert 0 < np.abs(one - two).max() <= 2 * head.LR * head.EPOCHS * 5 * 1.01
    assert np.array_equal(one, head.fit(x, y, "adam", seed=3)[0].weights)


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    """Embeddings of a pool, and a teacher's exact features of two parts of it."""
    draw = np.random.default_rng(1)
    rows = draw.normal(size=(len(IDS), 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    about = {"kind": "embedding", "dim": 5, "max_length": 8, "weights": ["x"]}
    made = {"embeddings": tmp_path / "embeddings"}
    store = create_store(tmp_path / "embeddings" / "shard-00000.zarr", about)
    put(store, "sketch", rows.astype(np.float16), ("examples", "dim"))
    put(store, "example_id", np.array(IDS), ("examples",))
    for name, value in (("norms", 1.0), ("loss", 0.0), ("tokens", 4), ("supervised", 1)):
        put(store, name, np.full(len(IDS), value), ("examples",))
    for role, part in (("teach", slice(0, 40)), ("heldout", slice(40, 60))):
        made[role] = tmp_path / role
        store = create_store(tmp_path / role / "shard-00000.zarr", {"queries": {}})
        put(store, "example_id", np.array(IDS[part]), ("examples",))
        put(store, "dots", (rows[part] @ WEIGHTS)[:, None], ("examples", "columns"))
        n = len(IDS[part])
        for name, value in (("norms", 1.0), ("loss", 1.0), ("tokens", 4), ("supervised", 1)):
            put(store, name, np.full(n, value), ("examples",))
        put(store, "columns", np.array(["t"]), ("columns",))
        put(store, "query_norms", np.ones(1), ("columns",))
    return made


def run(out: Path, parents: dict[str, Path], fit: str = "ridge") -> dict:
    stage = {"scorer": {"fit": fit, "seed": 0}, "task": {"name": "t"}}
    return head.make(job("head", out, parents, **stage))


def test_a_head_learns_a_linear_teacher(parents: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(tmp_path / "out", parents)
    assert metrics["spearman_heldout"] > 0.99
    assert (metrics["examples"], metrics["examples_heldout"]) == (40, 20)
    found = read_rows(tmp_path / "out")
    cosine = found.rows[0] @ WEIGHTS / np.linalg.norm(found.rows[0]) / np.linalg.norm(WEIGHTS)
    assert cosine > 0.999
    table = read_table(tmp_path / "out" / "quality.parquet")
    assert table["examples"].tolist() == ["taught", "heldout"]


def test_the_published_fit_is_worse(parents: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path / "out", parents, "adam")["spearman_heldout"] < 0.9


def test_overlapping_splits_are_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share an id"):
        run(tmp_path / "out", parents | {"heldout": parents["teach"]})


def test_constant_labels_are_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    store = create_store(parents["teach"] / "shard-00000.zarr", {"queries": {}})
    put(store, "example_id", np.array(IDS[:4]), ("examples",))
    put(store, "dots", np.ones((4, 1)), ("examples", "columns"))
    for name, value in (("norms", 1.0), ("loss", 1.0), ("tokens", 4), ("supervised", 1)):
        put(store, name, np.full(4, value), ("examples",))
    put(store, "columns", np.array(["t"]), ("columns",))
    put(store, "query_norms", np.ones(1), ("columns",))
    with pytest.raises(NumericsError, match="nothing to learn"):
        run(tmp_path / "out", parents)
