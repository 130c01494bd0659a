"""How early rankings list the pool examples of some categories: filtering unsafe ones, say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from iprox.errors import DataError
from iprox.report.artifacts import Study
from iprox.store.tables import read_arrow

FIRST = 0.05
"""Share of the pool that ``found_first`` looks at."""

FOUND = [
    "run",
    "task",
    "n_examples",
    "n_wanted",
    "chance",
    "average_precision",
    "precision",
    "found_first",
]


def found(study: Study) -> pd.DataFrame:
    """Area under the precision-recall curve of every ranking; empty when nothing is looked for.

    The examples of the categories ``report.find`` are wanted: a task's ranking is judged by how
    early it lists them, as DATE-LM does with unsafe examples in a fine-tuning set
    (arXiv:2507.09424). ``average_precision`` is the area, ``chance`` what a random order has in
    expectation (the share of wanted examples), ``precision`` the wanted share of as many first
    examples as are wanted, ``found_first`` the share of them in the first 5 % of the pool.

    Raises:
        DataError: No example of the pool is of these categories, or all are.
    """
    if not study.settings.find:
        return pd.DataFrame(columns=FOUND)
    wanted = _wanted(study)
    rows = [
        {"run": run.name, "task": task} | judge(_in_order(run.artifacts["ranking"], task), wanted)
        for run in study.runs
        if "ranking" in run.artifacts
        for task in study.tasks
    ]
    return pd.DataFrame(rows, columns=FOUND)


def judge(order: list[str], wanted: set[str]) -> dict[str, Any]:
    """Figures of one order of the pool, best first.

    Args:
        order: Ids of all examples.
        wanted: Ids of those that should come first; some of them, not all.
    """
    from sklearn.metrics import average_precision_score

    hits = np.array([example in wanted for example in order])
    n_first = max(1, round(FIRST * len(hits)))
    return {
        "n_examples": len(hits),
        "n_wanted": int(hits.sum()),
        "chance": float(hits.mean()),
        "average_precision": float(average_precision_score(hits, -np.arange(len(hits)))),
        "precision": float(hits[: hits.sum()].mean()),
        "found_first": float(hits[:n_first].sum() / hits.sum()),
    }


def _in_order(ranking: Any, task: str) -> list[str]:
    """Ids of all examples by rank for a task."""
    table = ranking.table("ranking.parquet")
    return list(table[table["task"] == task].sort_values("rank")["example_id"])


def _wanted(study: Study) -> set[str]:
    """Ids of the pool's examples of the categories asked for."""
    file = study.shared["pool"].folder / "pool.parquet"
    table = read_arrow(file, ["example_id", "category"]).to_pandas()
    is_wanted = table["category"].isin(study.settings.find)
    if not is_wanted.any() or is_wanted.all():
        raise DataError(
            "the categories to find are those of no example, or of all",
            where="report.find",
            value=study.settings.find,
            allowed=", ".join(sorted(table["category"].dropna().unique())[:10]),
            fix="give examples of the pool a field category, and name those that are wanted",
        )
    return set(table["example_id"][is_wanted])
