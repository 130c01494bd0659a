"""DataInf: query gradients times the mean over examples of inverted rank-one Fisher matrices.

Layer by layer ``1/n sum_i (g_i g_i^T + l I)^-1 v``, g_i the gradients of n examples and l by
default 0.1 of their mean square (Kwon et al., arXiv:2310.00902). Two passes over the examples
and no gradient stored: the first takes inner products and norms, the second the weighted sum of
gradients that the solution is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from iprox.engine.gradients import weighted_gradients
from iprox.engine.loss import Batch
from iprox.engine.scoring import Scorer
from iprox.errors import ConfigError, NumericsError
from iprox.estimators import Preconditioner
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.numerics.datainf import swapped_inverse_weights
from iprox.progress import Track, track
from iprox.stages.fisher import Fisher, read_fisher
from iprox.stages.passes import column_blocks, fingerprint, free_bytes, layer_groups, open_reader
from iprox.stages.queries import Columns, Queries, check_origin, open_queries
from iprox.store.job import Job, Metrics
from iprox.study.schema import CurvatureSection, InfluenceSection


def preconditioner(job: Job) -> Preconditioner:
    """Passes the fisher split once now, and again for each group of layers that fits in memory.

    Raises:
        ArtifactError: The query was taken at another model.
        ConfigError: Factored damping, of what has no factors.
        DataError: No example of the fisher split has a supervised token.
        NumericsError: A loss or gradient is not finite; names the example.
    """
    section = job.section(CurvatureSection, "curvature")
    if section.damping_mode == "factored":
        raise ConfigError(
            "factored damping is for curvature that is a product of two factors",
            where="curvature.damping_mode",
            value="datainf with factored",
            allowed="relative, absolute",
        )
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    reader = open_reader(job, "model")
    queries = open_queries({"task": job.parents["query"]})
    layers = {n: [m.out_features, m.in_features] for n, m in reader.layers.items()}
    model = {"layers": layers, "loss_reduction": reduction, "model": fingerprint(reader.layers)}
    check_origin(queries.stores[0].attrs, model, job.parents.get("model", job.out))
    fisher = read_fisher(job, reader)
    fisher.texts.supervised_only()  # raises when there is none
    dots, squares = inner_products(fisher, queries, reduction)
    weights: dict[str, Tensor] = {}
    dampings: dict[str, float] = {}
    for place, (name, layer) in enumerate(reader.layers.items()):
        mean_square = float(squares[place].mean()) / layer.weight.numel()
        share = mean_square if section.damping_mode == "relative" else 1.0
        dampings[name] = section.damping * share
        weights[name] = _weights(name, dots[place], squares[place], dampings[name])
    return _Directions(fisher, weights, dampings, reduction)


def inner_products(fisher: Fisher, queries: Queries, reduction: str) -> tuple[Tensor, Tensor]:
    """Inner products of examples' and query gradients, and squared norms, layer by layer.

    Returns:
        (layers, examples, queries) and (layers, examples), float64.

    Raises:
        NumericsError: A loss or gradient is not finite; names the example.
    """
    reader, n_columns = fisher.reader, len(queries.columns)
    shape = len(reader.layers), len(fisher.encoded)
    dots, squares = (torch.zeros(*shape, *last, dtype=torch.float64) for last in ((n_columns,), ()))
    column_bytes = 4 * sum(layer.weight.numel() for layer in reader.layers.values())
    blocks = list(column_blocks(n_columns, column_bytes, free_bytes(reader.device) // 2))
    with track(len(blocks) * shape[1], "examples", "inner products") as progress:
        for block in blocks:
            columns = Columns(queries, block, reader.device)
            scorer = Scorer(reader.model, reader.layers, columns, reduction)
            for indices, batch, ids in fisher.batches(progress):
                scores = scorer.by_layer(batch, ids)
                dots[:, indices, block.start : block.stop] = scores.dots.double().cpu()
                squares[:, indices] = scores.squared_norms.double().cpu()
    for layer, example in (~squares.isfinite()).nonzero().tolist()[:1]:
        raise NumericsError(
            "the gradient of an example is not finite",
            where=f"example {fisher.encoded[example].example_id}, "
            f"layer {list(reader.layers)[layer]}",
            value=float(squares[layer, example]),
            fix="look for broken text, or for a precision that overflows",
        )
    return dots, squares


def _weights(layer: str, dots: Tensor, squares: Tensor, damping: float) -> Tensor:
    """Weights (queries, examples) of one layer; an error names it."""
    try:
        return swapped_inverse_weights(dots, squares, damping)
    except NumericsError as error:
        raise NumericsError(
            error.what,
            where=f"layer {layer}",
            value=error.value,
            allowed=error.allowed,
            fix=error.fix,
        ) from None


class _Directions:
    """Solutions layer by layer; a pass is made for each group of layers, when it is reached."""

    def __init__(
        self,
        fisher: Fisher,
        weights: Mapping[str, Tensor],
        dampings: Mapping[str, float],
        reduction: str,
    ) -> None:
        self.fisher, self.weights, self.dampings = fisher, weights, dampings
        self.reduction, self.sums = reduction, dict[str, Tensor]()
        sizes = {
            name: 4.0 * len(weights[name]) * layer.weight.numel()
            for name, layer in fisher.reader.layers.items()
        }
        alone = {name: name for name in sizes}
        budget = free_bytes(fisher.reader.device) // 2
        self.groups = list(layer_groups(sizes, alone, budget))
        network = network_of(fisher.reader.model, fisher.reader.layers)
        n_queries = len(next(iter(weights.values())))
        work = flops.datainf(network, load_of(fisher.encoded), n_queries, len(self.groups))
        self.metrics: Metrics = {**fisher.texts.counts(), "flops": work}

    def __call__(self, layer: str, gradients: Tensor) -> tuple[Tensor, float]:
        if layer not in self.sums:
            self.sums = self._pass(next(group for group in self.groups if layer in group))
        damping, total = self.dampings[layer], self.sums.pop(layer)
        return gradients.to(total) / damping + total, damping

    def _pass(self, group: list[str]) -> dict[str, Tensor]:
        layers = {name: self.fisher.reader.layers[name] for name in group}
        with track(len(self.fisher.encoded), "examples", "weighted gradients") as progress:
            batches = self._batches(group, progress)
            return weighted_gradients(self.fisher.reader.model, layers, batches, self.reduction)

    def _batches(
        self, group: list[str], progress: Track
    ) -> Iterator[tuple[Batch, Mapping[str, Tensor], list[str]]]:
        for indices, batch, ids in self.fisher.batches(progress):
            yield batch, {name: self.weights[name][:, indices] for name in group}, ids
