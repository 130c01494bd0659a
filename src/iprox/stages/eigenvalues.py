"""Stage ``eigenvalues``: squared gradients of examples in the curvature's eigenbases, for EK-FAC.

A second pass over the fisher split, cut into shards like the first; means over all shards are
the corrected eigenvalues (George et al., arXiv:1806.03884, Eq. 8).
"""

from __future__ import annotations

from collections.abc import Mapping

from iprox.engine.curvature import SquaredGradients, visit_examples
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.numerics.ghost import widen
from iprox.progress import track
from iprox.stages.curvature_store import check_alike, open_curvature
from iprox.stages.fisher import read_fisher, settings
from iprox.stages.passes import Reader, free_bytes, layer_groups, open_reader
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import CurvatureSection, InfluenceSection


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: sums over rows ``job.rows`` of the fisher split, all when absent.

    ``sums/<layer>`` (out, in) float32 are sums over examples of ``(Q_S^T G Q_A)^2``, element by
    element; ``examples`` in the root attributes says of how many.

    Returns:
        Counts of examples and tokens, the number of passes, and FLOPs.

    Raises:
        ArtifactError: The curvature is of another model or of other settings.
        NumericsError: A loss is not finite; names the example.
    """
    section = job.section(CurvatureSection, "curvature")
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    reader = open_reader(job, "model")
    fisher = read_fisher(job, reader)
    curvature = open_curvature(job.parents["curvature"])
    sites = curvature.sites
    about = settings(job, reader, sites)
    check_alike(curvature.path, curvature.bases.attrs, about)
    store = create_store(job.out / "shard.zarr", about | {"examples": len(fisher.encoded)})
    groups = list(layer_groups(_bytes(reader, sites), sites, free_bytes(reader.device) // 2))
    with track(len(groups) * len(fisher.encoded), "examples", "eigenvalues") as progress:
        for names in groups:
            layers = {name: reader.layers[name] for name in names}
            own = [name for name in names if sites[name] == name]
            where = reader.device, widen(layers[names[0]].weight[:0]).dtype
            squares = SquaredGradients(
                {name: curvature.basis("inputs", name, *where) for name in own},
                {name: curvature.basis("output_grads", name, *where) for name in names},
                sites,
            )
            batches = fisher.named(progress)
            visit_examples(
                reader.model, layers, batches, squares, reduction, section.labels, section.seed
            )
            for name, total in squares.sums.items():
                put(store, f"sums/{name}", total.float().cpu().numpy(), ("out", "in"))
    network, load = network_of(reader.model, reader.layers), load_of(fisher.encoded)
    return {
        **fisher.texts.counts(),
        "passes": len(groups),
        "flops": flops.eigenvalues(network, load, len(groups), section.max_factor_dim),
    }


def _bytes(reader: Reader, sites: Mapping[str, str]) -> dict[str, float]:
    """Bytes of every layer's eigenvectors and sums; layers of one site share their inputs'."""
    sizes = {}
    for name, layer in reader.layers.items():
        out, features = layer.out_features, layer.in_features
        own = features**2 if sites[name] == name else 0
        sizes[name] = 4.0 * (out**2 + own + out * features)
    return sizes
