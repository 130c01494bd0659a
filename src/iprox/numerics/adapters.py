"""Sketches of the gradients of low-rank adapters, from those of the layers they are part of.

With the weight ``W + c B A`` (LoRA, arXiv:2106.09685) and the gradient ``G`` of that sum, the
gradients of ``A (rank, in)`` and ``B (out, rank)`` are ``c B^T G`` and ``c G A^T``: a pass through
the model with the adapters merged into it gives both. LESS compares examples by them
(arXiv:2402.04333).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iprox.numerics.sketch import Shapes, Sketch

DOWN, UP = "lora_A", "lora_B"
"""The two weights of an adapter: (rank, in) and (out, rank)."""

Adapters = Callable[[str], tuple[Tensor, Tensor]]
"""Layer -> ``A`` and ``B`` of its adapter."""


def adapter_shapes(shapes: Shapes, rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of the adapters' weights, ``<layer>.lora_A`` and ``<layer>.lora_B``."""
    found: dict[str, tuple[int, int]] = {}
    for layer, (out, inn) in shapes.items():
        found |= {f"{layer}.{DOWN}": (rank, inn), f"{layer}.{UP}": (out, rank)}
    return found


class AdapterSketch(Sketch):
    """A sketch of adapters' gradients that is given the layers'.

    Args:
        inner: Over the adapters' weights, see :func:`adapter_shapes`.
        shapes: Layer -> (out, in).
        adapters: Of every layer.
        scale: The factor ``c`` of the product, LoRA's alpha over its rank.
    """

    kind = "adapters"

    def __init__(self, inner: Sketch, shapes: Shapes, adapters: Adapters, scale: float) -> None:
        super().__init__(shapes, inner.dim, inner.seed, inner.device)
        self.inner, self.adapters, self.scale = inner, adapters, scale

    def about(self) -> dict[str, Any]:
        """Settings of the sketch, and whose gradients it takes."""
        return self.inner.about() | {"weights": "lora"}

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Add sketches of ``(c D B)^T X`` and ``(c D)^T (X A^T)``; ``D^T X`` is not formed."""
        down, up = self._of(layer, into)
        d = self.scale * d
        self.inner.add_rows(f"{layer}.{DOWN}", x, d @ up, into)
        self.inner.add_rows(f"{layer}.{UP}", x @ down.mT, d, into)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add sketches of ``c B^T G`` and ``c G A^T``."""
        down, up = self._of(layer, into)
        gradients = self.scale * gradients
        self.inner.add_gradients(f"{layer}.{DOWN}", up.mT @ gradients, into)
        self.inner.add_gradients(f"{layer}.{UP}", gradients @ down.mT, into)

    def _of(self, layer: str, like: Tensor) -> tuple[Tensor, Tensor]:
        down, up = (weight.to(self.device, like.dtype) for weight in self.adapters(layer))
        return down, up
