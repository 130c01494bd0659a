"""Stage ``selection``: the best of every task's ranking, as a table and as training files."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iprox.errors import ArtifactError, DataError
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow, read_metadata, read_table, write_table
from iprox.study.schema import SelectSection

log = logging.getLogger(__name__)

ALL = "all"
"""Subset name of the union over tasks."""

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COLUMNS = ["example_id", "task", "rank", "score", "reason"]


def make(job: Job) -> Metrics:
    """Write ``selection.parquet``, ``selected.jsonl`` and ``selected/<task>.jsonl``.

    ``selection.parquet`` has a row per task and selected example: example_id, task, rank,
    score and the reason in words, best first. ``selected.jsonl`` holds every selected example
    once, a line each: example_id, tasks (that chose it), messages, source, category;
    ``selected/<task>.jsonl`` those of one task.

    Returns:
        Numbers of pool examples, examples kept per task, distinct examples, and examples
        without a score.

    Raises:
        DataError: The fraction keeps nothing, or fewer examples have a score than it keeps.
        ArtifactError: Ranking and pool do not hold the same examples.
    """
    fraction = job.section(SelectSection, "select").fraction
    ranking_file = job.parents["ranking"] / "ranking.parquet"
    ranking = read_table(ranking_file)
    pool = {row["example_id"]: row for row in read_arrow(_pool_file(job)).to_pylist()}
    _same_examples(ranking, pool, ranking_file)
    keep = n_selected(fraction, len(pool))
    table = select_top(ranking, keep, _basis(read_metadata(ranking_file)))
    write_table(job.out / "selection.parquet", table, job.params["select"])
    _write_files(job.out, table, pool)
    unscorable = int((~np.isfinite(ranking["score"])).groupby(ranking["task"]).sum().max())
    return {
        "examples": len(pool),
        "selected_per_task": keep,
        "selected_distinct": int(table["example_id"].nunique()),
        "without_score": unscorable,
    }


def n_selected(fraction: float, n_examples: int) -> int:
    """``floor(fraction * n)`` in exact decimal arithmetic: 0.29 of 100 is 29.

    Raises:
        DataError: That is zero.
    """
    keep = math.floor(Fraction(str(fraction)) * n_examples)
    if keep < 1:
        raise DataError(
            "the selected fraction of the pool is less than one example",
            where="select.fraction",
            value=f"{fraction} of {n_examples} examples",
            allowed=f"at least {1 / max(n_examples, 1):.4g} for this pool",
            fix="raise select.fraction or use a larger pool",
        )
    return keep


def select_top(ranking: pd.DataFrame, keep: int, basis: str = "by influence") -> pd.DataFrame:
    """The first ``keep`` examples of every task's ranking.

    Ties are settled by the ranking's own order, so the result does not depend on row order.

    Args:
        ranking: Columns task, rank (from 1, best first), example_id, score.
        keep: Examples per task.
        basis: What the ranking is by, for the reason.

    Returns:
        Columns example_id, task, rank, score, reason; sorted by task and rank.

    Raises:
        DataError: A task has fewer examples with a finite score than ``keep``.
    """
    parts: list[pd.DataFrame] = []
    for task, group in ranking.groupby("task", sort=True):
        scored = group[np.isfinite(group["score"])].sort_values("rank", kind="stable")
        if len(scored) < keep:
            raise DataError(
                "fewer examples have a score than are to be selected",
                where=f"task {task}",
                value=f"{len(scored)} of {len(group)} examples have a score; {keep} wanted",
                fix="lower select.fraction, or raise chat.max_length so that responses are not "
                "cut away",
            )
        reason = f"top {keep} of {len(group)} {basis} on {task}"
        parts.append(scored.head(keep).assign(reason=reason)[COLUMNS])
    return pd.concat(parts, ignore_index=True)


def selected_file(folder: Path, subset: str) -> Path:
    """The file of a selection folder that holds one task's examples, or ``all`` of them.

    Raises:
        ArtifactError: The name could leave the folder.
    """
    if not TASK_NAME.fullmatch(subset):
        raise ArtifactError(
            "a task's name is not a file name",
            where=folder,
            value=subset,
            allowed="letters, digits, dot, underscore, hyphen",
        )
    return folder / ("selected.jsonl" if subset == ALL else f"selected/{subset}.jsonl")


def read_selected(folder: Path, subset: str) -> list[dict[str, Any]]:
    """The selected examples of one task, or ``all``: example_id, tasks, messages, ...

    Raises:
        ArtifactError: The selection has no such task.
        DataError: It is empty.
    """
    path = selected_file(folder, subset)
    if not path.is_file():
        known = sorted(p.stem for p in (folder / "selected").glob("*.jsonl"))
        raise ArtifactError(
            "the selection has no such subset",
            where=folder,
            value=subset,
            allowed=", ".join([ALL, *known]),
        )
    # By file lines: str.splitlines would also cut at separators inside a text, such as U+2028.
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    if not records:
        raise DataError("the selection is empty", where=path)
    return records


def _pool_file(job: Job) -> Path:
    return job.parents["pool"] / "pool.parquet"


def _same_examples(ranking: pd.DataFrame, pool: Mapping[str, Any], where: Path) -> None:
    """Every task must rank every pool example exactly once."""
    for task, group in ranking.groupby("task", sort=True):
        ids = group["example_id"]
        if len(ids) != len(pool) or set(ids) != set(pool):
            strange = sorted(set(ids) ^ set(pool))[:5]
            raise ArtifactError(
                "ranking and pool do not hold the same examples",
                where=f"{where}, task {task}",
                value=f"{len(ids)} ranked, {len(pool)} in the pool, only in one: {strange}",
                fix="make the ranking again from this pool",
            )


def _basis(metadata: Mapping[str, Any]) -> str:
    """What the ranking is by, in words."""
    return "at random" if metadata.get("scorer") == "random" else "by influence"


def _write_files(out: Path, table: pd.DataFrame, pool: Mapping[str, Mapping[str, Any]]) -> None:
    by_example = table.groupby("example_id", sort=False)["task"].agg(list).to_dict()
    lines = {str(i): _line(pool[str(i)], tasks) for i, tasks in by_example.items()}
    (out / "selected").mkdir()
    _write_lines(selected_file(out, ALL), lines.values())
    for task, group in table.groupby("task", sort=True):
        _write_lines(selected_file(out, str(task)), (lines[i] for i in group["example_id"]))


def _line(row: Mapping[str, Any], tasks: list[str]) -> str:
    record = {
        "example_id": row["example_id"],
        "tasks": tasks,
        "messages": row["messages"],
        "source": row["source"],
        "category": row["category"],
    }
    return json.dumps(record, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    # newline="\n": the same bytes on every platform
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
