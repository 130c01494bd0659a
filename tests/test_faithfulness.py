"""Linear datamodeling scores, and the passes and stages that measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import job, random_examples, write_pool
from oracles import exact_model, in_float64, inner, one_of, random_batch, weight_gradients
from scipy import stats
from torch import Tensor

from iprox.engine.attribution import Attribution, Examples
from iprox.engine.loss import hidden_states
from iprox.errors import ConfigError, DataError, NumericsError
from iprox.models.layers import scored_linears
from iprox.models.small import small_model, small_tokenizer
from iprox.numerics.datamodels import (
    datamodeling_scores,
    draw_subsets,
    subset_predictions,
    with_interval,
)
from iprox.numerics.kfac import Damping
from iprox.plan.faithfulness import check_judged, plan_faithfulness
from iprox.plan.plan import plan_study
from iprox.stages import faithfulness, retrain, small
from iprox.store.tables import read_arrow, read_table
from iprox.study.load import load_study
from iprox.study.schema import FaithfulnessSection, LayersSection

ROOT = Path(__file__).parents[1]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- the score ---------------------------------------------------------------------------------


def test_subsets_are_of_equal_size_and_a_seeds_own() -> None:
    masks = draw_subsets(10, 40, 0.5, seed=3)
    assert masks.shape == (40, 10)
    assert (masks.sum(axis=1) == 5).all()
    assert 0 < masks.mean(axis=0).min() < masks.mean(axis=0).max() < 1
    np.testing.assert_array_equal(masks, draw_subsets(10, 40, 0.5, seed=3))
    assert (masks != draw_subsets(10, 40, 0.5, seed=4)).any()


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_subsets_that_cannot_differ_are_refused(fraction: float) -> None:
    with pytest.raises(NumericsError, match="leave some examples out"):
        draw_subsets(10, 4, fraction, seed=0)


def test_the_score_is_the_rank_correlation_of_sums_query_by_query() -> None:
    scores, losses = normal(10, 3), normal(20, 3, seed=1)
    masks = draw_subsets(10, 20, 0.5, seed=0)
    slow = []
    for query in range(3):
        sums = [sum(s for s, kept in zip(scores[:, query], m, strict=True) if kept) for m in masks]
        slow.append(stats.spearmanr(sums, -losses[:, query]).statistic)
    np.testing.assert_allclose(datamodeling_scores(scores, masks, losses), slow, rtol=1e-12)


def test_scores_that_add_up_to_the_losses_are_perfect_and_their_opposite_the_worst() -> None:
    scores, masks = normal(12, 4), draw_subsets(12, 30, 0.5, seed=0)
    losses = 7 - subset_predictions(scores, masks).T
    np.testing.assert_allclose(datamodeling_scores(scores, masks, losses), 1)
    np.testing.assert_allclose(datamodeling_scores(-scores, masks, losses), -1)
    shifted = datamodeling_scores(3 * scores + 5, masks, losses)  # subsets are of equal size
    np.testing.assert_allclose(shifted, 1)


def test_the_interval_holds_the_mean_and_narrows_with_subsets() -> None:
    scores = normal(30, 6)

    def group(subsets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        masks = draw_subsets(30, subsets, 0.5, seed=1)
        noise = 4 * normal(subsets, 6, seed=2)
        return scores, masks, noise - subset_predictions(scores, masks).T

    few, drawn = with_interval([group(20), group(20)], 200, seed=0)
    many, _ = with_interval([group(320), group(320)], 200, seed=0)
    assert few.low < few.mean < few.high
    assert drawn.shape == (200,)
    assert many.high - many.low < 0.5 * (few.high - few.low)
    again, same = with_interval([group(20), group(20)], 200, seed=0)
    assert again == few
    np.testing.assert_array_equal(same, drawn)
    none, _ = with_interval([group(20)], 0, seed=0)
    assert np.isnan(none.low)
    assert none.mean == pytest.approx(datamodeling_scores(*group(20)).mean())


def test_a_score_that_is_not_finite_is_named() -> None:
    scores = normal(4, 2)
    scores[3, 1] = np.nan
    with pytest.raises(NumericsError, match="example 3, query 1"):
        subset_predictions(scores, draw_subsets(4, 3, 0.5, seed=0))


def test_influence_functions_predict_retraining_of_a_ridge_regression() -> None:
    """60 random halves, retrained in closed form; curvature beats plain gradients."""
    n, dim = 80, 8
    scale = np.geomspace(3, 0.1, dim)
    x, queries = normal(n, dim) * scale, normal(10, dim, seed=1) * scale
    truth = normal(dim, seed=2)
    y = x @ truth + normal(n, seed=3)
    answers = queries @ truth

    def fit(rows: np.ndarray) -> np.ndarray:
        return np.linalg.solve(x[rows].T @ x[rows] + 0.1 * np.eye(dim), x[rows].T @ y[rows])

    masks = draw_subsets(n, 60, 0.5, seed=0)
    losses = np.stack([(queries @ fit(m) - answers) ** 2 / 2 for m in masks])
    weights = fit(np.ones(n, dtype=bool))
    gradients = (x @ weights - y)[:, None] * x
    query_gradients = (queries @ weights - answers)[:, None] * queries
    plain = gradients @ query_gradients.T
    hessian = x.T @ x + 0.1 * np.eye(dim)
    solved = gradients @ np.linalg.solve(hessian, query_gradients.T)
    graddot, influence = (datamodeling_scores(s, masks, losses).mean() for s in (plain, solved))
    shuffled = [
        datamodeling_scores(np.random.default_rng(s).permutation(solved), masks, losses).mean()
        for s in range(20)
    ]
    assert influence > 0.2
    assert influence > graddot > 0.1
    assert graddot > 3 * np.std(shuffled)


# --- scores of a model in memory ---------------------------------------------------------------


@pytest.fixture(scope="module")
def attribution() -> Attribution:
    model = exact_model()
    layers = scored_linears(model, LayersSection(include=["layers.1.self_attn.[kv]_proj"]))
    train = [random_batch([7, 9, 5], [2, 3, 1], seed=1), random_batch([6, 8], [2, 2], seed=2)]
    queries = [random_batch([6], [3], seed=3), random_batch([8, 5], [2, 2], seed=4)]
    names = Examples(train, [["a", "b", "c"], ["d", "e"]])
    return Attribution(model, layers, names, Examples(queries, [["q"], ["r", "s"]]))


def gradients(attribution: Attribution, examples: Examples) -> list[dict[str, Tensor]]:
    """Every example's gradients, by autograd, one example at a time."""
    return [
        weight_gradients(attribution.model, attribution.layers, one_of(batch, row))
        for batch in examples.batches
        for row in range(len(batch.lengths))
    ]


def test_without_an_estimator_scores_are_inner_products(attribution: Attribution) -> None:
    train = gradients(attribution, attribution.train)
    queries = gradients(attribution, attribution.queries)
    found = attribution.influences(attribution.directions("tracin", Damping()))
    slow = torch.tensor([[inner(g, v) for v in queries] for g in train], dtype=torch.float64)
    torch.testing.assert_close(found.dots, slow, rtol=1e-9, atol=1e-12)
    norms = [found.dots.new_tensor([inner(g, g) ** 0.5 for g in s]) for s in (train, queries)]
    torch.testing.assert_close(found.cosines, slow / torch.outer(*norms), rtol=1e-9, atol=1e-12)


def test_datainf_is_the_mean_of_inverted_rank_one_matrices(attribution: Attribution) -> None:
    train = gradients(attribution, attribution.train)
    queries = gradients(attribution, attribution.queries)
    found = attribution.directions("datainf", Damping(0.3))
    for name in attribution.layers:
        rows = torch.stack([g[name].flatten() for g in train])
        damping = 0.3 * rows.square().mean()
        eye = torch.eye(rows.shape[1], dtype=rows.dtype)
        inverse = sum(torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in rows) / len(rows)
        slow = torch.stack([inverse @ v[name].flatten() for v in queries])
        torch.testing.assert_close(found[name].flatten(1), slow, rtol=1e-7, atol=1e-12)


def test_ekfac_is_the_best_diagonal_in_kfacs_basis(attribution: Attribution) -> None:
    train = gradients(attribution, attribution.train)
    for name, curvature in attribution.corrected.items():
        rows = torch.stack([g[name] for g in train])
        within = curvature.inputs.into(curvature.grads.into(rows.mT).mT)
        torch.testing.assert_close(curvature.corrected, within.square().mean(0))
        fisher = torch.einsum("za,zb->ab", rows.flatten(1), rows.flatten(1)) / len(rows)
        basis = torch.kron(curvature.grads.blocks[0], curvature.inputs.blocks[0])

        def error(values: Tensor, q: Tensor = basis, f: Tensor = fisher) -> float:
            return float((f - q @ torch.diag(values.flatten()) @ q.mT).norm())

        best = error(curvature.eigenvalues())
        assert best <= error(attribution.curvature[name].eigenvalues())
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            factors = torch.rand(rows.shape[1:], generator=generator, dtype=rows.dtype) * 2
            assert best <= error(curvature.eigenvalues() * factors)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
def test_curvature_is_inverted_in_its_full_matrix(attribution: Attribution, estimator: str) -> None:
    queries = gradients(attribution, attribution.queries)
    found = attribution.directions(estimator, Damping(0.2))
    curvatures = attribution.curvature if estimator == "kfac" else attribution.corrected
    for name, curvature in curvatures.items():
        basis = torch.kron(curvature.grads.blocks[0], curvature.inputs.blocks[0])
        values = curvature.eigenvalues().flatten()
        full = basis @ torch.diag(values + 0.2 * values.mean()) @ basis.mT
        for query, direction in zip(queries, found[name], strict=True):
            slow = torch.linalg.solve(full, query[name].flatten())
            torch.testing.assert_close(direction.flatten(), slow, rtol=1e-7, atol=1e-9)


def test_an_unknown_estimator_is_refused(attribution: Attribution) -> None:
    with pytest.raises(ConfigError, match="unknown estimator"):
        attribution.directions("newton", Damping())


# --- the tiny model and the stages -------------------------------------------------------------

SECTION: dict[str, Any] = {
    "candidates": 12,
    "queries": 3,
    "subsets": 6,
    "vocabulary": 280,
    "width": 16,
    "blocks": 1,
    "heads": 2,
    "max_length": 48,
    "pretrain_epochs": 1.0,
    "epochs": 2.0,
    "batch": 4,
    "seeds": 1,
    "bootstrap": 20,
}


def runs() -> dict[str, dict[str, Any]]:
    def one(**changes: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {"scorer": {}, "proxy": {"kind": "target"}, "influence": {}}
        return {**plain, "curvature": {}, **changes}

    return {
        "random": one(scorer={"kind": "random"}),
        "tracin": one(),
        "ekfac": one(influence={"estimator": "ekfac", "score": "dot"}),
        "ipsvd": one(proxy={"kind": "ipsvd", "rank_multiple": 1, "passes": "both"}),
        "made": one(proxy={"kind": "ipsvd", "rank_multiple": 1, "whiten": "queries"}),
        "back": one(proxy={"kind": "svd", "rank_multiple": 1, "passes": "backward"}),
    }


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("data") / "pool", random_examples(24))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> dict[str, Path]:
    """A tiny model, and its retrainings in two jobs."""
    folder = tmp_path_factory.mktemp("made")
    parents = {"pool": pool}
    small.make(job("small", folder / "small", parents, faithfulness=SECTION, seed=0))
    parents |= {"small": folder / "small"}
    for part, (first, last) in {"a": (0, 4), "b": (4, 6)}.items():
        about = {"seed": 0, "first": first, "last": last}
        retrain.make(job("retrain", folder / part, parents, faithfulness=SECTION, **about))
    return {
        "pool": pool,
        "small/0": folder / "small",
        "retrain/0/a": folder / "a",
        "retrain/0/b": folder / "b",
    }


def test_the_tiny_model_depends_on_its_seed_alone() -> None:
    tokenizer = small_tokenizer(["one two three"], 262)
    sizes = {"width": 16, "blocks": 1, "heads": 2, "max_length": 32}
    first, second, other = (
        small_model(tokenizer, **sizes, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    text = "three, two: \N{SNOWMAN}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_tokenizer_needs_room_for_all_bytes() -> None:
    with pytest.raises(DataError, match="all bytes"):
        small_tokenizer(["a"], 100)


def test_roles_do_not_overlap_and_use_the_whole_pool(made: dict[str, Path]) -> None:
    roles = read_table(made["small/0"] / "examples.parquet")
    assert roles["example_id"].is_unique
    assert roles["role"].value_counts().to_dict() == {"candidate": 12, "query": 3, "pretrain": 9}


def test_a_pool_that_is_too_small_is_refused(pool: Path, tmp_path: Path) -> None:
    section = SECTION | {"candidates": 22}
    with pytest.raises(DataError, match="too small"):
        small.make(job("small", tmp_path / "o", {"pool": pool}, faithfulness=section, seed=0))


def test_retraining_on_everything_gives_the_full_model(made: dict[str, Path]) -> None:
    """What a retraining job does with all candidates is what stage ``small`` did."""
    from iprox.study.schema import FaithfulnessSection

    section = FaithfulnessSection(**SECTION)
    start, tokenizer = small.read_small(made["small/0"], "start")
    full, _ = small.read_small(made["small/0"], "full")
    about = job("x", made["pool"].parent / "unused", {"pool": made["pool"]})
    texts = small.read_role(about, made["small/0"], "candidate", tokenizer, section)
    small.train(start, tokenizer, texts, section.trainings(0)[1])
    weights = full.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.state_dict().items())


def test_jobs_retrain_the_subsets_they_are_given(made: dict[str, Path]) -> None:
    rows = [
        r
        for part in "ab"
        for r in read_arrow(made[f"retrain/0/{part}"] / "losses.parquet").to_pylist()
    ]
    assert [row["subset"] for row in rows] == list(range(6))
    kept = np.array([row["kept"] for row in rows])
    np.testing.assert_array_equal(kept, draw_subsets(12, 6, 0.5, seed=0))
    losses = np.array([row["losses"] for row in rows])
    assert losses.shape == (6, 3)
    assert len(np.unique(losses[:, 0])) == 6


def test_the_table_has_every_run_and_what_proxies_keep(
    made: dict[str, Path], tmp_path: Path
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        counts = faithfulness.make(
            job("faithfulness", out, made, faithfulness=SECTION, runs=runs())
        )
        assert counts == {"runs": 6, "seeds": 1, "models": 6}
    table = read_table(outs[0] / "faithfulness.parquet").set_index("run")
    assert list(table.index) == list(runs())
    assert table["lds"].between(-1, 1).all()
    assert (table["low"] <= table["high"]).all()
    assert table["kept"].notna().to_dict() == dict.fromkeys(runs(), False) | {
        "ipsvd": True,
        "made": True,
        "back": True,
    }
    shares = table.loc[["ipsvd", "made", "back"]]
    np.testing.assert_allclose(shares["kept"], shares["lds"] / table.loc["tracin", "lds"])
    assert list(table["model"]) == [
        "none",
        "target",
        "target",
        "IPSVD 0.5",
        "IPSVD 0.5, backward",
        "SVD 0.5, backward",
    ]
    seeds = read_table(outs[0] / "seeds.parquet").set_index("run")
    np.testing.assert_allclose(seeds["lds"], table["lds"])
    assert "kept" in (outs[0] / "summary.txt").read_text()
    for path in outs[0].iterdir():
        assert (outs[1] / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_proxy_made_for_queries_is_weighted_by_inputs_that_move_along_them(
    made: dict[str, Path], tmp_path: Path
) -> None:
    asked = job("faithfulness", tmp_path / "out", made, faithfulness=SECTION, runs=runs())
    scorings = faithfulness.Scorings(asked, FaithfulnessSection(**SECTION), seed=0)
    scorings.model = in_float64(scorings.model.double())
    method = faithfulness.method_of("made", runs()["made"] | {"influence": {"estimator": "kfac"}})
    layers = scored_linears(scorings.model, method.proxy.layers)
    rows = faithfulness.Rows(layers)
    scorings._move_inputs(rows, method)
    at_target = scorings._attribution(method.at_target)
    directions = at_target.directions("kfac", method.damping)
    norms = sum(g.square().sum((1, 2)) for g in directions.values()).sqrt()
    last = list(layers)[-1]

    def inputs() -> Tensor:
        """Inputs of the last layer at all tokens."""
        seen: list[Tensor] = []
        keep = layers[last].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            for batch in scorings.train.batches:
                hidden_states(scorings.model, batch)
        keep.remove()
        lengths = torch.cat([b.lengths for b in scorings.train.batches]).tolist()
        examples = [example for x in seen for example in x]
        return torch.cat([x[:n] for x, n in zip(examples, lengths, strict=True)])

    moved = []
    for column in range(len(norms)):  # central differences of the weights along each query
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.weight += sign * 1e-4 * directions[name][column] / norms[column]
            ends.append(inputs())
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.weight -= sign * 1e-4 * directions[name][column] / norms[column]
        moved.append((ends[0] - ends[1]) / 2e-4)
    found = torch.cat(rows._inputs[last])
    torch.testing.assert_close(found, torch.cat(moved), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ({"proxy": {"kind": "layers"}}, "proxy.kind"),
        ({"proxy": {"sparsity": "auto"}}, "proxy.sparsity"),
        ({"proxy": {"rank_allocation": "global"}}, "proxy.rank_allocation"),
        ({"scorer": {"kind": "bm25"}}, "scorer.kind"),
        (
            {"proxy": {"kind": "target"}, "influence": {"estimator": "multistage"}},
            "influence.estimator",
        ),
        ({"influence": {"checkpoints": "epochs"}}, "influence.checkpoints"),
    ],
)
def test_a_run_that_the_tiny_model_cannot_follow_is_named(run: dict[str, Any], key: str) -> None:
    path = ROOT / "config" / "small" / "faithfulness.yaml"
    check_judged(plan_study(load_study([path])))
    extra = {"finetuned": {"pool": {"name": "alpaca-demo"}}, "runs": {"mine": run}}
    plan = plan_study(load_study([path], extra))
    with pytest.raises(ConfigError, match=f"runs.mine: {key}"):
        check_judged(plan)


def test_the_plan_shares_the_studys_pool_and_changes_none_of_its_stages() -> None:
    study = load_study([ROOT / "config" / "small" / "faithfulness.yaml"])
    plan = plan_study(study)
    before = dict(plan.nodes)
    beside, last = plan_faithfulness(plan)
    assert plan.nodes == before
    assert last.parents["pool"] is plan.shared["pool"]
    stages = pd.Series([node.stage for node in beside.nodes.values()]).value_counts()
    assert stages.to_dict() == {"retrain": 6, "small": 3, "faithfulness": 1}
    assert set(last.params["runs"]) == set(plan.runs)
    spans = [n.params for n in beside.nodes.values() if n.stage == "retrain"]
    assert sorted({(p["first"], p["last"]) for p in spans}) == [(0, 32), (32, 64)]
