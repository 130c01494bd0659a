"""One row of numbers for each query of a task, to be compared with rows of the same kind of a pool.

Rows are sketches of single queries' gradients, or embeddings of their texts. The score of an
example for a task is the mean over its queries of the inner products of their rows, taken
within each subtask and then at its largest where the run says so, as LESS does
(arXiv:2402.04333).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iprox.errors import ArtifactError
from iprox.stages.feature_store import ROWS, QuerySketches
from iprox.store.arrays import create_store, open_store, put


@dataclass(frozen=True)
class MeanRows(QuerySketches):
    """Means of rows at unit length: an inner product with one is a mean of cosines."""

    @property
    def norms(self) -> np.ndarray:
        """Ones, so that a cosine score divides by the example's norm alone, (columns,)."""
        return np.ones(len(self.rows))


@dataclass(frozen=True)
class QueryRows:
    """Rows of a task's queries.

    Attributes:
        rows: (queries, dim) float32 at unit length; zero where a query has no direction.
        ids: Ids of the queries.
        subtasks: Their subtasks.
        about: Settings that the pool's rows must agree with.
    """

    rows: np.ndarray
    ids: list[str]
    subtasks: list[str]
    about: dict[str, Any]


def write_rows(
    out: Path,
    rows: np.ndarray,
    ids: Sequence[str],
    subtasks: Sequence[str],
    about: dict[str, Any],
) -> None:
    """Write ``rows.zarr``: ``sketch`` (queries, dim), ``example_id`` and ``subtask``.

    Args:
        out: Folder to write into.
        rows: (queries, dim), at unit length.
        ids: Ids of the queries.
        subtasks: Their subtasks.
        about: Settings that the pool's rows must agree with.
    """
    store = create_store(out / ROWS, {"about": about})
    put(store, "sketch", rows.astype(np.float32), ("queries", "dim"))
    put(store, "example_id", np.array(ids, dtype=str), ("queries",))
    put(store, "subtask", np.array(subtasks, dtype=str), ("queries",))


def read_rows(folder: Path) -> QueryRows:
    """Rows of a task's queries.

    Raises:
        ArtifactError: There is no store.
    """
    store = open_store(folder / ROWS)
    ids, subtasks = (store[name][:].tolist() for name in ("example_id", "subtask"))
    return QueryRows(
        store["sketch"][:],
        list(map(str, ids)),
        list(map(str, subtasks)),
        dict(store.attrs["about"]),
    )


def mean_rows(folders: Mapping[str, Path], by_subtask: bool) -> MeanRows:
    """Means of the rows of all tasks, with which mean scores are inner products.

    Args:
        folders: Task -> folder with its rows.
        by_subtask: A mean for each subtask, instead of one for the task.

    Raises:
        ArtifactError: The tasks' rows are of different settings.
    """
    columns, means = [], []
    tasks = {task: read_rows(folder) for task, folder in folders.items()}
    about = [found.about for found in tasks.values()]
    for task, found in zip(tasks, about, strict=True):
        if found != about[0]:
            raise ArtifactError(
                "the queries of two tasks were made with different settings", where=f"task {task}"
            )
    for task, queries in tasks.items():
        groups = np.array(queries.subtasks if by_subtask else [task] * len(queries.ids))
        for group in sorted(set(groups.tolist())):
            columns.append(f"{task}/{group}" if by_subtask else task)
            means.append(queries.rows[groups == group].mean(0, dtype=np.float64))
    return MeanRows(columns, np.stack(means).astype(np.float32), about[0])
