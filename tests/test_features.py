"""Query gradients and features against autograd, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import (
    CHAT,
    exact_reader,
    job,
    random_examples,
    turns,
    write_pool,
    write_split,
    write_task,
)
from oracles import inner, weight_gradients
from torch import Tensor

from iprox.data.batches import collate
from iprox.data.chat import encode
from iprox.engine import scoring
from iprox.engine.loss import Batch
from iprox.errors import ArtifactError, NumericsError
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy
from iprox.stages import features, query
from iprox.stages.feature_store import Features, open_shards, read_features, restrict
from iprox.stages.passes import Reader
from iprox.store.arrays import open_store
from iprox.study.schema import LayersSection

QUERIES = [("b", "red?", "green"), ("a", "one?", "two three"), ("b", "cat?", "dog sleeps over")]
EXAMPLES = random_examples(7)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    opened = exact_reader()
    for stage in (query, features):
        monkeypatch.setattr(stage, "open_reader", lambda *_: opened)
    return opened


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool", EXAMPLES)


def make_query(tmp_path: Path, val_agg: str = "mean_raw", name: str = "t") -> Path:
    task = write_task(tmp_path / f"task-{name}-{val_agg}", QUERIES)
    out = tmp_path / f"query-{name}-{val_agg}"
    query.make(job("query", out, {"task": task}, influence={"val_agg": val_agg}))
    return out


def make_features(
    tmp_path: Path,
    parents: dict[str, Path],
    shards: Sequence[tuple[int, int]] = ((0, 7),),
    **influence: Any,
) -> Features:
    """Features in shards of these rows, gathered."""
    folder = tmp_path / f"features{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for number, rows in enumerate(shards):
        out = folder / "out"
        stage = {"subset": {"name": "all"}, "influence": influence}
        features.make(job("features", out, parents, rows, **stage))
        (out / "shard.zarr").rename(folder / f"shard-{number:05d}.zarr")
        out.rmdir()
    return read_features(folder)


def example(reader: Reader, prompt: str, response: str, **options: Any) -> Batch:
    tokens = encode(turns(prompt, response), reader.tokenizer, **CHAT, **options)
    return Batch(*collate([tokens], 0))


def query_gradients(reader: Reader) -> list[dict[str, Tensor]]:
    batches = [example(reader, p, c, eos=False, last_only=True) for _, p, c in QUERIES]
    return [weight_gradients(reader.model, reader.layers, b) for b in batches]


def stored(folder: Path, group: int = 0) -> dict[str, Tensor]:
    store = open_store(folder / "query.zarr")
    names = store.attrs["layers"]
    return {n: torch.from_numpy(store[f"gradients/{n}"][group]).double() for n in names}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor.float().double(), rtol=1e-6, atol=1e-9)


def combined(gradients: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) / len(gradients)
        for name in gradients[0]
    }


def test_mean_raw_is_the_mean_of_the_gradients(tmp_path: Path, reader: Reader) -> None:
    folder = make_query(tmp_path)
    expected = combined(query_gradients(reader), [1, 1, 1])
    assert_same(stored(folder), expected)
    norms = open_store(folder / "query.zarr")["norms"][:]
    assert norms == pytest.approx([inner(expected, expected) ** 0.5], rel=1e-10)


def test_mean_unit_is_the_mean_of_the_unit_gradients(tmp_path: Path, reader: Reader) -> None:
    gradients = query_gradients(reader)
    expected = combined(gradients, [inner(g, g) ** -0.5 for g in gradients])
    assert_same(stored(make_query(tmp_path, "mean_unit")), expected)


def test_subtask_max_has_a_group_per_subtask(tmp_path: Path, reader: Reader) -> None:
    folder = make_query(tmp_path, "subtask_max")
    first, second, third = query_gradients(reader)
    assert list(open_store(folder / "query.zarr")["group"][:]) == ["a", "b"]
    assert_same(stored(folder, 0), second)
    assert_same(stored(folder, 1), combined([first, third], [1, 1]))


def test_features_equal_autograd(tmp_path: Path, reader: Reader, pool: Path) -> None:
    made = make_query(tmp_path)
    found = make_features(tmp_path, {"pool": pool, "query/t": made})
    assert found.columns == ["t"]
    vector = stored(made)
    for i, example_id in enumerate(found.example_id.to_pylist()):
        batch = example(reader, *EXAMPLES[example_id])
        gradient = weight_gradients(reader.model, reader.layers, batch)
        norm = inner(gradient, gradient) ** 0.5
        assert found.norms[i] == pytest.approx(norm, rel=1e-10)
        assert found.dots[i, 0] == pytest.approx(inner(gradient, vector), rel=1e-10)
        cosine = inner(gradient, vector) / norm / inner(vector, vector) ** 0.5
        assert found.scores("cosine")["t"][i] == pytest.approx(cosine, rel=1e-6)
        assert found.tokens[i] == int(batch.lengths)
        assert found.supervised[i] == int((batch.labels >= 0).sum())


def test_dots_by_layer_equal_autograd(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of factorised layers, whose two factors are one layer's share."""
    dense = exact_reader()
    thin = [n for n in dense.layers if n.endswith(("up_proj", "q_proj"))]
    factors = {n: random_factors(dense.layers[n].weight) for n in thin}
    model = as_proxy(dense.model, factors).eval().requires_grad_(False)
    reader = dense._replace(model=model, layers=scored_linears(model, LayersSection()))
    for stage in (query, features):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)
    vector, out = stored(made := make_query(tmp_path)), tmp_path / "out"
    parents = {"pool": pool, "query/t": made}
    features.make(job("features", out, parents, (0, 7), subset={"name": "all"}))
    store = open_store(out / "shard.zarr")
    assert sorted(store["layers"][:]) == sorted(dense.layers)
    for i, texts in enumerate(EXAMPLES.values()):
        gradient = weight_gradients(reader.model, reader.layers, example(reader, *texts))
        for place, name in enumerate(store["layers"][:]):
            own = [f"{name}.left", f"{name}.right"] if name in thin else [str(name)]
            expected = sum(float((gradient[n] * vector[n]).sum()) for n in own)
            assert store["layer_dots"][i, 0, place] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert store.attrs["scored_parameters"] == sum(
        layer.weight.numel() for layer in reader.layers.values()
    )
    assert store.attrs["parameters"] == sum(p.numel() for p in model.parameters())


def random_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    out_dim, in_dim = weight.shape
    left, right = (torch.randn(*size, generator=generator) for size in ((out_dim, 3), (3, in_dim)))
    return left.double(), right.double()


def test_dots_by_layer_of_a_large_pool_are_not_kept(
    tmp_path: Path, reader: Reader, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    kept = 4 * len(EXAMPLES) * len(reader.layers)
    for limit in (kept, kept - 1):
        monkeypatch.setattr(features, "LAYER_DOTS_BYTES", limit)
        out = tmp_path / f"out{limit}"
        # the shard alone would fit under both limits
        features.make(job("features", out, parents, (0, 3), subset={"name": "all"}))
        assert ("layer_dots" in open_store(out / "shard.zarr")) == (limit == kept)


def test_the_maximum_over_subtasks_is_taken(tmp_path: Path, reader: Reader, pool: Path) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path, "subtask_max")}
    parents["query/u"] = make_query(tmp_path, "subtask_max", name="u")
    found = make_features(tmp_path, parents)
    assert found.columns == ["t/a", "t/b", "u/a", "u/b"]
    cosines = found.dots / found.norms[:, None] / found.query_norms
    np.testing.assert_allclose(found.scores("cosine")["t"], cosines[:, :2].max(1), rtol=1e-6)
    np.testing.assert_allclose(found.scores("dot")["u"], found.dots[:, 2:].max(1), rtol=1e-6)


@pytest.mark.parametrize(
    "cuts", [[(0, 3), (3, 7)], [(0, 1), (1, 1), (1, 7)]], ids=["two", "one empty"]
)
def test_shards_joined_are_one_run(
    tmp_path: Path, reader: Reader, pool: Path, cuts: list[tuple[int, int]]
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    whole, parts = make_features(tmp_path, parents), make_features(tmp_path, parents, cuts)
    assert parts.example_id.tolist() == whole.example_id.tolist() == sorted(EXAMPLES)
    np.testing.assert_allclose(parts.dots, whole.dots, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-10)


def test_batch_size_changes_nothing(
    tmp_path: Path, reader: Reader, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    whole = make_features(tmp_path, parents)
    monkeypatch.setattr(scoring, "CPU_BATCH_TOKENS", 1)
    single = make_features(tmp_path, parents)
    np.testing.assert_allclose(single.dots, whole.dots, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(single.loss, whole.loss, rtol=1e-10)


@pytest.mark.parametrize("query_home", ["memory", "disk"])
def test_queries_that_do_not_fit_give_the_same(
    tmp_path: Path,
    reader: Reader,
    pool: Path,
    monkeypatch: pytest.MonkeyPatch,
    query_home: str,
) -> None:
    """A pass for each column, or one for all of them from a file, to the same bits."""
    parents = {"pool": pool, "query/t": make_query(tmp_path, "subtask_max")}
    whole = make_features(tmp_path, parents)
    monkeypatch.setattr(features, "free_bytes", lambda _: 1)
    scorers: list[scoring.Scorer] = []

    def counted(*args: Any, **options: Any) -> scoring.Scorer:
        scorers.append(scoring.Scorer(*args, **options))
        return scorers[-1]

    monkeypatch.setattr(features, "Scorer", counted)
    again = make_features(tmp_path, parents, query_home=query_home)
    assert len(whole.columns) > 1
    assert len(scorers) == (1 if query_home == "disk" else len(whole.columns))
    tolerance = 0 if query_home == "disk" else 1e-10
    np.testing.assert_allclose(again.dots, whole.dots, rtol=tolerance, atol=tolerance * 1e-4)
    np.testing.assert_allclose(again.norms, whole.norms, rtol=tolerance)


def test_an_example_without_a_response_is_marked_and_scores_lowest(
    tmp_path: Path, reader: Reader
) -> None:
    pool = write_pool(tmp_path / "pool", {"a": ("long " * 20, "no"), "b": ("hi", "yes")})
    out = tmp_path / "out"
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    metrics = features.make(job("features", out, parents, subset={"name": "all"}))
    assert metrics["unsupervised"] == metrics["truncated"] == 1
    found = open_shards([out / "shard.zarr"]).read()
    assert found.supervised[0] == 0
    assert found.dots[0, 0] == found.norms[0] == 0
    assert np.isnan(found.loss[0])
    for score in ("cosine", "dot"):
        assert found.scores(score)["t"][0] == -np.inf
        assert np.isfinite(found.scores(score)["t"][1])


def test_only_the_slice_is_scored_for_fidelity(tmp_path: Path, reader: Reader, pool: Path) -> None:
    split = write_split(tmp_path / "split", "fidelity", ["e005", "e001", "e002"])
    parents = {"pool": pool, "query/t": make_query(tmp_path), "split": split}
    features.make(job("features", tmp_path / "out", parents, subset={"name": "fidelity"}))
    part = open_shards([tmp_path / "out" / "shard.zarr"]).read()
    assert part.example_id.tolist() == ["e001", "e002", "e005"]
    whole = restrict(make_features(tmp_path, parents), ["e002", "e001", "e005"])
    assert whole.example_id.tolist() == ["e001", "e002", "e005"]
    np.testing.assert_allclose(part.dots, whole.dots, rtol=1e-10, atol=1e-14)


def test_queries_made_otherwise_are_refused(tmp_path: Path, reader: Reader, pool: Path) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    parents["query/u"] = make_query(tmp_path, "mean_unit")
    with pytest.raises(ArtifactError, match="differ in val_agg"):
        make_features(tmp_path, parents)


def test_an_example_in_two_shards_is_an_error(tmp_path: Path, reader: Reader, pool: Path) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    with pytest.raises(ArtifactError, match="in two shards"):
        make_features(tmp_path, parents, [(0, 4), (3, 7)])


def test_stages_run_on_a_saved_model(tmp_path: Path, target_folder: Path, pool: Path) -> None:
    task = write_task(tmp_path / "task", QUERIES)
    out = tmp_path / "query"
    query.make(job("query", out, {"task": task, "model": target_folder}))
    parents = {"pool": pool, "query/t": out, "model": target_folder}
    found = make_features(tmp_path, parents)
    assert np.isfinite(found.scores("cosine")["t"]).all()


def test_an_example_that_is_not_finite_stops_the_job_or_is_left_out(
    tmp_path: Path, reader: Reader, pool: Path
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    expected = make_features(tmp_path, parents)
    ids = expected.example_id.to_pylist()
    tokens = [set(example(reader, *EXAMPLES[i]).input_ids[0].tolist()) for i in ids]
    broken, own = next(
        (i, min(owned))
        for i, one in enumerate(tokens)
        if (owned := one - set().union(*(t for j, t in enumerate(tokens) if j != i)))
    )
    untied = reader.model.lm_head.weight.clone()
    reader.model.lm_head.weight = torch.nn.Parameter(untied, requires_grad=False)
    reader.model.get_input_embeddings().weight[own] = float("nan")
    with pytest.raises(NumericsError, match=ids[broken]):
        make_features(tmp_path, parents)
    out = tmp_path / "skipping"
    settings = {"on_nonfinite": "skip"}
    made = features.make(
        job("features", out, parents, (0, 7), subset={"name": "all"}, influence=settings)
    )
    assert made["skipped"] == 1
    assert open_store(out / "shard.zarr").attrs["skipped"] == {ids[broken]: "loss"}
    (out / "shard.zarr").rename(out / "shard-00000.zarr")
    found = read_features(out)
    for score in ("cosine", "dot"):
        kept, whole = found.scores(score)["t"], expected.scores(score)["t"]
        assert np.isneginf(kept[broken])
        others = np.arange(7) != broken
        np.testing.assert_allclose(kept[others], whole[others], rtol=1e-6)


def test_cut_queries_score_like_their_approximation_and_say_what_is_lost(
    tmp_path: Path, reader: Reader, pool: Path
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    exact = make_features(tmp_path, parents)
    vector = stored(parents["query/t"])
    for rank in (2, 1000):
        out = tmp_path / f"rank-{rank}"
        settings = {"query_rank": rank}
        features.make(
            job("features", out, parents, (0, 7), subset={"name": "all"}, influence=settings)
        )
        attributes = open_store(out / "shard.zarr").attrs
        lost = 0.0
        near = {}
        for name, matrix in vector.items():
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            near[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
            lost += float(s[rank:].square().sum())
        share = (lost / inner(vector, vector)) ** 0.5
        assert attributes["query_truncation"]["t"] == pytest.approx(share, rel=1e-5, abs=1e-9)
        (out / "shard.zarr").rename(out / "shard-00000.zarr")
        found = read_features(out)
        np.testing.assert_allclose(found.norms, exact.norms, rtol=1e-9)
        for i, example_id in enumerate(found.example_id.to_pylist()):
            batch = example(reader, *EXAMPLES[example_id])
            gradient = weight_gradients(reader.model, reader.layers, batch)
            expected = inner(gradient, near)
            assert found.dots[i, 0] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_queries_in_bfloat16_score_like_their_rounding_and_say_what_is_lost(
    tmp_path: Path, reader: Reader, pool: Path
) -> None:
    parents = {"pool": pool, "query/t": make_query(tmp_path)}
    vector = stored(parents["query/t"])
    rounded = {name: matrix.bfloat16().to(matrix) for name, matrix in vector.items()}
    difference = {name: matrix - rounded[name] for name, matrix in vector.items()}
    out = tmp_path / "rounded"
    settings = {"query_dtype": "bfloat16"}
    features.make(job("features", out, parents, (0, 7), subset={"name": "all"}, influence=settings))
    share = (inner(difference, difference) / inner(vector, vector)) ** 0.5
    lost = open_store(out / "shard.zarr").attrs["query_truncation"]["t"]
    assert lost == pytest.approx(share, rel=1e-5)
    (out / "shard.zarr").rename(out / "shard-00000.zarr")
    found = read_features(out)
    for i, example_id in enumerate(found.example_id.to_pylist()):
        gradient = weight_gradients(
            reader.model, reader.layers, example(reader, *EXAMPLES[example_id])
        )
        assert found.dots[i, 0] == pytest.approx(inner(gradient, rounded), rel=1e-6, abs=1e-9)
