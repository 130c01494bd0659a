"""Texts of a stage as tokens: pool examples and queries, with counts of what the limits cost."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.data.chat import Encoded, encode
from iprox.data.labelled import encode_labelled
from iprox.errors import ArtifactError, DataError
from iprox.store.tables import read_arrow, read_table
from iprox.study.schema import ChatSection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Encoded examples in a fixed order.

    Attributes:
        encoded: The examples, each with its id.
        subtasks: Subtask of each query; empty for pool examples.
    """

    encoded: list[Encoded]
    subtasks: list[str]

    @property
    def ids(self) -> list[str]:
        """Ids of the examples."""
        return [e.example_id for e in self.encoded]

    @property
    def n_truncated(self) -> int:
        """Examples that lost tokens to ``chat.max_length``."""
        return sum(e.n_truncated > 0 for e in self.encoded)

    @property
    def n_unsupervised(self) -> int:
        """Examples without a supervised token: nothing to take a loss on."""
        return sum(e.supervised == 0 for e in self.encoded)

    def counts(self) -> dict[str, int]:
        """Counts for a stage's metrics."""
        return {
            "examples": len(self.encoded),
            "tokens": sum(map(len, self.encoded)),
            "supervised": sum(e.supervised for e in self.encoded),
            "truncated": self.n_truncated,
            "unsupervised": self.n_unsupervised,
        }

    def supervised_only(self) -> Texts:
        """The examples that have a loss, in their order.

        Raises:
            DataError: There is none.
        """
        kept = [i for i, e in enumerate(self.encoded) if e.supervised]
        if not kept:
            raise DataError(
                "no example has a supervised token",
                value=f"{len(self.encoded)} examples",
                fix="raise chat.max_length: prompts alone fill it",
            )
        subtasks = [self.subtasks[i] for i in kept] if self.subtasks else []
        return Texts([self.encoded[i] for i in kept], subtasks)

    def with_all_labels(self) -> Texts:
        """The same examples with a loss on every token."""
        encoded = [replace(e, labels=list(e.input_ids)) for e in self.encoded]
        return replace(self, encoded=encoded)


def split_ids(folder: Path, name: str) -> list[str]:
    """Ids of one named split, in their order.

    Raises:
        ArtifactError: The split artifact has no such split.
    """
    table = read_table(folder / "split.parquet")
    chosen = table[table["split"] == name].sort_values("position")
    if chosen.empty:
        raise ArtifactError(
            "a split has no examples",
            where=folder / "split.parquet",
            value=name,
            allowed=", ".join(sorted(set(table["split"]))),
        )
    return [str(i) for i in chosen["example_id"]]


def pool_ids(folder: Path) -> list[str]:
    """Ids of all pool examples, sorted."""
    return sorted(read_arrow(folder / "pool.parquet", ["example_id"])["example_id"].to_pylist())


def pool_texts(
    folder: Path,
    ids: Sequence[str],
    tokenizer: Any,
    chat: ChatSection,
    labels: Mapping[str, int] | None = None,
) -> Texts:
    """Encode the pool examples ``ids``, in that order.

    Args:
        folder: The pool.
        ids: Ids of the examples.
        tokenizer: The model's.
        chat: How messages become tokens.
        labels: Of a classifier, label -> its number: the last turn is then the label of the text.

    Raises:
        ArtifactError: An id is not in the pool.
        DataError: A label is not one of the classifier's.
    """
    blocks = _encoded_blocks(folder, ids, tokenizer, chat, max(1, len(ids)), labels)
    return _reported(Texts([e for block in blocks for e in block], []), folder)


def pool_blocks(
    folder: Path, ids: Sequence[str], tokenizer: Any, chat: ChatSection, size: int
) -> Iterator[Texts]:
    """Encode the pool examples ``ids`` in that order, ``size`` at a time.

    Raises:
        ArtifactError: An id is not in the pool.
    """
    counts: Counter[str] = Counter()
    for block in _encoded_blocks(folder, ids, tokenizer, chat, size):
        texts = Texts(block, [])
        counts.update(texts.counts())
        yield texts
    if counts["truncated"] or counts["unsupervised"]:
        log.warning(
            "%s: %d of %d examples are cut to chat.max_length, %d have no supervised token left",
            folder,
            counts["truncated"],
            counts["examples"],
            counts["unsupervised"],
        )


def _encoded_blocks(
    folder: Path,
    ids: Sequence[str],
    tokenizer: Any,
    chat: ChatSection,
    size: int,
    labels: Mapping[str, int] | None = None,
) -> Iterator[list[Encoded]]:
    """Encoded examples in blocks; only their messages are in memory as a whole, as Arrow."""
    messages = _messages(folder / "pool.parquet", pa.array(list(ids), pa.string()))
    for start in range(0, len(ids), size):
        rows = messages[start : start + size].to_pylist()
        pairs = zip(ids[start : start + size], rows, strict=True)
        if labels is not None:
            yield [encode_labelled(row, tokenizer, labels, chat.max_length, i) for i, row in pairs]
            continue
        yield [
            encode(row, tokenizer, chat.template, chat.max_length, example_id=i) for i, row in pairs
        ]


def _messages(pool: Path, ids: pa.Array) -> pa.ChunkedArray:
    """Messages of the pool examples ``ids``, in that order.

    Raises:
        ArtifactError: An id is not in the pool.
    """
    table = read_arrow(pool, ["example_id", "messages"], pc.field("example_id").isin(ids))
    places = pc.index_in(ids, table["example_id"].cast(pa.string()))
    if places.null_count:
        missing = ids.filter(places.is_null())
        raise ArtifactError(
            f"{len(missing)} examples are not in the pool",
            where=pool,
            value=missing[0].as_py(),
            fix="make the split again from this pool",
        )
    return table["messages"].take(places)


def query_texts(
    folder: Path, tokenizer: Any, chat: ChatSection, labels: Mapping[str, int] | None = None
) -> Texts:
    """Encode a task's queries in the order of ``queries.parquet``; the completion is supervised.

    Of a classifier (``labels`` as in :func:`pool_texts`) the completion is the label.
    """
    rows = read_arrow(folder / "queries.parquet").to_pylist()
    subtasks = [row["subtask"] for row in rows]
    if labels is not None:
        labelled = [
            encode_labelled(r["messages"], tokenizer, labels, chat.max_length, r["example_id"])
            for r in rows
        ]
        return _reported(Texts(labelled, subtasks), folder)
    encoded = [
        encode(
            row["messages"],
            tokenizer,
            chat.template,
            chat.max_length,
            prefix=row["prefix"],
            eos=row["eos"],
            last_only=True,
            example_id=row["example_id"],
        )
        for row in rows
    ]
    return _reported(Texts(encoded, subtasks), folder)


def _reported(texts: Texts, folder: Path) -> Texts:
    """Say in the log how many examples were cut, and how many lost their whole response."""
    if texts.n_truncated or texts.n_unsupervised:
        lost = np.sum([e.n_truncated_supervised for e in texts.encoded])
        log.warning(
            "%s: %d of %d examples are cut to chat.max_length (%d response tokens lost), "
            "%d have no supervised token left",
            folder,
            texts.n_truncated,
            len(texts.encoded),
            lost,
            texts.n_unsupervised,
        )
    return texts
