"""The report's table of how early rankings list examples of some categories."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from report_fixture import Fixture

from iprox.errors import DataError
from iprox.report.found import found, judge
from iprox.stages import report


def test_the_area_is_the_mean_precision_where_recall_rises() -> None:
    row = judge(list("abcdefgh"), {"a", "d"})
    assert row["average_precision"] == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert row["chance"] == 0.25
    assert row["precision"] == 0.5
    assert row["found_first"] == 0.5  # the first of eight


def test_a_perfect_order_finds_all_and_the_worst_none() -> None:
    order = [f"e{i}" for i in range(40)]
    assert judge(order, set(order[:2]))["average_precision"] == 1
    assert judge(order, set(order[:2]))["found_first"] == 1
    last = judge(order, set(order[-2:]))
    assert last["precision"] == last["found_first"] == 0
    assert last["average_precision"] < 0.06


def test_every_ranking_of_a_made_up_filtering_task_is_judged(tmp_path: Path) -> None:
    """One example in twenty is unsafe: a ranking is judged by where it has them."""
    texts = [f"text {i}" for i in range(60)]
    made = Fixture(tmp_path, texts, ["full", "random-0"], categories=["unsafe", *["benign"] * 19])
    job = made.job(tmp_path / "out", find=["unsafe"])
    report.make(job)
    table = pd.read_parquet(job.out / "tables" / "found.parquet")
    assert list(zip(table["run"], table["task"], strict=True)) == [
        (run, task) for run in ("full", "random-0") for task in made.tasks
    ]
    assert (table["n_wanted"] == 3).all()
    ranking = pd.read_parquet(made.parents["full/ranking"] / "ranking.parquet")
    own = ranking[ranking["task"] == "mmlu"].sort_values("rank")["example_id"]
    places = [i + 1 for i, name in enumerate(own) if made.ids.index(name) % 20 == 0]
    expected = sum((k + 1) / place for k, place in enumerate(places)) / 3
    assert table["average_precision"][0] == pytest.approx(expected)
    assert "Examples to find: unsafe" in (job.out / "index.html").read_text()


def test_nothing_is_shown_unless_it_is_asked_for(tmp_path: Path) -> None:
    job = Fixture(tmp_path, ["a", "b"], ["full"]).job(tmp_path / "out")
    report.make(job)
    assert len(pd.read_parquet(job.out / "tables" / "found.parquet")) == 0
    assert "Examples to find" not in (job.out / "index.html").read_text()


@pytest.mark.parametrize("find", [["unknown"], ["open_qa", "closed_qa", "brainstorming"]])
def test_categories_of_no_example_or_of_all_are_refused(tmp_path: Path, find: list[str]) -> None:
    from iprox.report.artifacts import Study

    job = Fixture(tmp_path, ["a", "b", "c"], ["full"]).job(tmp_path / "out", find=find)
    with pytest.raises(DataError, match="of no example, or of all"):
        found(Study.of_job(job))
