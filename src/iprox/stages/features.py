"""Stage ``features``: what is kept of every pool example's gradient.

Either its exact inner products with all query gradients and its norm, or a sketch of it that
any query gradient can be compared with later. A pass over the pool is cut into shards; a
shard's rows are in pool order whatever the batches were, and all shards together are the pool.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from iprox.engine.scoring import Scorer
from iprox.progress import Track, track
from iprox.stages.feature_store import PER_EXAMPLE, Features
from iprox.stages.passes import Reader, free_bytes, open_reader
from iprox.stages.queries import Queries, open_queries
from iprox.stages.sketches import make_sketches
from iprox.stages.texts import Texts, pool_ids, pool_texts, split_ids
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, InfluenceSection

WHOLE_POOL = "all"


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: the rows ``job.rows`` of the examples to score, all when absent.

    Its arrays are those of :class:`Features`, with the kernels used and the settings in its
    root attributes; or, when the job has a section ``features``, those of
    :func:`iprox.stages.sketches.make_sketches`.

    Returns:
        Counts of examples and tokens, and the number of passes.

    Raises:
        ArtifactError: The queries are not of this model's layers or of different settings.
        NumericsError: A loss or gradient is not finite; names the example and layer.
    """
    reader, ids = open_reader(job, "model"), example_ids(job)
    if "features" in job.params:
        return make_sketches(job, reader, ids)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in reader.layers.items()}
    queries = open_queries(job.roles("query"), shapes)
    start, stop = job.rows or (0, len(ids))
    texts = pool_texts(
        job.parents["pool"], ids[start:stop], reader.tokenizer, job.section(ChatSection, "chat")
    )
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    features, kernels, n_passes = score_texts(reader, queries, texts, reduction)
    store = create_store(
        job.out / "shard.zarr",
        {"kernels": kernels, "loss_reduction": reduction, "queries": queries.about()},
    )
    put(store, "example_id", np.array(texts.ids, dtype=str), ("examples",))
    for name in PER_EXAMPLE[1:]:
        array = getattr(features, name)
        put(store, name, array, ("examples", "columns")[: array.ndim])
    put(store, "columns", np.array(features.columns), ("columns",))
    put(store, "query_norms", features.query_norms, ("columns",))
    return {**texts.counts(), "passes": n_passes}


def example_ids(job: Job) -> list[str]:
    """Ids of all examples this stage scores, sorted: the pool, or one split of it."""
    subset = job.params["subset"]["name"]
    if subset == WHOLE_POOL:
        return pool_ids(job.parents["pool"])
    return sorted(split_ids(job.parents["split"], subset))


def score_texts(
    reader: Reader, queries: Queries, texts: Texts, reduction: str
) -> tuple[Features, list[dict[str, int | str]], int]:
    """Score encoded examples against all queries.

    When the query gradients of all columns do not fit in memory together, the examples are
    passed several times, each time against a block of columns.

    Returns:
        The features, the kernels used, and the number of passes.
    """
    n = len(texts.encoded)
    supervised = np.array([e.supervised for e in texts.encoded])
    features = Features(
        example_id=pa.array(texts.ids, pa.large_string()),
        dots=np.zeros((n, len(queries.columns))),
        norms=np.zeros(n),
        loss=np.full(n, np.nan),
        tokens=np.array([len(e) for e in texts.encoded]),
        supervised=supervised,
        columns=queries.columns,
        query_norms=queries.norms,
    )
    scorable = np.flatnonzero(supervised)
    blocks = list(_column_blocks(reader, len(queries.columns)))
    kernels: list[dict[str, int | str]] = []
    with track(len(scorable) * len(blocks), "examples", "scoring") as progress:
        for block in blocks:
            tensors = {
                name: torch.from_numpy(queries.load(name, block)).to(reader.device)
                for name in reader.layers
            }
            scorer = Scorer(reader.model, reader.layers, tensors, reduction)
            _fill(features, scorer, reader, texts, scorable, block, progress)
            kernels = scorer.kernels()
    return features, kernels, len(blocks)


def _fill(
    features: Features,
    scorer: Scorer,
    reader: Reader,
    texts: Texts,
    scorable: np.ndarray,
    columns: range,
    progress: Track,
) -> None:
    """Write the norms, losses and inner products of some columns into ``features``."""
    for indices, batch in reader.batches([texts.encoded[i] for i in scorable]):
        rows = scorable[indices]
        scores = scorer.score(batch, [texts.encoded[i].example_id for i in rows])
        features.dots[rows, columns.start : columns.stop] = scores.dots.cpu().numpy()
        features.norms[rows] = scores.squared_norms.sqrt().cpu().numpy()
        features.loss[rows] = scores.losses.double().cpu().numpy()
        progress.advance(len(rows), tokens=int(batch.lengths.sum()))


def _column_blocks(reader: Reader, n_columns: int) -> Iterator[range]:
    """Columns in blocks whose query gradients fit in half of the free memory."""
    column_bytes = sum(4 * layer.weight.numel() for layer in reader.layers.values())
    size = max(1, free_bytes(reader.device) // 2 // column_bytes)
    for start in range(0, n_columns, size):
        yield range(start, min(start + size, n_columns))
