"""Stage ``evaluation``: what a model makes of a task's test items."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from iprox.data.chat import IGNORED, completion_ids, encode, encode_plain, encode_prompt
from iprox.errors import DataError
from iprox.evaluation import metrics
from iprox.evaluation.likelihood import generations, harness, log_likelihoods
from iprox.evaluation.prefixes import Request, families
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
        ("n_shots", pa.int64()),
        ("n_shots_dropped", pa.int64()),
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

PASSAGE_TOKENS = 512
"""Longest passage of a TyDiQA prompt, as in LESS (arXiv:2402.04333)."""

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


def generation_of(facts: Mapping[str, Any]) -> Generation | None:
    """How a task's answers are generated; None where nothing says so.

    Args:
        facts: Metadata of ``test.parquet``: the task's kind; of kind custom also ``until`` and
            ``max_new_tokens``.
    """
    if "until" not in facts:
        return GENERATION.get(str(facts.get("kind")))
    stop = tuple(json.loads(facts["until"]))
    new = int(facts["max_new_tokens"])
    return Generation(new, stop, str.strip, metrics.exact_match, f1=metrics.squad_f1)


@dataclass(frozen=True)
class Prepared:
    """A test item as tokens.

    Attributes:
        row: Its row of ``test.parquet``.
        prompt: Token ids before the completion.
        completions: What is scored after it: the completion, or every choice.
        not_run: Why it cannot be evaluated; empty if it can.
        truncated: Whether the completion lost tokens to ``chat.max_length``.
        n_shots: Worked examples in the prompt that may be left out.
        n_shots_dropped: Worked examples that were.
        n_cut: Passages that were cut.
    """

    row: Row
    prompt: list[int]
    completions: tuple[list[int], ...] = ()
    not_run: str = ""
    truncated: bool = False
    n_shots: int = 0
    n_shots_dropped: int = 0
    n_cut: int = 0

    @property
    def requests(self) -> list[Request]:
        """One request for each completion."""
        return [Request(self.prompt, completion) for completion in self.completions]


def make(job: Job) -> Metrics:
    """Write ``items.parquet``, a row per test item, and ``metrics.json``.

    ``loss`` items give the mean ``-log p`` of a held-out completion's tokens, ``choice`` items
    whether the likeliest choice is right (``accuracy_norm``: likeliest per byte), ``generate``
    items whether a greedy answer is. Worked examples that do not fit are left out, the last
    first, of this item only. ``metrics.json`` maps a metric to its mean over items
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
    rows, how = read_arrow(test).to_pylist(), generation_of(read_metadata(test))
    if not rows:
        log.warning("%s has no test items: set heldout or test of the task", test)
    model = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], pick_device())
    lm = harness(model, load_tokenizer(folder))
    prepare = Preparation(lm.tokenizer, chat, settings, lm.max_length, how)
    prepared = [prepare(row) for row in rows]
    results = evaluate(lm, prepared, how)
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
        chat: Template, and length limit of losses, the same as for influence queries.
        settings: Whether answers are wanted, and the length limit of their prompts.
        window: Tokens the model can see.
        how: How the task's answers are generated; None when nothing says so.
    """

    tokenizer: Any
    chat: ChatSection
    settings: EvaluateSection
    window: int
    how: Generation | None

    def __call__(self, row: Row) -> Prepared:
        """One item, with as many of its worked examples as fit.

        Raises:
            DataError: Its kind is unknown, it has no answer, its answer is none of its choices,
                nothing says how to generate an answer, or not one worked example fits.
        """
        self._check(row)
        row, n_cut = self._cut_passages(row)
        shots = row["shots"]
        if row["kind"] != "loss" and not self.settings.accuracy:
            prompt = self._prompt(row)
            return Prepared(
                row, prompt, not_run="evaluate.accuracy is off", n_shots=len(shots), n_cut=n_cut
            )
        for n in range(len(shots), min(len(shots), 1) - 1, -1):
            item = self._tokens(_with_shots(row, n))
            if not item.not_run:
                break
        else:
            if shots:
                raise DataError(
                    "a test item's context cannot hold one worked example",
                    where=row["example_id"],
                    value=f"{len(item.prompt)} tokens with one",
                    allowed=item.not_run,
                    fix="raise evaluate.max_length (losses: chat.max_length), or lower test_shots",
                )
        return replace(item, n_shots=n, n_shots_dropped=len(shots) - n, n_cut=n_cut)

    def _check(self, row: Row) -> None:
        kind, where = row["kind"], row["example_id"]
        if kind not in ("loss", "choice", "generate"):
            raise DataError(
                "a test item has an unknown kind",
                where=where,
                value=kind,
                allowed="loss, choice, generate",
            )
        if kind == "choice" and (row["answer"] not in row["choices"] or not all(row["choices"])):
            raise DataError(
                "the answer of a test item is none of its choices, or a choice is empty",
                where=where,
                value=row["answer"],
                allowed=row["choices"],
            )
        if kind == "generate" and not any(answer.strip() for answer in row["answers"]):
            raise DataError("a test item has no answer", where=where, value=row["answers"])
        if kind == "generate" and self.how is None:
            raise DataError(
                "nothing says how answers of this kind of task are generated",
                where=where,
                allowed=f"kind {', '.join(GENERATION)}, or custom",
            )

    def _cut_passages(self, row: Row) -> tuple[Row, int]:
        """The item with long passages cut, wherever they stand, and how many were."""
        long = []
        for passage in row["passages"]:
            encoded = self.tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)
            ends = encoded["offset_mapping"]
            if len(ends) > PASSAGE_TOKENS:
                long.append((passage, passage[: ends[PASSAGE_TOKENS - 1][1]]))

        def cut(text: str) -> str:
            for passage, beginning in long:
                text = text.replace(passage, beginning)
            return text

        if not long:
            return row, 0
        first, *rest = row["messages"]
        messages = [first | {"content": cut(first["content"])}, *rest]
        return row | {"messages": messages, "shots": [cut(s) for s in row["shots"]]}, len(long)

    def _tokens(self, row: Row) -> Prepared:
        if row["kind"] == "loss":
            return self._loss(row)
        prompt = self._prompt(row)
        return self._choice(row, prompt) if row["kind"] == "choice" else self._generate(row, prompt)

    def _prompt(self, row: Row) -> list[int]:
        if row["plain"]:
            return encode_plain(row["messages"][0]["content"], self.tokenizer)
        return encode_prompt(row["messages"], self.tokenizer, self.chat.template, row["prefix"])

    def _loss(self, row: Row) -> Prepared:
        limit = min(self.chat.max_length, self.window)
        encoded = encode(
            row["messages"],
            self.tokenizer,
            self.chat.template,
            limit,
            prefix=row["prefix"],
            eos=row["eos"],
            last_only=True,
            example_id=row["example_id"],
        )
        start = next((i for i, label in enumerate(encoded.labels) if label != IGNORED), None)
        if start is None:
            return Prepared(row, encoded.input_ids, not_run=self._too_long(limit))
        # The supervised tokens are one run: nothing after the last turn's end is kept as label.
        end = start + encoded.supervised
        ids, cut = encoded.input_ids, encoded.n_truncated_supervised > 0
        return Prepared(row, ids[:start], (ids[start:end],), truncated=cut)

    def _choice(self, row: Row, prompt: list[int]) -> Prepared:
        completions = tuple(completion_ids(choice, self.tokenizer) for choice in row["choices"])
        limit = min(self.settings.max_length, self.window)
        if len(prompt) + max(map(len, completions)) > limit:
            return Prepared(row, prompt, not_run=self._too_long(limit))
        return Prepared(row, prompt, completions)

    def _generate(self, row: Row, prompt: list[int]) -> Prepared:
        new = self.how.max_new_tokens if self.how else 0
        room = min(self.settings.max_length, self.window - new)
        return Prepared(row, prompt, not_run="" if len(prompt) <= room else self._too_long(room))

    @staticmethod
    def _too_long(limit: int) -> str:
        return f"the prompt leaves no room in {limit} tokens"


def _with_shots(row: Row, n: int) -> Row:
    """An item with the first of its worked examples only."""
    shots = row["shots"]
    if n == len(shots):
        return row
    first, *rest = row["messages"]
    text = first["content"].replace("".join(shots), "".join(shots[:n]), 1)
    return row | {"messages": [first | {"content": text}, *rest], "shots": shots[:n]}


def evaluate(lm: Any, prepared: Sequence[Prepared], how: Generation | None) -> list[Row]:
    """Rows of ``items.parquet``, in the order of the items.

    Args:
        lm: From :func:`iprox.evaluation.likelihood.harness`.
        prepared: The items.
        how: How answers are generated, where some are.
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
        if asked and how is not None:
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
        "n_shots": item.n_shots,
        "n_shots_dropped": item.n_shots_dropped,
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
    """Tokens the model read or wrote, and FLOPs; what requests share counts once.

    Args:
        prepared: The items.
        results: Their rows, in the same order.
        net: The model.
    """
    read = families([request for item in prepared for request in item.requests])
    spent = [
        flops.reading(
            net,
            family.shared,
            [len(member) - family.shared for member in family.members],
            sum(len(member) - member.first for member in family.members),
        )
        for family in read
    ]
    answers = [
        (len(item.prompt), int(row["n_tokens"]) - len(item.prompt))
        for item, row in zip(prepared, results, strict=True)
        if row.get("generation") is not None
    ]
    generated = sum(flops.generation(net, prompt, new) for prompt, new in answers)
    return {
        "tokens": sum(family.n_tokens for family in read) + sum(map(sum, answers)),
        "flops": sum(spent) + generated,
    }


def _counts(prepared: Sequence[Prepared]) -> dict[str, int]:
    """How many items there are of each kind, and how many were not run or lost something."""
    counts = {}
    for kind in ("loss", "choice", "generate"):
        of_kind = [item for item in prepared if item.row["kind"] == kind]
        counts[f"{kind}_items"] = len(of_kind)
        counts[f"{kind}_items_not_run"] = sum(bool(item.not_run) for item in of_kind)
    counts["loss_items_truncated"] = sum(item.truncated for item in prepared)
    counts["items_fewer_shots"] = sum(item.n_shots_dropped > 0 for item in prepared)
    counts["passages_cut"] = sum(item.n_cut for item in prepared)
    if counts["items_fewer_shots"]:
        log.warning(
            "%d of %d test items lost worked examples that do not fit: see n_shots_dropped in "
            "items.parquet",
            counts["items_fewer_shots"],
            len(prepared),
        )
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
