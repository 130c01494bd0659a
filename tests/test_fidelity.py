"""Fidelity tables against scipy on the scores the stage compares."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from artifacts import job, write_split
from scipy import stats

from iprox.errors import ArtifactError, NumericsError
from iprox.numerics.correlation import bootstrap, interval, spearman
from iprox.numerics.regression import cross_validated_ridge
from iprox.stages import fidelity
from iprox.stages.feature_store import PER_EXAMPLE, read_features
from iprox.store.arrays import create_store, put
from iprox.store.tables import read_table

N = 60
TASKS = ["s", "t"]


LAYERS = ["first", "second"]
LENGTHS = np.arange(N) % 17 + 4


def write_features(
    folder: Path,
    seed: int,
    columns: list[str] = TASKS,
    layers: list[str] = LAYERS,
    about: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """Random features whose scores agree in part, through a common share."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    size = (N, len(columns))
    arrays = {
        "example_id": np.array([f"e{i:03d}" for i in range(N)]),
        "dots": common.normal(size=size) + own.normal(size=size),
        "norms": 1 + own.random(N),
        "loss": 2 + own.random(N),
        "tokens": LENGTHS,
        "supervised": LENGTHS // 2,
    } | changes
    shares = own.dirichlet(np.ones(len(layers)), size=size)
    folder.mkdir()
    store = create_store(folder / "shard-00000.zarr", {"queries": {}, **(about or {})})
    put(store, "layers", np.array(layers), ("layers",))
    layer_dots = (arrays["dots"][..., None] * shares).astype(np.float32)
    put(store, "layer_dots", layer_dots, ("examples", "columns", "layers"))
    for name in PER_EXAMPLE:
        put(store, name, arrays[name], ("examples", "columns")[: arrays[name].ndim])
    put(store, "columns", np.array(columns), ("columns",))
    put(store, "query_norms", np.ones(len(columns)), ("columns",))
    return folder


def run(tmp_path: Path, parents: dict[str, Path], **section: Any) -> pd.DataFrame:
    return make(tmp_path, parents, **section)[0]


def make(
    tmp_path: Path, parents: dict[str, Path], **section: Any
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Both tables and the metrics of a fidelity job."""
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    settings = {"bootstrap": 50} | section
    metrics = fidelity.make(job("fidelity", out, parents, fidelity=settings))
    tables = [read_table(out / name) for name in ("fidelity.parquet", "layers.parquet")]
    return tables[0].set_index(["task", "metric"]), tables[1].set_index(["task", "layer"]), metrics


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
    other = ("loss_mean", "length", "above_length")
    agreement = table[~table.index.get_level_values("metric").str.startswith(other)]
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


def test_examples_that_the_proxy_was_made_from_are_told_apart(tmp_path: Path) -> None:
    norms = np.ones(N)
    norms[:4] = 0  # cannot be scored, whoever was made from them
    pair = {
        "proxy": write_features(tmp_path / "p", 1, norms=norms),
        "target": write_features(tmp_path / "q", 2),
    }
    for name, numbers in (("probe", range(20)), ("align", range(15, 30))):
        ids = [f"e{i:03d}" for i in numbers]
        pair[f"made_of/{name}"] = write_split(tmp_path / name, name, ids)
    table = run(tmp_path, pair)
    values = []
    for k, task in enumerate(TASKS):
        features = (read_features(pair[role]) for role in ("proxy", "target"))
        ours, theirs = (f.dots[30:, k] / f.norms[30:] for f in features)
        values.append(stats.spearmanr(ours, theirs).statistic)
        assert table.loc[(task, "unseen_spearman"), "value"] == pytest.approx(values[-1], rel=1e-6)
    row = table.loc[("mean", "unseen_spearman")]
    assert row["value"] == pytest.approx(np.mean(values), rel=1e-6)
    assert row["low"] < row["value"] < row["high"]
    assert row["n"] == N - 30
    assert (table.loc[(slice(None), "spearman"), "n"] == N - 4).all()


def test_a_proxy_made_from_all_examples_has_no_unseen_ones(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    ids = [f"e{i:03d}" for i in range(N - 2)]
    table = run(tmp_path, parents | {"made_of/probe": write_split(tmp_path / "s", "probe", ids)})
    assert table.loc[(slice(None), "unseen_spearman"), "value"].isna().all()
    assert (table.loc[(slice(None), "unseen_spearman"), "n"] == 2).all()


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


# What lengths alone say, what it costs, and which layers lose it


def test_predictions_are_those_of_ridge_fits_to_the_other_folds() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(23, 3)), rng.normal(size=23)
    found = cross_validated_ridge(x, y, folds=5, penalty=2.0, seed=1)
    standard = (x - x.mean(0)) / x.std(0)
    fold = np.random.default_rng(1).permutation(23) % 5
    for k in range(5):
        inside, outside = standard[fold == k], standard[fold != k]
        # ridge by an augmented least-squares problem with a free intercept
        design = np.vstack(
            [np.column_stack([outside, np.ones(len(outside))]), np.eye(4)[:3] * 2.0**0.5]
        )
        weights = np.linalg.lstsq(design, np.append(y[fold != k], np.zeros(3)), rcond=None)[0]
        np.testing.assert_allclose(found[fold == k], inside @ weights[:3], rtol=1e-9)


def test_features_that_say_nothing_predict_nothing() -> None:
    values = np.random.default_rng(0).normal(size=12)
    assert (cross_validated_ridge(np.ones((12, 2)), values) == 0).all()
    noise = np.random.default_rng(1)
    chance = [
        float(spearman(cross_validated_ridge(noise.normal(size=(30, 1)), y), y))
        for y in noise.normal(size=(200, 30))
    ]
    assert abs(np.mean(chance)) < 0.05  # with intercepts it is about -0.2


def test_a_proxy_is_compared_with_a_guess_from_lengths(tmp_path: Path) -> None:
    """Scores that are a function of length leave nothing for a proxy to add."""
    by_length = np.log(LENGTHS)[:, None].repeat(2, axis=1)
    target = write_features(tmp_path / "target", 2, dots=by_length, norms=np.ones(N))
    proxy = write_features(tmp_path / "proxy", 1, norms=np.ones(N))
    table = run(tmp_path, {"proxy": proxy, "target": target}, bootstrap=40, seed=3)
    for task in (*TASKS, "mean"):
        assert table.loc[(task, "length_spearman"), "value"] > 0.99
        difference = table.loc[(task, "spearman"), "value"]
        difference -= table.loc[(task, "length_spearman"), "value"]
        assert table.loc[(task, "above_length"), "value"] == pytest.approx(difference, rel=1e-12)
    ours, theirs = cosines(proxy)[:, 0], cosines(target)[:, 0]
    lengths = np.column_stack([LENGTHS, np.log(LENGTHS), LENGTHS // 2])
    guess = cross_validated_ridge(lengths, theirs.astype(np.float64), seed=3)
    draws = [bootstrap(spearman, scores, theirs, 40, 3) for scores in (ours, guess)]
    assert tuple(table.loc[("s", "above_length"), ["low", "high"]]) == pytest.approx(
        interval(draws[0] - draws[1])
    )


def test_equal_lengths_say_nothing(tmp_path: Path) -> None:
    same = {"tokens": np.full(N, 9), "supervised": np.full(N, 3)}
    pair = {
        "proxy": write_features(tmp_path / "proxy", 1, **same),
        "target": write_features(tmp_path / "target", 2, **same),
    }
    table, _, metrics = make(tmp_path, pair)
    assert np.isnan(table.loc[("mean", "length_spearman"), "value"])
    assert "above_length" not in metrics


def test_cost_is_the_proxys_over_the_targets(tmp_path: Path) -> None:
    sizes = ("parameters", "scored_parameters", "flops")
    pair = {
        "proxy": write_features(
            tmp_path / "p", 1, about=dict(zip(sizes, (60, 5, 8.0), strict=True))
        ),
        "target": write_features(
            tmp_path / "q", 2, about=dict(zip(sizes, (80, 20, 16.0), strict=True))
        ),
    }
    table = run(tmp_path, pair).loc["mean"]
    found = [table.loc[f"{name}_ratio", "value"] for name in sizes]
    assert found == [0.75, 0.25, 0.5]
    assert "flops_ratio" not in run(tmp_path, pair | {"proxy": write_features(tmp_path / "r", 1)})


def test_each_layers_influence_is_compared(tmp_path: Path, parents: dict[str, Path]) -> None:
    _, layers, metrics = make(tmp_path, parents)
    assert metrics["layers"] == 2
    assert metrics["unmatched_layers"] == 0
    stores = [
        fidelity.open_scored(job("f", tmp_path / f"{r}-job", parents), r, "q") for r in parents
    ]
    dots = [store.layer_dots().dots.astype(np.float64) for store in stores]  # type: ignore[union-attr]
    norms = [store.read().norms for store in stores]
    for k, task in enumerate(TASKS):
        scale = [d[:, k] / n[:, None] for d, n in zip(dots, norms, strict=True)]
        for place, layer in enumerate(LAYERS):
            ours, theirs = (s[:, place] for s in scale)
            row = layers.loc[(task, layer)]
            assert row["spearman"] == pytest.approx(stats.spearmanr(ours, theirs).statistic)
            cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
            assert row["cosine"] == pytest.approx(cosine)
            share = np.abs(theirs).mean() / np.abs(scale[1]).mean(0).sum()
            assert row["share"] == pytest.approx(share)
    by_task = layers.loc[TASKS].groupby("layer")["spearman"].mean()
    np.testing.assert_allclose(layers.loc["mean"]["spearman"][by_task.index], by_task)


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_layers_add_up_to_the_score(tmp_path: Path, score: str) -> None:
    """Also where a task's score is the maximum over its subtasks."""
    folder = write_features(tmp_path / "f", 1, columns=["s/a", "s/b", "t/a"])
    store = fidelity.open_scored(job("f", tmp_path / "o", {"proxy": folder}), "proxy", "q")
    features, layers = store.read(), store.layer_dots()
    assert layers is not None
    parts = layers.contributions(features, score)
    for task, scores in features.scores(score).items():
        np.testing.assert_allclose(parts[task].sum(1), scores, rtol=1e-5, atol=1e-6)


def test_layers_of_one_model_only_are_counted(tmp_path: Path, parents: dict[str, Path]) -> None:
    other = write_features(tmp_path / "other", 3, layers=["second", "third", "fourth"])
    _, layers, metrics = make(tmp_path, parents | {"proxy": other})
    assert set(layers.index.get_level_values("layer")) == {"second"}
    assert (metrics["layers"], metrics["unmatched_layers"]) == (1, 3)


def test_without_products_by_layer_the_table_is_empty(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    """As for sketches."""
    shutil.rmtree(parents["proxy"] / "shard-00000.zarr" / "layer_dots")
    table, layers, metrics = make(tmp_path, parents)
    assert len(layers) == metrics["layers"] == 0
    assert list(layers.columns) == ["spearman", "cosine", "share", "n"]
    assert table.loc[("mean", "spearman"), "value"] == metrics["spearman"]
