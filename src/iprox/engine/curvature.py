"""Statistics of a model's layers that second-order influence needs, in passes over examples.

Each class is a visitor of :func:`iprox.engine.capture.packed_pass`: it sees a layer's rows of a
whole batch once and keeps sums. All rows of an example count, those of its prompt too, since
attention carries gradients to them; padding does not exist. The loss, and so the scale of output
gradients, is that of queries and candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iprox.engine.capture import PackedVisitor, check_finite, packed_pass, same_tensor
from iprox.engine.head import draw_tokens
from iprox.engine.loss import IGNORE, Batch
from iprox.engine.packed import Packed, pack
from iprox.numerics.ghost import widen
from iprox.numerics.kfac import (
    Damping,
    Eigenbasis,
    LayerCurvature,
    add_second_moment,
    add_squared_gradients,
    whitened_squares,
)
from iprox.numerics.sides import block_sides
from iprox.numerics.sketch import layer_key, uniforms

Labels = Literal["empirical", "sampled"]


class Covariances:
    """Sums of ``x x^T`` at every input and of ``d d^T`` at every layer.

    Args:
        layers: The layers, in model order.
        sites: Layer -> the first layer that reads its input; they share one sum.
        max_factor_dim: Longer sides are split into blocks and what is between them is dropped.

    Attributes:
        inputs: Site -> blocks of the sum, in at least float32.
        output_grads: Layer -> blocks of the sum.
        tokens: Layer -> rows that were summed.
    """

    def __init__(
        self, layers: Mapping[str, nn.Linear], sites: Mapping[str, str], max_factor_dim: int
    ) -> None:
        self.sites = sites
        self.tokens = dict.fromkeys(layers, 0)

        def zeros(weight: Tensor, dim: int) -> list[Tensor]:
            wide = widen(weight[:0])
            return [wide.new_zeros(side, side) for side in block_sides(dim, max_factor_dim)]

        self.inputs = {
            name: zeros(layer.weight, layer.in_features)
            for name, layer in layers.items()
            if sites[name] == name
        }
        self.output_grads = {
            name: zeros(layer.weight, layer.out_features) for name, layer in layers.items()
        }

    def __call__(self, name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
        """Add a batch's rows of one layer."""
        self.tokens[name] += len(x)
        add_second_moment(self.output_grads[name], d)
        if self.sites[name] == name:
            add_second_moment(self.inputs[name], x)


class Rotations:
    """Rows of layers in the eigenbases of their second moments.

    Args:
        inputs: Site -> eigenbasis of its inputs.
        output_grads: Layer -> eigenbasis of its output gradients.
        sites: Layer -> site.
    """

    def __init__(
        self,
        inputs: Mapping[str, Eigenbasis],
        output_grads: Mapping[str, Eigenbasis],
        sites: Mapping[str, str],
    ) -> None:
        self.inputs, self.output_grads, self.sites = inputs, output_grads, sites
        self._last: tuple[str, Tensor, Tensor] | None = None

    def rotated(self, name: str, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (tokens, in) and output gradients (tokens, out) of one layer, rotated.

        Layers of one site follow each other in a backward pass, and share their inputs'.
        """
        site = self.sites[name]
        if self._last is None or self._last[0] != site or not same_tensor(self._last[1], x):
            self._last = (site, x, self.inputs[site].into(widen(x)))
        return self._last[2], self.output_grads[name].into(widen(d))


class SquaredGradients(Rotations):
    """Sums over examples of their squared gradients in the eigenbases of their layers.

    Attributes:
        sums: Layer -> (out, in).
    """

    def __init__(
        self,
        inputs: Mapping[str, Eigenbasis],
        output_grads: Mapping[str, Eigenbasis],
        sites: Mapping[str, str],
    ) -> None:
        super().__init__(inputs, output_grads, sites)
        self.sums = {
            name: basis.values.new_zeros(len(basis.values), len(inputs[sites[name]].values))
            for name, basis in output_grads.items()
        }

    def __call__(self, name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
        """Add a batch's rows of one layer."""
        x, d = self.rotated(name, x, d)
        add_squared_gradients(self.sums[name], d, x, rows)


class WhitenedNorms(Rotations):
    """Norms of examples' gradients in the metric of an inverse curvature.

    Args:
        curvatures: Layer -> its curvature.
        sites: Layer -> the first layer that reads its input.
        damping: What is added to the curvature.

    Raises:
        NumericsError: A damped curvature is singular or not finite.
    """

    def __init__(
        self, curvatures: Mapping[str, LayerCurvature], sites: Mapping[str, str], damping: Damping
    ) -> None:
        inputs = {name: c.inputs for name, c in curvatures.items() if sites[name] == name}
        super().__init__(inputs, {name: c.grads for name, c in curvatures.items()}, sites)
        self.eigenvalues = {name: c.denominators(damping) for name, c in curvatures.items()}

    def __call__(self, name: str, x: Tensor, d: Tensor, rows: list[int]) -> Tensor:
        """What one layer adds to the squared norms, (examples,)."""
        x, d = self.rotated(name, x, d)
        return whitened_squares(d, x, self.eigenvalues[name], rows)


def visit_examples(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Batch, Sequence[str]]],
    visit: PackedVisitor,
    reduction: str = "token_mean",
    labels: Labels = "empirical",
    seed: int = 0,
) -> None:
    """Pass examples and hand every layer's rows to a visitor.

    Args:
        model: A causal LM with frozen weights.
        layers: Layers to visit.
        batches: Batches and the ids of their examples.
        visit: Receives each layer's rows.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        labels: ``empirical``: the examples' own tokens. ``sampled``: at every supervised position
            a token drawn from the model's distribution there, which makes the second moments
            those of the true Fisher matrix.
        seed: Seed of these draws; a draw depends on seed, example and position alone.

    Raises:
        ModelError: A layer has no influence on the loss.
        NumericsError: A loss is not finite; names the example.
    """
    for batch, ids in batches:
        packed = pack(batch)

        def check(losses: Tensor, ids: Sequence[str] = ids) -> None:
            check_finite(losses, ids)

        relabel = _sampler(model, packed, ids, seed) if labels == "sampled" else None
        packed_pass(model, layers, packed, visit, reduction, check, relabel)


def _sampler(
    model: Any, packed: Packed, ids: Sequence[str], seed: int
) -> Callable[[Tensor], Tensor]:
    """Draws the tokens of the supervised positions of some examples."""
    parts = zip(
        ids,
        packed.positions.split(packed.lengths),
        packed.targets.split(packed.lengths),
        strict=True,
    )
    places = torch.cat([uniforms(p[t != IGNORE], layer_key(seed, name)) for name, p, t in parts])
    return lambda states: draw_tokens(model, states, places)
