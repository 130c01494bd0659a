"""The task files work in the harness itself, and give what a study's evaluation gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model, tiny_tokenizer
from test_tasks import BBH_PROMPT

from iprox.data.tasks import build_task, item_table
from iprox.stages import evaluation
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table
from iprox.study.schema import ChatSection, EvaluateSection, TaskSection

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "workflow" / "tasks"
GOLDEN = Path(__file__).parent / "golden"

FILES = {
    "mmlu": {"path": "mmlu.jsonl", "test": "mmlu.jsonl"},
    "bbh": {"prompts": "prompts.json", "test": "bbh.jsonl"},
    "tydiqa": {"path": "one_shot.jsonl", "test": "dev.jsonl"},
}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two subtasks of each benchmark, made up."""
    questions = [
        {
            "id": f"{subject}-{split}-{n}",
            "split": split,
            "subject": subject,
            "question": f"Which number of {subject} comes after {n}?" + " Say." * (split == "test"),
            **{letter: str(n + i) for i, letter in enumerate("ABCD")},
            "answer": "BCDA"[n % 4],
        }
        for subject in ("abstract_algebra", "virology")
        for split, count in (("dev", 5), ("test", 4))
        for n in range(count)
    ]
    write(tmp_path / "mmlu.jsonl", questions)
    prompts = {f"task_{n}": BBH_PROMPT.replace("one", f"one {n}") for n in range(2)}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    problems = [
        {"id": f"{task}-{i}", "task": task, "input": f"new {i}", "target": f"({i})"}
        for task in prompts
        for i in range(2)
    ]
    write(tmp_path / "bbh.jsonl", problems)
    for name, first in (("one_shot", 0), ("dev", 1)):
        passages = [
            {
                "id": f"{language}-{n}",
                "language": language,
                "context": f"The town of {language} has {n} towers.",
                "question": f"How many towers, {language}?",
                "answers": [{"text": f"{n}"}, {"text": f"{n} towers"}],
            }
            for language in ("english", "finnish")
            for n in range(first, 3 * first + 1)
        ]
        write(tmp_path / f"{name}.jsonl", passages)
    return tmp_path


@pytest.mark.parametrize("kind", ["mmlu", "bbh", "tydiqa"])
def test_rendered_prompts_are_pinned(kind: str, data: Path, tokenizer: Any) -> None:
    """What the model reads, character by character; a change here changes results."""
    task = build_task(TaskSection(name=kind, kind=kind, **FILES[kind]), data)
    chat, settings = ChatSection(template="tulu"), EvaluateSection()
    how = evaluation.generation_of({"kind": kind})
    prepare = evaluation.Preparation(tokenizer, chat, settings, 100_000, how)
    item = next(row for row in item_table(task).to_pylist() if row["kind"] != "loss")
    found = prepare(item)
    text = tokenizer.decode(found.prompt)
    text += "".join(f"\n[choice]{tokenizer.decode(c)}" for c in found.completions)
    assert text == (GOLDEN / f"{kind}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["mmlu", "bbh", "tydiqa"])
def test_the_harness_gives_what_a_study_gives(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = tiny_model(max_position_embeddings=4096)
    folder, task, out = tmp_path / "model", tmp_path / "task", tmp_path / "out"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for made in (task, out):
        made.mkdir()
    built = build_task(TaskSection(name=kind, kind=kind, **FILES[kind]), data)
    write_table(task / "test.parquet", item_table(built), built.facts)
    params = {
        "evaluate": {"bootstrap": 0, "max_length": 4096},
        "chat": {"max_length": 4096},
        "compute": {"dtype": "float32", "attention": "eager"},
    }
    how = evaluation.GENERATION.get(kind, evaluation.GENERATION["bbh"])
    monkeypatch.setitem(
        evaluation.GENERATION,
        kind,
        replace(how, max_new_tokens=8),
    )
    evaluation.make(Job("evaluation", params, {"task": task, "model": folder}, out))
    ours = read_table(out / "items.parquet").query("kind != 'loss'").set_index("example_id")

    manager = TaskManager(
        include_path=str(FOLDER),
        include_defaults=False,
        metadata={"data_dir": str(data), **FILES[kind]},
    )
    lm = HFLM(pretrained=model.float(), tokenizer=tiny_tokenizer(), backend="causal")
    theirs = simple_evaluate(
        lm,
        tasks=[f"iprox_{kind}"],
        task_manager=manager,
        apply_chat_template=kind == "tydiqa",
        gen_kwargs=None if kind == "mmlu" else {"max_gen_toks": 8},
        bootstrap_iters=0,
    )
    samples = {s["doc"]["example_id"]: s for s in theirs["samples"][f"iprox_{kind}"]}
    assert set(samples) == set(ours.index)
    for example_id, sample in samples.items():
        mine = ours.loc[example_id]
        if kind == "mmlu":
            values = [float(value) for value, _ in sample["filtered_resps"]]
            assert mine["prediction"] == sample["doc"]["choices"][int(np.argmax(values))]
            assert mine["correct"] == bool(sample["acc"])
        else:
            assert mine["generation"] == sample["filtered_resps"][0]
            assert mine["correct"] == bool(sample["exact_match"])
    metrics = json.loads((out / "metrics.json").read_text())
    scores = theirs["results"][f"iprox_{kind}"]
    name, score = ("accuracy", "acc") if kind == "mmlu" else ("exact_match", "exact_match")
    assert metrics[name]["value"] == pytest.approx(scores[f"{score},none"])
    assert metrics[f"{name}_macro"]["value"] == pytest.approx(scores[f"{score}_macro,none"])
