"""The step that Adam would take on an example's gradient, and sketches of it.

LESS (arXiv:2402.04333, section 3.1) compares examples by these directions, because the model will
be fine-tuned with Adam. They are not linear in the gradient, so that gradients are formed, a block
at a time, before they are sketched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iprox.numerics.sketch import Blockwise, Sketch

BETAS = (0.9, 0.999)
EPS = 1e-8

Moments = Callable[[str], tuple[Tensor, Tensor]]
"""Layer -> Adam's first and second moments of its weight, each (out, in)."""


def adam_direction(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    betas: tuple[float, float] = BETAS,
    eps: float = EPS,
) -> Tensor:
    """``m' / sqrt(v' + eps)`` with the moments as the gradient would change them.

    As LESS's code has it: eps inside the root, moments not corrected for their start at zero.

    Args:
        gradient: (..., weights).
        first: Moments m, (weights,).
        second: Moments v, (weights,).
        betas: Shares of the old moments that are kept.
        eps: Added to the second moments.
    """
    m = torch.lerp(gradient, first, betas[0])
    v = torch.lerp(gradient.square(), second, betas[1])
    return m / (v + eps).sqrt()


class AdamSketch(Sketch):
    """A sketch of Adam's directions.

    Args:
        inner: The sketch, one that takes gradients coordinate by coordinate.
        moments: Of every layer's weight.
    """

    kind = "adam"

    def __init__(self, inner: Blockwise, moments: Moments) -> None:
        super().__init__(inner.shapes, inner.dim, inner.seed, inner.device)
        self.inner, self.moments = inner, moments

    def about(self) -> dict[str, Any]:
        """Settings of the sketch; directions are compared with gradients sketched by the same."""
        return self.inner.about() | {"directions": "adam"}

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Form the gradients block by block, and add the sketches of their directions."""
        moments = self._of(layer, into)
        for rows in self.inner.row_blocks(layer):
            self._add(layer, rows, d[..., rows].mT @ x, moments, into)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add the sketches of gradients' directions, block by block."""
        moments = self._of(layer, into)
        for rows in self.inner.row_blocks(layer):
            self._add(layer, rows, gradients[:, rows], moments, into)

    def _of(self, layer: str, like: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (moment.to(self.device, like.dtype) for moment in self.moments(layer))
        return first, second

    def _add(
        self,
        layer: str,
        rows: slice,
        gradients: Tensor,
        moments: tuple[Tensor, Tensor],
        into: Tensor,
    ) -> None:
        directions = adam_direction(gradients, moments[0][rows], moments[1][rows])
        self.inner.add_block(layer, rows.start, directions.flatten(1), into)
