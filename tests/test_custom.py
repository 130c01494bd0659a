"""Tasks of one's own: the README's example, the harness's prompts, and what cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_model, tiny_tokenizer

from iprox.data.tasks import Task, build_task
from iprox.errors import DataError
from iprox.stages import evaluation, query, task
from iprox.store.arrays import open_store
from iprox.store.job import Job
from iprox.store.tables import read_table
from iprox.study.schema import TaskSection

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"<!-- example: ([^\n]*) -->\n```\w+\n(.*?)```", re.DOTALL)
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_target": "{{a}}",
    "num_fewshot": 1,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
}


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    """The README's files in a folder; its task."""
    found = dict(EXAMPLE.findall((ROOT / "config/README.md").read_text(encoding="utf-8")))
    study = yaml.safe_load(found.pop("study"))
    for name, text in found.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (section,) = study["tasks"]
    return section


def own(folder: Path, content: Any, records: list[dict[str, Any]], **keys: Any) -> Task:
    (folder / "t.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    section = {"name": "t", "kind": "custom", "yaml": "t.yaml", "path": "t.jsonl"} | keys
    return build_task(TaskSection(**section), folder)


def test_the_example_of_the_readme(example: dict[str, Any], tmp_path: Path) -> None:
    built = build_task(TaskSection(**example), tmp_path)
    assert len(built.queries) == 2
    asked = built.queries[0]
    country = {"it": "Italy", "pe": "Peru", "mn": "Mongolia", "ke": "Kenya"}[asked.example_id]
    assert asked.messages[0]["content"] == f"Question: What is the capital of {country}?\nAnswer:"
    assert asked.messages[1]["content"] in ("Rome", "Lima", "Ulaanbaatar", "Nairobi")
    assert sorted(i.kind for i in built.test) == ["choice", "choice", "loss", "loss"]
    choice = next(i for i in built.test if i.kind == "choice")
    assert choice.plain
    assert len(choice.shots) == 1
    assert choice.answers[0] in choice.choices
    assert choice.answers[0].startswith(" ")


def test_the_example_flows_to_query_gradients_and_evaluation(
    example: dict[str, Any], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_model(max_position_embeddings=1024).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    folders = {name: tmp_path / f"made-{name}" for name in ("task", "query", "evaluation")}
    for folder in folders.values():
        folder.mkdir()
    compute = {"compute": {"dtype": "float32", "attention": "eager"}, "chat": {}}
    task.make(Job("task", {"task": example}, {}, folders["task"], data_dir=tmp_path))
    parents = {"model": model, "task": folders["task"]}
    influence = compute | {"influence": {}, "layers": {}}
    asked = query.make(Job("query", influence, parents, folders["query"]))
    assert asked["examples"] == 2
    assert len(list(open_store(folders["query"] / "query.zarr").group_keys())) > 0
    params = compute | {"evaluate": {"bootstrap": 20}}
    evaluation.make(Job("evaluation", params, parents, folders["evaluation"]))
    metrics = json.loads((folders["evaluation"] / "metrics.json").read_text())
    assert metrics["accuracy"]["n"] == metrics["loss"]["n"] == 2
    items = read_table(folders["evaluation"] / "items.parquet")
    assert items["not_run"].isna().all()


def test_generated_answers_end_where_the_file_says(tmp_path: Path) -> None:
    records = [{"q": f"{n}?", "a": f"answer {n}"} for n in range(4)]
    built = own(tmp_path, GENERATED, records, heldout=2)
    item = next(i for i in built.test if i.kind == "generate")
    assert item.messages[0]["content"].startswith("Q: ")
    assert item.messages[0]["content"].endswith("?\nA:")
    assert item.shots[0] in item.messages[0]["content"]
    how = evaluation.generation_of(built.facts)
    assert how is not None
    assert (how.max_new_tokens, how.stop) == (5, ("\n",))
    assert how.matches(how.extract(" Answer 1. "), ["answer 1"])


def test_prompts_are_the_harness_s(example: dict[str, Any], tmp_path: Path) -> None:
    """Its own rendering of the same file, worked examples included."""
    from lm_eval.api.task import ConfigurableTask

    section = TaskSection(
        **example | {"heldout": 0, "test": example["path"]}, allow_contaminated=True
    )
    records = [json.loads(x) for x in (tmp_path / example["path"]).read_text().splitlines()]
    tested = [r | {"id": f"test-{r['id']}"} for r in records]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tested))
    built = build_task(section.model_copy(update={"test": "test.jsonl"}), tmp_path)
    content = yaml.safe_load((tmp_path / example["yaml"]).read_text())
    files = {"dev": str(tmp_path / example["path"]), "test": str(tmp_path / "test.jsonl")}
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
    }
    theirs = ConfigurableTask(config=content | data)
    for document in theirs.test_docs():
        ours = next(i for i in built.test if i.example_id == document["id"])
        prompt = theirs.fewshot_context(document, num_fewshot=1)
        assert prompt == ours.messages[0]["content"]
        requests = theirs.construct_requests(document, prompt, doc_id=0)
        assert [r.args for r in requests] == [(prompt, choice) for choice in ours.choices]
        assert ours.choices.index(ours.answers[0]) == document["cities"].index(document["city"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"doc_to_text": None}, ["lacks a key", "t.yaml", "no doc_to_text"]),
        ({"doc_to_target": ""}, ["lacks a key", "no doc_to_target"]),
        ({"output_type": None}, ["lacks a key", "no output_type"]),
        ({"output_type": "multiple_choice"}, ["lacks a key", "no doc_to_choice"]),
        ({"output_type": "rolling"}, ["unknown output type", "'rolling'", "multiple_choice"]),
        ({"doc_to_txt": "x"}, ["does not understand", "'doc_to_txt'", "doc_to_text or"]),
        ({"filter_list": []}, ["does not understand", "'filter_list'"]),
        (
            {"doc_to_text": "{{missing}}"},
            ["fails on a record", "t.jsonl:1", "missing", "fields q, a"],
        ),
        ({"doc_to_text": "{{ q"}, ["fails on a record"]),
    ],
)
def test_bad_task_files_are_named(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        own(tmp_path, GENERATED | change, [{"q": "1?", "a": "x"}, {"q": "2?", "a": "y"}])
    for part in parts:
        assert part in str(caught.value)


def test_functions_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("doc_to_text: !function os.getcwd\n")
    section = TaskSection(name="t", kind="custom", yaml="t.yaml", path="t.jsonl")
    with pytest.raises(DataError, match="read, not run"):
        build_task(section, tmp_path)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"a": "z"}, ["none of the choices", "t.jsonl:2", "'z'", "x, y"]),
        ({"a": 2}, ["none of the choices", "0 to 1"]),
        ({"a": ""}, ["no answer", "t.jsonl:2"]),
        ({"c": ["x"]}, ["no choices", "t.jsonl:2"]),
        ({"c": ["x", " "]}, ["no choices"]),
    ],
)
def test_bad_records_are_named(tmp_path: Path, record: dict[str, Any], parts: list[str]) -> None:
    content = {
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "c",
        "doc_to_target": "a",
    }
    good = {"q": "1?", "c": ["x", "y"], "a": "x"}
    with pytest.raises(DataError) as caught:
        own(tmp_path, content, [good, good | {"q": "2?"} | record])
    for part in parts:
        assert part in str(caught.value)


def test_an_answer_may_be_a_number(tmp_path: Path) -> None:
    content = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{a}}",
    }
    built = own(tmp_path, content, [{"q": "1?", "a": 1}, {"q": "2?", "a": "yes"}])
    assert [q.messages[1]["content"] for q in built.queries] == ["no", "yes"]
