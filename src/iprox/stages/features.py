"""Stage ``features``: what is kept of every pool example's gradient.

Either its exact inner products with all query gradients and its norm, or a sketch of it that
any query gradient can be compared with later. A pass over the pool is cut into shards; a
shard's rows are in pool order whatever the batches were, and all shards together are the pool.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from iprox.engine.scoring import LayerNorms, Scorer
from iprox.models.device import dtype_of
from iprox.models.flops import load_of, network_of
from iprox.models.layers import replaced_layer
from iprox.numerics import flops
from iprox.progress import Track, track
from iprox.stages.curvature_store import whitened_norms
from iprox.stages.feature_store import PER_EXAMPLE, Features
from iprox.stages.passes import Reader, column_blocks, free_bytes, model_sizes, open_reader
from iprox.stages.queries import Columns, Queries, open_queries
from iprox.stages.sketches import left_out, make_sketches
from iprox.stages.texts import Texts, pool_ids, pool_texts, split_ids
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.store.mapped import MappedTensors
from iprox.store.tables import read_arrow
from iprox.study.schema import ChatSection, InfluenceSection, PrefilterSection

log = logging.getLogger(__name__)

WHOLE_POOL = "all"

LAYER_DOTS_BYTES = 64 * 2**20
"""Inner products are kept layer by layer up to this size: always of a slice that fidelity is
measured on, and of pools that are about as small (three tasks and 210 layers: 26,000 examples)."""


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: the rows ``job.rows`` of the examples to score, all when absent.

    Its arrays are those of :class:`Features`, with the kernels used and the settings in its
    root attributes; and, where those of all examples take less than ``LAYER_DOTS_BYTES``,
    ``layer_dots`` (examples, columns, layers), what each layer of the dense model adds to the
    dots, and ``layers``. When the job has a section ``features``, they are those of
    :func:`iprox.stages.sketches.make_sketches` instead.

    Returns:
        Counts of examples and tokens, and the number of passes.

    Raises:
        ArtifactError: The queries are not of this model's layers or of different settings.
        NumericsError: A loss or gradient is not finite; names the example and layer.
    """
    reader, ids = open_reader(job, "model"), example_ids(job)
    own = own_ids(job, ids)
    if "features" in job.params:
        return make_sketches(job, reader, ids, own)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in reader.layers.items()}
    influence = job.section(InfluenceSection, "influence")
    half = "curvature" in job.parents  # norms by the curvature, of queries as of examples
    queries = open_queries(job.roles("query"), shapes, "half_norms" if half else "norms")
    norms = whitened_norms(job, reader, influence.loss_reduction) if half else None
    chat = job.section(ChatSection, "chat")
    texts = pool_texts(job.parents["pool"], own, reader.tokenizer, chat)
    layers = dense_layers(reader.layers)[0]
    # of all examples, not the shard's: one shard must not decide otherwise than the next
    fits = 4 * len(ids) * len(queries.columns) * len(layers) <= LAYER_DOTS_BYTES
    scored = score_texts(reader, queries, texts, influence, keep_layers=fits, norms=norms)
    features = scored.features
    network, load = network_of(reader.model, reader.layers), load_of(texts.encoded)
    n_queries, rank = len(queries.columns), influence.query_rank
    work = partial(flops.features, network, load, n_queries, query_rank=rank, whitened=half)
    store = create_store(
        job.out / "shard.zarr",
        {
            **model_sizes(reader),
            "flops": work(),
            "kernels": scored.kernels,
            "loss_reduction": influence.loss_reduction,
            "prefiltered": left_out(job, ids, own),
            "queries": queries.about(),
            "query_dtype": influence.query_dtype,
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
    if scored.layer_dots is not None:
        put(store, "layer_dots", scored.layer_dots, ("examples", "columns", "layers"))
        put(store, "layers", np.array(layers, dtype=str), ("layers",))
    return {
        **texts.counts(),
        "passes": scored.n_passes,
        "prefiltered": left_out(job, ids, own),
        "skipped": len(scored.skipped),
        "flops": work(passes=scored.n_passes),
    }


def own_ids(job: Job, ids: list[str]) -> list[str]:
    """The examples of ``job.rows``, all when absent, but those that a prefilter leaves out.

    Kept are the first of each task's ranking by the prefilter, in the share of the pool that
    ``prefilter.keep`` says; one that any task keeps is scored for all.
    """
    start, stop = job.rows or (0, len(ids))
    own = ids[start:stop]
    if "prefilter" not in job.parents:
        return own
    keep = max(1, math.floor(job.section(PrefilterSection, "prefilter").keep * len(ids)))
    first = pc.field("rank") <= keep
    ranking = read_arrow(job.parents["prefilter"] / "ranking.parquet", ["example_id"], first)
    kept = set(ranking["example_id"].to_pylist())
    passed = [name for name in own if name in kept]
    log.info("prefilter: %d of %d examples are scored", len(passed), len(own))
    return passed


def example_ids(job: Job) -> list[str]:
    """Ids of all examples this stage scores, sorted: the pool, or one split of it."""
    subset = job.params["subset"]["name"]
    if subset == WHOLE_POOL:
        return pool_ids(job.parents["pool"])
    return sorted(split_ids(job.parents["split"], subset))


def dense_layers(scored: Sequence[str] | Mapping[str, object]) -> tuple[list[str], list[int]]:
    """The dense model's layers, and for each scored linear the place of the one it belongs to."""
    owners = [replaced_layer(name) for name in scored]
    layers = list(dict.fromkeys(owners))
    places = {layer: place for place, layer in enumerate(layers)}
    return layers, [places[owner] for owner in owners]


@dataclass
class Scored:
    """What came out of scoring a shard.

    Attributes:
        features: Inner products, norms and losses.
        layer_dots: Inner products by layer of the dense model, the two factors of a layer added
            up, (examples, columns, layers) float32; None when they are not wanted.
        kernels: Which kernel layers of each shape used, and why.
        truncation: Share of each column's query norm that ``query_rank`` and ``query_dtype``
            left out.
        n_passes: How many times the examples were passed through the model.
        skipped: Example -> where a number of it was not finite.
    """

    features: Features
    layer_dots: np.ndarray | None = None
    kernels: list[dict[str, int | str]] = field(default_factory=list)
    truncation: list[float] = field(default_factory=list)
    n_passes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def score_texts(
    reader: Reader,
    queries: Queries,
    texts: Texts,
    influence: InfluenceSection,
    keep_layers: bool = False,
    norms: LayerNorms | None = None,
) -> Scored:
    """Score encoded examples against all queries; ``norms`` as for a :class:`Scorer`.

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
    blocks = list(_column_blocks(reader, len(queries.columns), influence))
    scored = Scored(features)
    if keep_layers:
        n_layers = len(dense_layers(reader.layers)[0])
        scored.layer_dots = np.zeros((n, len(queries.columns), n_layers), dtype=np.float32)
    with track(len(scorable) * len(blocks), "examples", "scoring") as progress:
        for block in blocks:
            scorer = Scorer(
                reader.model,
                reader.layers,
                Columns(queries, block, reader.device),
                influence.loss_reduction,
                query_rank=influence.query_rank,
                query_dtype=dtype_of(influence.query_dtype),
                skip_nonfinite=influence.on_nonfinite == "skip",
                norms=norms,
                home=MappedTensors() if influence.query_home == "disk" else None,
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
    features, (layers, groups) = scored.features, dense_layers(reader.layers)
    own = slice(columns.start, columns.stop)
    for indices, batch in reader.batches([texts.encoded[i] for i in scorable]):
        rows = scorable[indices]
        scores = scorer.score(batch, [texts.encoded[i].example_id for i in rows])
        features.dots[rows, own] = scores.dots.cpu().numpy()
        if scored.layer_dots is not None:
            by_layer = torch.zeros(len(layers), *scores.dots.shape, dtype=torch.float64)
            by_layer.index_add_(0, torch.tensor(groups), scores.layer_dots.cpu())
            scored.layer_dots[rows, own] = by_layer.permute(1, 2, 0).numpy()
        features.norms[rows] = scores.squared_norms.sqrt().cpu().numpy()
        features.loss[rows] = scores.losses.double().cpu().numpy()
        for place, where in scores.unusable.items():
            row = rows[place]
            scored.skipped[texts.encoded[row].example_id] = where
            features.dots[row], features.norms[row], features.loss[row] = 0, 0, np.nan
            if scored.layer_dots is not None:
                scored.layer_dots[row] = 0
        progress.advance(len(rows), tokens=int(batch.lengths.sum()))


def _column_blocks(reader: Reader, n_columns: int, influence: InfluenceSection) -> Iterator[range]:
    """Columns in blocks whose query gradients fit in half of the free memory; all from a file."""
    if influence.query_home == "disk":
        return iter([range(n_columns)])
    column_bytes, rank = 0, influence.query_rank
    for layer in reader.layers.values():
        out, features = layer.weight.shape
        if 0 < rank < min(out, features):
            column_bytes += layer.weight.element_size() * rank * (out + features)
        else:
            column_bytes += dtype_of(influence.query_dtype).itemsize * out * features
    return column_blocks(n_columns, column_bytes, free_bytes(reader.device) // 2)
