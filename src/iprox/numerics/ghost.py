"""Inner products of per-example weight gradients, formed only where forming them is cheapest.

An example that passes rows ``X (tokens, in)`` through a linear layer and gets back output
gradients ``D (tokens, out)`` has the weight gradient ``G = D^T X (out, in)``. Everything here
follows from that: ``<G, G'>`` is a sum over pairs of tokens ("ghost" products, after the ghost
norms of Goodfellow, arXiv:1510.01799, and Li et al., arXiv:2110.05679), and ``<G, V>`` for a
fixed ``V`` is a sum over tokens.

Examples come packed: the rows of all of them in one matrix, and how many rows each has. Sums
are taken in float32, or in float64 when the rows are. Rows in bfloat16 are widened first for
ghost products; for a materialised gradient the product itself is taken in bfloat16 (it sums in
float32) and each element of the gradient is rounded once, which shifts a cosine by about 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iprox.numerics.matmul import vector_products

GRAM_ROWS = 64
"""Rows of a slice of a symmetric Gram matrix; of the slices only the upper part is computed."""

SCRATCH_BYTES = 2**21
"""Size of the part of a weight gradient that is formed at a time on a CPU: it has to stay in the
cache until its products are taken."""


class Choice(NamedTuple):
    """Which kernel a layer uses, and why in one line."""

    kernel: str  # "ghost", "materialise" or "low_rank"
    reason: str


class LowRankQueries(NamedTuple):
    """Fixed matrices as products of thin ones, ``V_k ~ left_k @ right_k``, side by side."""

    left: Tensor  # (out, queries * rank)
    right: Tensor  # (in, queries * rank)
    rank: int

    def matrices(self) -> Tensor:
        """The products, (queries, out, in)."""
        left, right = (t.unflatten(1, (-1, self.rank)).permute(1, 0, 2) for t in self[:2])
        return left @ right.mT


def widen(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or float64 when it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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


class GramSlice(NamedTuple):
    """Some rows of a symmetric Gram matrix, from the diagonal on."""

    diagonal: Tensor  # (rows, rows)
    beyond: Tensor  # (rows, tokens after them)


def half_gram(rows: Tensor) -> list[GramSlice]:
    """The upper part of ``rows @ rows^T``, in slices of :data:`GRAM_ROWS` rows.

    Args:
        rows: (tokens, features).
    """
    wide = widen(rows)
    slices = []
    for start in range(0, len(wide), GRAM_ROWS):
        some, rest = wide[start : start + GRAM_ROWS], wide[start + GRAM_ROWS :]
        slices.append(GramSlice(some @ some.mT, some @ rest.mT))
    return slices


def ghost_squared_norm(d: Tensor, x_gram: Sequence[GramSlice]) -> Tensor:
    """Squared Frobenius norm of ``D^T X`` from D and the Gram matrix of X.

    Both Gram matrices are symmetric: of every pair of tokens one is looked at.

    Args:
        d: Output gradients, (tokens, out).
        x_gram: ``X X^T`` from :func:`half_gram`; layers with the same input share it.

    Returns:
        A scalar, clamped at zero where rounding would make it negative.
    """
    total = widen(d).new_zeros(())
    d_gram = half_gram(d)
    with vector_products():
        for ours, theirs in zip(d_gram, x_gram, strict=True):
            total += torch.dot(ours.diagonal.view(-1), theirs.diagonal.view(-1))
            total += 2 * torch.dot(ours.beyond.view(-1), theirs.beyond.view(-1))
    return total.clamp_(min=0)


def example_sums(per_token: Tensor, rows: Sequence[int]) -> Tensor:
    """Sums over each example's tokens.

    Args:
        per_token: (tokens, ...), the examples' one behind the other.
        rows: Tokens of each example.

    Returns:
        (examples, ...).
    """
    return torch.stack([part.sum(0) for part in per_token.split(list(rows))])


def fixed_dot(d: Tensor, x: Tensor, matrices: Tensor, rows: Sequence[int]) -> Tensor:
    """Inner products of each example's ``D^T X`` with fixed matrices, as ``sum(D * (X V^T))``.

    Args:
        d: Output gradients, (tokens, out).
        x: Inputs, (tokens, in).
        matrices: V, (queries, out, in).
        rows: Tokens of each example.

    Returns:
        (examples, queries).
    """
    d, x = widen(d), widen(x)
    if not len(matrices):
        return d.new_zeros((len(rows), 0))
    per_token = torch.stack([(d * (x @ v.to(x.dtype).mT)).sum(-1) for v in matrices], dim=-1)
    return example_sums(per_token, rows)


def low_rank_dot(d: Tensor, x: Tensor, queries: LowRankQueries, rows: Sequence[int]) -> Tensor:
    """Inner products of each example's ``D^T X`` with ``left @ right``: ``(D left) * (X right^T)``.

    Args:
        d: Output gradients, (tokens, out).
        x: Inputs, (tokens, in).
        queries: The matrices, in the precision of the rows.
        rows: Tokens of each example.

    Returns:
        (examples, queries).
    """
    products = widen(d @ queries.left) * widen(x @ queries.right)
    return example_sums(products, rows).unflatten(1, (-1, queries.rank)).sum(-1)


def truncate_queries(matrices: Tensor, rank: int) -> tuple[LowRankQueries, Tensor]:
    """The best approximation of each matrix by one of a given rank (Eckart-Young).

    Args:
        matrices: (queries, out, in).
        rank: At least 1; matrices whose shorter side is not longer are kept as they are.

    Returns:
        Their factors, and the squared norm of what each loses, (queries,) float64.
    """
    u, s, v = torch.linalg.svd(widen(matrices), full_matrices=False)
    rank = min(rank, s.shape[1])
    left, right = u[:, :, :rank] * s[:, None, :rank], v[:, :rank].mT
    left, right = (t.permute(1, 0, 2).flatten(1).contiguous() for t in (left, right))
    return LowRankQueries(left, right, rank), s[:, rank:].double().square().sum(1)


def materialised(d: Tensor, x: Tensor) -> Tensor:
    """The weight gradient itself, ``D^T X``, (..., out, in)."""
    return widen(d).mT @ widen(x)


def materialised_products(
    d: Tensor, x: Tensor, matrices: Tensor, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Inner products with fixed matrices and squared norms, from the gradients themselves.

    A part of one example's gradient is formed, used for all products at once, and overwritten
    by the next: the cost of one weight gradient, and memory that does not depend on its size.

    Args:
        d: Output gradients, (tokens, out).
        x: Inputs, (tokens, in).
        matrices: V, (queries, out, in).
        rows: Tokens of each example.

    Returns:
        Inner products (examples, queries) and squared norms (examples,).
    """
    out, features = d.shape[1], x.shape[1]
    wide = widen(d[:0]).dtype
    height = _part(out, features, d)
    scratch = torch.empty(min(out, height) * features, dtype=wide, device=d.device)
    narrow = None if wide == d.dtype else torch.empty_like(scratch, dtype=d.dtype)
    dots = scratch.new_zeros((len(rows), len(matrices)))
    squares = scratch.new_zeros(len(rows))
    examples = list(zip(d.split(list(rows)), x.split(list(rows)), strict=True))
    for top in range(0, out, height):
        size = (min(top + height, out) - top) * features
        part = scratch[:size]
        queries = matrices[:, top : top + height].flatten(1).to(wide)
        for i, (d_rows, x_rows) in enumerate(examples):
            product = part if narrow is None else narrow[:size]
            torch.mm(d_rows[:, top : top + height].mT, x_rows, out=product.view(-1, features))
            if narrow is not None:
                part.copy_(product)
            with vector_products():
                dots[i] += queries @ part
                squares[i] += torch.dot(part, part)
    return dots, squares


def _part(out: int, features: int, d: Tensor) -> int:
    """Rows of a gradient formed at a time: parts of equal height that stay in a CPU's cache."""
    if d.device.type != "cpu":
        return out
    parts = -(-out * features * 4 // SCRATCH_BYTES)
    return -(-out // parts)


class Costs(NamedTuple):
    """What operations cost beside a multiply-add of a product of two matrices."""

    bandwidth: float
    """A multiply-add of a matrix-vector product, which waits for memory."""
    ghost: float
    """A multiply-add of a ghost product, whose rows are widened first."""


COSTS = {"cpu": Costs(8, 1), "cpu-bfloat16": Costs(24, 3), "cuda": Costs(32, 2)}
"""By device, and precision where it matters; as measured for layers of 0.1 to 1 M weights on a
CPU. Constants rather than measurements of the moment, so that a run takes the same path each
time."""


def costs_of(rows: Tensor) -> Costs:
    """What operations cost on the device of some rows, in their precision."""
    if rows.device.type == "cuda":
        return COSTS["cuda"]
    return COSTS["cpu-bfloat16" if rows.dtype == torch.bfloat16 else "cpu"]


def ghost_cost(
    tokens: int, in_features: int, out_features: int, n_queries: int, costs: Costs
) -> float:
    """Work of one example's products by the ghost kernel, in multiply-adds."""
    fixed = n_queries * tokens * in_features * out_features
    return costs.ghost * (fixed + tokens**2 * (in_features + out_features) / 2)


def materialise_cost(
    tokens: int, in_features: int, out_features: int, n_queries: int, costs: Costs
) -> float:
    """Work of one example's products by the materialising kernel, in multiply-adds."""
    return in_features * out_features * (tokens + costs.bandwidth * (n_queries + 1))


def choose_kernel(
    tokens: int, in_features: int, out_features: int, n_queries: int, costs: Costs
) -> Choice:
    """The cheaper kernel for an example of this length, by counting operations.

    Args:
        tokens: Length of the example.
        in_features: Width of the layer's input.
        out_features: Width of its output.
        n_queries: Fixed matrices to take inner products with.
        costs: What operations cost, from :func:`costs_of`.
    """
    sizes = (tokens, in_features, out_features, n_queries)
    ghost, materialise = ghost_cost(*sizes, costs), materialise_cost(*sizes, costs)
    kernel = "ghost" if ghost < materialise else "materialise"
    reason = f"{ghost / 1e6:.3g} M multiply-adds by ghost, {materialise / 1e6:.3g} M by materialise"
    return Choice(kernel, f"{reason} ({tokens} tokens, {n_queries} queries)")


def ghost_limit(in_features: int, out_features: int, n_queries: int, costs: Costs) -> int:
    """Shortest length in tokens from which on :func:`choose_kernel` materialises.

    The difference of the two costs is a quadratic in the length that crosses zero once.
    """
    area = in_features * out_features
    a = costs.ghost * (in_features + out_features) / 2
    b = (costs.ghost * n_queries - 1) * area
    c = -costs.bandwidth * area * (n_queries + 1)
    limit = max(1, int((-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)) - 1)
    while choose_kernel(limit, in_features, out_features, n_queries, costs).kernel == "ghost":
        limit += 1
    return limit
