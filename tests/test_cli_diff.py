from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cli_artifacts import (
    Results,
    evaluation_writer,
    every_stage,
    fidelity_writer,
    ranking_writer,
    write_factors,
    write_features,
    write_proxy,
)
from scipy.stats import spearmanr
from typer.testing import CliRunner

from iprox.cli.diff import agreement
from iprox.cli.main import app
from iprox.plan.nodes import Node
from iprox.store.tables import write_table


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Results, dict[str, Node]]:
    """Runs `a` and `b` of one study: b has another sparsity, and other results from there on."""
    results = Results(tmp_path)
    a = every_stage(results)
    b = dict(a)
    add = results.add
    made = {"decomposition": a["decomposition"]}
    b["factors"] = add("factors", "g", {"factors": {"sparsity": 0.7}}, made, write_factors)
    b["proxy"] = add("proxy", "g", {"align": {}}, {"factors": b["factors"]}, write_proxy)
    b["features"] = add(
        "features", "g", {"influence": {}}, {"model": b["proxy"], "pool": a["pool"]}, write_features
    )
    scored = {"features": b["features"]}
    writer = ranking_writer([0.4, 0.1, -np.inf, 0.3])
    b["ranking"] = add("ranking", "g", {"influence": {"score": "dot"}}, scored, writer)
    b["fidelity"] = add("fidelity", "g", {"fidelity": {}}, scored, fidelity_writer(0.5))
    b["evaluation"] = add(
        "evaluation",
        "g-mmlu",
        {"evaluate": {}},
        {"model": a["finetune"], "ranking": b["ranking"]},
        evaluation_writer(1.5),
    )
    names = ("pool", "factors", "proxy", "features", "ranking", "fidelity")
    for run, nodes in (("a", a), ("b", b)):
        results.link(
            "demo", run, {n: nodes[n] for n in names} | {"evaluation-mmlu": nodes["evaluation"]}
        )
    rows = [
        {
            "study": "demo",
            "run": run,
            "group": run,
            "scorer": "gradient",
            "proxy": "ipsvd",
            "sparsity": sparsity,
            "settings": json.dumps({"proxy.sparsity": sparsity, "influence.score": score, "x": 1}),
            "stages": "{}",
            "changed": "{}",
        }
        for run, sparsity, score in (("a", 0.5, "cosine"), ("b", 0.7, "dot"))
    ]
    write_table(tmp_path / "results/studies/demo/runs.parquet", pd.DataFrame(rows))
    monkeypatch.chdir(tmp_path)
    return results, b


def diff(a: object, b: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["diff", str(a), str(b), "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("prefix", ["demo", "results/studies/demo"])
def test_two_runs_differ_in_what_was_changed(
    study: tuple[Results, dict[str, Node]], prefix: str
) -> None:
    body = diff(f"{prefix}/a", f"{prefix}/b")
    found = {(r["stage"], r["key"], r["A"], r["B"]) for r in body["parameters that differ"]}
    assert found == {
        ("factors", "factors.sparsity", 0.5, 0.7),
        ("ranking", "influence.score", "cosine", "dot"),
    }
    content = {row["name"]: row["content"] for row in body["results"]}
    assert content["pool"] == "the same artifact"
    assert content["features"] == "identical"
    assert content["ranking"] == "differs"


def test_numbers_of_two_runs_stand_side_by_side(study: tuple[Results, dict[str, Node]]) -> None:
    body = diff("demo/a", "demo/b")
    (ranking,) = body["ranking: agreement"]
    assert ranking["in common"] == 4
    assert ranking["Spearman"] == pytest.approx(-1.0)
    assert ranking["top 5% overlap"] == 0.0
    (loss,) = body["evaluation-mmlu: metrics"]
    (paired,) = body["evaluation-mmlu: on the same items (95 % interval, test)"]
    assert (paired["metric"], paired["items"], paired["p"]) == ("loss", 2, 0.5)
    assert paired["B - A"] == paired["low"] == paired["high"] == loss["B - A"]
    assert (loss["metric"], loss["A"], loss["B"], loss["B - A"]) == ("loss", 2.0, 1.5, -0.5)
    values = {row["task"]: row["B - A"] for row in body["fidelity: values"]}
    assert values == {"mmlu": -0.25, "mean": -0.25}


def test_two_artifacts_are_compared_through_their_ancestry(
    study: tuple[Results, dict[str, Node]],
) -> None:
    results, b = study
    a = results.root / "results/studies/demo/a/ranking"
    body = diff(a, results.folder(b["ranking"]))
    keys = {row["key"] for row in body["parameters that differ"]}
    assert keys == {"factors.sparsity", "influence.score"}
    assert [row["name"] for row in body["results"]] == [
        "ranking",
        "ranking < features",
        "ranking < features < model",
        "ranking < features < model < factors",
    ]


def test_a_run_against_itself_differs_in_nothing(study: tuple[Results, dict[str, Node]]) -> None:
    body = diff("demo/a", "demo/a")
    assert body["parameters that differ"] == []
    assert {row["content"] for row in body["results"]} == {"the same artifact"}


def test_stages_that_one_side_lacks_are_named(study: tuple[Results, dict[str, Node]]) -> None:
    results, _ = study
    (results.root / "results/studies/demo/b/fidelity").unlink()
    content = {row["name"]: row["content"] for row in diff("demo/a", "demo/b")["results"]}
    assert content["fidelity"] == "only in A"


def test_what_cannot_be_compared_is_an_error(study: tuple[Results, dict[str, Node]]) -> None:
    results, b = study
    for pair in (
        (results.folder(b["pool"]), results.folder(b["ranking"])),
        ("demo/a", "demo/nothing"),
        ("demo/a", results.folder(b["pool"])),
        (results.root, results.root),
    ):
        result = CliRunner().invoke(app, ["diff", *map(str, pair)])
        assert result.exit_code == 1
        assert result.stderr.startswith("Error:")


def ranked(scores: dict[str, float]) -> pd.DataFrame:
    table = pd.DataFrame({"example_id": list(scores), "score": list(scores.values())})
    return table.assign(rank=table["score"].rank(ascending=False, method="first").astype(int))


def test_agreement_is_the_textbook_correlation_and_overlap() -> None:
    rng = np.random.default_rng(0)
    ids = [f"e{i:03d}" for i in range(60)]
    a = dict(zip(ids[:50], rng.integers(0, 20, 50).astype(float), strict=True))
    b = dict(zip(ids[10:], rng.integers(0, 20, 50).astype(float), strict=True))
    common = ids[10:50]
    expected = spearmanr([a[i] for i in common], [b[i] for i in common]).statistic
    n, only_a, only_b, spearman, overlap = agreement(ranked(a), ranked(b))
    assert (n, only_a, only_b) == (40, 10, 10)
    assert spearman == pytest.approx(expected, abs=1e-12)
    order_a, order_b = (
        sorted(common, key=dict(zip(t["example_id"], t["rank"], strict=True)).__getitem__)
        for t in (ranked(a), ranked(b))
    )
    assert overlap == len(set(order_a[:2]) & set(order_b[:2])) / 2


def test_agreement_of_constant_or_disjoint_scores_is_undefined() -> None:
    constant = ranked({"a": 1.0, "b": 1.0})
    assert agreement(constant, ranked({"a": 1.0, "b": 2.0}))[3] is None
    assert agreement(constant, ranked({"c": 1.0}))[3:] == (None, None)


def test_runs_lists_what_differs_and_headline_metrics(
    study: tuple[Results, dict[str, Node]],
) -> None:
    result = CliRunner().invoke(app, ["runs", "demo", "--json"])
    assert result.exit_code == 0, result.output
    a, b = json.loads(result.stdout)["runs of demo"]
    assert (a["run"], b["run"]) == ("a", "b")
    assert (a["fidelity"], b["fidelity"]) == (0.75, 0.5)
    assert (a["above lengths"], a["FLOPs ratio"]) == (0.375, 0.625)
    assert (a["mmlu loss"], b["mmlu loss"]) == (2.0, 1.5)
    assert (a["influence.score"], b["influence.score"]) == ("cosine", "dot")
    assert not {"x", "settings", "stages", "changed"} & set(a)
    everything = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["runs"])
    assert "mmlu loss" in everything.stdout
    shown = CliRunner().invoke(app, ["show", "results/studies/demo"], env={"COLUMNS": "300"})
    assert "influence.score" in shown.stdout


def test_runs_of_an_unknown_study_names_the_known(study: tuple[Results, dict[str, Node]]) -> None:
    result = CliRunner().invoke(app, ["runs", "dmeo"])
    assert result.exit_code == 1
    assert "demo?" in result.stderr


def test_runs_without_results_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["runs"])
    assert result.exit_code == 1
    assert "Snakemake" in result.stderr
