"""Pools: every shape and kind of file ends in one schema, and every bad record is named."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iprox.data.pools import (
    POOL_SCHEMA,
    Pool,
    build_pool,
    content_id,
    draw_key,
    read_candidates,
    text_hash,
)
from iprox.data.sources import Source, resolve
from iprox.errors import DataError
from iprox.stages import pool as pool_stage
from iprox.store.job import Job
from iprox.store.tables import read_metadata, read_table
from iprox.study.schema import PoolSection

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def build(folder: Path, name: str = "pool.jsonl", **keys: Any) -> Pool:
    section = PoolSection(path=name, **keys)
    return build_pool(resolve(section, folder, folder), section)


def one(tmp_path: Path, record: Any, **keys: Any) -> Any:
    write_jsonl(tmp_path / "pool.jsonl", [record])
    pool = build(tmp_path, **keys)
    return pool.format, list(pool.candidates[0].messages)


@pytest.mark.parametrize(
    ("record", "shape", "messages"),
    [
        (ALPACA, "alpaca", turns("Add.\n\n1 2", "3")),
        ({"instruction": "Hi.", "input": "", "output": "Ho."}, "alpaca", turns("Hi.", "Ho.")),
        ({"instruction": "Hi.", "output": "Ho."}, "alpaca", turns("Hi.", "Ho.")),
        (
            {"instruction": "Who?", "context": "He.", "response": "He.", "category": "qa"},
            "dolly",
            turns("Who?\n\nHe.", "He."),
        ),
        ({"messages": turns("a", "b", "c", "d")}, "messages", turns("a", "b", "c", "d")),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            turns("a", "b"),
        ),
        ({"prompt": "a", "completion": "b"}, "prompt_response", turns("a", "b")),
        ({"prompt": "a", "response": "b"}, "prompt_response", turns("a", "b")),
        (
            {"system": "Be brief.", "instruction": "a", "output": "b"},
            "alpaca",
            [{"role": "system", "content": "Be brief."}, *turns("a", "b")],
        ),
        ({"instruction": " a ", "output": "b\n"}, "alpaca", turns(" a ", "b\n")),
    ],
)
def test_shapes_are_detected_and_parsed(
    tmp_path: Path, record: Any, shape: str, messages: Any
) -> None:
    assert one(tmp_path, record) == (shape, messages)
    assert one(tmp_path, record, format=shape) == (shape, messages)


def test_every_kind_of_file_gives_the_same_pool(tmp_path: Path) -> None:
    records = [
        {
            "id": f"x{i}",
            "instruction": f"line\n{i}, ä",
            "input": "None",
            "output": "NA",
            "category": "c",
        }
        for i in range(3)
    ]
    write_jsonl(tmp_path / "pool.jsonl", records)
    (tmp_path / "pool.json").write_text(json.dumps(records, indent=1))
    with (tmp_path / "pool.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pool.parquet")
    found = []
    for name in ("pool.jsonl", "pool.json", "pool.csv", "pool.parquet"):
        pool = build(tmp_path, name)
        found.append([(c.example_id, c.category, c.messages) for c in pool.candidates])
    assert len(found[0]) == 3
    assert found[0][0][2][0]["content"] == "line\n0, ä\n\nNone"
    assert all(f == found[0] for f in found)


def test_a_folder_is_one_pool(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    write_jsonl(tmp_path / "pool" / "b.jsonl", [{"id": "1", **ALPACA}])
    write_jsonl(tmp_path / "pool" / "a.jsonl", [{"id": "2", **ALPACA}])
    pool = build(tmp_path, "pool")
    named = [(c.example_id, c.source) for c in pool.candidates]
    assert named == [("1", "pool/b.jsonl"), ("2", "pool/a.jsonl")]


def test_ids_from_content_are_stable_and_unique(tmp_path: Path) -> None:
    other = {"instruction": "x", "output": "y"}
    write_jsonl(tmp_path / "pool.jsonl", [ALPACA, other, ALPACA, ALPACA])
    ids = {c.example_id for c in build(tmp_path).candidates}
    canonical = '[["user","Add.\\n\\n1 2"],["assistant","3"]]'
    base = "pool-" + hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert ids == {base, f"{base}-1", f"{base}-2", content_id("pool", turns("x", "y"))}


def test_the_pool_does_not_depend_on_the_order_of_its_file(tmp_path: Path) -> None:
    records = [
        {"instruction": f"{i // 2}", "output": "y", "category": str(i % 2)} for i in range(40)
    ]
    write_jsonl(tmp_path / "pool.jsonl", records)
    random.Random(0).shuffle(records)
    write_jsonl(tmp_path / "shuffled.jsonl", records)
    pools = []
    for name in ("pool.jsonl", "shuffled.jsonl"):
        section = PoolSection(path=name, limit=11, seed=5)
        source = Source("pool", "pool", (("pool", tmp_path / name),))
        pools.append([(c.example_id, c.category) for c in build_pool(source, section).candidates])
    assert len(pools[0]) == 11
    assert pools[0] == pools[1] == sorted(pools[0])


def test_a_sample_is_the_smallest_keys_and_grows_with_its_limit(tmp_path: Path) -> None:
    records = [{"id": f"x{i}", **ALPACA} for i in range(30)]
    write_jsonl(tmp_path / "pool.jsonl", records)
    drawn = {n: {c.example_id for c in build(tmp_path, limit=n, seed=1).candidates} for n in (5, 9)}
    by_key = sorted((r["id"] for r in records), key=lambda i: draw_key(1, "pool", i))
    assert drawn[5] == set(by_key[:5])
    assert drawn[5] < drawn[9]
    other = {c.example_id for c in build(tmp_path, limit=5, seed=2).candidates}
    assert other != drawn[5]
    assert build(tmp_path, limit=99).counts["n_examples"] == 30


def test_long_empty_and_duplicate_examples_are_counted(tmp_path: Path) -> None:
    records = [
        {"id": "a", "instruction": "x", "output": "y"},
        {"id": "a", "instruction": "again", "output": "y"},
        {"id": "b", "instruction": "x", "output": "  \n"},
        {"id": "c", "instruction": "x" * 9, "output": "yy"},
        {"id": "d", "instruction": "x", "output": None},
    ]
    write_jsonl(tmp_path / "pool.jsonl", records)
    pool = build(tmp_path, on_duplicate="drop", max_chars=10)
    assert pool.counts == {
        "n_read": 5,
        "n_empty": 2,
        "n_duplicate": 1,
        "n_too_long": 1,
        "n_not_sampled": 0,
        "n_examples": 1,
    }
    assert pool.candidates[0].messages[0]["content"] == "x"  # the first of the two
    assert build(tmp_path, on_duplicate="drop", max_chars=11).counts["n_too_long"] == 0


def test_a_conversation_that_ends_with_a_question_has_no_response(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [{"messages": turns("a", "b", "c")}])
    with pytest.raises(DataError, match="no example of the pool is left"):
        build(tmp_path)
    with pytest.raises(DataError, match="has no response"):
        build(tmp_path, on_empty="error")


def test_text_hash_ignores_case_spacing_and_unicode_form() -> None:
    assert text_hash(turns("A  b\n", "caf\u00e9")) == text_hash(turns("a B", "cafe\u0301"))
    assert text_hash(turns("a", "b")) != text_hash(turns("b", "a"))


GOOD = json.dumps(ALPACA).encode()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.jsonl", GOOD + b'\n{"instruction": \n', ["invalid JSON", "p.jsonl:2"]),
        ("p.jsonl", GOOD + b"\n[1]\n", ["must be a JSON object", "p.jsonl:2"]),
        ("p.jsonl", GOOD + b"\n\n\xff\xfe\n", ["not UTF-8", "p.jsonl:3"]),
        ("p.jsonl", GOOD + b'\n{"instruction": "x"}\n', ["lacks a field", "p.jsonl:2", "output"]),
        (
            "p.jsonl",
            GOOD + b'\n{"prompt": "x", "response": "y"}\n',
            ["another shape", "p.jsonl:2", "prompt_response", "alpaca: instruction, output"],
        ),
        ("p.jsonl", b'{"text": "x"}\n', ["no known shape", "p.jsonl:1", "fields text"]),
        ("p.jsonl", b"", ["has no records", "p.jsonl"]),
        ("p.jsonl", b"\n \n", ["has no records", "p.jsonl"]),
        (
            "p.jsonl",
            b'{"instruction": 3, "output": "x"}',
            ["not text", "p.jsonl:1, field instruction", "3"],
        ),
        ("p.jsonl", b'{"instruction": " ", "output": "x"}', ["asks nothing", "p.jsonl:1"]),
        (
            "p.jsonl",
            b'{"instruction": "\\ud800", "output": "x"}',
            ["surrogate", "p.jsonl:1, field instruction"],
        ),
        (
            "p.jsonl",
            b'{"id": 1.5, "instruction": "x", "output": "x"}',
            ["neither text nor an integer", "p.jsonl:1, field id"],
        ),
        ("p.jsonl", b'{"messages": []}', ["list of turns", "p.jsonl:1"]),
        (
            "p.jsonl",
            b'{"messages": [{"role": "robot", "content": "x"}]}',
            ["unknown role", "p.jsonl:1, messages[0].role", "system, user, assistant"],
        ),
        (
            "p.jsonl",
            b'{"conversations": [{"from": "human"}]}',
            ["a turn lacks a field", "p.jsonl:1, conversations[0]", "{from, value}"],
        ),
        ("p.json", b'[\n{"instruction": "x"\n', ["invalid JSON", "p.json:3"]),
        ("p.json", GOOD + b"\n" + GOOD, ["invalid JSON", "named .jsonl"]),
        ("p.json", b'{"data": []}', ["must be a list", "p.json"]),
        ("p.json", b"[" + GOOD + b', {"output": "x"}]', ["lacks a field", "p.json: item 2"]),
        ("p.json", b"[" * 100_000, ["nested too deeply", "p.json"]),
        (
            "p.csv",
            b'instruction,output\n"a\nb",x\nc,d,e\n',
            ["not as many fields", "p.csv:4", "3 fields", "instruction, output"],
        ),
        ("p.csv", b"instruction,output\n", ["has no records", "p.csv"]),
        ("p.csv", b"output,output\nx,y\n", ["repeats a column", "p.csv:1"]),
        ("p.csv", b'instruction,output\n"a"b,c\n', ["invalid CSV", "p.csv:2"]),
        ("p.csv", b"instruction,output\na,\xff\n", ["not UTF-8", "p.csv:2"]),
        ("p.parquet", b"not parquet", ["cannot be read", "p.parquet"]),
        ("p.txt", b"x", ["unknown kind", "p.txt", ".jsonl, .json, .csv, .parquet"]),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        build(tmp_path, name)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [ALPACA]).chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        build(tmp_path)


def test_duplicate_ids_are_an_error_that_names_both(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [{"id": 7, **ALPACA}, {"id": "7", **ALPACA}])
    with pytest.raises(DataError, match="two examples have one id") as caught:
        build(tmp_path)
    assert "pool.jsonl:2 and pool.jsonl:1" in str(caught.value)
    assert "on_duplicate: drop" in str(caught.value)


def test_a_record_of_a_forced_format_must_fit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [ALPACA])
    with pytest.raises(DataError, match="another shape"):
        build(tmp_path, format="messages")


def test_hub_records_are_numbered_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from iprox.data import pools

    records = [{"instruction": "a", "context": "", "response": "b", "category": "x"}, {"a": 1}]
    monkeypatch.setattr(pools, "load_hub", lambda hub: records)
    source = resolve(PoolSection(name="dolly"), Path(), Path())
    with pytest.raises(DataError, match=r"databricks-dolly-15k: row 1"):
        read_candidates(source)
    records.pop()
    candidates, shape = read_candidates(source)
    assert shape == "dolly"
    assert candidates[0].source == "dolly"
    assert candidates[0].example_id.startswith("dolly-")


def run_stage(out: Path, data_dir: Path, **keys: Any) -> dict[str, Any]:
    out.mkdir()
    job = Job("pool", {"pool": keys}, {}, out, data_dir=data_dir, cache_dir=out)
    return dict(pool_stage.make(job))


def test_the_stage_writes_equal_bytes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pool.jsonl", [{"id": f"x{i}", **ALPACA} for i in range(9)])
    metrics = run_stage(tmp_path / "one", tmp_path, path="pool.jsonl", limit=4)
    run_stage(tmp_path / "two", tmp_path, path="pool.jsonl", limit=4)
    files = [tmp_path / run / "pool.parquet" for run in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert metrics["n_examples"] == 4
    assert metrics["format"] == "alpaca"
    assert read_metadata(files[0]) == metrics
    assert pq.read_schema(files[0]).remove_metadata().equals(POOL_SCHEMA)
    table = read_table(files[0])
    assert list(table["example_id"]) == sorted(table["example_id"])
    assert table["messages"][0][1] == {"role": "assistant", "content": "3"}


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("dolly/dolly_15k.parquet", 15_011),
        ("self_instruct/seed_tasks.parquet", 175),
        ("self_instruct", 427),
    ],
)
def test_real_pools(shared_data: Path, path: str, rows: int) -> None:
    section = PoolSection(path=path)
    pool = build_pool(resolve(section, shared_data, shared_data), section)
    assert pool.format == "alpaca"
    assert pool.counts["n_read"] == rows
    assert pool.counts["n_examples"] == rows - pool.counts["n_empty"]
    ids = [c.example_id for c in pool.candidates]
    assert ids == sorted(set(ids))


@pytest.mark.shared_data
def test_dolly_keeps_its_text_and_its_ids(shared_data: Path) -> None:
    pool = build(shared_data, "dolly/dolly_15k.parquet")
    kept = {c.example_id: c for c in pool.candidates}
    for row in pq.read_table(shared_data / "dolly/dolly_15k.parquet").to_pylist()[:500]:
        user, answer = (m["content"] for m in kept[row["id"]].messages)
        assert answer == row["output"]
        assert user == row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        assert kept[row["id"]].category == row["category"]
