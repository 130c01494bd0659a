"""Documents of the task files beside it: the test items of a study, for the harness itself.

Prompts, worked examples and answers are made by ``iprox.data``, as for a study. Where the data
is may be said on the command line, in place of what a task file says::

    lm_eval --include_path workflow/tasks --tasks iprox_mmlu --model hf \
        --model_args pretrained=MODEL --metadata '{"data_dir": "FOLDER", "test_limit": 570}'
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iprox.data.tasks import build_task
from iprox.evaluation import metrics
from iprox.study.schema import TaskSection

KEYS = set(TaskSection.model_fields) - {"name", "kind"}


def _documents(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    import datasets

    data_dir = Path(settings.get("data_dir") or os.environ.get("IPROX_DATA_DIR") or ".")
    # The harness passes everything it knows of the model too.
    section = TaskSection(name=kind, kind=kind, **{k: settings[k] for k in KEYS & set(settings)})
    items = [item for item in build_task(section, data_dir).test if item.kind != "loss"]
    documents = [
        {
            "example_id": item.example_id,
            "subtask": item.subtask,
            "prompt": item.messages[0]["content"],
            "prefix": item.prefix,
            "choices": list(item.choices),
            "answer": item.choices.index(item.answers[0]) if item.choices else -1,
            "answers": list(item.answers),
        }
        for item in items
    ]
    return {"test": datasets.Dataset.from_list(documents)}


def mmlu(**settings: Any) -> dict[str, Any]:
    """MMLU after five worked examples."""
    return _documents("mmlu", settings)


def bbh(**settings: Any) -> dict[str, Any]:
    """BBH after three worked examples with their reasoning."""
    return _documents("bbh", settings)


def tydiqa(**settings: Any) -> dict[str, Any]:
    """TyDiQA's gold passages after one worked example."""
    return _documents("tydiqa", settings)


def judge_choice(document: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Whether the likeliest choice is right."""
    correct = float(int(np.argmax([value for value, _ in results])) == document["answer"])
    return {"acc": correct, "acc_macro": (document["subtask"], correct)}


def judge_bbh(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Whether the answer at the end of the reasoning is right."""
    correct = float(metrics.exact_match(metrics.bbh_answer(results[0]), document["answers"]))
    return {"exact_match": correct, "exact_match_macro": (document["subtask"], correct)}


def judge_tydiqa(document: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """SQuAD's exact match and F1."""
    answer, subtask = results[0].strip(), document["subtask"]
    correct = float(metrics.squad_exact_match(answer, document["answers"]))
    f1 = metrics.squad_f1(answer, document["answers"])
    return {
        "exact_match": correct,
        "exact_match_macro": (subtask, correct),
        "f1": f1,
        "f1_macro": (subtask, f1),
    }


def macro(values: Sequence[tuple[str, float]]) -> float:
    """Mean over subtasks of the mean over their items."""
    subtasks, scores = zip(*values, strict=True)
    mean: Any = metrics.macro(scores, subtasks, resamples=0, seed=0)["value"]
    return float(mean)
