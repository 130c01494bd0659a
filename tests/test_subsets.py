"""Selection beyond the best: what is chosen from rankings, features, texts and categories."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from artifacts import MESSAGES, turns
from test_plan import plan, stages

from iprox.errors import ArtifactError, ConfigError, DataError, NumericsError
from iprox.numerics import subset
from iprox.stages import selection, subsets
from iprox.store.arrays import create_store, put
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table

N = 24
IDS = [f"e{i:02d}" for i in range(N)]
SCORES = {
    "a": np.linspace(1, 0, N),  # prefers low ids
    "b": np.concatenate([np.linspace(0, 9, N - 1), [-np.inf]]),  # high ones; has none for the last
}


def features() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(N, 6))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def select(tmp_path: Path) -> Any:
    """Run the stage with some settings; returns its table, metrics and folder."""
    for name in ("pool", "ranking", "features"):
        (tmp_path / name).mkdir()
    texts = [(f"question {i} {'x' * (i % 3)}", "answer") for i in range(N)]
    texts[1] = (texts[0][0].upper() + "!", "Answer.")  # e01 repeats e00
    rows = {
        "example_id": IDS,
        "source": ["s"] * N,
        "category": ["even" if i % 2 == 0 else "odd" for i in range(N)],
        "messages": pa.array([turns(*t) for t in texts], MESSAGES),
    }
    write_table(tmp_path / "pool" / "pool.parquet", pa.table(rows))
    parts = []
    for task, scores in SCORES.items():
        order = np.argsort(-scores, kind="stable")
        ids = [IDS[i] for i in order]
        ranks = np.arange(1, N + 1)
        score = scores[order].astype(np.float32)
        parts.append(pd.DataFrame({"task": task, "rank": ranks, "example_id": ids, "score": score}))
    write_table(tmp_path / "ranking" / "ranking.parquet", pd.concat(parts))
    for number, rows_of in enumerate((slice(0, 10), slice(10, N))):
        store = create_store(tmp_path / "features" / f"shard-{number:05d}.zarr", {})
        put(store, "sketch", features()[rows_of], ("examples", "dim"))
        put(store, "example_id", np.array(IDS[rows_of]), ("examples",))
    count = iter(range(100))

    def run(**settings: Any) -> tuple[pd.DataFrame, dict[str, Any], Path]:
        out = tmp_path / f"out{next(count)}"
        out.mkdir()
        parents = {name: tmp_path / name for name in ("pool", "ranking", "features")}
        params = {"select": {"count": 6, **settings}}
        metrics = selection.make(Job("selection", params, parents, out))
        table = read_table(out / "selection.parquet")
        assert not table.duplicated(["task", "example_id"]).any()
        return table, metrics, out

    return run


def of(table: pd.DataFrame, task: str) -> list[str]:
    return table.loc[table["task"] == task, "example_id"].tolist()


def test_a_count_takes_the_place_of_a_fraction(select: Any) -> None:
    table, metrics, _ = select()
    assert of(table, "a") == IDS[:6]
    assert metrics["selected_per_task"] == 6
    with pytest.raises(DataError, match="more examples are to be selected than the pool has"):
        select(count=N + 1)
    with pytest.raises(DataError, match="23 of 24 examples have a score"):
        select(count=N)


def test_tasks_in_turn_share_one_selection(select: Any) -> None:
    table, metrics, out = select(tasks="round_robin", count=7)
    assert of(table, "a") == IDS[:4]
    assert of(table, "b") == [IDS[i] for i in (22, 21, 20)]
    assert metrics["selected_distinct"] == 7
    assert table["reason"][1] == "turn 2 of a: best left, rank 2 of 24 by influence"
    lines = [json.loads(x) for x in (out / "selected.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    assert all({"role", "content"} == set(m) for x in lines for m in x["messages"])


@pytest.mark.parametrize("scale", ["rank", "zscore"])
def test_a_union_compares_tasks_on_one_scale(select: Any, scale: str) -> None:
    table, _, _ = select(tasks="union", calibrate=scale)
    values = {t: subset.calibrate(s, scale) for t, s in SCORES.items()}
    best = {i: max((v[n], t) for t, v in values.items()) for n, i in enumerate(IDS)}
    ours = {(t, i) for i, (_, t) in best.items()}
    assert set(zip(table["task"], table["example_id"], strict=True)) <= ours
    kept = sorted((best[i][0] for i in table["example_id"]), reverse=True)
    assert kept == sorted((v for v, _ in best.values()), reverse=True)[:6]
    assert table["reason"].str.contains(f"by {scale} over all tasks").all()


def test_a_threshold_passes_over_what_is_alike(select: Any) -> None:
    table, _, _ = select(method="threshold", max_similarity=0.2, count=4)
    rows, naive = features(), list[int]()
    for i in range(N):
        if len(naive) < 4 and all(rows[i] @ rows[j] <= 0.2 for j in naive):
            naive.append(i)
    assert of(table, "a") == [IDS[i] for i in naive] != IDS[:4]
    with pytest.raises(DataError, match="fewer examples pass"):
        select(method="threshold", max_similarity=-0.9)


@pytest.mark.parametrize("method", ["k_centre", "facility_location", "dpp"])
def test_diverse_methods_choose_among_the_best(select: Any, method: str) -> None:
    table, _, _ = select(method=method, shortlist=2.0, count=3)
    rows, quality = features()[:6], np.linspace(1, 0, 6)
    chosen = {
        "k_centre": lambda: subset.k_centre(rows, 3),
        "facility_location": lambda: subset.facility_location(
            subset.coverage(rows), quality, 3, 1.0
        ),
        "dpp": lambda: subset.dpp_map(rows, quality, 3, 1.0),
    }[method]()
    assert of(table, "a") == sorted(IDS[i] for i in chosen.places)
    assert table["reason"].str.contains("from 6 of the best by influence on").all()


def test_large_shortlists_are_chosen_from_part_by_part(
    select: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "PART_EXAMPLES", 5)
    for method in ("k_centre", "facility_location", "dpp"):
        one, two = (select(method=method, shortlist=3.0, seed=1)[0] for _ in range(2))
        assert one.equals(two)
        assert len(of(one, "a")) == len(of(one, "b")) == 6
        other = select(method=method, shortlist=3.0, seed=2)[0]
        assert not other.equals(one)


@pytest.mark.parametrize("kind", ["text", "near"])
def test_duplicates_of_better_examples_are_passed_over(select: Any, kind: str) -> None:
    table, metrics, _ = select(duplicates=kind)
    assert of(table, "a") == [IDS[0], *IDS[2:7]]  # e01 says what e00 says
    assert metrics["passed_over_duplicates"] == 1
    table, _, _ = select(duplicates=kind, tasks="round_robin")
    assert of(table, "a") == [IDS[0], IDS[2], IDS[3]]


def test_quotas_cap_categories(select: Any) -> None:
    table, metrics, _ = select(quotas={"even": 0.34})
    chosen = Counter(int(i[1:]) % 2 for i in of(table, "a"))
    assert chosen == {0: 2, 1: 4}
    assert metrics["passed_over_over_quota"] > 0
    assert set(of(select(quotas={"*": 0.5})[0], "b")) == {IDS[i] for i in range(17, 23)}
    none, _, _ = select(quotas={"odd": 0.0})
    assert all(int(i[1:]) % 2 == 0 for i in none["example_id"])


def test_a_quota_of_nothing_is_an_error(select: Any) -> None:
    with pytest.raises(DataError, match="no example of the pool has") as error:
        select(quotas={"evn": 0.5})
    assert "even" in str(error.value)
    with pytest.raises(DataError, match="fewer examples pass"):
        select(quotas={"*": 0.1})


def test_features_must_hold_every_example(select: Any, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(tmp_path / "features" / "shard-00000.zarr")
    with pytest.raises(ArtifactError, match="missing from the features"):
        select(method="k_centre")


def test_constant_scores_cannot_be_compared_over_tasks(select: Any, tmp_path: Path) -> None:
    path = tmp_path / "ranking" / "ranking.parquet"
    write_table(path, read_table(path).assign(score=np.float32(1)))
    with pytest.raises(NumericsError, match="constant"):
        select(tasks="union")


# --- planning ------------------------------------------------------------------------------------


def test_one_selection_for_all_tasks_trains_one_model() -> None:
    for tasks in ("round_robin", "union"):
        p = plan(select={"tasks": tasks})
        trained = [n.params["subset"]["task"] for (s, _), n in p.nodes.items() if s == "finetune"]
        assert trained == ["all"]


def test_diverse_methods_read_sketches() -> None:
    p = plan(features={"kind": "countsketch"}, select={"method": "dpp"})
    nodes = p.runs["a"].nodes
    assert nodes["selection"].parents["features"] is nodes["features"]
    assert nodes["selection"].params["select"]["method"] == "dpp"
    assert "features" not in plan().runs["a"].nodes["selection"].parents


def test_only_the_keys_that_decide_count() -> None:
    assert stages(plan()) == stages(plan(select={"max_similarity": 0.1, "shortlist": 9, "seed": 3}))
    assert stages(plan()) != stages(plan(select={"duplicates": "text"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"method": "dpp"}}, "stores nothing to compare"),
        (
            {"select": {"method": "dpp"}, "scorer": {"kind": "bm25"}},
            "stores nothing to compare",
        ),
        (
            {"select": {"method": "dpp", "quotas": {"x": 0.5}}, "features": {"kind": "logra"}},
            "quotas need",
        ),
        (
            {"select": {"method": "dpp", "tasks": "round_robin"}, "features": {"kind": "logra"}},
            "choose in turn",
        ),
        ({"select": {"quotas": {"x": 1.5}}}, "select.quotas"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)
