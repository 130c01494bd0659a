"""The same text on both sides is found whatever its case and spacing, listed, and refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from iprox.data.contamination import in_pool, in_test, texts_of
from iprox.data.pools import build_pool, pool_table
from iprox.data.sources import resolve
from iprox.data.tasks import build_task
from iprox.errors import DataError
from iprox.stages import selection, task
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table
from iprox.study.schema import PoolSection, TaskSection

ASKED = {"subject": "s", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "A"}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path.name


def questions(*texts: str, **changes: Any) -> list[dict[str, Any]]:
    return [ASKED | {"question": text} | changes for text in texts]


def build(folder: Path, kind: str, **keys: Any) -> Any:
    return build_task(TaskSection(name="t", kind=kind, **keys), folder)


def pool(folder: Path, *records: dict[str, Any]) -> pa.Table:
    section = PoolSection(path=write(folder / "pool.jsonl", list(records)))
    return pool_table(build_pool(resolve(section, folder, folder), section))


def test_a_development_example_in_the_test_set_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dev = write(tmp_path / "dev.jsonl", questions("How  many?", "Which?", "Why?"))
    test = write(tmp_path / "test.jsonl", questions("how MANY?", "When?", "why?", subject="other"))
    keys = {"path": dev, "test": test}
    with pytest.raises(DataError, match="also stand in its test set") as caught:
        build(tmp_path, "mmlu", **keys)
    assert "s-dev-0000 = other-test-0000" in str(caught.value)
    assert "2 found" in str(caught.value)
    assert "allow_contaminated" in str(caught.value)
    assert "s-dev-0002" in caplog.text
    found = build(tmp_path, "mmlu", **keys, allow_contaminated=True)
    assert [pair[0] for pair in in_test(found.texts)] == ["s-dev-0000", "s-dev-0002"]


def test_other_choices_make_another_question(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl", questions("Which of these?"))
    test = write(tmp_path / "test.jsonl", questions("Which of these?", A="0"))
    assert in_test(build(tmp_path, "mmlu", path=dev, test=test).texts) == []


def test_worked_examples_count_though_they_are_no_queries(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl", questions("a?", "b?", "c?"))
    for text in ("a?", "b?", "c?"):
        test = write(tmp_path / "test.jsonl", questions(text))
        with pytest.raises(DataError, match="also stand in its test set"):
            build(tmp_path, "mmlu", path=dev, test=test, queries=1)


def test_the_task_stage_lists_pairs_and_texts(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl", questions("a?", "b?"))
    test = write(tmp_path / "test.jsonl", questions("b?", "c?"))
    keys = {"name": "t", "kind": "mmlu", "path": dev, "test": test, "allow_contaminated": True}
    out = tmp_path / "out"
    out.mkdir()
    metrics = task.make(Job("task", {"task": keys}, {}, out, data_dir=tmp_path))
    assert metrics["n_contaminated"] == 1
    pairs = read_table(out / "contaminated.parquet")
    assert pairs.to_dict("records") == [
        {"example_id": "s-dev-0001", "role": "development", "same_as": "s-test-0000"}
    ]
    texts = read_table(out / "texts.parquet")
    assert set(texts["role"]) == {"development", "test"}
    assert texts["example_id"].nunique() == 4


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"instruction": "How  many\nTOWERS?", "output": "3"}, True),  # another answer
        ({"instruction": "How many towers?", "output": "Two"}, True),
        ({"instruction": "How many", "input": "towers?", "output": "9"}, True),
        ({"instruction": "How many towers are there?", "output": "Two"}, False),
        ({"instruction": "Two", "output": "How many towers?"}, False),
    ],
)
def test_a_pool_example_with_a_task_s_prompt_is_found(
    tmp_path: Path, record: dict[str, Any], found: bool
) -> None:
    own = write(tmp_path / "own.jsonl", [{"prompt": "How many towers?", "response": "Two"}])
    texts = build(tmp_path, "messages", path=own).texts
    other = {"instruction": "Something else", "output": "x"}
    table = pool(tmp_path, other, record)
    rows = pa.Table.from_pylist([vars(text) for text in texts])
    pairs = list(in_pool(rows, table.to_batches()))
    assert len(pairs) == found
    if found:
        (row,) = (r for r in table.to_pylist() if r["example_id"] == pairs[0][2])
        assert row["messages"][0]["content"].lower().startswith("how")


def test_passage_and_question_are_found_in_either_order(tmp_path: Path) -> None:
    passage = {"language": "english", "context": "A text.", "question": "What?", "answers": ["A"]}
    path = write(tmp_path / "one.jsonl", [passage])
    texts = build(tmp_path, "tydiqa", path=path).texts
    table = pool(
        tmp_path,
        {"instruction": "What?", "input": "A text.", "output": "A"},
        {"instruction": "A text.", "input": "What?", "output": "A"},
        {"instruction": "What?", "output": "A"},
    )
    pairs = list(in_pool(pa.Table.from_pylist([vars(t) for t in texts]), table.to_batches()))
    assert len(pairs) == 2


def test_selection_refuses_a_pool_that_holds_a_query(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write(tmp_path / "own.jsonl", [{"prompt": "How many towers?", "response": "Two"}])
    texts = build(tmp_path, "messages", path=own).texts
    table = pool(
        tmp_path,
        *({"instruction": f"Say {i}", "output": "x"} for i in range(9)),
        {"instruction": "How many towers?", "output": "Three"},
    )
    folders = {name: tmp_path / name for name in ("pool", "ranking", "task", "out")}
    for folder in folders.values():
        folder.mkdir()
    write_table(folders["pool"] / "pool.parquet", table)
    rows = pa.Table.from_pylist([vars(text) for text in texts])
    write_table(folders["task"] / "texts.parquet", rows)
    ids = table["example_id"].to_pylist()
    ranking = [
        {"task": "t", "rank": i + 1, "example_id": e, "score": -float(i)} for i, e in enumerate(ids)
    ]
    write_table(folders["ranking"] / "ranking.parquet", pa.Table.from_pylist(ranking), {"x": 1})
    parents = {"pool": folders["pool"], "ranking": folders["ranking"], "task/t": folders["task"]}
    job = Job("selection", {"select": {"fraction": 0.2}}, parents, folders["out"])
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="in the pool") as caught:
        selection.make(job)
    assert "select.allow_contaminated" in str(caught.value)
    assert "task/t" in caplog.text
    job.params["select"]["allow_contaminated"] = True
    assert selection.make(job)["contaminated"] == 1
    pairs = read_table(folders["out"] / "contaminated.parquet")
    assert len(pairs) == 1


def test_texts_are_hashed_once_for_each_shape() -> None:
    class Example:
        example_id, subtask = "a", "s"

        def shapes(self) -> tuple[str, ...]:
            return ("x", "x", "y")

    assert len(texts_of([Example()], [])) == 2
