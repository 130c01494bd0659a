"""Sketched features from pass to ranking: every kind, shards, settings, tasks that come later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, exact_reader, job, random_examples, turns, write_pool, write_task
from oracles import inner, weight_gradients

from iprox.data.batches import collate
from iprox.data.chat import encode
from iprox.engine.loss import Batch
from iprox.engine.sketching import Sketcher
from iprox.errors import ArtifactError, NumericsError
from iprox.numerics.sketch import CountSketch
from iprox.stages import features, fidelity, query, ranking, sketches
from iprox.stages.feature_store import Features, open_scored
from iprox.stages.passes import Reader
from iprox.store.arrays import open_store
from iprox.store.tables import read_metadata, read_table
from iprox.study.schema import FeaturesSection

TASKS = {
    "t": [("b", "red?", "green"), ("a", "one?", "two three")],
    "u": [("c", "cat?", "dog sleeps over"), ("c", "blue?", "bird")],
}
EXAMPLES = random_examples(9)
SECTIONS: dict[str, dict[str, Any]] = {
    "countsketch": {"kind": "countsketch", "dim": 64, "dtype": "float32", "seed": 3},
    "logra": {"kind": "logra", "rank": 3, "dtype": "float32", "seed": 3},
    "lora": {"kind": "lora", "dim": 64, "rank": 3, "dtype": "float32", "seed": 3},
    "rademacher": {"kind": "random", "dim": 40, "dtype": "float32", "seed": 3},
    "gaussian": {
        "kind": "random",
        "dim": 40,
        "dtype": "float32",
        "seed": 3,
        "distribution": "gaussian",
    },
}
WHOLE = {"kind": "logra", "rank": 260, "dtype": "float32", "seed": 1}
"""Projections as wide as every layer: a rotation, which loses nothing."""


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    opened = exact_reader()
    for stage in (query, features):
        monkeypatch.setattr(stage, "open_reader", lambda *_: opened)
    return opened


@pytest.fixture
def pool(tmp_path: Path, reader: Reader) -> Path:
    return write_pool(tmp_path / "pool", EXAMPLES)


def make_queries(
    tmp_path: Path, tasks: Sequence[str] = ("t",), **influence: Any
) -> dict[str, Path]:
    """Query artifacts by role."""
    made = {}
    for name in tasks:
        out = tmp_path / f"query-{name}{len(list(tmp_path.iterdir()))}"
        task = write_task(out.with_name(f"task-{out.name}"), TASKS[name])
        query.make(job("query", out, {"task": task}, influence=influence))
        made[f"query/{name}"] = out
    return made


def make_features(
    tmp_path: Path,
    pool: Path,
    section: dict[str, Any],
    shards: Sequence[tuple[int, int]] = ((0, 9),),
    **more: Any,
) -> Path:
    """A sketched features artifact in shards of these rows."""
    folder = tmp_path / f"features{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for number, rows in enumerate(shards):
        out = folder / "out"
        stage = job(
            "features", out, {"pool": pool}, rows, subset={"name": "all"}, features=section, **more
        )
        features.make(stage)
        (out / "shard.zarr").rename(folder / f"shard-{number:05d}.zarr")
        for left in out.iterdir():
            left.replace(folder / left.name)
        out.rmdir()
    return folder


def scored(
    tmp_path: Path, folder: Path, queries: dict[str, Path], section: dict[str, Any]
) -> Features:
    out = tmp_path / f"scored{len(list(tmp_path.iterdir()))}"
    return open_scored(
        job("ranking", out, {"features": folder, **queries}, features=section), "features", "query"
    ).read()


def batch_of(reader: Reader, prompt: str, response: str, **options: Any) -> Batch:
    tokens = encode(turns(prompt, response), reader.tokenizer, **CHAT, **options)
    return Batch(*collate([tokens], 0))


@pytest.mark.parametrize("kind", SECTIONS)
def test_scores_are_those_of_sketched_gradients(
    tmp_path: Path, reader: Reader, pool: Path, kind: str
) -> None:
    section = SECTIONS[kind]
    found = scored(
        tmp_path, make_features(tmp_path, pool, section), make_queries(tmp_path), section
    )
    shapes = {n: tuple(layer.weight.shape) for n, layer in reader.layers.items()}
    sketch = sketches.build_sketch(FeaturesSection(**section), shapes, torch.device("cpu"))

    def sketch_of(batch: Batch) -> torch.Tensor:
        gradient = weight_gradients(reader.model, reader.layers, batch)
        row = torch.zeros(1, sketch.dim, dtype=torch.float64)
        for name, weight in gradient.items():
            sketch.add_gradients(name, weight[None], row)
        return row[0]

    wanted = [batch_of(reader, p, c, eos=False, last_only=True) for _, p, c in TASKS["t"]]
    mean = sum(map(sketch_of, wanted)) / len(wanted)
    assert found.query_norms == pytest.approx([float(mean.norm())], rel=1e-5)
    assert found.example_id.to_pylist() == sorted(EXAMPLES)
    for i, name in enumerate(sorted(EXAMPLES)):
        batch = batch_of(reader, *EXAMPLES[name])
        row = sketch_of(batch)
        assert found.norms[i] == pytest.approx(float(row.norm()), rel=1e-5)
        scale = float(row.norm() * mean.norm())
        assert found.dots[i, 0] == pytest.approx(float(row @ mean), abs=1e-5 * scale)
        assert found.tokens[i] == int(batch.lengths)


def test_a_sketch_that_loses_nothing_ranks_exactly(
    tmp_path: Path, reader: Reader, pool: Path
) -> None:
    queries = make_queries(tmp_path, ["t", "u"])
    exact = tmp_path / "exact"
    features.make(job("features", exact, {"pool": pool, **queries}, subset={"name": "all"}))
    (exact / "shard.zarr").rename(exact / "shard-00000.zarr")
    sketched = make_features(tmp_path, pool, WHOLE)
    tables = {}
    for name, parents, more in (
        ("one", {"features": exact}, {}),
        ("two", {"features": sketched, **queries}, {"features": WHOLE}),
    ):
        out = tmp_path / name
        ranking.make(job("ranking", out, parents, scorer={}, tasks=["t", "u"], **more))
        tables[name] = read_table(out / "ranking.parquet")
    first, second = tables["one"], tables["two"]
    assert first.drop(columns="score").equals(second.drop(columns="score"))
    np.testing.assert_allclose(first["score"], second["score"], atol=1e-6)
    about = read_metadata(tmp_path / "two" / "ranking.parquet")["features"]
    assert about["kind"] == "logra"
    folder = tmp_path / "fidelity"
    parents = {"proxy": sketched, "target": exact}
    parents |= {f"proxy_{role}": path for role, path in queries.items()}
    fidelity.make(job("fidelity", folder, parents, fidelity={"bootstrap": 20}, features=WHOLE))
    table = read_table(folder / "fidelity.parquet").set_index(["task", "metric"])
    assert table.loc[("mean", "spearman"), "value"] == pytest.approx(1)
    assert table.loc[("mean", "loss_retention"), "value"] == pytest.approx(1)


def test_subtasks_are_columns_of_their_own(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = make_queries(tmp_path, ["t", "u"], val_agg="subtask_max")
    folder = make_features(tmp_path, pool, WHOLE)
    found = scored(tmp_path, folder, queries, WHOLE)
    assert found.columns == ["t/a", "t/b", "u/c"]
    cosines = found.dots / found.norms[:, None] / found.query_norms
    np.testing.assert_allclose(found.scores("cosine")["t"], cosines[:, :2].max(1), rtol=1e-6)
    monkeypatch.setattr(sketches, "QUERY_BYTES", 1)  # one column at a time
    again = scored(tmp_path, folder, queries, WHOLE)
    np.testing.assert_allclose(again.dots, found.dots, rtol=1e-5, atol=1e-7)


def test_a_new_task_is_ranked_without_the_model(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = SECTIONS["logra"]
    folder = make_features(tmp_path, pool, section)
    later = make_queries(tmp_path, ["u"])
    monkeypatch.setattr(features, "open_reader", lambda *_: pytest.fail("a model was opened"))
    found = scored(tmp_path, folder, later, section)
    assert found.columns == ["u"]
    assert np.isfinite(found.scores("cosine")["u"]).all()


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("cuts", [[(0, 4), (4, 9)], [(0, 0), (0, 9)]], ids=["two", "one empty"])
def test_shards_and_blocks_change_nothing(
    tmp_path: Path,
    pool: Path,
    kind: str,
    cuts: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section, queries = SECTIONS[kind], make_queries(tmp_path)
    one = make_features(tmp_path, pool, section)
    monkeypatch.setattr(sketches, "BLOCK_EXAMPLES", 2)
    two = make_features(tmp_path, pool, section, cuts)
    assert open_store(two / "shard-00001.zarr")["sketch"].chunks[0] == 2
    whole, parts = (scored(tmp_path, folder, queries, section) for folder in (one, two))
    assert parts.example_id.equals(whole.example_id)
    np.testing.assert_allclose(parts.dots, whole.dots, rtol=1e-5, atol=1e-6 * whole.dots.std())
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-10)
    assert (one / "sketch.parquet").read_bytes() == (two / "sketch.parquet").read_bytes()


def test_errors_of_cosines_are_those_of_autograd(
    tmp_path: Path, reader: Reader, pool: Path
) -> None:
    section = SECTIONS["countsketch"]
    folder = make_features(tmp_path, pool, section)
    row = read_table(folder / "sketch.parquet").iloc[0]
    store = open_store(folder / "shard-00000.zarr")
    gradients = [
        weight_gradients(reader.model, reader.layers, batch_of(reader, *EXAMPLES[name]))
        for name in sorted(EXAMPLES)
    ]
    unit = store["sketch"][:].astype(np.float64)
    errors = []
    for i, first in enumerate(gradients):
        for j, second in enumerate(gradients[:i]):
            scale = (inner(first, first) * inner(second, second)) ** 0.5
            errors.append(abs(unit[i] @ unit[j] - inner(first, second) / scale))
    assert row["pairs"] == len(errors) == 36
    assert row["mean_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert row["max_error"] == pytest.approx(np.max(errors), rel=1e-5)
    assert row["bytes_per_example"] == 64 * 4


def test_a_sketch_that_loses_nothing_has_no_error(
    tmp_path: Path, pool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_features(tmp_path, pool, WHOLE | {"check": 5})
    row = read_table(folder / "sketch.parquet").iloc[0]
    assert row["examples"] == 5
    assert row["max_error"] < 1e-5
    assert row["spearman"] == pytest.approx(1)
    assert "raise features.dim" not in caplog.text
    make_features(tmp_path, pool, {"kind": "countsketch", "dim": 2})
    assert "raise features.dim" in caplog.text


def test_no_check_writes_no_errors(tmp_path: Path, pool: Path) -> None:
    folder = make_features(tmp_path, pool, SECTIONS["logra"] | {"check": 0})
    assert not (folder / "sketch.parquet").exists()


def test_half_precision_is_safe_for_gradients_of_any_size(tmp_path: Path) -> None:
    rows = np.array([[3e8, -4e8], [3e-9, 4e-9], [0, 0]])
    unit, norms = sketches.unit_rows(rows, "float16")
    np.testing.assert_allclose(unit, [[0.6, -0.8], [0.6, 0.8], [0, 0]], atol=1e-3)
    assert norms.tolist() == [5e8, 5e-9, 0]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"kind": "random", "dim": 64}, "kind"),
        ({"dim": 65}, "dim"),
        ({"seed": 4}, "seed"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_a_store_of_other_settings_is_refused(
    tmp_path: Path, pool: Path, change: dict[str, Any], setting: str
) -> None:
    section = SECTIONS["countsketch"]
    folder, queries = make_features(tmp_path, pool, section), make_queries(tmp_path)
    with pytest.raises(ArtifactError, match=f"with another {setting}"):
        scored(tmp_path, folder, queries, section | change)


def test_other_ranks_layers_and_losses_are_refused(
    tmp_path: Path, reader: Reader, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = SECTIONS["logra"]
    folder, queries = make_features(tmp_path, pool, section), make_queries(tmp_path)
    with pytest.raises(ArtifactError, match="with another rank"):
        scored(tmp_path, folder, queries, section | {"rank": 4})
    summed = make_queries(tmp_path, loss_reduction="token_sum")
    with pytest.raises(ArtifactError, match="with another loss_reduction"):
        scored(tmp_path, folder, summed, section)
    fewer = reader._replace(layers=dict(list(reader.layers.items())[1:]))
    monkeypatch.setattr(query, "open_reader", lambda *_: fewer)
    with pytest.raises(ArtifactError, match="with another layers"):
        scored(tmp_path, folder, make_queries(tmp_path), section)
    with pytest.raises(ArtifactError, match="with another kind"):
        scored(tmp_path, folder, {}, section)  # read as exact features


def test_an_example_without_a_response_scores_lowest(tmp_path: Path, reader: Reader) -> None:
    pool = write_pool(
        tmp_path / "pool", {"a": ("long " * 20, "no"), "b": ("hi", "yes"), "c": ("ho", "no")}
    )
    folder = make_features(tmp_path, pool, SECTIONS["logra"], [(0, 3)])
    found = scored(tmp_path, folder, make_queries(tmp_path), SECTIONS["logra"])
    assert found.norms[0] == 0
    assert np.isnan(found.loss[0])
    for score in ("cosine", "dot"):
        assert found.scores(score)["t"][0] == -np.inf
        assert np.isfinite(found.scores(score)["t"][1:]).all()
    assert read_table(folder / "sketch.parquet").iloc[0]["examples"] == 2


def test_a_gradient_that_is_not_finite_names_example_and_layer(reader: Reader) -> None:
    shapes = {n: tuple(layer.weight.shape) for n, layer in reader.layers.items()}
    sketch = CountSketch(shapes, 8, 0, torch.device("cpu"))
    name = list(reader.layers)[0]

    def overflow(module: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    reader.layers[name].register_forward_hook(overflow)
    sketcher = Sketcher(reader.model, reader.layers, sketch)
    with pytest.raises(NumericsError, match="example ex-1, layer"):
        sketcher.sketch(batch_of(reader, "one", "two"), ["ex-1"])


def test_stages_run_on_a_saved_model(tmp_path: Path, target_folder: Path) -> None:
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    out = tmp_path / "out"
    section = {"kind": "logra", "rank": 4}
    parents = {"pool": pool, "model": target_folder}
    metrics = features.make(job("features", out, parents, subset={"name": "all"}, features=section))
    assert metrics["examples"] == 9
    assert metrics["sketch_max_error"] > 0
    store = open_store(out / "shard.zarr")
    assert store["sketch"].dtype == np.float16
    norms = np.linalg.norm(store["sketch"][:].astype(float), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)
