"""Sketches of every example's gradient in one pass, and of gradients that are stored.

A sketch is linear (see :mod:`iprox.numerics.sketch`), so the sketch of a mean gradient is the
mean of the sketches, and inner products of pool examples with a query gradient are inner
products of their sketches with the sketch of that gradient: no pass over the pool is needed
for a query that comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iprox.engine.capture import backward_pass, example_name
from iprox.engine.loss import Batch
from iprox.errors import NumericsError
from iprox.numerics.ghost import widen
from iprox.numerics.sketch import Sketch


class Sketches(NamedTuple):
    """What a batch of examples is reduced to."""

    rows: Tensor  # (examples, dim) float32, float64 for a float64 model
    losses: Tensor  # (examples,)


class Sketcher:
    """Sketches the gradients of batches of examples.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count.
        sketch: The map, over the shapes of these layers.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Linear],
        sketch: Sketch,
        reduction: str = "token_mean",
    ) -> None:
        self.model, self.layers, self.map, self.reduction = model, layers, sketch, reduction
        self.dtype = widen(next(iter(layers.values())).weight[:0]).dtype

    def sketch(self, batch: Batch, example_ids: Sequence[str] | None = None) -> Sketches:
        """One forward and one backward pass over a batch.

        Args:
            batch: Examples, right-padded; who else is in the batch changes nothing.
            example_ids: Names of the examples, for messages.

        Raises:
            ModelError: A layer has no influence on the loss.
            NumericsError: A loss or a gradient is not finite; names the example and layer.
        """
        n = len(batch.lengths)
        rows = torch.zeros(n, self.map.dim, dtype=self.dtype, device=batch.input_ids.device)
        sums: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor, d: Tensor) -> None:
            x, d = widen(x), widen(d)
            sums[name] = d.flatten(1).sum(1)
            self.map.add_rows(name, x, d, rows)

        losses = backward_pass(self.model, self.layers, batch, visit, self.reduction, example_ids)
        _check_finite(rows, sums, example_ids)
        return Sketches(rows, losses)


def sketch_gradients(
    sketch: Sketch, gradients: Callable[[str], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sketches of gradients that are given layer by layer.

    Args:
        sketch: The map.
        gradients: Layer -> (gradients, out, in).
        dtype: Precision of the sums.

    Returns:
        (gradients, dim).
    """
    rows: Tensor | None = None
    for name in sketch.shapes:
        layer = gradients(name).to(sketch.device, dtype)
        if rows is None:
            rows = layer.new_zeros(len(layer), sketch.dim)
        sketch.add_gradients(name, layer, rows)
    if rows is None:
        raise ValueError("a sketch needs at least one layer")
    return rows


def _check_finite(rows: Tensor, sums: Mapping[str, Tensor], ids: Sequence[str] | None) -> None:
    """Refuse sketches that are not finite, naming the layer the backward pass saw first."""
    bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    layers = [name for name, total in sums.items() if not torch.isfinite(total[bad[0]])]
    raise NumericsError(
        "the gradient of an example is not finite",
        where=f"{example_name(bad[0], ids)}" + (f", layer {layers[0]}" if layers else ""),
        allowed="finite numbers",
        fix="look for broken text, or for a precision that overflows",
    )
