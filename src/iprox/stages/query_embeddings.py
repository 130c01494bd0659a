"""Stage ``query_embeddings``: the text embedding of every query of a task."""

from __future__ import annotations

from iprox.models.device import pick_device
from iprox.models.encoder import load_encoder
from iprox.stages.encoding import attributes, check_cut, embed_texts, query_texts
from iprox.stages.query_rows import write_rows
from iprox.store.job import Job, Metrics
from iprox.study.schema import EncoderSection


def make(job: Job) -> Metrics:
    """Write ``rows.zarr``, a row for each query, see :func:`~iprox.stages.query_rows.write_rows`.

    Returns:
        Counts of queries, tokens and texts that were cut.

    Raises:
        DataError: More texts are cut than ``encoder.max_cut`` allows.
        ModelError: The encoder has fewer positions than ``encoder.max_length``.
    """
    section = job.section(EncoderSection, "encoder")
    encoder = load_encoder(job.parents["encoder"], section.max_length, pick_device())
    queries = query_texts(job.parents["task"], section.instruction)
    found = embed_texts(encoder, queries.texts)
    check_cut(found.n_cut, len(queries.texts), section.max_cut, "the queries")
    about = attributes(encoder, job.parents["encoder"])
    write_rows(job.out, found.rows, queries.ids, queries.subtasks, about)
    return {
        "queries": len(queries.ids),
        "tokens": int(found.tokens.sum()),
        "truncated": found.n_cut,
    }
