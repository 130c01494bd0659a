"""Sketched features: a pass that keeps a sketch of every example's gradient, and its quality."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from iprox.data.batches import collate
from iprox.data.chat import Encoded, pad_id
from iprox.engine.geometry import gradient_gram
from iprox.engine.loss import Batch
from iprox.engine.sketching import Sketcher, sketch_gradients
from iprox.models.moments import open_adapters, open_moments
from iprox.numerics.adam import AdamSketch
from iprox.numerics.adapters import AdapterSketch, adapter_shapes
from iprox.numerics.correlation import spearman
from iprox.numerics.sketch import Blockwise, CountSketch, FreshLora, Logra, RandomProjection, Sketch
from iprox.progress import track
from iprox.stages.feature_store import QuerySketches
from iprox.stages.passes import Reader, model_sizes
from iprox.stages.queries import Queries, open_queries
from iprox.stages.texts import pool_blocks, pool_texts
from iprox.store.arrays import CHUNK_BYTES, allocate, create_store, put
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import ChatSection, FeaturesSection, InfluenceSection

log = logging.getLogger(__name__)

BLOCK_EXAMPLES = 4096
"""Most examples that are tokenised, batched and written together."""

QUERY_BYTES = 2**30
"""Most memory for the query gradients of one layer that are sketched together."""

CHECK_CHUNK = 4
"""Half the examples of a pass that compares gradients in pairs."""

LARGE_ERROR = 0.15
"""Error of a cosine above which a sketch is too small for single comparisons."""


def make_sketches(job: Job, reader: Reader, ids: list[str], own: list[str]) -> Metrics:
    """Write ``shard.zarr`` with sketches, and ``sketch.parquet`` with the first shard.

    Of gradients; with a section ``directions``, of the steps Adam would take on them.

    The arrays are ``sketch`` (examples, dim), at unit length; ``norms`` (examples,), the norms
    of the sketches, 0 for an example without a gradient; and ``example_id``, ``loss``,
    ``tokens`` and ``supervised``. The settings of the sketch are root attributes.

    Args:
        job: The features job.
        reader: The model, and the layers whose gradients are sketched.
        ids: All examples, of which ``job.rows`` are this shard's.
        own: Those of them to sketch.

    Returns:
        Counts of examples and tokens; with the first shard also the sketch's largest error.

    Raises:
        NumericsError: A loss or gradient is not finite; names the example and layer.
    """
    section = job.section(FeaturesSection, "features")
    influence = job.section(InfluenceSection, "influence")
    reduction = influence.loss_reduction
    sketch = sketch_of(job, reader, section, trained="moments")
    about = attributes(sketch, section.dtype, reduction) | model_sizes(reader)
    counts = {"prefiltered": left_out(job, ids, own)}
    store = create_store(job.out / "shard.zarr", about | counts)
    sketcher = Sketcher(
        reader.model,
        reader.layers,
        sketch,
        reduction,
        skip_nonfinite=influence.on_nonfinite == "skip",
    )
    metrics = counts | _write_shard(job, reader, sketcher, store, own, section.dtype)
    if (job.rows is None or job.rows[0] == 0) and section.check:
        metrics |= _check(job, reader, sketcher, ids, section)
    return metrics


def left_out(job: Job, ids: list[str], own: list[str]) -> int:
    """Examples among the job's rows that a prefilter leaves out.

    Args:
        job: A features job.
        ids: All examples.
        own: Those of ``job.rows`` that are passed.
    """
    start, stop = job.rows or (0, len(ids))
    return stop - start - len(own)


def sketch_of(job: Job, reader: Reader, section: FeaturesSection, trained: str) -> Sketch:
    """The map that a job asks for: of gradients of weights or of LoRA's updates, or Adam's steps.

    Args:
        job: Has a section ``adapters`` for gradients of the updates, ``directions`` for steps.
        reader: The model.
        section: Settings of the sketch.
        trained: Role of the parent that has the updates and the moments.
    """
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in reader.layers.items()}
    adapted = "adapters" in job.params
    if adapted:
        adapters, rank, scale = open_adapters(job.parents[trained])
    weights = adapter_shapes(shapes, rank) if adapted else shapes
    sketch = build_sketch(section, weights, reader.device)
    if "directions" in job.params:
        assert isinstance(sketch, Blockwise)  # the plan allows no other
        sketch = AdamSketch(sketch, open_moments(job.parents[trained]))
    return AdapterSketch(sketch, shapes, adapters, scale) if adapted else sketch


def build_sketch(section: FeaturesSection, shapes: Mapping[str, Any], device: Any) -> Sketch:
    """The map that a section asks for, over layers of these shapes."""
    if section.kind == "countsketch":
        return CountSketch(shapes, section.dim, section.seed, device)
    if section.kind == "lora":
        return FreshLora(shapes, section.dim, section.rank, section.seed, device)
    if section.kind == "logra":
        return Logra(shapes, section.rank, section.seed, device)
    if section.kind == "random":
        return RandomProjection(shapes, section.dim, section.seed, device, section.distribution)
    raise ValueError(f"{section.kind} features are not sketches")


def attributes(sketch: Sketch, dtype: str, reduction: str) -> dict[str, Any]:
    """Everything that sketches must agree in to be compared: root attributes of a shard."""
    layers = {name: list(shape) for name, shape in sketch.shapes.items()}
    settings = {"dtype": dtype, "layers": layers, "loss_reduction": reduction, "dim": sketch.dim}
    return {**sketch.about(), **settings}


def query_sketches(folders: Mapping[str, Path], section: FeaturesSection) -> QuerySketches:
    """Sketches of the tasks' query gradients.

    Args:
        folders: Task -> folder of its query artifact.
        section: Settings of the sketch.

    Raises:
        ArtifactError: The queries were made with different settings or of different layers.
    """
    queries = open_queries(folders)
    sketch = build_sketch(section, queries.layers, torch.device("cpu"))
    layer_bytes = 4 * max(out * inn for out, inn in queries.layers.values())
    size = max(1, QUERY_BYTES // layer_bytes)
    parts = []
    for start in range(0, len(queries.columns), size):
        columns = range(start, min(start + size, len(queries.columns)))
        parts.append(sketch_gradients(sketch, partial(_query_gradients, queries, columns)))
    expected = attributes(sketch, section.dtype, queries.settings["loss_reduction"])
    return QuerySketches(queries.columns, torch.cat(parts).numpy(), expected)


def _query_gradients(queries: Queries, columns: range, layer: str) -> torch.Tensor:
    """Query gradients of one layer, (columns, out, in)."""
    return torch.from_numpy(queries.load(layer, columns))


def unit_rows(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Sketches at unit length in the precision they are stored in, and their norms.

    Args:
        rows: Sketches, (examples, dim).
        dtype: ``float16`` or ``float32``; float16 is safe, since no entry exceeds 1.

    Returns:
        (examples, dim), zero where the sketch is, and (examples,) float64.
    """
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return (rows / np.where(norms == 0, 1, norms)[:, None]).astype(dtype), norms


def _write_shard(
    job: Job, reader: Reader, sketcher: Sketcher, store: Any, ids: list[str], dtype: str
) -> Metrics:
    """Sketch a shard's examples block by block; a block is a chunk of the stored array."""
    dim = sketcher.map.dim
    row_bytes = dim * np.dtype(dtype).itemsize
    size = max(1, min(BLOCK_EXAMPLES, CHUNK_BYTES // row_bytes))
    stored = allocate(store, "sketch", (len(ids), dim), dtype, ("examples", "dim"), size)
    loss, norms = np.full(len(ids), np.nan), np.zeros(len(ids))
    tokens, supervised = np.zeros(len(ids), int), np.zeros(len(ids), int)
    chat = job.section(ChatSection, "chat")
    counts: dict[str, int] = {}
    skipped: dict[str, str] = {}
    with track(len(ids), "examples", "sketching") as progress:
        start = 0
        for texts in pool_blocks(job.parents["pool"], ids, reader.tokenizer, chat, size):
            rows = slice(start, start + len(texts.encoded))
            found = sketch_texts(reader, sketcher, texts.encoded)
            stored[rows], norms[rows] = unit_rows(found.rows, dtype)
            loss[rows] = found.losses
            skipped |= found.skipped
            tokens[rows] = [len(e) for e in texts.encoded]
            supervised[rows] = [e.supervised for e in texts.encoded]
            counts = {k: counts.get(k, 0) + n for k, n in texts.counts().items()}
            progress.advance(len(texts.encoded), tokens=int(tokens[rows].sum()))
            start = rows.stop
    put(store, "example_id", np.array(ids, dtype=str), ("examples",))
    for name, array in (
        ("norms", norms),
        ("loss", loss),
        ("tokens", tokens),
        ("supervised", supervised),
    ):
        put(store, name, array, ("examples",))
    store.attrs["skipped"] = skipped
    if skipped:
        log.warning("%d examples have numbers that are not finite and rank last", len(skipped))
    return {**counts, "passes": 1, "skipped": len(skipped)}


class Sketched(NamedTuple):
    """Sketches of some examples."""

    rows: np.ndarray  # (examples, dim)
    losses: np.ndarray  # (examples,)
    skipped: dict[str, str]  # example -> where a number was not finite


def sketch_texts(reader: Reader, sketcher: Sketcher, encoded: list[Encoded]) -> Sketched:
    """Sketches and losses of encoded examples.

    An example without a supervised token, or that is skipped, has a sketch of zeros and the
    loss NaN.
    """
    rows = np.zeros((len(encoded), sketcher.map.dim), dtype=np.float32)
    losses = np.full(len(encoded), np.nan)
    skipped: dict[str, str] = {}
    scorable = [i for i, e in enumerate(encoded) if e.supervised]
    for places, batch in reader.batches([encoded[i] for i in scorable]):
        members = [scorable[i] for i in places]
        found = sketcher.sketch(batch, [encoded[i].example_id for i in members])
        rows[members] = found.rows.float().cpu().numpy()
        losses[members] = found.losses.double().cpu().numpy()
        for place, where in found.unusable.items():
            losses[members[place]] = np.nan
            skipped[encoded[members[place]].example_id] = where
    return Sketched(rows, losses, skipped)


def _check(
    job: Job, reader: Reader, sketcher: Sketcher, ids: list[str], section: FeaturesSection
) -> Metrics:
    """Write ``sketch.parquet``: errors of sketched cosines on examples drawn from all ``ids``.

    The draw and the passes are the same however the pool is cut into shards.
    """
    drawn = np.random.default_rng(section.seed).permutation(len(ids))[: section.check]
    chat = job.section(ChatSection, "chat")
    chosen = [ids[i] for i in sorted(drawn.tolist())]
    texts = pool_texts(job.parents["pool"], chosen, reader.tokenizer, chat)
    usable = sorted((e for e in texts.encoded if e.supervised), key=len)
    sketched = sketch_texts(reader, sketcher, usable)
    good = [i for i, e in enumerate(usable) if e.example_id not in sketched.skipped]
    usable = [usable[i] for i in good]
    unit, _ = unit_rows(sketched.rows[good], section.dtype)
    gram = exact_gram(reader, usable, sketcher.reduction)
    errors = cosine_errors(gram, unit.astype(np.float64))
    if errors is None:
        log.warning(
            "fewer than two of the %d examples drawn have a gradient: the sketch is not "
            "compared with exact gradients",
            len(chosen),
        )
        return {}
    row = {
        **sketcher.map.about(),
        "dim": sketcher.map.dim,
        "dtype": section.dtype,
        "bytes_per_example": unit.shape[1] * unit.itemsize,
        **errors,
    }
    write_table(job.out / "sketch.parquet", pd.DataFrame([row]))
    report = log.warning if errors["max_error"] > LARGE_ERROR else log.info
    report(
        "cosines of sketches are off by %.3f on average and %.3f at most (%d examples)%s",
        errors["mean_error"],
        errors["max_error"],
        errors["examples"],
        "; raise features.dim or features.rank" if errors["max_error"] > LARGE_ERROR else "",
    )
    return {"sketch_max_error": errors["max_error"]}


def exact_gram(reader: Reader, encoded: list[Encoded], reduction: str) -> np.ndarray:
    """Inner products of examples' exact gradients, (examples, examples) float64."""

    def batch(examples: Any) -> Batch:
        return Batch(*collate(examples, pad_id(reader.tokenizer))).to(reader.device)

    gram = gradient_gram(reader.model, reader.layers, encoded, batch, CHECK_CHUNK, reduction)
    return np.asarray(gram.numpy())


def cosine_errors(gram: np.ndarray, unit: np.ndarray) -> dict[str, Any] | None:
    """How far cosines of sketches are from exact ones, over all pairs of examples.

    Args:
        gram: Exact inner products, (examples, examples).
        unit: Sketches at unit length, (examples, dim).

    Returns:
        ``examples``, ``pairs``, ``mean_error``, ``max_error`` (both absolute) and ``spearman``
        (NaN when it is undefined); None when fewer than two examples have a gradient.
    """
    norms = np.sqrt(gram.diagonal())
    alive = np.flatnonzero(norms > 0)
    if len(alive) < 2:
        return None
    pairs = np.triu_indices(len(alive), 1)
    exact = (gram[np.ix_(alive, alive)] / np.outer(norms[alive], norms[alive]))[pairs]
    sketched = (unit[alive] @ unit[alive].T)[pairs]
    error = np.abs(sketched - exact)
    return {
        "examples": len(alive),
        "pairs": len(exact),
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "spearman": float(spearman(sketched, exact)),
    }
