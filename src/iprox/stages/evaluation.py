"""Stage ``evaluation``: what a model makes of a task's test items."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from iprox.data.chat import IGNORED, completion_ids, encode, encode_prompt
from iprox.errors import DataError
from iprox.evaluation import metrics
from iprox.evaluation.likelihood import Request, generations, harness, log_likelihoods
from iprox.models.device import dtype_of, pick_device
from iprox.models.flops import network_of
from iprox.models.load import load_model, load_tokenizer
from iprox.numerics import flops
from iprox.progress import track
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow, read_metadata, write_table
from iprox.study.schema import ChatSection, EvaluateSection

log = logging.getLogger(__name__)

Row = dict[str, Any]

ITEM_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("subtask", pa.string()),
        ("kind", pa.string()),
        ("prompt_hash", pa.string()),
        ("n_tokens", pa.int64()),
        ("loss", pa.float64()),
        ("prediction", pa.string()),
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("accuracy_norm", pa.bool_()),
        ("f1", pa.float64()),
        ("generation", pa.string()),
        ("not_run", pa.string()),
    ]
)
"""Columns of ``items.parquet``; ``not_run`` says why an item has no result."""

SUMMARIES = (
    ("loss", "loss", "loss"),
    ("accuracy", "choice", "correct"),
    ("accuracy_norm", "choice", "accuracy_norm"),
    ("exact_match", "generate", "correct"),
    ("f1", "generate", "f1"),
)
"""Metric, kind of items it is over, their column."""


@dataclass(frozen=True)
class Generation:
    """How a task's answers are generated and judged, as in LESS (arXiv:2402.04333).

    Attributes:
        max_new_tokens: Longest answer.
        stop: Texts that end it.
        extract: From the generated text to the answer.
        matches: Whether an answer is one of the accepted ones.
        f1: Its overlap with the accepted ones, where the task has that metric.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    extract: Callable[[str], str]
    matches: Callable[[str, Sequence[str]], bool]
    f1: Callable[[str, Sequence[str]], float] | None = None


GENERATION = {
    "bbh": Generation(512, ("\n\n",), metrics.bbh_answer, metrics.exact_match),
    "tydiqa": Generation(50, ("\n",), str.strip, metrics.squad_exact_match, f1=metrics.squad_f1),
}


@dataclass(frozen=True)
class Prepared:
    """A test item as tokens.

    Attributes:
        row: Its row of ``test.parquet``.
        prompt: Token ids before the completion.
        completions: What is scored after it: the completion, or every choice.
        not_run: Why it cannot be evaluated; empty if it can.
        truncated: Whether the completion lost tokens to ``chat.max_length``.
    """

    row: Row
    prompt: list[int]
    completions: tuple[list[int], ...] = ()
    not_run: str = ""
    truncated: bool = False

    @property
    def requests(self) -> list[Request]:
        """One request for each completion."""
        return [Request(self.prompt, completion) for completion in self.completions]


def make(job: Job) -> Metrics:
    """Write ``items.parquet``, a row per test item, and ``metrics.json``.

    ``loss`` items give the mean ``-log p`` of a held-out completion's tokens, ``choice`` items
    whether the likeliest choice is right (``accuracy_norm``: likeliest per byte), ``generate``
    items whether a greedy answer is. ``metrics.json`` maps a metric to its mean over items
    (``..._macro``: over subtasks), with a 95 % bootstrap interval, and counts items that were
    not run; ``items.parquet`` says why.

    Returns:
        Numbers of items of each kind, of those not run, tokens and FLOPs.

    Raises:
        DataError: An item cannot be used.
        ModelError: The model cannot be loaded.
    """
    settings, chat = job.section(EvaluateSection, "evaluate"), job.section(ChatSection, "chat")
    compute, folder = job.params["compute"], job.parents["model"]
    test = job.parents["task"] / "test.parquet"
    rows, task_kind = read_arrow(test).to_pylist(), str(read_metadata(test).get("kind"))
    if not rows:
        log.warning("%s has no test items: set heldout or test of the task", test)
    model = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], pick_device())
    lm = harness(model, load_tokenizer(folder))
    prepare = Preparation(lm.tokenizer, chat, lm.max_length, settings.accuracy, task_kind)
    prepared = [prepare(row) for row in rows]
    results = evaluate(lm, prepared, task_kind)
    items = pa.Table.from_pylist(results, schema=ITEM_SCHEMA)
    write_table(job.out / "items.parquet", items, job.params["evaluate"])
    summary = summarise(items.to_pandas(), settings)
    counts = _counts(prepared)
    text = json.dumps({**summary, **counts}, indent=1, sort_keys=True, allow_nan=False)
    (job.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return {**counts, **work(prepared, results, network_of(model))}


@dataclass(frozen=True)
class Preparation:
    """Turns rows of ``test.parquet`` into tokens, and says which cannot be run.

    Attributes:
        tokenizer: The model's.
        chat: Template and length limit, the same as for influence queries.
        window: Tokens the model can see.
        accuracy: Whether choices and generations are wanted.
        task_kind: The task's kind, which decides how answers are generated.
    """

    tokenizer: Any
    chat: ChatSection
    window: int
    accuracy: bool
    task_kind: str

    @property
    def limit(self) -> int:
        """Tokens of an item."""
        return min(self.chat.max_length, self.window)

    def __call__(self, row: Row) -> Prepared:
        """One item.

        Raises:
            DataError: Its kind is unknown, its answer is none of its choices, or nothing says
                how to generate an answer.
        """
        if row["kind"] == "loss":
            return self._loss(row)
        if row["kind"] not in ("choice", "generate"):
            raise DataError(
                "a test item has an unknown kind",
                where=row["example_id"],
                value=row["kind"],
                allowed="loss, choice, generate",
            )
        prompt = encode_prompt(row["messages"], self.tokenizer, self.chat.template, row["prefix"])
        item = self._choice(row, prompt) if row["kind"] == "choice" else self._generate(row, prompt)
        if not self.accuracy:
            return Prepared(row, prompt, not_run="evaluate.accuracy is off")
        return item

    def _loss(self, row: Row) -> Prepared:
        encoded = encode(
            row["messages"],
            self.tokenizer,
            self.chat.template,
            self.limit,
            prefix=row["prefix"],
            eos=row["eos"],
            last_only=True,
            example_id=row["example_id"],
        )
        start = next((i for i, label in enumerate(encoded.labels) if label != IGNORED), None)
        if start is None:
            return Prepared(row, encoded.input_ids, not_run=self._too_long(self.limit))
        # The supervised tokens are one run: nothing after the last turn's end is kept as label.
        end = start + encoded.supervised
        ids, cut = encoded.input_ids, encoded.n_truncated_supervised > 0
        return Prepared(row, ids[:start], (ids[start:end],), truncated=cut)

    def _choice(self, row: Row, prompt: list[int]) -> Prepared:
        if row["answer"] not in row["choices"] or not all(row["choices"]):
            raise DataError(
                "the answer of a test item is none of its choices, or a choice is empty",
                where=row["example_id"],
                value=row["answer"],
                allowed=row["choices"],
            )
        completions = tuple(completion_ids(choice, self.tokenizer) for choice in row["choices"])
        if len(prompt) + max(map(len, completions)) > self.limit:
            return Prepared(row, prompt, not_run=self._too_long(self.limit))
        return Prepared(row, prompt, completions)

    def _generate(self, row: Row, prompt: list[int]) -> Prepared:
        how = GENERATION.get(self.task_kind)
        if how is None:
            raise DataError(
                "nothing says how answers of this kind of task are generated",
                where=row["example_id"],
                value=self.task_kind,
                allowed=", ".join(GENERATION),
            )
        room = min(self.chat.max_length, self.window - how.max_new_tokens)
        return Prepared(row, prompt, not_run="" if len(prompt) <= room else self._too_long(room))

    @staticmethod
    def _too_long(limit: int) -> str:
        return f"the prompt leaves no room in {limit} tokens"


def evaluate(lm: Any, prepared: Sequence[Prepared], task_kind: str) -> list[Row]:
    """Rows of ``items.parquet``, in the order of the items.

    Args:
        lm: From :func:`iprox.evaluation.likelihood.harness`.
        prepared: The items.
        task_kind: Which of ``GENERATION`` applies.
    """
    rows = [_blank(item) for item in prepared]
    runnable = [i for i, item in enumerate(prepared) if not item.not_run]
    scored = [i for i in runnable if prepared[i].completions]
    asked = [i for i in runnable if not prepared[i].completions]
    requests = [request for i in scored for request in prepared[i].requests]
    with track(len(requests) + len(asked), "requests", "evaluation") as progress:
        likelihoods = iter(log_likelihoods(lm, requests, progress.advance))
        for i in scored:
            values = [next(likelihoods) for _ in prepared[i].completions]
            judge = _judge_loss if prepared[i].row["kind"] == "loss" else _judge_choice
            rows[i] |= judge(prepared[i], values)
        if asked:
            how = GENERATION[task_kind]
            contexts = [prepared[i].prompt for i in asked]
            texts = generations(lm, contexts, how.stop, how.max_new_tokens, progress.advance)
            for i, text in zip(asked, texts, strict=True):
                rows[i] |= _judge_generation(prepared[i], text, how)
                rows[i]["n_tokens"] += len(completion_ids(text, lm.tokenizer))
    return rows


def summarise(items: pd.DataFrame, settings: EvaluateSection) -> dict[str, metrics.Interval]:
    """Means of every metric over items, and over subtasks (``..._macro``).

    Args:
        items: Rows of ``items.parquet``.
        settings: Resamples and seed of the intervals.
    """
    summary = {}
    for name, kind, column in SUMMARIES:
        found = items[(items["kind"] == kind) & items[column].notna()]
        if found.empty:
            continue
        values, subtasks = found[column].astype(float).tolist(), found["subtask"].tolist()
        summary[name] = metrics.micro(values, settings.bootstrap, settings.seed)
        summary[f"{name}_macro"] = metrics.macro(
            values, subtasks, settings.bootstrap, settings.seed
        )
    return summary


def _blank(item: Prepared) -> Row:
    """An item's row without its result."""
    return {
        "example_id": item.row["example_id"],
        "subtask": item.row["subtask"],
        "kind": item.row["kind"],
        "prompt_hash": hashlib.sha256(json.dumps(item.prompt).encode()).hexdigest()[:16],
        "n_tokens": len(item.prompt) + sum(map(len, item.completions)),
        "answer": item.row["answer"] or None,
        "not_run": item.not_run or None,
    }


def _judge_loss(item: Prepared, values: list[float]) -> Row:
    return {"loss": -values[0] / len(item.completions[0])}


def _judge_choice(item: Prepared, values: list[float]) -> Row:
    """The likeliest choice, and the likeliest per byte; ties go to the earlier one."""
    choices, answer = item.row["choices"], item.row["answer"]
    per_byte = [v / len(c.encode()) for v, c in zip(values, choices, strict=True)]
    prediction = choices[int(np.argmax(values))]
    return {
        "prediction": prediction,
        "correct": prediction == answer,
        "accuracy_norm": choices[int(np.argmax(per_byte))] == answer,
    }


def _judge_generation(item: Prepared, text: str, how: Generation) -> Row:
    prediction, answers = how.extract(text), item.row["answers"]
    return {
        "generation": text,
        "prediction": prediction,
        "correct": how.matches(prediction, answers),
        "f1": how.f1(prediction, answers) if how.f1 else None,
    }


def work(
    prepared: Sequence[Prepared], results: Sequence[Row], net: flops.Network
) -> dict[str, int | float]:
    """Tokens the model read or wrote, and FLOPs; contexts that requests share count once.

    Args:
        prepared: The items.
        results: Their rows, in the same order.
        net: The model.
    """
    contexts = {
        tuple(request.context + request.continuation[:-1])
        for item in prepared
        for request in item.requests
    }
    load = flops.Load.of(map(len, contexts), 0)
    answers = [
        (len(item.prompt), int(row["n_tokens"]) - len(item.prompt))
        for item, row in zip(prepared, results, strict=True)
        if row.get("generation") is not None
    ]
    generated = sum(flops.generation(net, prompt, new) for prompt, new in answers)
    return {
        "tokens": int(load.tokens) + sum(map(sum, answers)),
        "flops": flops.evaluation(net, load) + generated,
    }


def _counts(prepared: Sequence[Prepared]) -> dict[str, int]:
    """How many items there are of each kind, and how many were not run or lost tokens."""
    counts = {}
    for kind in ("loss", "choice", "generate"):
        of_kind = [item for item in prepared if item.row["kind"] == kind]
        counts[f"{kind}_items"] = len(of_kind)
        counts[f"{kind}_items_not_run"] = sum(bool(item.not_run) for item in of_kind)
    counts["loss_items_truncated"] = sum(item.truncated for item in prepared)
    lost = sum(counts[f"{kind}_items_not_run"] for kind in ("loss", "choice", "generate"))
    if lost or counts["loss_items_truncated"]:
        log.warning(
            "%d of %d test items were not run and %d lost the end of their completion: "
            "see not_run in items.parquet",
            lost,
            len(prepared),
            counts["loss_items_truncated"],
        )
    return counts
