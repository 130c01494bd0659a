"""Stage ``embeddings``: every pool example's text embedding.

The shards have the layout of sketched features, an embedding in the place of a sketch of unit
length, so that whatever compares sketches with queries compares embeddings with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from iprox.models.device import pick_device
from iprox.models.encoder import Encoder, load_encoder
from iprox.progress import track
from iprox.stages.encoding import attributes, check_cut, embed_texts, example_texts
from iprox.stages.texts import pool_ids
from iprox.store.arrays import CHUNK_BYTES, allocate, create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import EncoderSection

BLOCK_EXAMPLES = 4096
"""Most examples that are tokenised, batched and written together."""


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: embeddings of the rows ``job.rows`` of the pool, all when absent.

    Arrays: ``sketch`` (examples, dim) at unit length, ``norms`` (examples,) of ones,
    ``loss`` of zeros and ``supervised`` of ones (no text is unusable), ``tokens`` and
    ``example_id``.

    Returns:
        Counts of examples, tokens and texts that were cut, and bytes per example.

    Raises:
        DataError: More texts are cut than ``encoder.max_cut`` allows.
        ModelError: The encoder has fewer positions than ``encoder.max_length``.
    """
    section = job.section(EncoderSection, "encoder")
    encoder = load_encoder(job.parents["encoder"], section.max_length, pick_device())
    ids = pool_ids(job.parents["pool"])
    start, stop = job.rows or (0, len(ids))
    about = attributes(encoder, job.parents["encoder"])
    store = create_store(job.out / "shard.zarr", about)
    tokens, n_cut = _write(job, encoder, store, ids[start:stop])
    check_cut(n_cut, stop - start, section.max_cut, "the pool")
    count = stop - start
    for name, array in (
        ("example_id", np.array(ids[start:stop], dtype=str)),
        ("norms", np.ones(count)),
        ("loss", np.zeros(count)),
        ("tokens", tokens),
        ("supervised", np.ones(count, dtype=int)),
    ):
        put(store, name, array, ("examples",))
    return {"examples": count, "tokens": int(tokens.sum()), "truncated": n_cut}


def _write(job: Job, encoder: Encoder, store: Any, ids: list[str]) -> tuple[np.ndarray, int]:
    """Embed a shard's examples block by block; a block is a chunk of the stored array.

    Returns:
        Tokens of each example, and how many texts were cut.
    """
    size = max(1, min(BLOCK_EXAMPLES, CHUNK_BYTES // (2 * encoder.dim)))
    shape = (len(ids), encoder.dim)
    stored = allocate(store, "sketch", shape, "float16", ("examples", "dim"), size)
    tokens, n_cut = np.zeros(len(ids), dtype=int), 0
    with track(len(ids), "examples", "embedding") as progress:
        for start in range(0, len(ids), size):
            rows = slice(start, min(start + size, len(ids)))
            found = embed_texts(encoder, example_texts(job.parents["pool"], ids[rows]).texts)
            stored[rows], tokens[rows] = found.rows.astype(np.float16), found.tokens
            n_cut += found.n_cut
            progress.advance(rows.stop - rows.start, tokens=int(found.tokens.sum()))
    return tokens, n_cut
