"""What is kept of a ranking, and the files it is written to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from iprox.errors import ArtifactError, DataError
from iprox.stages import selection
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table

N = 20
IDS = [f"ex-{i:02d}" for i in range(N)]


def ranking(scores: dict[str, list[float]]) -> pd.DataFrame:
    """A ranking of IDS by score, ties in the order of ids reversed (only ``rank`` knows)."""
    parts = []
    for task, values in scores.items():
        table = pd.DataFrame({"task": task, "example_id": IDS, "score": np.float32(values)})
        table = table[::-1].sort_values("score", ascending=False, kind="stable")
        parts.append(table.assign(rank=np.arange(1, N + 1)))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two tasks: mmlu prefers high ids, bbh low ones; every fifth line of text is not ASCII."""
    folders = {role: tmp_path / role for role in ("pool", "ranking", "out")}
    for folder in folders.values():
        folder.mkdir()
    rows = [
        {
            "example_id": i,
            "source": "made",
            "category": "qa",
            "messages": [
                {"role": "user", "content": f"q {i} é\u2028"},
                {"role": "assistant", "content": "a"},
            ],
            "text_hash": i,
        }
        for i in IDS
    ]
    write_table(folders["pool"] / "pool.parquet", pa.Table.from_pylist(rows))
    up = [float(i) for i in range(N)]
    write_table(folders["ranking"] / "ranking.parquet", ranking({"mmlu": up, "bbh": up[::-1]}))
    parents = {"pool": folders["pool"], "ranking": folders["ranking"]}
    params = {"select": {"fraction": 0.15}}
    return Job(stage="selection", params=params, parents=parents, out=folders["out"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


@pytest.mark.parametrize(
    ("fraction", "n", "keep"),
    [(0.05, 20, 1), (0.05, 39, 1), (0.29, 100, 29), (0.07, 100, 7), (1.0, 3, 3), (0.05, 256, 12)],
)
def test_the_number_kept_is_the_floor_of_the_decimal_product(
    fraction: float, n: int, keep: int
) -> None:
    assert selection.n_selected(fraction, n) == keep


def test_keeping_less_than_one_example_is_an_error() -> None:
    with pytest.raises(DataError, match=r"0\.05 of 19"):
        selection.n_selected(0.05, 19)


def top(folder: Path, table: pd.DataFrame, keep: int) -> list[str]:
    path = folder / "ranking.parquet"
    write_table(path, table)
    return list(selection.select_top(path, keep, selection.tally_ranking(path))["example_id"])


def test_ties_follow_the_ranking_whatever_the_order_of_rows(tmp_path: Path) -> None:
    table = ranking({"t": [1.0] * N})
    assert top(tmp_path, table, 3) == ["ex-19", "ex-18", "ex-17"]
    shuffled = table.sample(frac=1.0, random_state=0)
    assert top(tmp_path, shuffled, 3) == ["ex-19", "ex-18", "ex-17"]


def test_examples_without_a_score_are_never_selected(job: Job) -> None:
    path = job.parents["ranking"] / "ranking.parquet"
    write_table(path, ranking({"t": [3.0, 2.0, 1.0, *[-np.inf] * (N - 3)]}))
    metrics = selection.make(job)
    assert metrics["without_score"] == N - 3
    assert read_table(job.out / "selection.parquet")["example_id"].tolist() == IDS[:3]
    write_table(path, ranking({"t": [2.0, 1.0, *[-np.inf] * (N - 2)]}))
    with pytest.raises(DataError, match=r"2 of 20 .* 3 wanted"):
        selection.make(job)


def test_a_ranking_is_counted_by_task(tmp_path: Path) -> None:
    path = tmp_path / "ranking.parquet"
    write_table(path, ranking({"t": [1.0] * N, "s": [1.0] * 15 + [-np.inf] * 5}))
    assert selection.tally_ranking(path) == {"s": (N, 15), "t": (N, N)}


def test_tables_and_files_agree(job: Job) -> None:
    metrics = selection.make(job)
    table = read_table(job.out / "selection.parquet")
    assert table["task"].tolist() == ["bbh"] * 3 + ["mmlu"] * 3
    assert table["rank"].tolist() == [1, 2, 3] * 2
    assert table["example_id"].tolist() == [*IDS[:3], *IDS[:-4:-1]]
    assert table["reason"].iloc[-1] == "top 3 of 20 by influence on mmlu"
    assert metrics["selected_per_task"] == 3
    assert metrics["selected_distinct"] == 6
    mmlu = lines(job.out / "selected" / "mmlu.jsonl")
    assert [r["example_id"] for r in mmlu] == IDS[:-4:-1]
    assert mmlu[0]["messages"][0] == {"role": "user", "content": "q ex-19 é\u2028"}
    assert [r["example_id"] for r in lines(job.out / "selected.jsonl")] == table[
        "example_id"
    ].tolist()


def test_an_example_chosen_by_two_tasks_is_written_once(job: Job) -> None:
    same = [float(i) for i in range(N)]
    write_table(job.parents["ranking"] / "ranking.parquet", ranking({"mmlu": same, "bbh": same}))
    selection.make(job)
    union = lines(job.out / "selected.jsonl")
    assert [r["example_id"] for r in union] == IDS[:-4:-1]
    assert all(r["tasks"] == ["bbh", "mmlu"] for r in union)
    assert len(read_table(job.out / "selection.parquet")) == 6


def test_a_random_ranking_says_so(job: Job) -> None:
    path = job.parents["ranking"] / "ranking.parquet"
    write_table(path, read_table(path), {"scorer": "random"})
    selection.make(job)
    reasons = set(read_table(job.out / "selection.parquet")["reason"])
    assert reasons == {"top 3 of 20 at random on bbh", "top 3 of 20 at random on mmlu"}


def test_a_ranking_of_another_pool_is_refused(job: Job) -> None:
    path = job.parents["ranking"] / "ranking.parquet"
    table = read_table(path)
    write_table(path, table[table["example_id"] != "ex-07"])
    with pytest.raises(ArtifactError, match="19 ranked, 20 in the pool"):
        selection.make(job)
    write_table(path, table.replace({"example_id": {"ex-19": "other"}}))
    with pytest.raises(ArtifactError, match="'other'"):
        selection.make(job)


def test_reading_a_subset_back(job: Job) -> None:
    selection.make(job)
    assert [r["example_id"] for r in selection.read_selected(job.out, "bbh")] == IDS[:3]
    assert len(selection.read_selected(job.out, "all")) == 6
    with pytest.raises(ArtifactError, match="all, bbh, mmlu"):
        selection.read_selected(job.out, "mmul")
    with pytest.raises(ArtifactError, match="file name"):
        selection.read_selected(job.out, "../pool")
    (job.out / "selected" / "bbh.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        selection.read_selected(job.out, "bbh")
