"""Kronecker-factored curvature of linear layers, and solving with it: K-FAC and EK-FAC.

An example that passes rows X (tokens, in) through a layer and gets back output gradients
D (tokens, out) has the weight gradient ``G = D^T X``. The curvature of the layer is the Fisher
matrix ``F = E[vec(G) vec(G)^T]``, a mean over *examples*; with rows of G one behind the other,
``vec(d x^T) = d kron x``.

K-FAC (arXiv:1503.05671) takes inputs and output gradients, and the tokens of an example, as
independent: ``F ~ n S kron A`` with ``A = E[x x^T]`` and ``S = E[d d^T]`` over tokens and n tokens
per example. EK-FAC (arXiv:1806.03884; for language models arXiv:2308.03296) keeps the
eigenvectors of A and S and replaces the products of their eigenvalues by the second moments of
G in that basis, the best diagonal there is in the Frobenius norm.

Curvature is block-diagonal, a block per weight matrix; the two factors of a factorised layer are
two linear layers like any other. Biases have no part in it: only weights are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.ghost import widen
from iprox.numerics.ipsvd import symmetric_eigen

DampingMode = Literal["relative", "absolute", "factored"]


class Damping(NamedTuple):
    """What is added to a layer's curvature before it is inverted.

    Attributes:
        amount: ``absolute``: the number itself. Otherwise a share of the layer's mean eigenvalue,
            so that the solution does not depend on the scale of the loss.
        mode: ``factored`` splits it over both factors (Martens and Grosse, arXiv:1503.05671,
            section 6.3); the others add it to the eigenvalues of their product.
    """

    amount: float = 0.1
    mode: DampingMode = "relative"


class Eigenbasis(NamedTuple):
    """Eigenvectors and eigenvalues of a second moment, block-diagonal where it was split."""

    blocks: list[Tensor]  # (side, side) each, eigenvectors as columns; sides add up to dim
    values: Tensor  # (dim,)

    def into(self, rows: Tensor) -> Tensor:
        """Coordinates (..., dim) of rows (..., dim) in this basis."""
        return self._times(rows, self.blocks)

    def back(self, coordinates: Tensor) -> Tensor:
        """Rows (..., dim) from their coordinates (..., dim)."""
        return self._times(coordinates, [q.mT for q in self.blocks])

    def _times(self, rows: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        parts = rows.split([len(q) for q in blocks], dim=-1)
        products = [part @ q for part, q in zip(parts, blocks, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


@dataclass(frozen=True)
class LayerCurvature:
    """Curvature of one layer's weight, ready to be solved with.

    Attributes:
        name: The layer, for messages.
        grads: Eigenbasis of S, the second moment of output gradients.
        inputs: Eigenbasis of A, the second moment of inputs.
        tokens_per_example: n, mean number of tokens of an example.
        corrected: EK-FAC's eigenvalues, (out, in); K-FAC's are used when absent.
    """

    name: str
    grads: Eigenbasis
    inputs: Eigenbasis
    tokens_per_example: float = 1.0
    corrected: Tensor | None = None

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the curvature of an example's loss, (out, in)."""
        if self.corrected is not None:
            return self.corrected
        return self.tokens_per_example * torch.outer(self.grads.values, self.inputs.values)

    def damping(self, damping: Damping) -> float:
        """The damping of this layer as a number.

        Raises:
            NumericsError: It is relative to curvature that is zero or not finite.
        """
        if damping.mode == "absolute":
            return damping.amount
        mean = float(self.eigenvalues().double().mean())
        if not (math.isfinite(mean) and mean > 0):
            raise NumericsError(
                "a layer has no curvature that damping could be relative to",
                where=f"layer {self.name}",
                value=f"mean eigenvalue {mean}",
                allowed="a finite number above 0",
                fix="exclude this layer in proxy.layers, or set curvature.damping_mode: absolute",
            )
        return damping.amount * mean

    def denominators(self, damping: Damping) -> Tensor:
        """Eigenvalues of the damped curvature, (out, in), all above 0.

        Raises:
            NumericsError: The damped curvature is singular or not finite.
            ValueError: Factored damping of corrected eigenvalues, which are not a product.
        """
        amount = self.damping(damping)
        if damping.mode == "factored":
            damped = self._factored(amount)
        else:
            damped = self.eigenvalues() + amount
        smallest, largest = float(damped.min()), float(damped.max())
        noise = max(damped.shape) if amount == 0 else 1  # of eigenvalues that should be zero
        limit = noise * torch.finfo(damped.dtype).eps * largest
        if not (math.isfinite(largest) and smallest > limit):
            raise NumericsError(
                "the curvature of a layer cannot be inverted",
                where=f"layer {self.name}",
                value=f"eigenvalues from {smallest:.3g} to {largest:.3g} "
                f"with a damping of {amount:.3g}",
                allowed=f"finite ones above {limit:.3g}",
                fix="raise curvature.damping; 0 needs more tokens than a layer has inputs or "
                "outputs",
            )
        return damped

    def _factored(self, amount: float) -> Tensor:
        """Eigenvalues of ``(sqrt(n) S + sqrt(l)/pi I) kron (sqrt(n) A + pi sqrt(l) I)``."""
        if self.corrected is not None:
            raise ValueError("corrected eigenvalues are not a product of two factors' eigenvalues")
        scale, root = math.sqrt(self.tokens_per_example), math.sqrt(amount)
        ratio = math.sqrt(float(self.inputs.values.mean() / self.grads.values.mean()))
        return torch.outer(
            scale * self.grads.values + root / ratio, scale * self.inputs.values + root * ratio
        )

    def solve(self, gradients: Tensor, damping: Damping) -> Tensor:
        """Inverse of the damped curvature times some gradients.

        ``Q_S [ (Q_S^T V Q_A) / (Lambda + l) ] Q_A^T`` (arXiv:2308.03296, section 3)

        Args:
            gradients: V, (gradients, out, in).
            damping: What is added to the curvature; nothing stored is changed.

        Returns:
            (gradients, out, in).

        Raises:
            NumericsError: The damped curvature is singular or not finite.
        """
        within = self.inputs.into(self.grads.into(gradients.mT).mT)
        scaled = within / self.denominators(damping)
        return self.inputs.back(self.grads.back(scaled.mT).mT)


def whitened_squares(d: Tensor, x: Tensor, eigenvalues: Tensor, rows: Sequence[int]) -> Tensor:
    """Squared norms of examples' gradients times the inverse square root of a curvature.

    ``<G, H^-1 G> = sum (Q_S^T G Q_A)^2 / (Lambda + l)``, the norm in which an influence function
    is an inner product.

    Args:
        d: Coordinates of output gradients in their eigenbasis, (tokens, out).
        x: Coordinates of inputs in theirs, (tokens, in).
        eigenvalues: Those of the damped curvature, (out, in).
        rows: Tokens of each example.

    Returns:
        (examples,).
    """
    parts = zip(d.split(list(rows)), x.split(list(rows)), strict=True)
    return torch.stack([((g.mT @ z).square_() / eigenvalues).sum() for g, z in parts])


def add_second_moment(blocks: Sequence[Tensor], rows: Tensor) -> None:
    """Add ``rows^T rows`` to a sum, of which only the diagonal blocks are kept.

    Args:
        blocks: (side, side) each.
        rows: (tokens, dim).
    """
    parts = widen(rows).split([len(block) for block in blocks], dim=-1)
    for block, part in zip(blocks, parts, strict=True):
        block.addmm_(part.mT, part)


def eigenbasis(sums: Sequence[Tensor], n_tokens: int) -> Eigenbasis:
    """Eigenvectors and eigenvalues of a mean second moment, in float64.

    Args:
        sums: Blocks of the sum over tokens, (side, side) each.
        n_tokens: Tokens that were summed.

    Raises:
        NumericsError: A sum is not finite, or the solver fails.
    """
    pairs = [symmetric_eigen(block.double() / n_tokens) for block in sums]
    return Eigenbasis([q for _, q in pairs], torch.cat([values for values, _ in pairs]))


def add_squared_gradients(total: Tensor, d: Tensor, x: Tensor, rows: Sequence[int]) -> None:
    """Add every example's squared gradient in a layer's eigenbases: what EK-FAC's eigenvalues sum.

    Squares are taken after the tokens of an example are summed and before examples are.

    Args:
        total: The sum, (out, in).
        d: Coordinates of output gradients, (tokens, out).
        x: Coordinates of inputs, (tokens, in).
        rows: Tokens of each example.
    """
    for d_rows, x_rows in zip(d.split(list(rows)), x.split(list(rows)), strict=True):
        total.add_((d_rows.mT @ x_rows).square_())
