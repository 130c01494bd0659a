"""Inner products of every example's gradient with query gradients, and its norm, in one pass.

The gradient of an example is that of its own loss with respect to the weights of the scored
linear layers, all layers together. It is never stored: each layer's rows are reduced to one
number per query and one for the norm while the backward pass is running, and nothing of the
size of a weight outlives the layer's turn (TracIn at one checkpoint, arXiv:2002.08484).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iprox.engine.capture import check_finite, example_name, packed_pass, same_tensor
from iprox.engine.loss import Batch
from iprox.engine.packed import pack
from iprox.errors import ModelError, NumericsError
from iprox.numerics.ghost import (
    Choice,
    GramSlice,
    LowRankQueries,
    choose_kernel,
    costs_of,
    fixed_dot,
    ghost_limit,
    ghost_squared_norm,
    half_gram,
    low_rank_dot,
    materialised_products,
    truncate_queries,
    widen,
)

LayerNorms = Callable[[str, Tensor, Tensor, list[int]], Tensor]
"""Squared norms (examples,) from a layer's name, X (tokens, in), D (tokens, out) and the rows of
each example."""

CPU_BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 8192


class Scores(NamedTuple):
    """What a batch of examples is reduced to."""

    dots: Tensor  # (examples, queries) float64
    layer_dots: Tensor  # (layers, examples, queries) float64: what each layer adds to the dots
    squared_norms: Tensor  # (examples,) float64
    losses: Tensor  # (examples,)
    unusable: dict[int, str]  # place -> where a number was not finite; their numbers mean nothing


class LayerScores(NamedTuple):
    """What a batch of examples is reduced to in every layer, in the order of the layers."""

    dots: Tensor  # (layers, examples, queries)
    squared_norms: Tensor  # (layers, examples)
    losses: Tensor  # (examples,)


def batch_tokens(device: torch.device) -> int:
    """Padded tokens per batch. Speed and memory depend on it, results do not."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


class _Grams:
    """Gram matrices of the inputs seen last, so that layers with one input compute them once.

    In a backward pass the layers of one input follow each other closely (of factorised layers
    every other one has an input of its own), so that few places are enough. The inputs are
    kept alive with their Gram matrices: their memory cannot pass to another tensor meanwhile.
    """

    PLACES = 2

    def __init__(self) -> None:
        self._seen: OrderedDict[int, tuple[Tensor, dict[int, list[GramSlice]]]] = OrderedDict()

    def of(self, x: Tensor, place: int, rows: Tensor) -> list[GramSlice]:
        """``X X^T`` of one example of the packed inputs ``x``, whose rows are ``rows``."""
        known = self._seen.get(x.data_ptr())
        if known is None or not same_tensor(known[0], x):
            known = self._seen[x.data_ptr()] = (x, {})
        self._seen.move_to_end(x.data_ptr())
        while len(self._seen) > self.PLACES:
            self._seen.popitem(last=False)
        if place not in known[1]:
            known[1][place] = half_gram(rows)
        return known[1][place]


class Scorer:
    """Scores batches of examples against fixed query gradients.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count, in model order.
        queries: Layer -> query gradients (queries, out, in), on the model's device. Empty:
            only the norms are wanted.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        query_rank: Replace the query gradient of each layer by its best approximation of this
            rank; 0: keep it whole. What is lost is in :attr:`truncation`.
        query_dtype: Precision in which whole query gradients are held; sums stay in float32.
        skip_nonfinite: Go on after an example whose loss or gradient is not finite, and list it
            in :attr:`Scores.unusable`, instead of raising.
        norms: Another norm than the Euclidean one: called with a layer's name, inputs, output
            gradients and rows of each example, gives the squared norms (examples,) of its part.
        home: Holds whole query gradients by layer; the model's device when absent. Each is
            written once, and read when its layer is reached, one layer after the other.

    Attributes:
        truncation: Share of each query gradient's norm that ``query_rank`` and ``query_dtype``
            leave out, (queries,).

    Raises:
        ModelError: The queries are not of these layers or not of their shapes.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Linear],
        queries: Mapping[str, Tensor],
        reduction: str = "token_mean",
        *,
        query_rank: int = 0,
        query_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        norms: LayerNorms | None = None,
        home: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.reduction = model, layers, reduction
        self.norms = norms
        self.skip_nonfinite, self.query_rank = skip_nonfinite, query_rank
        self.costs = costs_of(next(iter(layers.values())).weight)
        self.whole: MutableMapping[str, Tensor] = {} if home is None else home
        self.thin: dict[str, LowRankQueries] = {}
        lost, total = torch.zeros(2, 1, dtype=torch.float64)
        for name, matrices in _fitted(layers, queries):  # one layer's in full at a time
            self.n_queries = len(matrices)
            total = total + matrices.double().square().sum((1, 2)).cpu()
            if query_rank and len(matrices) and min(matrices.shape[1:]) > query_rank:
                thin, missing = truncate_queries(matrices, query_rank)
                dtype = layers[name].weight.dtype
                self.thin[name] = thin._replace(
                    left=thin.left.to(dtype), right=thin.right.to(dtype)
                )
            else:
                rounded = matrices.to(query_dtype or matrices.dtype)
                self.whole[name] = rounded
                missing = (matrices - rounded).double().square().sum((1, 2))
            lost = lost + missing.cpu()
        self.truncation = (lost / total.clamp(min=1e-300)).sqrt().expand(self.n_queries)

    def score(self, batch: Batch, example_ids: Sequence[str] | None = None) -> Scores:
        """One forward and one backward pass over a batch.

        Args:
            batch: Examples, right-padded; who else is in the batch changes nothing.
            example_ids: Names of the examples, for messages.

        Raises:
            ModelError: A layer has no influence on the loss.
            NumericsError: A loss or a gradient is not finite; names the example and layer.
        """
        layers = self.by_layer(batch, example_ids)
        dots, squares = (t.double() for t in (layers.dots, layers.squared_norms))
        unusable = self._unusable(layers.losses, squares, example_ids)
        return Scores(dots.sum(0), dots, squares.sum(0), layers.losses, unusable)

    def by_layer(self, batch: Batch, example_ids: Sequence[str] | None = None) -> LayerScores:
        """The same pass, before the layers are summed; only losses are checked to be finite."""
        dots: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        grams = _Grams()

        def visit(name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
            dots[name], squares[name] = self._layer(name, x, d, rows, grams)

        def check(losses: Tensor) -> None:
            if not self.skip_nonfinite:
                check_finite(losses, example_ids)

        losses = packed_pass(self.model, self.layers, pack(batch), visit, self.reduction, check)
        return LayerScores(
            torch.stack([dots[name] for name in self.layers]),
            torch.stack([squares[name] for name in self.layers]),
            losses,
        )

    def _layer(
        self, name: str, x: Tensor, d: Tensor, rows: list[int], grams: _Grams
    ) -> tuple[Tensor, Tensor]:
        """Inner products (examples, queries) and squared norms (examples,) of one layer."""
        thin = self.thin.get(name)
        if self.norms is not None:
            squares = self.norms(name, x, d, rows)
        elif thin is None and self._choice(max(rows), x.shape[1], d.shape[1]).kernel != "ghost":
            return materialised_products(d, x, self.whole[name].to(d.device), rows)
        else:
            squares = self._norms(x, d, rows, grams)
        if thin is not None:
            return low_rank_dot(d, x, thin, rows), squares
        return fixed_dot(d, x, self.whole[name].to(d.device), rows), squares

    def _norms(self, x: Tensor, d: Tensor, rows: list[int], grams: _Grams) -> Tensor:
        """Squared norms (examples,) by ghost products, or from long examples' gradients."""
        limit = ghost_limit(x.shape[1], d.shape[1], 0, self.costs)
        squares = []
        parts = zip(d.split(rows), x.split(rows), strict=True)
        for place, (d_rows, x_rows) in enumerate(parts):
            if len(x_rows) < limit:
                squares.append(ghost_squared_norm(d_rows, grams.of(x, place, x_rows)))
            else:
                none = widen(d[:0]).new_empty(0, d.shape[1], x.shape[1])
                squares.append(materialised_products(d_rows, x_rows, none, [len(x_rows)])[1][0])
        return torch.stack(squares)

    def _choice(self, tokens: int, in_features: int, out_features: int) -> Choice:
        """The kernel for the examples of a batch of which the longest has that many tokens."""
        return choose_kernel(tokens, in_features, out_features, self.n_queries, self.costs)

    def _unusable(
        self, losses: Tensor, squares: Tensor, example_ids: Sequence[str] | None
    ) -> dict[int, str]:
        """Examples with a loss or squared norm (layers, examples) that is not finite, and where.

        Raises:
            NumericsError: There is one, and it is not to be skipped.
        """
        unusable = {i: "loss" for i in (~losses.isfinite()).nonzero().flatten().tolist()}
        names = list(self.layers)
        for layer, place in (~torch.isfinite(squares)).nonzero().tolist():
            if unusable.get(place) != "loss":
                unusable[place] = names[layer]  # the backward pass reached the last layer first
        if unusable and not self.skip_nonfinite:
            place, layer_name = next(iter(sorted(unusable.items())))
            raise NumericsError(
                "the gradient of an example is not finite",
                where=f"{example_name(place, example_ids)}, layer {layer_name}",
                value=float(squares[names.index(layer_name), place]),
                allowed="a finite squared norm",
                fix="look for broken text, or for a precision that overflows; "
                "influence.on_nonfinite: skip leaves such examples out and lists them",
            )
        return unusable

    def kernels(self) -> list[dict[str, int | str]]:
        """Which kernel layers of each shape use for which lengths, and why.

        One row per shape: ``out``, ``in``, ``layers`` (how many), ``example`` (one of them),
        ``kernel`` (``low_rank``, or ``by length``) and ``materialise_from``, the length in
        tokens of a batch's longest example from which on gradients are formed; shorter ones use
        ghost products.
        """
        rows: dict[tuple[int, int, bool], dict[str, int | str]] = {}
        for name, layer in self.layers.items():
            out, features = layer.weight.shape
            thin = name in self.thin
            limit = ghost_limit(features, out, 0 if thin else self.n_queries, self.costs)
            reason = choose_kernel(limit, features, out, 0 if thin else self.n_queries, self.costs)
            row = rows.setdefault(
                (out, features, thin),
                {
                    "out": out,
                    "in": features,
                    "layers": 0,
                    "example": name,
                    "kernel": "low_rank" if thin else "by length",
                    "materialise_from": limit,
                    "reason": reason.reason,
                },
            )
            row["layers"] = int(row["layers"]) + 1
        return list(rows.values())


def _fitted(
    layers: Mapping[str, nn.Linear], queries: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
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
        matrices = queries[name]
        if matrices.shape[1:] != layer.weight.shape:
            raise ModelError(
                "a query gradient has another shape than its layer",
                where=name,
                value=tuple(matrices.shape[1:]),
                allowed=tuple(layer.weight.shape),
            )
        yield name, matrices.to(widen(layer.weight[:0]).dtype)
