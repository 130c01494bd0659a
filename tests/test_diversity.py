"""Subspace affinity and nearest distances, by hand and through the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from artifacts import job
from test_plan import plan

from iprox.numerics import diversity as numerics
from iprox.numerics.diversity import (
    nearest_distances,
    principal_directions,
    random_affinity,
    subspace_affinity,
)
from iprox.report.page import diversity_grid
from iprox.stages import diversity
from iprox.stages.feature_store import QuerySketches
from iprox.store.arrays import create_store, put
from iprox.store.tables import read_table, write_table

RANDOM = np.random.default_rng(0)


def basis(k: int, dim: int) -> np.ndarray:
    return np.linalg.qr(RANDOM.normal(size=(dim, k)))[0].T


def test_affinity_of_known_subspaces() -> None:
    a = basis(3, 8)
    assert subspace_affinity(a, a) == pytest.approx(1)
    assert subspace_affinity(np.eye(8)[:3], np.eye(8)[3:6]) == 0
    angle = 0.3
    line = np.array([[1.0, 0.0]])
    turned = np.array([[np.cos(angle), np.sin(angle)]])
    assert subspace_affinity(line, turned) == pytest.approx(np.cos(angle))
    assert subspace_affinity(np.eye(8)[:1], np.eye(8)[:5]) == 1  # one holds the other
    assert np.isnan(subspace_affinity(a, a[:0]))


def test_affinity_does_not_see_rotation() -> None:
    a, b, rotation = basis(3, 8), basis(2, 8), basis(8, 8)
    expected = subspace_affinity(a, b)
    assert subspace_affinity(a @ rotation, b @ rotation) == pytest.approx(expected)
    assert subspace_affinity(basis(3, 3) @ a, b) == pytest.approx(expected)


def test_random_subspaces_have_the_stated_affinity() -> None:
    squares = [subspace_affinity(basis(3, 20), basis(5, 20)) ** 2 for _ in range(400)]
    error = np.std(squares) / np.sqrt(len(squares))
    assert np.mean(squares) == pytest.approx(random_affinity(3, 5, 20) ** 2, abs=4 * error)


@pytest.mark.parametrize("exact", [1, 1024])
def test_directions_are_those_of_unit_rows(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "EXACT_SIDE", exact)
    scales = np.array([[3.0], [0.1], [7.0], [1.0], [0.0], [2.0], [5.0], [1.0]])
    rows = RANDOM.normal(size=(8, 5)) @ np.diag([9, 3, 1, 0.3, 0.1]) * scales
    unit = np.delete(rows, 4, axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = np.linalg.svd(unit)[2][:2]
    found = principal_directions(rows, 2)
    assert subspace_affinity(found, expected) == pytest.approx(1)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-12)
    assert len(principal_directions(np.ones((4, 5)), 3)) == 1


@pytest.mark.parametrize("rows", [2, 512])
def test_nearest_distances_on_a_grid(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "NEAREST_ROWS", rows)
    points = np.array([[0, 0], [0, 2], [3, 0], [3, 0], [9, 0]], dtype=float)
    np.testing.assert_allclose(nearest_distances(points), [2, 2, 0, 0, 6], atol=1e-12)


def test_the_stage_compares_a_selection_with_its_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"e{i}" for i in range(6)]
    sketch = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 3, 3]]
    sketch[4] = 0  # it has no gradient
    store = create_store(tmp_path / "features" / "shard-00000.zarr", {})
    put(store, "sketch", sketch, ("examples", "dim"))
    put(store, "example_id", np.array(ids), ("examples",))
    (tmp_path / "selection").mkdir()
    chosen = pd.DataFrame({"task": list("ttttu"), "example_id": ["e0", "e1", "e2", "e4", "e3"]})
    write_table(tmp_path / "selection" / "selection.parquet", chosen)
    rows = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    queries = QuerySketches(["t", "u"], rows, {})
    monkeypatch.setattr(diversity, "query_sketches", lambda *_: queries)
    parents = {name: tmp_path / name for name in ("features", "selection")}
    of: dict[str, Any] = {"features": {}, "tasks": ["t", "u"]}
    diversity.make(job("diversity", tmp_path / "each", parents, together=False, **of))
    table = read_table(tmp_path / "each" / "diversity.parquet").set_index("task")
    assert table.loc["t", ["selected", "compared"]].tolist() == [4, 3]
    assert table.at["t", "nearest"] == pytest.approx(np.sqrt(2) / 3)  # e0 and e2 are equal
    assert table.at["t", "affinity"] == pytest.approx(1)  # e0 and e1 span the query
    assert table.at["u", "affinity"] == 0
    assert np.isnan(table.at["u", "nearest"])
    assert table.at["t", "affinity_random"] == pytest.approx(np.sqrt(2 / 4))
    diversity.make(job("diversity", tmp_path / "all", parents, together=True, **of))
    together = read_table(tmp_path / "all" / "diversity.parquet").set_index("task")
    assert together["selected"].tolist() == [5, 5]


def test_all_selections_are_compared_by_one_run_s_sketches() -> None:
    runs: dict[str, Any] = {
        "exact": {"proxy": {"kind": "target"}},
        "sketch": {"features": {"kind": "countsketch"}},
        "random": {"scorer": {"kind": "random"}},
        "early": {"until": "ranking"},
    }
    p = plan(runs=runs)
    features = p.runs["sketch"].nodes["features"]
    for run in ("exact", "sketch", "random"):
        node = p.runs[run].nodes["diversity"]
        assert node.parents["features"] is features
        assert node.parents["selection"] is p.runs[run].nodes["selection"]
        assert {"query/mmlu", "query/bbh"} <= set(node.parents)
        assert p.report is not None
        assert p.report.parents[f"{run}/diversity"] is node
    assert "diversity" not in p.runs["early"].nodes
    assert "diversity" not in {s for s, _ in plan().nodes}


def test_nothing_is_shown_without_sketches() -> None:
    assert diversity_grid(None, pd.DataFrame(columns=["run"])) is None  # type: ignore[arg-type]
