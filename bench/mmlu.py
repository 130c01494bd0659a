"""5-shot MMLU against the harness's own pass: ``python -m bench.mmlu --model DIR --data DIR``.

Both score the same prompts on the same model with one thread: the harness with its default
settings (batches of one), this project with shared beginnings read once. Times are CPU seconds
from texts to likelihoods; predictions must be the same.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.timing import in_turn
from iprox.data.tasks import Item, Task, build_task, item_table
from iprox.evaluation.likelihood import harness, log_likelihoods
from iprox.models.device import set_threads
from iprox.models.load import load_model, load_tokenizer
from iprox.stages.evaluation import Preparation
from iprox.study.schema import ChatSection, EvaluateSection, TaskSection


def main() -> None:
    """Measure, and print what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.mmlu", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="holds mmlu/mmlu.parquet")
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--items", type=int, default=12, help="questions of a subject")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    set_threads(1)
    lm = harness(load_model(args.model, torch.float32), load_tokenizer(args.model))
    items = questions(args.data, args.subjects, args.items)
    print(json.dumps(compare(lm, items, args.rounds), indent=1))


def questions(data: Path, n_subjects: int, n_items: int) -> list[Item]:
    """Test questions of a few subjects, seeded, with their worked examples."""
    section = TaskSection(
        name="mmlu",
        kind="mmlu",
        path="mmlu/mmlu.parquet",
        test="mmlu/mmlu.parquet",
        test_per_subtask=n_items,
        allow_contaminated=True,
    )
    items = build_task(section, data).test
    subjects = sorted({item.subtask for item in items})
    chosen = np.random.default_rng(0).choice(subjects, n_subjects, replace=False)
    return [item for item in items if item.subtask in chosen]


def compare(lm: Any, items: list[Item], rounds: int) -> dict[str, float | int]:
    """Items per CPU second of both, their ratio, and how far they agree.

    Args:
        lm: The harness's view of the model.
        items: Multiple-choice test items.
        rounds: Times each is run; the medians are compared.
    """
    from lm_eval.api.instance import Instance

    found: dict[str, list[float]] = {}
    window = lm.max_length
    prepare = Preparation(lm.tokenizer, ChatSection(), EvaluateSection(), window, None)

    def theirs() -> None:
        asked = [(item.messages[0]["content"], choice) for item in items for choice in item.choices]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
        found["theirs"] = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    def ours() -> None:
        prepared = [prepare(row) for row in item_table(Task([], items)).to_pylist()]
        found["ours"] = log_likelihoods(lm, [r for item in prepared for r in item.requests])

    logging.disable(logging.WARNING)
    seconds = {k: float(np.median(v)) for k, v in in_turn({"t": theirs, "o": ours}, rounds).items()}
    predictions = {k: np.reshape(v, (len(items), -1)).argmax(1) for k, v in found.items()}
    right = [item.choices.index(item.answers[0]) for item in items]
    return {
        "items": len(items),
        "harness_items_per_s": len(items) / seconds["t"],
        "ours_items_per_s": len(items) / seconds["o"],
        "ratio": seconds["t"] / seconds["o"],
        "same_predictions": int((predictions["ours"] == predictions["theirs"]).sum()),
        "harness_accuracy": float((predictions["theirs"] == right).mean()),
        "ours_accuracy": float((predictions["ours"] == right).mean()),
        "largest_difference": float(np.abs(np.subtract(found["ours"], found["theirs"])).max()),
    }


if __name__ == "__main__":
    main()
