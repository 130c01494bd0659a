"""Tasks: LESS's formats verbatim, draws without leaks, and what cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from iprox.data import bbh, lm_eval_files, mmlu, pools
from iprox.data.chat import encode
from iprox.data.items import QUERY_SCHEMA, TEST_SCHEMA, spread
from iprox.data.tasks import Item, Task, build_task
from iprox.data.tydiqa import WORDING
from iprox.errors import ConfigError, DataError
from iprox.stages import task as task_stage
from iprox.store.job import Job
from iprox.store.tables import read_metadata, read_table
from iprox.study.schema import Hub, TaskSection

LONG = 100_000


def build(folder: Path, kind: str, **keys: Any) -> Task:
    return build_task(TaskSection(**({"name": "t", "kind": kind} | keys)), folder)


def prompt(item: Item) -> str:
    return item.messages[0]["content"]


def response(item: Item) -> str:
    return item.messages[-1]["content"]


def tulu(item: Item, tokenizer: Any) -> tuple[str, str]:
    """The rendered query, and the part of it that carries a loss."""
    encoded = encode(
        item.messages, tokenizer, "tulu", LONG, prefix=item.prefix, eos=item.eos, last_only=True
    )
    supervised = [label for label in encoded.labels if label >= 0]
    return tokenizer.decode(encoded.input_ids), tokenizer.decode(supervised)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path.name


def question(subject: str, n: int, split: str = "dev", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{subject}-{split}-{n}",
        "split": split,
        "subject": subject,
        "question": f"What is {n}?" if split == "dev" else f"What is {n}, again?",
        "A": "a0",
        "B": "None",
        "C": "c0",
        "D": "d0",
        "answer": "ABCD"[n % 4],
    } | changes


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five development and three test questions of each of three subjects."""
    records = [
        question(subject, n, split)
        for subject in ("world_religions", "abstract_algebra", "virology")
        for split, count in (("dev", 5), ("test", 3))
        for n in range(count)
    ]
    write(tmp_path / "mmlu.jsonl", records)
    return tmp_path


# --- formats, written by hand --------------------------------------------------------------


def test_mmlu_query(questions: Path, tokenizer: Any) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl")
    assert tulu(task.queries[1], tokenizer) == (
        "<|user|>\n"
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "What is 1?\nA. a0\nB. None\nC. c0\nD. d0\nAnswer:\n"
        "<|assistant|>\nThe answer is: B",
        " B",
    )
    assert [q.subtask for q in task.queries] == sorted(q.subtask for q in task.queries)


def test_mmlu_shots(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", shots=2)
    assert prompt(task.queries[0]) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "What is 1?\nA. a0\nB. None\nC. c0\nD. d0\nAnswer: B\n\n"
        "What is 2?\nA. a0\nB. None\nC. c0\nD. d0\nAnswer: C\n\n"
        "What is 0?\nA. a0\nB. None\nC. c0\nD. d0\nAnswer:"
    )


def test_mmlu_test_items_are_choices(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", test="mmlu.jsonl")
    assert len(task.queries) == 15
    assert len(task.test) == 9
    item = task.test[2]
    assert (item.kind, item.choices, item.answers) == ("choice", (" A", " B", " C", " D"), (" C",))
    assert item.plain
    assert item.prefix + item.answers[0] == response(item) == " C"


def test_mmlu_test_items_can_be_asked_as_queries_are(questions: Path) -> None:
    keys = {"path": "mmlu.jsonl", "test": "mmlu.jsonl", "test_prompt": "query"}
    item = build(questions, "mmlu", **keys).test[2]
    assert not item.plain
    assert item.shots == ()
    assert response(item) == "The answer is: C"
    assert item.prefix + item.answers[0] == response(item)
    assert prompt(item).count("What is") == 1
    assert prompt(build(questions, "mmlu", **keys, shots=2).test[2]).count("What is") == 3
    assert prompt(build(questions, "mmlu", **keys, test_shots=4).test[2]).count("What is") == 5


@pytest.mark.parametrize(("asked", "found"), [(None, 5), (0, 0), (3, 3)])
def test_worked_examples_before_a_test_item(questions: Path, asked: int | None, found: int) -> None:
    keys = {"path": "mmlu.jsonl", "test": "mmlu.jsonl", "test_shots": asked}
    task = build(questions, "mmlu", **keys)
    for item in task.test:
        assert len(item.shots) == found
        header, blank, rest = prompt(item).partition("\n\n")
        assert header.endswith(item.subtask.replace("_", " ") + ".")
        assert rest.startswith("".join(item.shots) + "What is ")
    assert task.facts["n_test_fewer_shots"] == 0


def test_fewer_worked_examples_than_the_benchmark_s_are_counted(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", heldout=1)
    (choice,) = (item for item in task.test if item.kind == "choice")
    assert len(choice.shots) == 4
    assert task.facts["n_test_fewer_shots"] == 1
    with pytest.raises(DataError, match=r"t\.test_shots"):
        build(questions, "mmlu", path="mmlu.jsonl", heldout=1, test_shots=5)


def test_mmlu_held_out_items_have_a_loss_and_choices(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", heldout=3)
    assert Counter((i.subtask, i.kind) for i in task.test) == {
        (subject, kind): 1
        for subject in ("world_religions", "abstract_algebra", "virology")
        for kind in ("loss", "choice")
    }


def test_mmlu_of_the_hub_s_shape(tmp_path: Path) -> None:
    record = {"subject": "s", "question": "q", "choices": list("wxyz"), "answer": 3}
    write(tmp_path / "dev.jsonl", [record])
    task = build(tmp_path, "mmlu", path="dev.jsonl")
    assert response(task.queries[0]) == "The answer is: D"
    assert "\nD. z\n" in prompt(task.queries[0])


BBH_PROMPT = (
    "CANARY line\n-----\nDo it.\n\nIn two parts.\n\n"
    "Q: one\nOptions:\n(A) x\nA: Let's think step by step.\nr1. So the answer is (A).\n\n"
    "Q: two\nA: Let's think step by step.\nr2\n\n"
    "Q: three\nA: Let's think step by step.\nr3"
)


def bbh_files(folder: Path, tasks: int = 2) -> dict[str, str]:
    prompts = {f"task_{n}": BBH_PROMPT.replace("one", f"one {n}") for n in range(tasks)}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    records = [
        {"id": f"task_{n}-{i}", "task": f"task_{n}", "input": f"new {i}", "target": f"({i})"}
        for n in range(tasks)
        for i in range(4)
    ]
    return {"prompts": "prompts.json", "test": write(folder / "bbh.jsonl", records)}


def test_bbh_query(tmp_path: Path, tokenizer: Any) -> None:
    bbh_files(tmp_path)
    task = build(tmp_path, "bbh", prompts="prompts.json")
    assert len(task.queries) == 6
    assert tulu(task.queries[1], tokenizer) == (
        "<|user|>\nDo it.\n\nIn two parts.\n\n"
        "Q: one 0\nOptions:\n(A) x\nA: Let's think step by step.\nr1. So the answer is (A).\n\n"
        "Q: three\nA: Let's think step by step.\nr3\n\n"
        "Q: two\n<|assistant|>\nA: Let's think step by step.\nr2",
        " Let's think step by step.\nr2",
    )


def test_bbh_test_items_are_generated_after_three_shots(tmp_path: Path) -> None:
    task = build(tmp_path, "bbh", **bbh_files(tmp_path))
    item = task.test[0]
    whole = BBH_PROMPT.split("-----\n")[1].replace("one", "one 0") + "\n\nQ: new 0"
    assert prompt(item) == whole + "\nA:"
    assert (item.kind, item.plain, response(item), item.prefix) == ("generate", True, "", "")
    assert item.answers == ("(0)",)
    assert len(item.shots) == 3
    assert "".join(item.shots) in whole
    item = build(tmp_path, "bbh", **bbh_files(tmp_path), test_prompt="query").test[0]
    assert (prompt(item), item.plain) == (whole, False)
    assert (response(item), item.prefix) == ("A:", "A:")


def test_bbh_tests_at_most_forty_problems_of_a_task(tmp_path: Path) -> None:
    files = bbh_files(tmp_path, tasks=1)
    records = [
        {"id": str(i), "task": "task_0", "input": f"new {i}", "target": "x"} for i in range(50)
    ]
    write(tmp_path / "bbh.jsonl", records)
    assert len(build(tmp_path, "bbh", **files).test) == 40
    assert len(build(tmp_path, "bbh", **files, test_per_subtask=45).test) == 45
    assert len(build(tmp_path, "bbh", **files, test_limit=7).test) == 7


def test_a_problem_without_an_answer_is_an_error(tmp_path: Path) -> None:
    files = bbh_files(tmp_path, tasks=1)
    write(tmp_path / "bbh.jsonl", [{"task": "task_0", "input": "q", "target": " "}])
    with pytest.raises(DataError, match=r"no answer\n.*bbh.jsonl:1, field target"):
        build(tmp_path, "bbh", **files)


def passage(language: str, n: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{language}-{n}",
        "language": language,
        "question": f"q{n}?",
        "context": f"c{n}",
        "answers": [{"text": f"a{n}", "answer_start": 0}, {"text": "other", "answer_start": 3}],
    } | changes


def test_tydiqa_query(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "one.jsonl", [passage("finnish"), passage("english", answers=["a0"])])
    task = build(tmp_path, "tydiqa", path="one.jsonl")
    assert tulu(task.queries[0], tokenizer) == (
        "<|user|>\n"
        "Answer the following question based on the information in the given passage."
        "Passage: c0\nQuestion: q0?\n<|assistant|>\nAnswer: a0",
        " a0",
    )
    assert prompt(task.queries[1]) == (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella."
        "Kappale: c0\nKysymys: q0?"
    )
    assert response(task.queries[1]) == "Vastaus: a0"


def test_tydiqa_knows_nine_languages() -> None:
    assert len(WORDING) == 9
    for field in ("instruction", "passage", "question", "answer"):
        assert len({getattr(words, field) for words in WORDING.values()}) == 9
    for words in WORDING.values():
        assert all(w.endswith(":") for w in (words.passage, words.question, words.answer))


def test_tydiqa_test_items_have_one_shot(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", [passage("english")])
    write(tmp_path / "dev.jsonl", [passage("english", n) for n in (1, 2)])
    task = build(tmp_path, "tydiqa", path="one.jsonl", test="dev.jsonl")
    assert [(i.example_id, i.kind) for i in task.test] == [
        ("english-1", "loss"),
        ("english-1", "generate"),
        ("english-2", "loss"),
        ("english-2", "generate"),
    ]
    assert prompt(task.test[1]) == (
        "Answer the following question based on the information in the given passage.\n\n"
        "Passage: c0\nQuestion: q0?\nAnswer: a0\n\n"
        "Passage: c1\nQuestion: q1?"
    )
    assert task.test[1].shots == ("Passage: c0\nQuestion: q0?\nAnswer: a0\n\n",)
    assert task.test[1].passages == ("c0", "c1")
    assert task.test[1].answers == ("a1", "other")
    assert response(task.test[1]) == "Answer: a1"


def test_messages_are_taken_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"id": "1", "instruction": "a", "input": "b", "output": "c", "category": "x"},
        {"id": "2", "instruction": "a", "output": "d", "subtask": "y", "category": "x"},
        {"id": "3", "instruction": "a", "output": "e"},
        {"id": "4", "instruction": "a", "output": " "},
    ]
    write(tmp_path / "own.jsonl", records)
    task = build(tmp_path, "messages", path="own.jsonl")
    assert [(q.example_id, q.subtask) for q in task.queries] == [("3", "t"), ("1", "x"), ("2", "y")]
    assert task.facts["n_dropped"] == 1
    rendered = tulu(task.queries[1], tokenizer)
    assert rendered == ("<|user|>\na\n\nb\n<|assistant|>\nc<|im_end|>\n", "c<|im_end|>")


def test_data_sets_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records as cais/mmlu, lukaemon/bbh and google-research-datasets/tydiqa have them."""
    bbh_files(tmp_path)
    asked: list[Hub] = []
    records = {
        "mmlu": {"subject": "s", "question": "q", "choices": list("wxyz"), "answer": 3},
        "bbh": {"input": "q", "target": "t"},
        "tydiqa": {
            "id": "finnish-7",
            "title": "t",
            "context": "c",
            "question": "q?",
            "answers": {"text": ["a", "b"], "answer_start": [0, 3]},
        },
    }

    def load(hub: Hub) -> list[dict[str, Any]]:
        asked.append(hub)
        n = 1 if hub.split == "dev" else 2
        name = hub.name.split("/")[1]
        ids = [{} if name == "bbh" else {"id": f"finnish-{hub.split}{i}"} for i in range(n)]
        return [records[name] | i for i in ids]

    monkeypatch.setattr(pools, "load_hub", load)
    for kind in records:
        keys: dict[str, Any] = {"test_hub": {"name": f"x/{kind}", "split": "test"}}
        keys["allow_contaminated"] = True
        if kind == "bbh":
            keys["prompts"] = "prompts.json"
        else:
            keys["hub"] = {"name": f"x/{kind}", "split": "dev"}
        task = build(tmp_path, kind, **keys)
        assert task.facts["test_source"] == f"x/{kind}"
        if kind == "bbh":
            assert [(h.config, h.split) for h in asked[-2:]] == [
                ("task_0", "test"),
                ("task_1", "test"),
            ]
            assert [t.subtask for t in task.test] == ["task_0"] * 2 + ["task_1"] * 2
        else:
            assert task.facts["source"] == f"x/{kind}"
        if kind == "tydiqa":
            assert task.test[0].answers == ("a", "b")
            assert {t.subtask for t in task.test} == {"finnish"}
    with pytest.raises(ValueError, match="path or hub, not both"):
        build(tmp_path, "mmlu", path="a", hub={"name": "b"})


# --- draws ---------------------------------------------------------------------------------


def items(**sizes: int) -> list[Item]:
    return [
        Item(f"{subtask}{i}", subtask, (), "", False)
        for subtask, size in sizes.items()
        for i in range(size)
    ]


def test_draws_are_spread_over_subtasks() -> None:
    pool = items(a=5, b=5, c=2)
    for n, sizes in ((3, [1, 1, 1]), (7, [2, 2, 3]), (6, [2, 2, 2]), (10, [2, 4, 4])):
        drawn = spread(pool, n, seed=0, draw="x")
        assert len(drawn) == n
        assert sorted(Counter(d.subtask for d in drawn).values()) == sizes
        assert [d.example_id for d in drawn] == sorted(d.example_id for d in drawn)
    assert spread(pool, None, 0, "x") == pool
    assert spread(pool, 99, 0, "x") == pool
    assert spread(pool, 0, 0, "x") == []


def test_draws_are_seeded_nested_and_independent_of_order() -> None:
    pool = items(a=9, b=9)

    def draw(n: int, seed: int = 0, name: str = "x", reverse: bool = False) -> set[str]:
        return {d.example_id for d in spread(pool[::-1] if reverse else pool, n, seed, name)}

    assert draw(6) == draw(6, reverse=True)
    assert draw(4) < draw(6)
    assert draw(6) != draw(6, seed=1)
    assert draw(6) != draw(6, name="y")


@pytest.mark.parametrize("queries", [None, 3, 6])
def test_held_out_examples_are_never_queries(questions: Path, queries: int | None) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", heldout=6, queries=queries)
    asked = {q.example_id for q in task.queries}
    held = {t.example_id for t in task.test}
    assert len(held) == 6
    assert asked.isdisjoint(held)
    assert len(asked) == (queries or 9)
    assert set(Counter(t.subtask for t in task.test).values()) == {4}  # two examples, two kinds
    assert task.facts["n_queries"] == len(asked)


@pytest.mark.parametrize("queries", [None, 2])
def test_held_out_examples_are_never_shown(tmp_path: Path, queries: int | None) -> None:
    bbh_files(tmp_path)
    task = build(tmp_path, "bbh", prompts="prompts.json", heldout=2, queries=queries)
    held = {t.example_id: f"Q: {prompt(t).rsplit('Q: ')[-1]}\nA: " for t in task.test}
    assert len(held) == 2
    for item in [*task.queries, *task.test]:
        for example_id, shown in held.items():
            of_this_subtask = example_id.rsplit("-dev-")[0] == item.subtask
            assert not of_this_subtask or shown not in prompt(item)
        assert prompt(item).count("\nA: ") == (1 if item in task.queries else 2)


def test_an_example_is_not_among_its_own_shots(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", shots=4)
    for query in task.queries:
        assert prompt(query).count("What is") == 5
        assert len(set(prompt(query).split("What is"))) == 6


def test_test_items_are_limited_and_spread(questions: Path) -> None:
    task = build(questions, "mmlu", path="mmlu.jsonl", test="mmlu.jsonl", test_limit=6)
    assert set(Counter(t.subtask for t in task.test).values()) == {2}


# --- what cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"answer": "E"}, ["unknown answer letter", "mmlu.jsonl:1, field answer", "'E'", "A, B"]),
        ({"answer": ""}, ["unknown answer letter"]),
        ({"answer": 4}, ["unknown answer letter"]),
        ({"choices": ["x", "y"]}, ["four choices", "mmlu.jsonl:1"]),
        ({"question": None}, ["not text", "mmlu.jsonl:1, field question"]),
        ({"split": "val"}, ["no records of a split", "'dev'", "val"]),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, changes: Any, parts: list[str]) -> None:
    write(tmp_path / "mmlu.jsonl", [question("s", 0, **changes)])
    with pytest.raises(DataError) as caught:
        build(tmp_path, "mmlu", path="mmlu.jsonl")
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    record = question("s", 0)
    del record["C"]
    write(tmp_path / "mmlu.jsonl", [record])
    with pytest.raises(DataError, match="lacks a field") as caught:
        build(tmp_path, "mmlu", path="mmlu.jsonl")
    assert "no C" in str(caught.value)
    assert "mmlu.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"queries": 16}, ["queries 16 + heldout 0", "at most 15"]),
        ({"queries": 10, "heldout": 6}, ["queries 10 + heldout 6", "at most 15"]),
        ({"heldout": 15}, ["all (at least 1) + heldout 15", "at most 15"]),
        ({"shots": 5}, ["tasks.t.shots", "subtask abstract_algebra", "at most 4"]),
        ({"path": "nothing.jsonl"}, ["tasks.t.path", "no such file", "mmlu.jsonl"]),
        ({"path": "../mmlu.jsonl"}, ["may not leave data_dir"]),
    ],
)
def test_what_a_task_lacks_is_said_in_numbers(questions: Path, keys: Any, parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        build(questions, "mmlu", **({"path": "mmlu.jsonl"} | keys))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "keys", "where"),
    [
        ("tydiqa", {}, "tasks.t.path"),
        ("messages", {}, "tasks.t.path"),
        ("bbh", {"path": "x.jsonl"}, "tasks.t.path"),
        ("mmlu", {"prompts": "x.json"}, "tasks.t.prompts"),
        ("tydiqa", {"prompts": "x.json"}, "tasks.t.prompts"),
        ("messages", {"path": "x.jsonl", "shots": 2}, "tasks.t.shots"),
    ],
)
def test_keys_that_do_not_go_with_a_kind(tmp_path: Path, kind: str, keys: Any, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, kind, **keys)
    assert caught.value.where == where


def test_one_file_may_not_be_queries_and_test(tmp_path: Path) -> None:
    write(tmp_path / "own.jsonl", [{"instruction": str(i), "output": "b"} for i in range(4)])
    for keys in ({}, {"queries": 1}, {"queries": 1, "heldout": 1}):
        with pytest.raises(DataError, match="also development examples"):
            build(tmp_path, "messages", path="own.jsonl", test="own.jsonl", **keys)


def test_duplicate_ids_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", [question("s", 0), question("s", 0)])
    with pytest.raises(DataError, match="two examples of a task have one id"):
        build(tmp_path, "mmlu", path="mmlu.jsonl")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ('["a"]', "JSON object"),
        ('{"x": 3}', "JSON object"),
        ('{"x": "Do.\\n\\nQ: a\\nA: b\\n\\nQ: c"}', "three worked examples"),
        ('{"x": "Q: a\\nA: b\\n\\nQ: a\\nA: b\\n\\nQ: a\\nA: b"}', "three worked examples"),
        ("{}", "has no examples"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(DataError, match=match):
        build(tmp_path, "bbh", prompts="prompts.json")


def test_a_test_item_needs_a_known_task(tmp_path: Path) -> None:
    files = bbh_files(tmp_path)
    write(tmp_path / "bbh.jsonl", [{"task": "task_9", "input": "a", "target": "b"}])
    with pytest.raises(DataError, match="no worked examples") as caught:
        build(tmp_path, "bbh", **files)
    assert "task_0" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"language": "klingon"}, "unknown language"),
        ({"answers": []}, "no answer"),
        ({"answers": None}, "no answer"),
        ({"answers": [{"text": ""}]}, "no answer"),
    ],
)
def test_bad_passages_are_named(tmp_path: Path, changes: Any, match: str) -> None:
    write(tmp_path / "one.jsonl", [passage("english") | changes])
    with pytest.raises(DataError, match=match) as caught:
        build(tmp_path, "tydiqa", path="one.jsonl")
    assert "one.jsonl:1" in str(caught.value)


# --- the stage -----------------------------------------------------------------------------


def test_the_stage_writes_equal_bytes(questions: Path, tmp_path: Path) -> None:
    keys = {"name": "mmlu", "kind": "mmlu", "path": "mmlu.jsonl", "heldout": 3, "queries": 6}
    written = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        job = Job("task", {"task": keys}, {}, tmp_path / run, data_dir=questions)
        metrics = task_stage.make(job)
        names = ("queries.parquet", "test.parquet")
        written.append([(tmp_path / run / name).read_bytes() for name in names])
    assert written[0] == written[1]
    queries, test = (tmp_path / "one" / name for name in ("queries.parquet", "test.parquet"))
    assert pq.read_schema(queries).remove_metadata().equals(QUERY_SCHEMA)
    assert pq.read_schema(test).remove_metadata().equals(TEST_SCHEMA)
    assert read_metadata(queries) == read_metadata(test)
    assert metrics == read_metadata(test) | {"n_contaminated": 0}
    assert metrics["source"] == "mmlu.jsonl"
    assert (metrics["n_queries"], metrics["n_test"], metrics["n_test_choice"]) == (6, 3, 3)
    rows = read_table(test)
    for _, row in rows[rows["kind"] == "choice"].iterrows():
        assert row["answer"] in list(row["choices"])
        assert list(row["answers"]) == [row["answer"]]


def test_without_test_items_the_table_is_empty_but_there(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    keys = {"name": "mmlu", "kind": "mmlu", "path": "mmlu.jsonl"}
    task_stage.make(Job("task", {"task": keys}, {}, tmp_path / "out", data_dir=questions))
    assert pq.read_table(tmp_path / "out" / "test.parquet").num_rows == 0


# --- lm-eval's package data ----------------------------------------------------------------


def test_lm_eval_ships_mmlu(tmp_path: Path) -> None:
    """0.4.13 has 282 of the 285 development questions, one of them with five choices."""
    task = build(tmp_path, "mmlu")
    assert str(task.facts["source"]).startswith("lm-eval ")
    assert (len(task.queries), task.facts["n_dropped"], task.facts["n_subtasks"]) == (281, 1, 57)
    first = task.queries[0]
    assert first.example_id == "abstract_algebra-dev-0"
    assert prompt(first) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Statement 1 | Every element of a group generates a cyclic subgroup of the group. "
        "Statement 2 | The symmetric group S_10 has 10 elements.\n"
        "A. True, True\nB. False, False\nC. True, False\nD. False, True\nAnswer:"
    )
    assert response(first) == "The answer is: C"
    few = {"college_chemistry": 3, "formal_logic": 4, "human_aging": 4}
    counts = Counter(q.subtask for q in task.queries)
    assert {s: n for s, n in counts.items() if n != 5} == few


def test_lm_eval_ships_bbh(tmp_path: Path) -> None:
    task = build(tmp_path, "bbh", heldout=27, queries=27)
    assert set(Counter(q.subtask for q in task.queries).values()) == {1}
    assert set(Counter(t.subtask for t in task.test).values()) == {1}
    every = build(tmp_path, "bbh")
    assert set(Counter(q.subtask for q in every.queries).values()) == {3}
    assert len(every.queries) == 81
    for query in every.queries:
        assert response(query).startswith("A: Let's think step by step.\n")
        assert prompt(query).count("\nA: Let's think step by step.\n") == 2


@pytest.mark.parametrize("read", [mmlu.shipped_questions, bbh.shipped_examples])
def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    monkeypatch.setattr(lm_eval_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed") as caught:
        read()
    assert "pip install lm-eval==0.4.13" in str(caught.value)


def test_a_package_file_is_read_and_never_run(tmp_path: Path) -> None:
    text = (
        "dataset_name: x\ndescription: d\nprocess: !function utils.process\n"
        "evil: !!python/object/apply:os.system ['exit 1']\n"
        "fewshot_config: {samples: [{input: !function a.b, target: 3}]}\n"
    )
    file = tmp_path / "x.yaml"
    file.write_text(text.replace("evil: !!python/object/apply:os.system ['exit 1']\n", ""))
    task = lm_eval_files._read(file, ("input", "target"))
    assert task.samples == [{"input": "a.b", "target": "3"}]
    file.write_text(text)
    with pytest.raises(DataError, match="not as expected"):
        lm_eval_files._read(file, ("input", "target"))


@pytest.mark.parametrize("text", ["- 1", "dataset_name: x", "a: [", "description: d"])
def test_a_package_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError, match="not as expected"):
        lm_eval_files._read(tmp_path / "x.yaml", ("input",))


# --- real data -----------------------------------------------------------------------------


@pytest.mark.shared_data
def test_real_mmlu(shared_data: Path) -> None:
    path = "mmlu/mmlu.parquet"
    with pytest.raises(DataError, match="5 found"):
        build(shared_data, "mmlu", path=path, test=path)
    task = build(shared_data, "mmlu", path=path, test=path, allow_contaminated=True)
    assert set(Counter(q.subtask for q in task.queries).values()) == {5}
    assert len(task.queries) == 285
    assert len(task.test) == 14_042
    nan = [t for t in task.test if "\nA. nan\n" in prompt(t)]
    assert not nan
    records = pq.read_table(shared_data / path).to_pylist()
    answers = {r["id"]: r["answer"] for r in records}
    assert all(t.answers == (f" {answers[t.example_id]}",) for t in task.test)


@pytest.mark.shared_data
def test_lm_eval_s_questions_are_the_development_questions(shared_data: Path) -> None:
    """Of 281, 271 ask in the words of the original; all but 5 of them offer and answer the same."""

    def plain(text: str) -> str:
        return "".join(text.split()).casefold()

    rows = pq.read_table(shared_data / "mmlu/mmlu.parquet").to_pylist()
    original = {(r["subject"], plain(r["question"])): r for r in rows if r["split"] == "dev"}
    shipped, _, _ = mmlu.shipped_questions()
    pairs = [(q, original.get((q.subtask, plain(q.question)))) for q in shipped]
    known = [(q, r) for q, r in pairs if r is not None]
    assert len(known) >= 271
    same = [
        q.answer == r["answer"]
        and [plain(c) for c in q.choices] == [plain(r[letter]) for letter in "ABCD"]
        for q, r in known
    ]
    assert sum(same) >= len(known) - 5


@pytest.mark.shared_data
def test_real_bbh_equals_lm_eval_s_but_for_spaces(shared_data: Path) -> None:
    ours = build(shared_data, "bbh", prompts="bbh/cot_prompts.json", test="bbh/bbh.parquet")
    shipped = build(shared_data, "bbh")
    assert len(ours.queries) == 81
    assert len(ours.test) == 27 * 40
    for a, b in zip(ours.queries, shipped.queries, strict=True):
        assert (a.example_id, a.prefix) == (b.example_id, b.prefix)
        assert prompt(a).split() == prompt(b).split()
        assert response(a).split() == response(b).split()
        if a.subtask != "sports_understanding":
            assert (prompt(a), response(a)) == (prompt(b), response(b))
    assert not any("canary" in prompt(q) for q in ours.queries)


@pytest.mark.shared_data
def test_real_bbh_prompts_are_less_s(shared_data: Path) -> None:
    """A test prompt is the task's prompt file without its two header lines, then the question."""
    prompts = json.loads((shared_data / "bbh/cot_prompts.json").read_text())
    task = build(
        shared_data, "bbh", prompts="bbh/cot_prompts.json", test="bbh/bbh.parquet", test_limit=27
    )
    inputs = {r["id"]: r for r in pq.read_table(shared_data / "bbh/bbh.parquet").to_pylist()}
    assert len(task.test) == 27
    for item in task.test:
        body = "\n".join(prompts[item.subtask].split("\n")[2:]).strip()
        assert prompt(item) == f"{body}\n\nQ: {inputs[item.example_id]['input']}\nA:"


@pytest.mark.shared_data
def test_real_tydiqa(shared_data: Path) -> None:
    task = build(shared_data, "tydiqa", path="tydiqa/one_shot.parquet", test="tydiqa/dev.parquet")
    assert [q.subtask for q in task.queries] == sorted(WORDING)
    assert task.facts["n_test"] == 1_713  # 8 x 200 + 113, the paper's number
    assert task.facts["n_test_generate"] == 1_713
    assert all(t.answers[0] in prompt(t) for t in task.test)
