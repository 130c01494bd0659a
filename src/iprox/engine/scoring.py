"""Inner products of every example's gradient with query gradients, and its norm, in one pass.

The gradient of an example is that of its own loss with respect to the weights of the scored
linear layers, all layers together. It is never stored: each layer's rows are reduced to one
number per query and one for the norm while the backward pass is running, and nothing of the
size of a weight outlives the layer's turn (TracIn at one checkpoint, arXiv:2002.08484).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iprox.engine.capture import backward_pass, example_name, same_tensor
from iprox.engine.loss import Batch
from iprox.errors import ModelError, NumericsError
from iprox.numerics.ghost import (
    choose_kernel,
    fixed_dot,
    ghost_limit,
    ghost_squared_norm,
    gram,
    materialised_products,
    widen,
)

CPU_BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 8192


class Scores(NamedTuple):
    """What a batch of examples is reduced to."""

    dots: Tensor  # (examples, queries) float64
    squared_norms: Tensor  # (examples,) float64
    losses: Tensor  # (examples,)


def batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch. Speed and memory depend on it, results do not."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


class _Grams:
    """Gram matrices of the inputs seen last, so that layers with one input compute it once.

    In a backward pass the layers of one input follow each other closely (of factorised layers
    every other one has an input of its own), so that few places are enough. The inputs are
    kept alive with their Gram matrices: their memory cannot pass to another tensor meanwhile.
    """

    PLACES = 2

    def __init__(self) -> None:
        self._seen: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def of(self, x: Tensor) -> Tensor:
        """``X X^T`` of every example, (examples, tokens, tokens)."""
        known = self._seen.get(x.data_ptr())
        if known is None or not same_tensor(known[0], x):
            known = self._seen[x.data_ptr()] = (x, gram(x))
        self._seen.move_to_end(x.data_ptr())
        while len(self._seen) > self.PLACES:
            self._seen.popitem(last=False)
        return known[1]


class Scorer:
    """Scores batches of examples against fixed query gradients.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count, in model order.
        queries: Layer -> query gradients (queries, out, in), on the model's device. Empty:
            only the norms are wanted.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Raises:
        ModelError: The queries are not of these layers or not of their shapes.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Linear],
        queries: Mapping[str, Tensor],
        reduction: str = "token_mean",
    ) -> None:
        self.model, self.layers, self.reduction = model, layers, reduction
        self.queries = _fitted(layers, queries)
        self.n_queries = len(next(iter(self.queries.values())))

    def score(self, batch: Batch, example_ids: Sequence[str] | None = None) -> Scores:
        """One forward and one backward pass over a batch.

        Args:
            batch: Examples, right-padded; who else is in the batch changes nothing.
            example_ids: Names of the examples, for messages.

        Raises:
            ModelError: A layer has no influence on the loss.
            NumericsError: A loss or a gradient is not finite; names the example and layer.
        """
        lengths = [int(n) for n in batch.lengths]
        padded = batch.input_ids.shape[1]
        dots: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        grams = _Grams()

        def visit(name: str, x: Tensor, d: Tensor) -> None:
            # A layer called several times has the rows of all calls, paddings in between.
            rows = lengths if x.shape[1] == padded else [x.shape[1]] * len(lengths)
            dots[name], squares[name] = self._layer(name, x, d, rows, grams)

        losses = backward_pass(self.model, self.layers, batch, visit, self.reduction, example_ids)
        per_layer = torch.stack([squares[name] for name in self.layers]).double()
        self._check(per_layer, example_ids)
        total = torch.stack([dots[name] for name in self.layers]).double().sum(0)
        return Scores(total, per_layer.sum(0), losses)

    def _layer(
        self, name: str, x: Tensor, d: Tensor, lengths: list[int], grams: _Grams
    ) -> tuple[Tensor, Tensor]:
        """Inner products (examples, queries) and squared norms (examples,) of one layer."""
        queries = self.queries[name]
        tokens, features = x.shape[1:]
        if choose_kernel(tokens, features, d.shape[2], len(queries)).kernel == "ghost":
            return fixed_dot(d, x, queries), ghost_squared_norm(d, grams.of(x))
        return materialised_products(d, x, queries, lengths)

    def _check(self, squares: Tensor, example_ids: Sequence[str] | None) -> None:
        """Refuse gradients (layers, examples) that are not finite, naming the deepest layer."""
        bad = (~torch.isfinite(squares)).nonzero()
        if len(bad):
            layer, place = bad[-1].tolist()  # the backward pass reached the last layer first
            raise NumericsError(
                "the gradient of an example is not finite",
                where=f"{example_name(place, example_ids)}, layer {list(self.layers)[layer]}",
                value=float(squares[layer, place]),
                allowed="a finite squared norm",
                fix="look for broken text, or for a precision that overflows",
            )

    def kernels(self) -> list[dict[str, int | str]]:
        """Which kernel layers of each shape use for which lengths, and why.

        One row per shape: ``out``, ``in``, ``layers`` (how many), ``example`` (one of them) and
        ``materialise_from``, the padded length in tokens from which on gradients are formed;
        shorter examples use ghost products.
        """
        rows: dict[tuple[int, int], dict[str, int | str]] = {}
        for name, layer in self.layers.items():
            out, features = layer.weight.shape
            limit = ghost_limit(features, out, self.n_queries)
            row = rows.setdefault(
                (out, features),
                {
                    "out": out,
                    "in": features,
                    "layers": 0,
                    "example": name,
                    "materialise_from": limit,
                    "reason": choose_kernel(limit, features, out, self.n_queries).reason,
                },
            )
            row["layers"] = int(row["layers"]) + 1
        return list(rows.values())


def mean_gradient(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Batch, Tensor, Sequence[str] | None]],
    reduction: str = "token_mean",
) -> dict[str, Tensor]:
    """Weighted sum of examples' gradients; with weights 1/n their mean.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count.
        batches: Batches, each with the weights (examples,) and, for messages, the ids of its
            examples. For a mean of unit gradients the weights are 1 / (n * norm), the norms
            from a :class:`Scorer`.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Returns:
        Layer -> (out, in), in float32 (float64 for a float64 model).

    Raises:
        ModelError: A layer has no influence on the loss.
        NumericsError: A loss is not finite.
    """
    sums = {
        name: torch.zeros_like(layer.weight, dtype=widen(layer.weight[:0]).dtype)
        for name, layer in layers.items()
    }
    for batch, weights, ids in batches:

        def visit(name: str, x: Tensor, d: Tensor, weights: Tensor = weights) -> None:
            weighted = widen(d) * weights.to(d.device)[:, None, None].to(sums[name].dtype)
            sums[name].addmm_(weighted.flatten(0, 1).mT, widen(x).flatten(0, 1))

        backward_pass(model, layers, batch, visit, reduction, ids)
    return sums


def _fitted(layers: Mapping[str, nn.Linear], queries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries of exactly these layers, in at least float32; shapes checked."""
    if not queries:
        queries = {n: layer.weight.new_empty(0, *layer.weight.shape) for n, layer in layers.items()}
    if set(queries) != set(layers):
        odd = sorted(set(queries) ^ set(layers))
        raise ModelError(
            "the query gradients are not of the layers that are scored",
            where=odd[0],
            value=f"{len(odd)} layers are in one and not in the other",
            fix="use queries that were made with the same model and layers",
        )
    for name, layer in layers.items():
        if queries[name].shape[1:] != layer.weight.shape:
            raise ModelError(
                "a query gradient has another shape than its layer",
                where=name,
                value=tuple(queries[name].shape[1:]),
                allowed=tuple(layer.weight.shape),
            )
    dtype = widen(next(iter(layers.values())).weight[:0]).dtype
    return {name: queries[name].to(dtype) for name in layers}
