"""Texts that stand on both sides: validation examples in the test set, either in the pool.

Texts are compared by their normalised hash (:func:`iprox.data.pools.text_hash`), in every shape
an example is known to appear in: the bare question, and the whole conversation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from iprox.data.pools import text_hash
from iprox.errors import DataError, shorten

log = logging.getLogger(__name__)

TEXT_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("subtask", pa.string()),
        ("role", pa.string()),
        ("text_hash", pa.string()),
    ]
)
"""Columns of ``texts.parquet``: a row for each shape of each example; role development or test."""

PAIR_SCHEMA = pa.schema(
    [("example_id", pa.string()), ("role", pa.string()), ("same_as", pa.string())]
)
"""Columns of ``contaminated.parquet``: an example of the task, and where else its text stands."""


class Recognisable(Protocol):
    """An example that can say what its text is."""

    @property
    def example_id(self) -> str:
        """Stable id."""

    @property
    def subtask(self) -> str:
        """Subject, task or language."""

    def shapes(self) -> Sequence[str]:
        """Its text without the answer, in every shape it may have elsewhere."""


@dataclass(frozen=True)
class Text:
    """One shape of an example of a task: a row of ``texts.parquet``."""

    example_id: str
    subtask: str
    role: str
    text_hash: str


def texts_of(development: Iterable[Recognisable], test: Iterable[Recognisable]) -> list[Text]:
    """All shapes of a task's development examples (queries, shots, held out) and test items."""
    both = [("development", e) for e in development] + [("test", e) for e in test]
    return [
        Text(e.example_id, e.subtask, role, text_hash([{"content": shape}]))
        for role, e in both
        for shape in dict.fromkeys(e.shapes())
    ]


def in_test(texts: Sequence[Text]) -> list[tuple[str, str, str]]:
    """Development examples that are also test items: id, role, id of the test item."""
    tested: dict[str, list[str]] = {}
    for text in texts:
        if text.role == "test":
            tested.setdefault(text.text_hash, []).append(text.example_id)
    found = {
        (text.example_id, text.role, test_id): None
        for text in texts
        if text.role == "development"
        for test_id in tested.get(text.text_hash, ())
    }
    return list(found)


def in_pool(texts: pa.Table, pool: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, str, str]]:
    """Examples of a task whose text is a pool example's, or its prompt: id, role, id in the pool.

    Args:
        texts: ``texts.parquet`` of the task.
        pool: Batches of the pool's ``example_id, text_hash, prompt_hash``.
    """
    known: dict[str, dict[tuple[str, str], None]] = {}
    for row in texts.to_pylist():
        known.setdefault(row["text_hash"], {})[row["example_id"], row["role"]] = None
    hashes = pa.array(known, pa.string())
    for batch in pool:
        found: dict[tuple[str, str, str], None] = {}
        for column in ("text_hash", "prompt_hash"):
            hits = batch.filter(pc.is_in(batch[column], value_set=hashes))
            for row in hits.to_pylist():
                for example_id, role in known[row[column]]:
                    found[example_id, role, row["example_id"]] = None
        yield from found


def pair_table(pairs: Iterable[tuple[str, str, str]]) -> pa.Table:
    """Rows of ``contaminated.parquet``."""
    rows = [dict(zip(PAIR_SCHEMA.names, pair, strict=True)) for pair in pairs]
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def refuse(
    pairs: Sequence[tuple[str, str, str]], *, where: str, place: str, allowed: bool, key: str
) -> None:
    """List what stands in two places, and stop unless that is allowed.

    Args:
        pairs: From :func:`in_test` or :func:`in_pool`.
        where: The task.
        place: Where else the texts stand.
        allowed: Whether the config allows it.
        key: The key that would.

    Raises:
        DataError: There are such examples, and they are not allowed.
    """
    if not pairs:
        return
    for example_id, role, other in pairs:
        log.warning(
            "%s: %s example %s also stands in %s as %s", where, role, example_id, place, other
        )
    if not allowed:
        examples = {example_id for example_id, _, _ in pairs}
        raise DataError(
            f"examples of a task also stand in {place}",
            where=where,
            value=shorten(", ".join(f"{a} = {b}" for a, _, b in pairs)),
            allowed=f"none; {len(examples)} found, listed in the log",
            fix=f"remove them from one of the two, or set {key}: true",
        )
