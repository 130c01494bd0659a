"""Stage ``features``: what is kept of every pool example's gradient.

Either its exact inner products with all query gradients and its norm, or a sketch of it that
any query gradient can be compared with later. A pass over the pool is cut into shards; a
shard's rows are in pool order whatever the batches were, and all shards together are the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from iprox.engine.scoring import Scorer
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.progress import Track, track
from iprox.stages.feature_store import PER_EXAMPLE, Features
from iprox.stages.passes import Reader, column_blocks, free_bytes, open_reader
from iprox.stages.queries import Columns, Queries, open_queries
from iprox.stages.sketches import make_sketches
from iprox.stages.texts import Texts, pool_ids, pool_texts, split_ids
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, InfluenceSection

log = logging.getLogger(__name__)

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
    influence = job.section(InfluenceSection, "influence")
    scored = score_texts(reader, queries, texts, influence)
    features = scored.features
    store = create_store(
        job.out / "shard.zarr",
        {
            "kernels": scored.kernels,
            "loss_reduction": influence.loss_reduction,
            "queries": queries.about(),
            "query_rank": influence.query_rank,
            "query_truncation": dict(zip(queries.columns, scored.truncation, strict=True)),
            "skipped": scored.skipped,
        },
    )
    put(store, "example_id", np.array(texts.ids, dtype=str), ("examples",))
    for name in PER_EXAMPLE[1:]:
        array = getattr(features, name)
        put(store, name, array, ("examples", "columns")[: array.ndim])
    put(store, "columns", np.array(features.columns), ("columns",))
    put(store, "query_norms", features.query_norms, ("columns",))
    network, load = network_of(reader.model, reader.layers), load_of(texts.encoded)
    return {
        **texts.counts(),
        "passes": scored.n_passes,
        "skipped": len(scored.skipped),
        "flops": flops.features(network, load, len(queries.columns), scored.n_passes),
    }


def example_ids(job: Job) -> list[str]:
    """Ids of all examples this stage scores, sorted: the pool, or one split of it."""
    subset = job.params["subset"]["name"]
    if subset == WHOLE_POOL:
        return pool_ids(job.parents["pool"])
    return sorted(split_ids(job.parents["split"], subset))


@dataclass
class Scored:
    """What came out of scoring a shard.

    Attributes:
        features: Inner products, norms and losses.
        kernels: Which kernel layers of each shape used, and why.
        truncation: Share of each column's query norm that ``query_rank`` left out.
        n_passes: How many times the examples were passed through the model.
        skipped: Example -> where a number of it was not finite.
    """

    features: Features
    kernels: list[dict[str, int | str]] = field(default_factory=list)
    truncation: list[float] = field(default_factory=list)
    n_passes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def score_texts(
    reader: Reader, queries: Queries, texts: Texts, influence: InfluenceSection
) -> Scored:
    """Score encoded examples against all queries.

    When the query gradients of all columns do not fit in memory together, the examples are
    passed several times, each time against a block of columns.
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
    blocks = list(_column_blocks(reader, len(queries.columns), influence.query_rank))
    scored = Scored(features)
    with track(len(scorable) * len(blocks), "examples", "scoring") as progress:
        for block in blocks:
            scorer = Scorer(
                reader.model,
                reader.layers,
                Columns(queries, block, reader.device),
                influence.loss_reduction,
                query_rank=influence.query_rank,
                skip_nonfinite=influence.on_nonfinite == "skip",
            )
            _fill(scored, scorer, reader, texts, scorable, block, progress)
            scored.kernels = scorer.kernels()
            scored.truncation += scorer.truncation.tolist()
            scored.n_passes += 1
    if scored.skipped:
        some = ", ".join(sorted(scored.skipped)[:5])
        log.warning(
            "%d of %d examples have numbers that are not finite and rank last: %s%s",
            len(scored.skipped),
            n,
            some,
            ", ..." if len(scored.skipped) > 5 else "",
        )
    return scored


def _fill(
    scored: Scored,
    scorer: Scorer,
    reader: Reader,
    texts: Texts,
    scorable: np.ndarray,
    columns: range,
    progress: Track,
) -> None:
    """Write the norms, losses and inner products of some columns into the features.

    An example that is skipped has no loss, the norm 0 and inner products of 0.
    """
    features = scored.features
    for indices, batch in reader.batches([texts.encoded[i] for i in scorable]):
        rows = scorable[indices]
        scores = scorer.score(batch, [texts.encoded[i].example_id for i in rows])
        features.dots[rows, columns.start : columns.stop] = scores.dots.cpu().numpy()
        features.norms[rows] = scores.squared_norms.sqrt().cpu().numpy()
        features.loss[rows] = scores.losses.double().cpu().numpy()
        for place, where in scores.unusable.items():
            row = rows[place]
            scored.skipped[texts.encoded[row].example_id] = where
            features.dots[row], features.norms[row], features.loss[row] = 0, 0, np.nan
        progress.advance(len(rows), tokens=int(batch.lengths.sum()))


def _column_blocks(reader: Reader, n_columns: int, query_rank: int) -> Iterator[range]:
    """Columns in blocks whose query gradients fit in half of the free memory."""
    column_bytes = 0
    for layer in reader.layers.values():
        out, features = layer.weight.shape
        thin = 0 < query_rank < min(out, features)
        column_bytes += 4 * (query_rank * (out + features) if thin else out * features)
    return column_blocks(n_columns, column_bytes, free_bytes(reader.device) // 2)
