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
    unusable: dict[int, str]  # place -> where a number was not finite; its row is zero


class Sketcher:
    """Sketches the gradients of batches of examples.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count.
        sketch: The map, over the shapes of these layers.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        skip_nonfinite: Go on after an example whose loss or gradient is not finite, and list it
            in :attr:`Sketches.unusable`, instead of raising.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Linear],
        sketch: Sketch,
        reduction: str = "token_mean",
        *,
        skip_nonfinite: bool = False,
    ) -> None:
        self.model, self.layers, self.map, self.reduction = model, layers, sketch, reduction
        self.skip_nonfinite = skip_nonfinite
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

        skip = self.skip_nonfinite
        losses = backward_pass(
            self.model,
            self.layers,
            batch,
            visit,
            self.reduction,
            example_ids,
            skip_nonfinite=skip,
        )
        unusable = _unusable(rows, sums, losses)
        if unusable and not skip:
            place, where = next(iter(unusable.items()))
            raise NumericsError(
                "the gradient of an example is not finite",
                where=f"{example_name(place, example_ids)}, layer {where}",
                allowed="finite numbers",
                fix="look for broken text, or for a precision that overflows; "
                "influence.on_nonfinite: skip leaves such examples out and lists them",
            )
        rows[list(unusable)] = 0
        return Sketches(rows, losses, unusable)


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


def _unusable(rows: Tensor, sums: Mapping[str, Tensor], losses: Tensor) -> dict[int, str]:
    """Examples with a loss or sketch that is not finite, and the layer it was first seen in."""
    good = losses.isfinite() & torch.isfinite(rows).all(1)
    unusable = {}
    for place in (~good).nonzero().flatten().tolist():
        layers = [name for name, total in sums.items() if not torch.isfinite(total[place])]
        unusable[place] = layers[0] if layers and losses[place].isfinite() else "loss"
    return unusable
