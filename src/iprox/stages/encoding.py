"""Texts of pool examples and queries as an encoder sees them, and their embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from iprox.data.batches import token_batches
from iprox.data.pools import text_hash
from iprox.engine.scoring import batch_tokens
from iprox.errors import ArtifactError, DataError
from iprox.models.encoder import Encoder
from iprox.models.load import weight_files
from iprox.stages.feature_store import EMBEDDING
from iprox.store.manifest import digest_file
from iprox.store.tables import read_arrow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderTexts:
    """Texts in a fixed order.

    Attributes:
        ids: Ids of the examples or queries.
        texts: What the encoder reads.
        hashes: Digests of the texts, normalised, by which equal ones are found.
        subtasks: Subtask of each query; empty for pool examples.
    """

    ids: list[str]
    texts: list[str]
    hashes: list[str]
    subtasks: list[str]

    def take(self, places: Sequence[int]) -> EncoderTexts:
        """Some of them, in the order given."""
        subtasks = [self.subtasks[i] for i in places] if self.subtasks else []
        ids, texts, hashes = ([x[i] for i in places] for x in (self.ids, self.texts, self.hashes))
        return EncoderTexts(ids, texts, hashes, subtasks)


class Embedded(NamedTuple):
    """Embeddings of some texts."""

    rows: np.ndarray  # (texts, dim) float32, at unit length
    tokens: np.ndarray  # (texts,) tokens the encoder saw
    n_cut: int  # texts that lost their beginning


def example_texts(pool: Path, ids: Sequence[str]) -> EncoderTexts:
    """Texts of pool examples, all turns joined, in the order of ``ids``.

    Raises:
        ArtifactError: An id is not in the pool.
    """
    wanted = pa.array(list(ids), pa.string())
    path = pool / "pool.parquet"
    table = read_arrow(path, ["example_id", "messages"], pc.field("example_id").isin(wanted))
    places = pc.index_in(wanted, table["example_id"].cast(pa.string()))
    if places.null_count:
        missing = wanted.filter(places.is_null())
        raise ArtifactError("examples are not in the pool", where=path, value=missing[0].as_py())
    rows = table["messages"].take(places).to_pylist()
    return EncoderTexts(list(ids), [joined(row) for row in rows], [text_hash(r) for r in rows], [])


def query_texts(task: Path, instruction: str) -> EncoderTexts:
    """Texts of a task's queries, all turns joined after an instruction."""
    rows = read_arrow(task / "queries.parquet").to_pylist()
    return EncoderTexts(
        [row["example_id"] for row in rows],
        [instruction + joined(row["messages"]) for row in rows],
        [text_hash(row["messages"]) for row in rows],
        [row["subtask"] for row in rows],
    )


def joined(messages: Sequence[Mapping[str, str]]) -> str:
    """The turns of a conversation as one text."""
    return "\n\n".join(turn["content"] for turn in messages)


def embed_texts(encoder: Encoder, texts: Sequence[str]) -> Embedded:
    """Embeddings in the order of the texts; batches hold texts of similar length."""
    ids, n_cut = encoder.inputs(texts)
    rows = np.zeros((len(texts), encoder.dim), dtype=np.float32)
    with torch.no_grad():
        for places in batches(encoder, ids):
            rows[places] = encoder.embed([ids[i] for i in places]).float().cpu().numpy()
    return Embedded(rows, np.array([len(one) for one in ids], dtype=int), n_cut)


def batches(encoder: Encoder, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of texts in batches of similar length."""
    yield from token_batches([len(one) for one in ids], batch_tokens(encoder.device))


def check_cut(n_cut: int, n_texts: int, max_cut: float, what: str) -> None:
    """Refuse an encoder that is too short for the texts it is to stand for.

    Args:
        n_cut: Texts that lost tokens.
        n_texts: All texts.
        max_cut: Share that may.
        what: Whose texts they are, for the message.

    Raises:
        DataError: More of them do.
    """
    if n_cut:
        log.warning("%d of %d texts of %s are longer than the encoder", n_cut, n_texts, what)
    if n_cut > max_cut * n_texts:
        raise DataError(
            "the encoder is too short for the texts",
            where=what,
            value=f"{n_cut} of {n_texts} texts are cut",
            allowed=f"at most a share of {max_cut:g} (encoder.max_cut)",
            fix="raise encoder.max_length, name an encoder with more positions, or accept the "
            "cut with encoder.max_cut",
        )


def attributes(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Settings that embeddings must agree in to be compared: root attributes of a shard."""
    weights = [digest_file(path) for path in weight_files(folder)]
    about = {"kind": EMBEDDING, "dim": encoder.dim, "max_length": encoder.max_length}
    return {**about, "weights": weights}
