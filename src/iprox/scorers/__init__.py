"""What ranks the pool besides gradients, a file each.

A file holds one function, ``score(job, corpus)``, and its name is registered in
:mod:`iprox.study.scorers` with what it reads. It returns :class:`Scores`; a higher score means
a more useful example, and -inf one that cannot be scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.errors import ConfigError
from iprox.stages.texts import Texts, pool_blocks
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow
from iprox.study.schema import ChatSection

READ_ROWS = 2**14
"""Examples whose texts are Python objects at once."""


@dataclass(frozen=True)
class Scores:
    """What a scorer says of the pool.

    Attributes:
        by_task: Task -> (examples,), in the order of the corpus.
        metrics: Counts for provenance.
    """

    by_task: dict[str, np.ndarray]
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """The texts a scorer reads; nothing is in memory before it is asked for.

    Attributes:
        job: The job whose parents hold them: ``pool``, and ``task/<name>`` for each task.
        tasks: Names of the tasks that are to be ranked.
    """

    job: Job
    tasks: list[str]

    @cached_property
    def _pool(self) -> pa.Table:
        table = read_arrow(self.job.parents["pool"] / "pool.parquet", ["example_id", "messages"])
        return table.take(pc.sort_indices(table["example_id"]))

    @cached_property
    def ids(self) -> pa.Array:
        """Ids of the candidates, ascending."""
        return self._pool["example_id"].cast(pa.large_string()).combine_chunks()

    def candidates(self, part: str = "all") -> Iterator[str]:
        """A part of every candidate's text, in the order of their ids.

        Args:
            part: ``all``, ``prompt`` or ``response``.
        """
        messages = self._pool["messages"]
        for start in range(0, len(messages), READ_ROWS):
            for conversation in messages.slice(start, READ_ROWS).to_pylist():
                yield text_of(conversation, part)

    def encoded(self, tokenizer: Any, chat: ChatSection) -> Iterator[Texts]:
        """Candidates as tokens, in the order of their ids, some at a time."""
        ids = self.ids.to_pylist()
        return pool_blocks(self.job.parents["pool"], ids, tokenizer, chat, READ_ROWS)

    def queries(self, part: str = "all") -> dict[str, list[str]]:
        """A part of every query's text by task.

        Raises:
            ConfigError: There is no task.
        """
        folders = self.job.roles("task")
        if not folders:
            raise ConfigError("this scorer needs the queries of at least one task", where="tasks")
        found = {}
        for task, folder in folders.items():
            rows = read_arrow(folder / "queries.parquet", ["messages"])["messages"].to_pylist()
            found[task] = [text_of(conversation, part) for conversation in rows]
        return found

    def same_for_all(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """One order for every task."""
        return dict.fromkeys(self.tasks, scores)


def text_of(conversation: Iterable[dict[str, Any]], part: str) -> str:
    """A part of a conversation, turns on lines of their own.

    Args:
        conversation: Messages with ``role`` and ``content``.
        part: ``all`` turns, those of the ``prompt`` (not the assistant's), or the ``response``.
    """
    return "\n".join(
        message["content"]
        for message in conversation
        if part == "all" or (message["role"] == "assistant") == (part == "response")
    )


def preferred(values: np.ndarray, prefer: str) -> np.ndarray:
    """Scores of examples by a property of theirs, NaN becoming -inf.

    Args:
        values: The property, (examples,).
        prefer: ``high`` or ``low`` values first, or those in the ``middle`` of their order.

    Returns:
        (examples,) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    scores = np.full(values.shape, -np.inf)
    if prefer == "middle":
        from scipy import stats

        ranks = stats.rankdata(values[known])
        scores[known] = -np.abs(ranks - (len(ranks) + 1) / 2)
    else:
        scores[known] = values[known] if prefer == "high" else -values[known]
    return scores


class OverQueries:
    """One score for every candidate from its similarities to the queries of a task.

    Similarities come a query, or some, at a time, so that the whole matrix is never in memory.

    Args:
        how: ``mean`` or ``max``.
        examples: Number of candidates.
    """

    def __init__(self, how: str, examples: int) -> None:
        self.how, self.n = how, 0
        self.total = np.full(examples, -np.inf if how == "max" else 0.0)

    def add(self, similarities: np.ndarray) -> None:
        """Take in similarities to more queries, (queries, examples)."""
        self.n += len(similarities)
        if self.how == "max":
            np.maximum(self.total, similarities.max(axis=0), out=self.total)
        else:
            self.total += similarities.sum(axis=0)

    def scores(self) -> np.ndarray:
        """The mean or maximum, (examples,) float64."""
        return self.total if self.how == "max" else self.total / self.n


def blocks_of(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive parts of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
