"""Likelihoods against direct computation, scoring of answers, and nothing silently skipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from iprox.data.chat import completion_ids, encode, encode_prompt
from iprox.data.items import TEST_SCHEMA
from iprox.errors import DataError, NumericsError
from iprox.evaluation import metrics
from iprox.evaluation.likelihood import Request, generations, harness, log_likelihoods
from iprox.models.load import load_model
from iprox.numerics.flops import Linear, Network
from iprox.stages import evaluation
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table
from iprox.study.schema import ChatSection, EvaluateSection


@pytest.fixture
def lm(model: Any, tokenizer: Any) -> Any:
    return harness(model, tokenizer)


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """Token by token, each from a forward pass of its own."""
    total, ids = 0.0, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, dim=-1)[token])
        ids.append(token)
    return total


def greedy(model: Any, context: list[int], n: int) -> list[int]:
    ids = list(context)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def item(example_id: str, kind: str, answer: str, **changes: Any) -> dict[str, Any]:
    row = {
        "example_id": example_id,
        "subtask": "s",
        "kind": kind,
        "messages": [
            {"role": "user", "content": f"Question {example_id}?"},
            {"role": "assistant", "content": f"Answer:{answer}"},
        ],
        "prefix": "Answer:",
        "eos": False,
        "choices": [],
        "answer": answer,
        "answers": [answer],
        "plain": False,
        "shots": [],
        "passages": [],
    }
    return row | changes


def shown(n_shots: int, question: str = "2?", length: int = 30) -> dict[str, Any]:
    """A plain prompt of 10 + n * 30 + 2 characters, which are tokens."""
    shots = [f"{n}".rjust(length - 2, "s") + "\n\n" for n in range(n_shots)]
    messages = [
        {"role": "user", "content": "header...\n" + "".join(shots) + question},
        {"role": "assistant", "content": " A"},
    ]
    return {"messages": messages, "prefix": "", "plain": True, "shots": shots}


def make_job(tmp_path: Path, model: Path, rows: list[dict[str, Any]], kind: str = "mmlu") -> Job:
    task, out = tmp_path / "task", tmp_path / "out"
    for folder in (task, out):
        folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=TEST_SCHEMA)
    write_table(task / "test.parquet", table, {"kind": kind})
    params = {
        "evaluate": {"bootstrap": 50, "max_length": 200},
        "chat": {"max_length": 200},
        "compute": {"dtype": "float32", "attention": "eager"},
    }
    return Job("evaluation", params, {"task": task, "model": model}, out)


def run(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    evaluation.make(job)
    found = json.loads((job.out / "metrics.json").read_text())
    items = read_table(job.out / "items.parquet")
    return found, items.astype(object).where(items.notna(), None).to_dict("records")


# --- likelihoods ---------------------------------------------------------------------------


def test_likelihoods_equal_a_direct_computation(lm: Any, model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for context, continuation in ((9, 1), (3, 7), (20, 2), (1, 1)):
        ids = torch.randint(4, 260, (context + continuation,), generator=generator).tolist()
        requests.append(Request(ids[:context], ids[context:]))
    # the same context asked twice, once for one token: the harness may share their logits
    requests += [Request(requests[0].context, [7]), Request(requests[1].context, [7])]
    found = log_likelihoods(lm, requests)
    direct = [log_likelihood(model, r.context, r.continuation) for r in requests]
    assert found == pytest.approx(direct, abs=1e-6)  # norms and rotary angles are in float32


def test_bfloat16_logits_are_normalised_in_float32(tokenizer: Any) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    (value,) = log_likelihoods(harness(model, tokenizer), [Request([5, 6, 7], [8])])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert value == pytest.approx(float(torch.log_softmax(logits.float(), dim=-1)[8]), abs=1e-6)


def test_requests_beyond_the_window_are_refused_rather_than_cut(lm: Any) -> None:
    log_likelihoods(lm, [Request([5] * 500, [6] * 12)])
    with pytest.raises(DataError, match="512"):
        log_likelihoods(lm, [Request([5] * 501, [6] * 12)])
    with pytest.raises(DataError, match=r"5 \+ 0"):
        log_likelihoods(lm, [Request([5] * 5, [])])


def test_a_diverged_model_is_an_error(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="1 of 1"):
        log_likelihoods(harness(model, tokenizer), [Request([5], [6])])


def test_generation_is_greedy_and_ends_at_a_stop_text(tokenizer: Any) -> None:
    model = tiny_model(dtype=torch.float32)
    lm = harness(model, tokenizer)
    contexts = [[40, 50, 60], [70, 80, 90, 100, 110]]
    whole = [tokenizer.decode(greedy(model, c, 8), skip_special_tokens=True) for c in contexts]
    assert generations(lm, contexts, (), 8) == whole
    assert whole[0] != whole[1]
    stop = whole[0][2]
    assert generations(lm, contexts, (stop,), 8) == [w.split(stop)[0] for w in whole]
    with pytest.raises(DataError, match="510"):
        generations(lm, contexts, (), 510)


# --- the stage -----------------------------------------------------------------------------


def test_loss_is_the_mean_over_the_completions_tokens_as_a_query_has_them(
    tmp_path: Path, target_folder: Path
) -> None:
    rows = [item("a", "loss", " the first"), item("b", "loss", " x", eos=True, prefix="")]
    found, items = run(make_job(tmp_path, target_folder, rows))
    model, tokenizer = load_model(target_folder), tiny_tokenizer()
    losses = []
    for row in rows:
        encoded = encode(
            row["messages"], tokenizer, "tokenizer", 200, row["prefix"], row["eos"], last_only=True
        )
        start = len(encode_prompt(row["messages"], tokenizer, "tokenizer", row["prefix"]))
        continuation = encoded.input_ids[start : start + encoded.supervised]
        assert encoded.labels[start : start + encoded.supervised] == continuation
        total = log_likelihood(model, encoded.input_ids[:start], continuation)
        losses.append(-total / len(continuation))
    assert [i["loss"] for i in items] == pytest.approx(losses, abs=1e-5)
    assert found["loss"]["value"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["loss"]["n"] == 2
    assert found["loss"]["low"] <= found["loss"]["value"] <= found["loss"]["high"]
    assert len(tokenizer(rows[0]["answer"])["input_ids"]) == len(" the first")  # bytes are tokens


def test_the_likeliest_choice_wins(tmp_path: Path, target_folder: Path) -> None:
    choices = [" A", " B", " C", " D"]
    rows = [item(f"q{i}", "choice", choices[i], choices=choices) for i in range(4)]
    found, items = run(make_job(tmp_path, target_folder, rows))
    model, tokenizer = load_model(target_folder), tiny_tokenizer()
    for row, result in zip(rows, items, strict=True):
        prompt = encode_prompt(row["messages"], tokenizer, "tokenizer", "Answer:")
        values = [log_likelihood(model, prompt, completion_ids(c, tokenizer)) for c in choices]
        assert result["prediction"] == choices[int(np.argmax(values))]
        assert result["correct"] == (result["prediction"] == row["answer"])
    assert found["accuracy"]["value"] == np.mean([i["correct"] for i in items])
    assert "loss" not in found


def test_accuracy_is_by_likelihood_and_by_likelihood_per_byte(
    tmp_path: Path, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted: a longer right choice is less likely in all, but likelier per byte."""
    scripts = {" no": -3.0, " yes indeed": -4.0}
    monkeypatch.setattr(
        evaluation,
        "log_likelihoods",
        lambda lm, requests, advance: [
            scripts[lm.tokenizer.decode(r.continuation)] for r in requests
        ],
    )
    rows = [
        item("long", "choice", " yes indeed", choices=list(scripts), subtask="s1"),
        item("short", "choice", " no", choices=list(scripts), subtask="s2"),
        item("short2", "choice", " no", choices=list(scripts), subtask="s2"),
    ]
    found, items = run(make_job(tmp_path, target_folder, rows))
    assert [i["correct"] for i in items] == [False, True, True]
    assert [i["accuracy_norm"] for i in items] == [True, False, False]
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["accuracy_macro"]["value"] == pytest.approx(1 / 2)
    assert found["accuracy_macro"]["n"] == 2
    assert found["accuracy_norm"]["value"] == pytest.approx(1 / 3)


def test_generated_answers_are_extracted_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(dtype=torch.float32, max_position_embeddings=1024).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    texts = {
        "bbh": [" Think. So the answer is (B). Bye.", " yes\n\nno"],
        "tydiqa": [" The Eiffel tower ", "in 1889 they say"],
    }
    answers = {"bbh": [["(b)"], ["No"]], "tydiqa": [["Eiffel Tower!"], ["1889", "in 1889"]]}
    for kind, asked in answers.items():
        rows = [item(str(i), "generate", a[0], answers=a) for i, a in enumerate(asked)]
        monkeypatch.setattr(evaluation, "generations", lambda *_, k=kind: texts[k])
        found, items = run(make_job(tmp_path, tmp_path / "m", rows, kind))
        assert [i["correct"] for i in items] == [True, False]
        assert found["exact_match"]["value"] == 0.5
        assert ("f1" in found) == (kind == "tydiqa")
        if kind == "tydiqa":
            assert [i["f1"] for i in items] == pytest.approx([1.0, 2 * 2 / (4 + 2)])


def test_generation_runs_on_a_real_model(tmp_path: Path, target_folder: Path) -> None:
    rows = [item("a", "generate", " x"), item("b", "generate", " y")]
    found, items = run(make_job(tmp_path, target_folder, rows, "tydiqa"))
    assert found["exact_match"]["n"] == 2
    assert all(i["generation"] is not None for i in items)


def test_items_that_cannot_be_run_are_counted_and_say_why(
    tmp_path: Path, target_folder: Path
) -> None:
    long = [
        {"role": "user", "content": "x" * 300},
        {"role": "assistant", "content": "Answer: A"},
    ]
    choices = [" A", " B"]
    rows = [
        item("fits", "loss", " A"),
        item("long", "loss", " A", messages=long),
        item("long", "choice", " A", messages=long, choices=choices),
        item("long", "generate", " A", messages=long),
        item("cut", "loss", " " + "A" * 300),
    ]
    found, items = run(make_job(tmp_path, target_folder, rows, "tydiqa"))
    assert [i["not_run"] is not None for i in items] == [False, True, True, True, False]
    assert "200 tokens" in items[1]["not_run"]
    assert found["loss_items_not_run"] == found["choice_items_not_run"] == 1
    assert found["generate_items_not_run"] == 1
    assert found["loss_items_truncated"] == 1
    assert found["loss"]["n"] == 2
    assert "accuracy" not in found


def test_accuracy_can_be_left_out_and_is_counted_as_not_run(
    tmp_path: Path, target_folder: Path
) -> None:
    job = make_job(
        tmp_path,
        target_folder,
        [item("a", "loss", " A"), item("a", "choice", " A", choices=[" A", " B"])],
    )
    job.params["evaluate"]["accuracy"] = False
    found, items = run(job)
    assert "accuracy" not in found
    assert found["choice_items_not_run"] == 1
    assert items[1]["not_run"] == "evaluate.accuracy is off"
    assert items[0]["prompt_hash"] == items[1]["prompt_hash"]


def test_a_task_without_test_items_gives_no_metrics(
    tmp_path: Path, target_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, items = run(make_job(tmp_path, target_folder, []))
    assert items == []
    assert found["loss_items"] == 0
    assert "loss" not in found
    assert "no test items" in caplog.text


def preparation(tokenizer: Any, limit: int, kind: str = "mmlu") -> evaluation.Preparation:
    chat, settings = ChatSection(max_length=limit), EvaluateSection(max_length=limit)
    how = evaluation.generation_of({"kind": kind})
    return evaluation.Preparation(tokenizer, chat, settings, 512, how)


def test_plain_prompts_have_no_chat_template(tokenizer: Any) -> None:
    item_ = preparation(tokenizer, 200)(item("a", "choice", " A", choices=[" A", " B"], **shown(2)))
    assert tokenizer.decode(item_.prompt) == shown(2)["messages"][0]["content"]
    assert [tokenizer.decode(c) for c in item_.completions] == [" A", " B"]


@pytest.mark.parametrize(
    ("limit", "kept"), [(200, 5), (164, 5), (163, 4), (134, 4), (133, 3), (44, 1)]
)
def test_worked_examples_that_do_not_fit_are_dropped_from_the_end(
    tokenizer: Any, limit: int, kept: int
) -> None:
    """Header 10, five shots of 30, question 2, answer 2 tokens."""
    row = item("a", "choice", " A", choices=[" A", " B"], **shown(5))
    found = preparation(tokenizer, limit)(row)
    assert (found.n_shots, found.n_shots_dropped) == (kept, 5 - kept)
    assert tokenizer.decode(found.prompt) == shown(kept)["messages"][0]["content"]


def test_the_next_question_has_all_its_worked_examples_again(
    tmp_path: Path, target_folder: Path
) -> None:
    """What LESS's own script forgets."""
    keys = {"choices": [" A", " B"]}
    rows = [
        item("long", "choice", " A", **keys, **shown(5, question="x" * 60)),
        item("short", "choice", " A", **keys, **shown(5)),
    ]
    found, items = run(make_job(tmp_path, target_folder, rows))
    assert [i["n_shots"] for i in items] == [4, 5]
    assert [i["n_shots_dropped"] for i in items] == [1, 0]
    assert found["items_fewer_shots"] == 1


def test_a_context_that_cannot_hold_one_worked_example_is_an_error(tokenizer: Any) -> None:
    row = item("a", "choice", " A", choices=[" A", " B"], **shown(5))
    with pytest.raises(DataError, match="cannot hold one worked example") as caught:
        preparation(tokenizer, 43)(row)
    assert "42 tokens with one" in str(caught.value)
    assert "43 tokens" in str(caught.value)
    generated = item("a", "generate", " A", **shown(5))
    with pytest.raises(DataError, match="cannot hold one worked example"):
        preparation(tokenizer, 41, "tydiqa")(generated)


def test_long_passages_are_cut_in_question_and_worked_examples(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "PASSAGE_TOKENS", 8)
    shot = "Passage: the shot's own\nAnswer: x\n\n"
    messages = [
        {"role": "user", "content": f"Do.\n\n{shot}Passage: fünf und mehr\nQ?"},
        {"role": "assistant", "content": "Answer: A"},
    ]
    passages = ["the shot's own", "fünf und mehr"]
    row = item("a", "generate", "A", messages=messages, shots=[shot], passages=passages)
    found = preparation(tokenizer, 500, "tydiqa")(row)
    text = tokenizer.decode(found.prompt)
    assert "Passage: the shot\nAnswer: x\n\nPassage: fünf un\nQ?" in text  # ü is two tokens
    assert (found.n_cut, found.n_shots) == (2, 1)
    whole = preparation(tokenizer, 500, "tydiqa")(row | {"passages": ["fünf"]})
    assert "fünf und mehr" in tokenizer.decode(whole.prompt)
    assert whole.n_cut == 0


def test_unusable_items_are_errors(tmp_path: Path, tokenizer: Any) -> None:
    prepare = preparation(tokenizer, 512, "messages")
    with pytest.raises(DataError, match="none of its choices"):
        prepare(item("a", "choice", " E", choices=[" A"]))
    with pytest.raises(DataError, match="loss, choice, generate"):
        prepare(item("a", "essay", " E"))
    with pytest.raises(DataError, match="bbh, tydiqa"):
        prepare(item("a", "generate", " E"))
    with pytest.raises(DataError, match="no answer"):
        prepare(item("a", "generate", " E", answers=[" "]))
    with pytest.raises(DataError, match="no answer"):
        prepare(item("a", "generate", " E", answers=[]))


def test_the_same_bytes_again(tmp_path: Path, target_folder: Path) -> None:
    rows = [item(str(i), "loss", f" number {i}") for i in range(5)]
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        job = make_job(tmp_path / name, target_folder, rows)
        evaluation.make(job)
        written.append({p.name: p.read_bytes() for p in job.out.iterdir()})
    assert written[0] == written[1]


# --- metrics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First this. So the answer is (A). And more. So the answer is B.", "(A)"),
        ("so the Answer is valid.", "valid"),
        ("  just this\n\nnot this", "just this"),
        ("So the answer is unfinished", "So the answer is unfinished"),
        ("", ""),
    ],
)
def test_bbh_answers_follow_the_phrase_or_are_the_first_paragraph(text: str, answer: str) -> None:
    assert metrics.bbh_answer(text) == answer


@pytest.mark.parametrize(
    ("prediction", "answers", "same"),
    [
        ("(A)", ["(a)"], True),
        ("a", ["(A)"], True),
        ("True!", ["False", "true"], True),
        ("the cat", ["cat"], False),
        ("] }", ["] }"], True),
        ("} ]", ["] }"], False),
        ("nothing", ["]"], False),
    ],
)
def test_exact_match_ignores_case_and_punctuation(
    prediction: str, answers: list[str], same: bool
) -> None:
    assert metrics.exact_match(prediction, answers) is same


def test_squad_scores() -> None:
    assert metrics.squad_normalise("The  Theatre, an Opera!") == "theatre opera"
    assert metrics.squad_exact_match("a Cat.", ["dog", "the cat"])
    assert not metrics.squad_exact_match("cats", ["the cat"])
    assert metrics.squad_f1("the big cat sat", ["dog", "big cat"]) == pytest.approx(0.8)
    assert metrics.squad_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)  # one word counts once
    assert metrics.squad_f1("dog", ["cat"]) == 0.0
    assert metrics.squad_f1("the", ["a"]) == 1.0  # both empty after normalisation


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = metrics.micro(values.tolist(), 4000, seed=1)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert metrics.micro(values.tolist(), 4000, seed=1) == found
    assert metrics.micro(values.tolist(), 4000, seed=2) != found


def test_edges_of_the_interval() -> None:
    assert metrics.micro([0.3] * 7, 20, 0) == {
        "value": pytest.approx(0.3),
        "low": pytest.approx(0.3),
        "high": pytest.approx(0.3),
        "n": 7,
    }
    assert metrics.micro([1.0, 2.0], 0, 0) == {"value": 1.5, "low": None, "high": None, "n": 2}
    with pytest.raises(ValueError, match="at least one"):
        metrics.micro([], 10, 0)


def test_the_macro_mean_weighs_groups_equally() -> None:
    found = metrics.macro([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"], 200, 0)
    assert found == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    alone = metrics.macro([1.0, 0.0, 1.0], ["a", "b", "c"], 100, 3)
    assert alone == metrics.micro([1.0, 0.0, 1.0], 100, 3)


def test_work_counts_shared_contexts_once() -> None:
    net = Network({Linear(2, 3): 1}, attention=4, head=10)
    choice = evaluation.Prepared({}, [1, 2, 3], ([5], [6]))  # one context for both
    longer = evaluation.Prepared({}, [1, 2], ([7, 8, 9],))
    answer = evaluation.Prepared({}, [1, 2])
    rows = [{"n_tokens": 5}, {"n_tokens": 5}, {"n_tokens": 6, "generation": "four"}]
    found = evaluation.work([choice, longer, answer], rows, net)
    assert found["tokens"] == 3 + 4 + 6
    likelihoods = 2 * (6 * (3 + 4) + 10 * (1 + 3)) + 4 * 4 * (9 + 16)
    generated = 2 * (6 * 6 + 10 * 5) + 4 * 4 * (4 + 2 * 4 + 8)
    assert found["flops"] == likelihoods + generated
    alike = [evaluation.Prepared({}, [*range(8), n], ([5], [6])) for n in (20, 30)]
    found = evaluation.work(alike, [{"n_tokens": 11}] * 2, net)
    assert found["tokens"] == 8 + 1 + 1
    assert found["flops"] == 2 * (6 * 10 + 10 * 2) + 4 * 4 * (64 + 2 * (81 - 64))
