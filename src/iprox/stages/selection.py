"""Stage ``selection``: the best of the tasks' rankings, as a table and as training files."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from iprox.data.contamination import in_pool, pair_table, refuse
from iprox.errors import ArtifactError, DataError
from iprox.stages.subsets import choose, is_plain
from iprox.store.job import Job, Metrics
from iprox.store.tables import (
    count_rows,
    read_arrow,
    read_batches,
    read_metadata,
    write_table,
)
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
    ``selected/<task>.jsonl`` those of one task. ``contaminated.parquet`` lists examples of the
    tasks that also stand in the pool.

    Returns:
        Numbers of pool examples, examples kept (per task, unless tasks choose together),
        distinct examples, examples without a score, examples that a prefilter left unscored, and
        examples passed over by reason.

    Raises:
        DataError: The fraction keeps nothing, fewer examples have a score or pass than are to be
            kept, a quota is of a category that no example has, or an example of a
            task also stands in the pool.
        ArtifactError: Ranking and pool do not hold the same examples.
    """
    section = job.section(SelectSection, "select")
    contaminated = _check_contamination(job, section.allow_contaminated)
    ranking_file = job.parents["ranking"] / "ranking.parquet"
    n_examples = count_rows(_pool_file(job))
    keep = n_selected(section.fraction, n_examples)
    if section.count is not None:
        keep = _checked_count(section.count, n_examples)
    tally = tally_ranking(ranking_file)
    prefiltered = int(read_metadata(ranking_file).get("prefiltered", 0))
    _check_tally(tally, n_examples - prefiltered, keep, ranking_file)
    refused: Counter[str] = Counter()
    if is_plain(section):
        table = select_top(ranking_file, keep, tally)
    else:
        chosen = choose(job, section, keep, _basis(read_metadata(ranking_file)))
        table, refused = chosen.table[COLUMNS], chosen.refused
        log.info("passed over: %s", dict(refused) or "none")
    write_table(job.out / "selection.parquet", table, job.params["select"])
    _write_files(job.out, table, _pool_rows(_pool_file(job), table["example_id"], ranking_file))
    return {
        "examples": n_examples,
        "selected_per_task": keep,
        "selected_distinct": int(table["example_id"].nunique()),
        "without_score": max(t.ranked - t.scored for t in tally.values()),
        "prefiltered": prefiltered,
        "contaminated": contaminated,
        **{f"passed_over_{reason}": n for reason, n in sorted(refused.items())},
    }


def _check_contamination(job: Job, allowed: bool) -> int:
    """Write ``contaminated.parquet``: examples of the tasks that also stand in the pool.

    Returns:
        The number of pool examples concerned.

    Raises:
        DataError: There are some, and they are not allowed.
    """
    found: list[tuple[str, str, str]] = []
    for role, folder in sorted(job.parents.items()):
        if role.startswith("task/"):
            pool = read_batches(_pool_file(job), ["example_id", "text_hash", "prompt_hash"])
            pairs = list(in_pool(read_arrow(folder / "texts.parquet"), pool))
            key = "select.allow_contaminated"
            refuse(pairs, where=role, place="the pool", allowed=allowed, key=key)
            found += pairs
    write_table(job.out / "contaminated.parquet", pair_table(found))
    return len({pool_id for _, _, pool_id in found})


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


def _checked_count(count: int, n_examples: int) -> int:
    """A number of examples that the pool has.

    Raises:
        DataError: It has fewer.
    """
    if count > n_examples:
        raise DataError(
            "more examples are to be selected than the pool has",
            where="select.count",
            value=count,
            allowed=f"at most {n_examples}",
            fix="lower select.count, or leave it out and give select.fraction",
        )
    return count


class Tally(NamedTuple):
    """How many examples a ranking has for a task."""

    ranked: int
    scored: int


def tally_ranking(path: Path) -> dict[str, Tally]:
    """Examples by task, counted without holding the ranking in memory."""
    tally: dict[str, Tally] = {}
    for batch in read_batches(path, ["task", "score"]):
        scored = np.isfinite(batch["score"].to_numpy(zero_copy_only=False))
        tasks = pc.dictionary_encode(batch["task"])
        for code, task in enumerate(tasks.dictionary.to_pylist()):
            own = tasks.indices.to_numpy() == code
            known = tally.get(task, Tally(0, 0))
            tally[task] = Tally(
                known.ranked + int(own.sum()), known.scored + int(scored[own].sum())
            )
    return dict(sorted(tally.items()))


def select_top(path: Path, keep: int, tally: Mapping[str, Tally]) -> pd.DataFrame:
    """The first ``keep`` examples of every task's ranking; the rest of it is not read.

    Ties are settled by the ranking's own order, so the result does not depend on row order.

    Args:
        path: File with columns task, rank (from 1, best first), example_id, score.
        keep: Examples per task.
        tally: Examples by task.

    Returns:
        Columns example_id, task, rank, score, reason; sorted by task and rank.
    """
    basis = _basis(read_metadata(path))
    top = read_arrow(path, where=pc.field("rank") <= keep).to_pandas()
    top = top.sort_values(["task", "rank"], kind="stable", ignore_index=True)
    reasons = {t: f"top {keep} of {n.ranked} {basis} on {t}" for t, n in tally.items()}
    return top.assign(reason=top["task"].map(reasons))[COLUMNS]


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


def _check_tally(tally: Mapping[str, Tally], n_examples: int, keep: int, where: Path) -> None:
    """Every task must rank all examples but those prefiltered, and score those to be kept.

    Raises:
        ArtifactError: A task ranks more or fewer examples.
        DataError: A task has fewer examples with a score than are to be selected.
    """
    for task, n in tally.items():
        if n.ranked != n_examples:
            raise ArtifactError(
                "ranking and pool do not hold the same examples",
                where=f"{where}, task {task}",
                value=f"{n.ranked} ranked, {n_examples} in the pool that are not prefiltered",
                fix="make the ranking again from this pool",
            )
        if n.scored < keep:
            raise DataError(
                "fewer examples have a score than are to be selected",
                where=f"task {task}",
                value=f"{n.scored} of {n.ranked} examples have a score; {keep} wanted",
                fix="lower select.fraction, raise prefilter.keep, or raise chat.max_length so that "
                "responses are not cut away",
            )


def _pool_rows(path: Path, ids: pd.Series, ranking: Path) -> dict[str, dict[str, Any]]:
    """Pool examples by id; the others are not read.

    Raises:
        ArtifactError: A selected example is not in the pool.
    """
    wanted = pa.array(sorted(set(ids)), pa.string())
    rows = read_arrow(path, where=pc.field("example_id").isin(wanted)).to_pylist()
    pool = {row["example_id"]: row for row in rows}
    strange = [i for i in wanted.to_pylist() if i not in pool]
    if strange:
        raise ArtifactError(
            "ranking and pool do not hold the same examples",
            where=ranking,
            value=f"{len(strange)} selected examples are not in the pool: {strange[:5]}",
            fix="make the ranking again from this pool",
        )
    return pool


def _basis(metadata: Mapping[str, Any]) -> str:
    """What the ranking is by, in words."""
    scorer = metadata.get("scorer", "gradient")
    return {"random": "at random", "gradient": "by influence"}.get(scorer, f"by {scorer}")


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
