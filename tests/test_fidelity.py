"""Fidelity tables against scipy on the scores the stage compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from artifacts import job, write_split
from scipy import stats

from iprox.errors import ArtifactError, NumericsError
from iprox.stages import fidelity
from iprox.stages.feature_store import PER_EXAMPLE, read_features
from iprox.store.arrays import create_store, put
from iprox.store.tables import read_table

N = 60
TASKS = ["s", "t"]


def write_features(folder: Path, seed: int, columns: list[str] = TASKS, **changes: Any) -> Path:
    """Random features whose scores agree in part, through a common share."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    arrays = {
        "example_id": np.array([f"e{i:03d}" for i in range(N)]),
        "dots": common.normal(size=(N, len(columns))) + own.normal(size=(N, len(columns))),
        "norms": 1 + own.random(N),
        "loss": 2 + own.random(N),
        "tokens": np.full(N, 9),
        "supervised": np.full(N, 3),
    } | changes
    folder.mkdir()
    store = create_store(folder / "shard-00000.zarr", {"queries": {}})
    for name in PER_EXAMPLE:
        put(store, name, arrays[name], ("examples", "columns")[: arrays[name].ndim])
    put(store, "columns", np.array(columns), ("columns",))
    put(store, "query_norms", np.ones(len(columns)), ("columns",))
    return folder


def run(tmp_path: Path, parents: dict[str, Path], **section: Any) -> pd.DataFrame:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    fidelity.make(job("fidelity", out, parents, fidelity={"bootstrap": 50} | section))
    return read_table(out / "fidelity.parquet").set_index(["task", "metric"])


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    return {
        "proxy": write_features(tmp_path / "proxy", 1),
        "target": write_features(tmp_path / "target", 2),
    }


def cosines(folder: Path) -> np.ndarray:
    features = read_features(folder)
    return (features.dots / features.norms[:, None]).astype(np.float32)


def test_values_equal_scipys_for_each_task_and_their_mean(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    table = run(tmp_path, parents)
    ours, theirs = cosines(parents["proxy"]), cosines(parents["target"])
    for metric, measure in (
        ("spearman", stats.spearmanr),
        ("kendall", stats.kendalltau),
        ("pearson", stats.pearsonr),
    ):
        expected = [measure(ours[:, k], theirs[:, k]).statistic for k in range(2)]
        found = [table.loc[(task, metric), "value"] for task in TASKS]
        assert found == pytest.approx(expected, rel=1e-6)
        assert table.loc[("mean", metric), "value"] == pytest.approx(np.mean(expected), rel=1e-6)
    best = [set(np.argsort(-scores[:, 0])[:6]) for scores in (ours, theirs)]
    assert table.loc[("s", "top_10%"), "value"] == len(best[0] & best[1]) / 6
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert (table["n"] == N).all()


def test_losses_of_both_models(tmp_path: Path, parents: dict[str, Path]) -> None:
    table = run(tmp_path, parents)
    ours, theirs = (read_features(parents[r]).loss.mean() for r in ("proxy", "target"))
    assert table.loc[("mean", "loss_mean_proxy"), "value"] == pytest.approx(ours)
    assert table.loc[("mean", "loss_mean_target"), "value"] == pytest.approx(theirs)
    assert table.loc[("mean", "loss_retention"), "value"] == pytest.approx(theirs / ours)


def test_a_model_agrees_with_itself(tmp_path: Path, parents: dict[str, Path]) -> None:
    table = run(tmp_path, parents | {"target": parents["proxy"]})
    agreement = table[~table.index.get_level_values("metric").str.startswith("loss_mean")]
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(agreement[column], 1.0, rtol=1e-12)


def test_the_mean_of_equal_tasks_has_the_interval_of_one(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    """Tasks are resampled together: with separate draws the mean's interval would be narrower."""
    single = np.random.default_rng(5).normal(size=(N, 1)).repeat(2, axis=1)
    other = single + np.random.default_rng(6).normal(size=(N, 1))
    pair = {
        "proxy": write_features(tmp_path / "p", 1, dots=single, norms=np.ones(N)),
        "target": write_features(tmp_path / "q", 2, dots=other, norms=np.ones(N)),
    }
    table = run(tmp_path, pair)
    one, mean = table.loc[("s", "spearman")], table.loc[("mean", "spearman")]
    assert tuple(one) == pytest.approx(tuple(mean), rel=1e-12)


def test_only_the_slice_is_compared(tmp_path: Path, parents: dict[str, Path]) -> None:
    ids = [f"e{i:03d}" for i in range(10, 30)]
    split = write_split(tmp_path / "split", "fidelity", ids)
    table = run(tmp_path, parents | {"split": split})
    ours, theirs = (cosines(parents[r])[10:30, 0] for r in ("proxy", "target"))
    expected = stats.spearmanr(ours, theirs).statistic
    assert table.loc[("s", "spearman"), "value"] == pytest.approx(expected, rel=1e-6)
    assert (table["n"] == 20).all()


def test_examples_that_one_model_cannot_score_are_left_out(tmp_path: Path) -> None:
    norms = np.ones(N)
    norms[:4] = 0
    pair = {
        "proxy": write_features(tmp_path / "p", 1, norms=norms),
        "target": write_features(tmp_path / "q", 2),
    }
    table = run(tmp_path, pair)
    assert (table["n"] == N - 4).all()


def test_no_bootstrap_leaves_the_bounds_empty(tmp_path: Path, parents: dict[str, Path]) -> None:
    table = run(tmp_path, parents, bootstrap=0)
    assert table["low"].isna().all()
    assert table["value"].notna().all()


def test_what_cannot_be_compared_is_refused(tmp_path: Path, parents: dict[str, Path]) -> None:
    other = write_features(tmp_path / "other", 3, columns=["s", "u"])
    with pytest.raises(ArtifactError, match="different tasks"):
        run(tmp_path, parents | {"target": other})
    ids = np.array([f"x{i:03d}" for i in range(N)])
    other = write_features(tmp_path / "ids", 3, example_id=ids)
    with pytest.raises(ArtifactError, match="different examples"):
        run(tmp_path, parents | {"target": other})
    flat = write_features(tmp_path / "flat", 3, dots=np.ones((N, 2)), norms=np.ones(N))
    with pytest.raises(NumericsError, match="all scores of a model are equal"):
        run(tmp_path, parents | {"target": flat})
