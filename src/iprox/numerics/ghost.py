"""Inner products of per-example weight gradients, mostly without forming them.

An example that passes rows ``X (tokens, in)`` through a linear layer and gets back output
gradients ``D (tokens, out)`` has the weight gradient ``G = D^T X (out, in)``. Everything here
follows from that: ``<G, G'>`` is a sum over pairs of tokens ("ghost" products, after the ghost
norms of Goodfellow, arXiv:1510.01799, and Li et al., arXiv:2110.05679), and ``<G, V>`` for a
fixed ``V`` is a sum over tokens.

Rows of ``D`` at padding are zero, so padded rows add nothing. Every function accepts leading
batch dimensions unless it says otherwise. Products are taken in float32, or in float64 when
the operands are; bfloat16 rows are widened first, which loses nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BANDWIDTH_BOUND = 8
"""How many times a multiply-add of a matrix-vector product counts against one of a matrix
product: the former waits for memory."""


class Choice(NamedTuple):
    """Which kernel a layer uses, and why in one line."""

    kernel: str  # "ghost" or "materialise"
    reason: str


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or float64 when it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gram(rows: Tensor) -> Tensor:
    """Inner products of all pairs of rows, (..., tokens, tokens)."""
    wide = widen(rows)
    return wide @ wide.mT


def ghost_dot(d: Tensor, x: Tensor, d_other: Tensor, x_other: Tensor) -> Tensor:
    """Inner product of two examples' weight gradients, from their rows.

    ``<D^T X, D'^T X'> = sum_{t,t'} (d_t . d'_t') (x_t . x'_t')``

    Args:
        d: Output gradients of one example, (..., tokens, out).
        x: Its inputs, (..., tokens, in).
        d_other: Output gradients of the other, (..., tokens', out).
        x_other: Its inputs, (..., tokens', in).

    Returns:
        (...).
    """
    pairs = (widen(d) @ widen(d_other).mT) * (widen(x) @ widen(x_other).mT)
    return pairs.sum((-2, -1))


def ghost_squared_norm(d: Tensor, x_gram: Tensor) -> Tensor:
    """Squared Frobenius norm of ``D^T X`` from D and the Gram matrix of X.

    Args:
        d: Output gradients, (..., tokens, out).
        x_gram: ``X X^T``, (..., tokens, tokens), from :func:`gram`; layers with the same input
            share it.

    Returns:
        (...), clamped at zero where rounding would make it negative.
    """
    return (gram(d) * x_gram).sum((-2, -1)).clamp(min=0)


def fixed_dot(d: Tensor, x: Tensor, matrices: Tensor) -> Tensor:
    """Inner products of ``D^T X`` with fixed matrices, as ``sum(D * (X V^T))``.

    Args:
        d: Output gradients, (..., tokens, out).
        x: Inputs, (..., tokens, in).
        matrices: V, (queries, out, in).

    Returns:
        (..., queries).
    """
    d, x = widen(d), widen(x)
    if not len(matrices):
        return d.new_zeros((*d.shape[:-2], 0))
    return torch.stack([(d * (x @ v.mT)).sum((-2, -1)) for v in matrices], dim=-1)


def materialised(d: Tensor, x: Tensor) -> Tensor:
    """The weight gradient itself, ``D^T X``, (..., out, in)."""
    return widen(d).mT @ widen(x)


def materialised_products(
    d: Tensor, x: Tensor, matrices: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Inner products with fixed matrices and squared norms, one weight gradient at a time.

    Each example's gradient is formed, used for all products at once, and overwritten by the
    next: the memory of one gradient, the cost of one weight gradient.

    Args:
        d: Output gradients, (examples, tokens, out).
        x: Inputs, (examples, tokens, in).
        matrices: V, (queries, out, in).
        lengths: Rows of each example that are not padding.

    Returns:
        Inner products (examples, queries) and squared norms (examples,).
    """
    flat = matrices.flatten(1)
    dots, norms = [], []
    for d_rows, x_rows, length in zip(d, x, lengths, strict=True):
        gradient = materialised(d_rows[:length], x_rows[:length]).flatten()
        dots.append(flat @ gradient)
        norms.append(gradient @ gradient)
    return torch.stack(dots), torch.stack(norms)


def ghost_cost(tokens: int, in_features: int, out_features: int, n_queries: int) -> int:
    """Multiply-adds of one example's products by the ghost kernel."""
    fixed = n_queries * tokens * in_features * out_features
    return fixed + tokens**2 * (in_features + out_features)


def materialise_cost(tokens: int, in_features: int, out_features: int, n_queries: int) -> int:
    """Multiply-adds of one example's products by the materialising kernel.

    The products with the finished gradient run at memory speed and count
    :data:`BANDWIDTH_BOUND` times.
    """
    return in_features * out_features * (tokens + BANDWIDTH_BOUND * (n_queries + 1))


def choose_kernel(tokens: int, in_features: int, out_features: int, n_queries: int) -> Choice:
    """The cheaper kernel for examples of this length, by counting operations.

    The count depends on shapes alone, never on a measurement, so that a run takes the same
    path each time.

    Args:
        tokens: Padded length of the examples.
        in_features: Width of the layer's input.
        out_features: Width of its output.
        n_queries: Fixed matrices to take inner products with.
    """
    sizes = (tokens, in_features, out_features, n_queries)
    ghost, materialise = ghost_cost(*sizes), materialise_cost(*sizes)
    kernel = "ghost" if ghost < materialise else "materialise"
    reason = f"{ghost / 1e6:.3g} M multiply-adds by ghost, {materialise / 1e6:.3g} M by materialise"
    return Choice(kernel, f"{reason} ({tokens} tokens, {n_queries} queries)")


def ghost_limit(in_features: int, out_features: int, n_queries: int) -> int:
    """Shortest length in tokens from which on :func:`choose_kernel` materialises.

    The difference of the two costs is a quadratic in the length that crosses zero once.
    """
    a = in_features + out_features
    b = (n_queries - 1) * in_features * out_features
    c = -BANDWIDTH_BOUND * in_features * out_features * (n_queries + 1)
    limit = int((-b + (b * b - 4 * a * c) ** 0.5) / (2 * a))
    while choose_kernel(limit, in_features, out_features, n_queries).kernel == "ghost":
        limit += 1
    return limit
