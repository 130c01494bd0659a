"""A cheap ranking that leaves examples out of scoring: absent, counted, and never zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from artifacts import job, random_examples, write_pool
from test_direction import EXAMPLES, Study
from test_direction import reader as reader
from test_direction import study as study

from iprox.errors import DataError
from iprox.plan.plan import plan_study
from iprox.stages import features, ranking, selection
from iprox.store.tables import read_metadata, read_table
from iprox.study.load import load_study

ROOT = Path(__file__).parents[1]
IDS = sorted(EXAMPLES)


@pytest.fixture
def texts(study: Study) -> dict[str, Path]:
    return {"pool": study.pool, "task/t": study.task}


def filtered(study: Study, texts: dict[str, Path], scorer: str = "bm25") -> Path:
    out = study.new()
    ranking.make(job("ranking", out, texts, scorer={"kind": scorer}, tasks=["t"]))
    return out


def passed(
    study: Study, parents: dict[str, Path], cuts: tuple[int, ...] = (0, 9), **params: Any
) -> tuple[Path, list[dict[str, Any]]]:
    """Features of the pool in shards, and their counts."""
    folder, counts = study.new(), []
    folder.mkdir()
    for number, rows in enumerate(zip(cuts, cuts[1:], strict=False)):
        out = folder / "out"
        found = features.make(job("features", out, parents, rows, subset={"name": "all"}, **params))
        counts.append(dict(found))
        (out / "shard.zarr").rename(folder / f"shard-{number:05d}.zarr")
        out.rmdir()
    return folder, counts


def ranked(study: Study, features_at: Path) -> Path:
    out = study.new()
    about: dict[str, Any] = {"scorer": {"kind": "gradient"}, "tasks": ["t"]}
    ranking.make(job("ranking", out, {"features": features_at}, **about))
    return out


def test_what_is_left_out_is_absent_and_counted(study: Study, texts: dict[str, Path]) -> None:
    first, query = filtered(study, texts), study.query()
    parents = {"pool": study.pool, "query/t": query}
    whole = read_table(ranked(study, passed(study, parents)[0]) / "ranking.parquet")
    parents["prefilter"] = first
    folder, counts = passed(study, parents, (0, 4, 9), prefilter={"keep": 0.5})
    out = ranked(study, folder)
    table = read_table(out / "ranking.parquet")
    best = read_table(first / "ranking.parquet")["example_id"][:4]  # floor(0.5 * 9)
    assert set(table["example_id"]) == set(best)
    assert sum(c["prefiltered"] for c in counts) == 5
    assert read_metadata(out / "ranking.parquet")["prefiltered"] == 5
    scores = whole.set_index("example_id")["score"]
    np.testing.assert_allclose(table["score"], scores[table["example_id"]], rtol=1e-6)
    assert list(table["rank"]) == [1, 2, 3, 4]


def test_what_any_task_keeps_is_scored_for_all(study: Study) -> None:
    folder = study.new()
    folder.mkdir()
    parts = [
        pd.DataFrame({"task": task, "rank": range(1, 10), "example_id": order, "score": 0.0})
        for task, order in (("t", IDS), ("u", IDS[::-1]))
    ]
    pd.concat(parts).to_parquet(folder / "ranking.parquet")
    made = job("features", study.new(), {"prefilter": folder}, prefilter={"keep": 0.25})
    assert features.own_ids(made, IDS) == [*IDS[:2], *IDS[-2:]]


def test_sketches_are_filtered_too(study: Study, texts: dict[str, Path]) -> None:
    parents = {"pool": study.pool, "prefilter": filtered(study, texts)}
    sketch = {"kind": "countsketch", "dim": 64, "check": 0}
    _, counts = passed(study, parents, features=sketch, prefilter={"keep": 0.5})
    assert [counts[0]["examples"], counts[0]["prefiltered"]] == [4, 5]


def test_a_selection_takes_its_share_of_the_whole_pool(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", random_examples(10))
    frame = pd.DataFrame(read_table(pool / "pool.parquet")).assign(source="s", category="c")
    frame.to_parquet(pool / "pool.parquet")
    order = tmp_path / "ranking"
    order.mkdir()
    import pyarrow as pa

    from iprox.stages.ranking import SCHEMA, rank
    from iprox.store.tables import write_groups

    ids = pa.array([f"e{i:03d}" for i in range(4)], pa.large_string())
    scores = {"t": np.array([0.1, 0.4, 0.3, 0.2], dtype=np.float32)}
    about = {"scorer": "gradient", "prefiltered": 6}
    write_groups(order / "ranking.parquet", SCHEMA, rank(scores, ids), about)
    parents = {"pool": pool, "ranking": order}
    counts = selection.make(job("selection", tmp_path / "a", parents, select={"fraction": 0.3}))
    assert counts["selected_per_task"] == 3
    assert counts["prefiltered"] == 6
    with pytest.raises(DataError, match=r"4 of 4(.|\n)*prefilter\.keep"):
        selection.make(job("selection", tmp_path / "b", parents, select={"fraction": 0.5}))


# --- the plan ----------------------------------------------------------------------------------


def plan(**runs: Any) -> Any:
    target = {"proxy": {"kind": "target"}}
    chosen = {name: target | run for name, run in runs.items()}
    return plan_study(load_study([ROOT / "config" / "small" / "multistage.yaml"], {"runs": chosen}))


def test_a_filter_is_the_ranking_of_a_run_of_its_own() -> None:
    found = plan(
        bm25={"scorer": {"kind": "bm25"}},
        some={"prefilter": {"by": "bm25", "keep": 0.5}},
        fewer={"prefilter": {"by": "bm25", "keep": 0.1}},
        all={},
    )
    some, fewer, whole = (found.runs[n].nodes for n in ("some", "fewer", "all"))
    assert some["prefilter"] is fewer["prefilter"] is found.runs["bm25"].nodes["ranking"]
    assert some["features"].parents["prefilter"] is some["prefilter"]
    assert len({n["features"].id for n in (some, fewer, whole)}) == 3
    assert "prefilter" not in whole
    assert "prefilter" not in whole["features"].params


def test_a_filter_of_embeddings_is_the_published_encoder() -> None:
    nodes = plan(some={"prefilter": {"by": "embedding"}}).runs["some"].nodes
    assert nodes["prefilter"].parents["features"].stage == "embeddings"
    assert nodes["prefilter"].parents["features"].parents["encoder"].stage == "backbone"


def test_fidelity_is_measured_on_a_slice_that_is_not_filtered() -> None:
    proxy = {"kind": "ipsvd", "sparsity": 0.5}
    nodes = plan(some={"proxy": proxy, "prefilter": {"by": "bm25"}}).runs["some"].nodes
    assert "prefilter" not in nodes["fidelity"].parents["proxy"].params
    assert "prefilter" in nodes["features"].params
