"""The report's tables of scorers that learn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from iprox.report import learned
from iprox.report.artifacts import Artifact
from iprox.report.page import amortisation_grid, encoders_grid
from iprox.store.arrays import create_store, put
from iprox.store.tables import write_table


def artifact(folder: Path, stage: str, seconds: float, rate: float | None = None) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {} if rate is None else {"examples_per_s": rate, "examples": 90}
    provenance: dict[str, Any] = {"seconds": seconds, "metrics": metrics}
    return Artifact(folder, stage, folder.name, "", {}, provenance)


def sketched(folder: Path, dim: int, dtype: str) -> Path:
    store = create_store(folder / "shard-00000.zarr")
    put(store, "sketch", np.zeros((3, dim), dtype), ("examples", "dim"))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Any:
    """Two runs: one whose encoder was taught, one whose encoder was not."""
    exact = artifact(tmp_path / "exact", "features", 70.0, rate=0.5)
    shared = {"target-features": exact}
    taught = shared | {
        "features": artifact(sketched(tmp_path / "e", 384, "float16"), "embeddings", 9.0, rate=50),
        "teach": artifact(sketched(tmp_path / "t", 8192, "float16"), "features", 200.0, rate=0.5),
        "sketches-mmlu": artifact(tmp_path / "s", "query_sketches", 40.0),
        "encoder": artifact(tmp_path / "enc", "encoder", 60.0),
    }
    rows = [
        {"queries": q, "encoder": e, "task": "mean", "metric": "aggregated", "value": v}
        | {"low": v - 0.1, "high": v + 0.1, "n_queries": 6, "n_candidates": 60}
        for q, e, v in (("known", "untrained", 0.1), ("known", "trained", 0.7))
    ]
    write_table(tmp_path / "enc" / "quality.parquet", pd.DataFrame(rows))
    untaught = shared | {"features": taught["features"]}
    runs = [
        SimpleNamespace(name="taught", group="taught", artifacts=taught),
        SimpleNamespace(name="untaught", group="untaught", artifacts=untaught),
        SimpleNamespace(name="gradient", group="gradient", artifacts={"features": exact}),
    ]
    return SimpleNamespace(runs=runs)


def test_costs_are_paid_back(study: Any) -> None:
    table = learned.amortisation(study).set_index("run")
    assert list(table.index) == ["taught", "untaught"]
    row = table.loc["taught"]
    assert row["labelled"] == 90
    assert row["labelling_seconds"] == 240
    assert row["training_seconds"] == 60
    assert row["seconds_per_1000"] == 20
    assert row["exact_seconds_per_1000"] == 2000
    assert row["speedup"] == 100
    assert row["break_even"] == pytest.approx(300 / 1.98)
    assert row["bytes_per_example"] == 768
    assert row["teacher_bytes_per_example"] == 16384


def test_an_encoder_that_was_not_taught_pays_off_at_once(study: Any) -> None:
    row = learned.amortisation(study).set_index("run").loc["untaught"]
    assert row["break_even"] == 0
    assert np.isnan(row["labelled"])
    assert np.isnan(row["teacher_bytes_per_example"])


def test_quality_is_read_of_runs_with_an_encoder(study: Any) -> None:
    table = learned.quality(study)
    assert table["run"].unique().tolist() == ["taught"]
    assert list(table.columns) == learned.QUALITY


def test_a_study_without_encoders_shows_nothing() -> None:
    empty = SimpleNamespace(runs=[])
    assert encoders_grid(empty, learned.quality(empty)) is None
    assert amortisation_grid(empty, learned.amortisation(empty)) is None


def test_the_page_shows_both_states_side_by_side(
    study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iprox.report import page

    monkeypatch.setattr(page, "_run_cell", lambda study, run: page.Cell(run))
    grid = encoders_grid(study, learned.quality(study))
    assert grid is not None
    assert [cell.text for cell in grid.rows[0]][:4] == ["taught", "known", "mean", "aggregated"]
    assert [cell.text for cell in grid.rows[0]][4:] == ["0.10", "0.70", "6 x 60"]
    costs = amortisation_grid(study, learned.amortisation(study))
    assert costs is not None
    assert "152 examples" in [cell.text for cell in costs.rows[0]]
