"""Stage ``probe``: inputs and output gradients of every layer at a sample of token positions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from iprox.data.chat import IGNORED, Encoded
from iprox.engine.capture import backward_pass
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.numerics.ranks import rank_for
from iprox.numerics.sampling import blend, draw_blends, stratified_positions
from iprox.progress import track
from iprox.stages.passes import Reader, find_sites, free_bytes, layer_groups, open_reader
from iprox.stages.positions import Drawn
from iprox.stages.queries import open_queries
from iprox.stages.tangents import mixtures, record_tangents
from iprox.stages.texts import Texts, pool_texts, split_ids
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, InfluenceSection, ProbeSection

log = logging.getLogger(__name__)

RANK_RULE_RANGE = (512, 2048)


def make(job: Job) -> Metrics:
    """Write ``probe.zarr``.

    Its arrays are ``inputs/<site>`` (tokens, in) and ``output_grads/<layer>`` (tokens, out) in
    float32, ``example_id`` and ``position`` (tokens,). A site is the first layer, in model
    order, that reads an input; ``layers`` in the root attributes gives each layer's site, out
    and in. The rows of all layers are of the same positions in the same order. Output
    gradients are those of each example's own loss. With ``probe.redundancy`` some rows give way
    to blends of two others, and ``blended`` has their places.

    Returns:
        Counts of positions (tokens), of the examples and tokens passed, and FLOPs.

    Raises:
        DataError: No probe example has a supervised token.
        NumericsError: A loss is not finite.
    """
    section, influence = _section(job), job.section(InfluenceSection, "influence")
    reader = open_reader(job, "warmup")
    wanted = _tokens(job, section, reader.layers)
    texts = _texts(job, section, reader)
    usable = texts.supervised_only()
    drawn = draw(usable.encoded, section, wanted)
    n_tokens = drawn.n_tokens
    sites = find_sites(reader)
    asked = job.roles("query")
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in reader.layers.items()}
    queries = open_queries(asked, shapes) if asked else None
    coefficients = mixtures(queries.norms, section.seed) if queries else np.ones((0, 0))
    counts = {
        "directions": len(coefficients),
        "tokens": n_tokens,
        "tokens_requested": wanted,
        "sequences": len(usable.encoded),
        "truncated": texts.n_truncated,
        "unsupervised": texts.n_unsupervised,
    }
    store = create_store(
        job.out / "probe.zarr",
        {
            **counts,
            "layers": {
                name: {"site": sites[name], "out": layer.out_features, "in": layer.in_features}
                for name, layer in reader.layers.items()
            },
            "loss_reduction": influence.loss_reduction,
            "positions": section.positions,
            "labels": section.labels,
            "redundancy": section.redundancy,
            "seed": section.seed,
        },
    )
    ids = np.repeat(np.array(usable.ids, dtype=object), [len(p) for p in drawn.positions])
    put(store, "example_id", ids.astype(str), ("tokens",))
    put(store, "position", np.concatenate(drawn.positions), ("tokens",))
    budget = free_bytes(torch.device("cpu")) // 2
    per_input = max(1, len(coefficients))
    sizes = _row_bytes(reader.layers, sites, n_tokens, per_input)
    groups = list(layer_groups(sizes, sites, budget))
    passes = len(groups) * (1 + len(coefficients))
    with track(passes * len(usable.encoded), "sequences", "probe") as progress:
        for names in groups:
            layers = {name: reader.layers[name] for name in names}
            rows = record(reader, layers, sites, drawn, influence, progress)
            if queries:
                own = [name for name in names if sites[name] == name]
                rows |= record_tangents(reader, own, drawn, queries, coefficients, progress)
            for name, array in rows.items():
                put(store, name, array, ("tokens", "in" if name.startswith("inputs/") else "out"))
    if section.redundancy:
        make_redundant(store, n_tokens, section)
    if n_tokens < wanted:
        log.warning("the probe examples have %d usable positions, %d were asked", n_tokens, wanted)
    load = load_of(usable.encoded)
    return {
        **counts,
        "passes": passes,
        "tokens_passed": int(load.tokens),
        "supervised": int(load.supervised),
        "flops": len(groups)
        * flops.probe(network_of(reader.model, reader.layers), load, len(coefficients)),
    }


def draw(encoded: list[Encoded], section: ProbeSection, tokens: int) -> Drawn:
    """Positions to record of every example; the same for all layers."""
    usable = [usable_positions(e, section.positions) for e in encoded]
    drawn = stratified_positions([len(u) for u in usable], tokens, section.seed)
    return Drawn(encoded, [u[d] for u, d in zip(usable, drawn, strict=True)])


def usable_positions(encoded: Encoded, which: str) -> np.ndarray:
    """Positions of one example that may be drawn.

    Args:
        encoded: The example.
        which: ``supervised`` for positions whose next token has a loss; ``all`` for every
            position up to the last of them, since attention carries gradients back to all.
    """
    predicting = np.flatnonzero(np.array(encoded.labels[1:]) != IGNORED)
    return predicting if which == "supervised" else np.arange(predicting[-1] + 1)


def record(
    reader: Reader,
    layers: Mapping[str, nn.Linear],
    sites: Mapping[str, str],
    drawn: Drawn,
    influence: InfluenceSection,
    progress: Any,
) -> dict[str, np.ndarray]:
    """Rows of ``layers`` at the drawn positions: ``inputs/<site>`` and ``output_grads/<layer>``.

    Returns:
        Arrays (tokens, in) and (tokens, out), float32, in the order of the examples.
    """
    rows: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        if sites[name] == name:
            rows[f"inputs/{name}"] = np.zeros((drawn.n_tokens, layer.in_features), np.float32)
        rows[f"output_grads/{name}"] = np.zeros((drawn.n_tokens, layer.out_features), np.float32)
    for batch, ids, places, chosen in drawn.batches(reader):

        def visit(
            name: str,
            x: Tensor,
            d: Tensor,
            places: np.ndarray = places,
            chosen: tuple[Tensor, Tensor] = chosen,
        ) -> None:
            if sites[name] == name:
                rows[f"inputs/{name}"][places] = x[chosen].float().cpu().numpy()
            rows[f"output_grads/{name}"][places] = d[chosen].float().cpu().numpy()

        backward_pass(reader.model, layers, batch, visit, influence.loss_reduction, ids)
        progress.advance(len(ids), tokens=int(batch.lengths.sum()))
    return rows


def make_redundant(store: zarr.Group, n_tokens: int, section: ProbeSection) -> None:
    """Blend a share of the rows, those of one position alike in every layer.

    Positions are near to each other by the input of the last layer.

    Args:
        store: Has the rows of all layers; of inputs there may be several at a position.
        n_tokens: Positions.
        section: How many give way, and the seed.
    """
    site = list(store.attrs["layers"].values())[-1]["site"]
    inputs = np.asarray(store[f"inputs/{site}"]).reshape(
        -1, n_tokens, store[f"inputs/{site}"].shape[1]
    )
    at_position = inputs.transpose(1, 0, 2).reshape(n_tokens, -1)
    blends = draw_blends(at_position, section.redundancy, section.seed)
    for group in ("inputs", "output_grads"):
        for _, array in sorted(store[group].arrays()):
            rows = np.asarray(array)
            array[...] = blend(rows.reshape(-1, n_tokens, rows.shape[1]), blends).reshape(
                rows.shape
            )
    put(store, "blended", blends.replaced, ("blends",))


def _section(job: Job) -> ProbeSection:
    params = {k: v for k, v in job.params["probe"].items() if k != "rank_rule"}
    return ProbeSection.model_validate(params)


def _tokens(job: Job, section: ProbeSection, layers: Mapping[str, nn.Linear]) -> int:
    """Positions to draw; by the paper's rule they depend on the largest rank of a layer."""
    if section.tokens != "rank":
        return section.tokens
    rule = job.params["probe"]["rank_rule"]
    ranks = [
        rank_for(
            layer.out_features,
            layer.in_features,
            rule["sparsity"],
            rule["rank_multiple"],
            rule["rank_rounding"],
            rule["dense_rule"],
        )
        for layer in layers.values()
    ]
    largest = max(rank or 0 for rank in ranks)
    low, high = RANK_RULE_RANGE
    return min(max(-(-largest // 128) * 128, low), high)


def _texts(job: Job, section: ProbeSection, reader: Reader) -> Texts:
    ids = split_ids(job.parents["split"], "probe")
    texts = pool_texts(job.parents["pool"], ids, reader.tokenizer, job.section(ChatSection, "chat"))
    return texts.with_all_labels() if section.labels == "all" else texts


def _row_bytes(
    layers: Mapping[str, nn.Linear], sites: Mapping[str, str], tokens: int, per_input: int
) -> dict[str, float]:
    """Bytes of every layer's rows, of inputs several at a position; a site's layers share them."""
    return {
        name: 4.0
        * tokens
        * (layer.out_features + (per_input * layer.in_features if sites[name] == name else 0))
        for name, layer in layers.items()
    }
