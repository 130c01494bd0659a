"""Stage ``covariance``: second moments of every layer's inputs and output gradients.

A pass over the fisher split, cut into shards; a shard holds sums, which stage ``curvature`` adds
up in the order of the shards. The same number of shards gives the same bytes, another number the
same up to the order of float32 sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from iprox.engine.curvature import Covariances, visit_examples
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.numerics.sides import block_sides
from iprox.progress import track
from iprox.stages.fisher import read_fisher, settings
from iprox.stages.passes import Reader, find_sites, free_bytes, layer_groups, open_reader
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import CurvatureSection, InfluenceSection


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: sums over rows ``job.rows`` of the fisher split, all when absent.

    ``inputs/<site>/<block>`` (side, side) are sums of ``x x^T``, ``output_grads/<layer>/<block>``
    of ``d d^T``, in float32. A site is the first layer, in model order, that reads an input; a
    side above ``curvature.max_factor_dim`` is split into blocks. Of the root attributes,
    ``tokens`` says how many rows each layer's sums have, and ``examples`` of how many examples.

    Returns:
        Counts of examples and tokens, the number of passes, and FLOPs.

    Raises:
        NumericsError: A loss is not finite; names the example.
    """
    section = job.section(CurvatureSection, "curvature")
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    reader = open_reader(job, "model")
    fisher, sites = read_fisher(job, reader), find_sites(reader)
    store = create_store(job.out / "shard.zarr")
    sizes = _sum_bytes(reader, sites, section.max_factor_dim)
    groups = list(layer_groups(sizes, sites, free_bytes(reader.device) // 2))
    tokens: dict[str, int] = {}
    with track(len(groups) * len(fisher.encoded), "examples", "covariance") as progress:
        for names in groups:
            layers = {name: reader.layers[name] for name in names}
            sums = Covariances(layers, sites, section.max_factor_dim)
            batches = fisher.named(progress)
            visit_examples(
                reader.model, layers, batches, sums, reduction, section.labels, section.seed
            )
            _put_blocks(store, "inputs", sums.inputs)
            _put_blocks(store, "output_grads", sums.output_grads)
            tokens |= sums.tokens
    counts = {"examples": len(fisher.encoded), "tokens": tokens}
    store.attrs.update(settings(job, reader, sites) | counts)
    network, load = network_of(reader.model, reader.layers), load_of(fisher.encoded)
    return {
        **fisher.texts.counts(),
        "passes": len(groups),
        "flops": flops.covariance(network, load, len(groups), section.max_factor_dim),
    }


def _sum_bytes(reader: Reader, sites: Mapping[str, str], limit: int) -> dict[str, float]:
    """Bytes of every layer's sums; layers of one site share their inputs'."""

    def squares(dim: int) -> int:
        return sum(side**2 for side in block_sides(dim, limit))

    return {
        name: 4.0
        * (squares(layer.out_features) + (sites[name] == name) * squares(layer.in_features))
        for name, layer in reader.layers.items()
    }


def _put_blocks(store: Any, kind: str, sums: Mapping[str, Sequence[Tensor]]) -> None:
    for name, blocks in sums.items():
        for place, block in enumerate(blocks):
            rows = block.float().cpu().numpy()
            put(store, f"{kind}/{name}/{place}", rows, ("features", "features"))
