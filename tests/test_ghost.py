"""Inner products from rows equal those of the gradients written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iprox.numerics import ghost

SHAPES = [(1, 4, 3), (7, 5, 5), (9, 2, 11)]  # tokens, in, out


def rows(tokens: int, features: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64)


def gradient(d: Tensor, x: Tensor) -> Tensor:
    """Sum of the outer products of the tokens, one at a time."""
    return sum((torch.outer(a, b) for a, b in zip(d, x, strict=True)), torch.zeros(()))


@pytest.mark.parametrize(("tokens", "features", "out"), SHAPES)
def test_products_equal_those_of_gradients(tokens: int, features: int, out: int) -> None:
    x, d = rows(tokens, features, 0), rows(tokens, out, 1)
    x_other, d_other = rows(tokens + 3, features, 2), rows(tokens + 3, out, 3)
    g, g_other = gradient(d, x), gradient(d_other, x_other)
    queries = torch.stack([g_other, g])
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ghost.materialised(d, x), g, **close)
    dot = ghost.ghost_dot(d, x, d_other, x_other)
    torch.testing.assert_close(dot, (g * g_other).sum(), **close)
    torch.testing.assert_close(ghost.ghost_squared_norm(d, ghost.gram(x)), (g * g).sum(), **close)
    expected = torch.stack([(g * g_other).sum(), (g * g).sum()])
    torch.testing.assert_close(ghost.fixed_dot(d, x, queries), expected, **close)


def test_kernels_agree_on_a_padded_batch() -> None:
    lengths = [6, 2, 5]
    x = torch.stack([rows(6, 4, seed) for seed in range(3)])  # inputs at padding are not zero
    d = torch.stack([rows(6, 3, seed + 9) for seed in range(3)])
    for row, length in enumerate(lengths):
        d[row, length:] = 0
    queries = torch.randn(2, 3, 4, dtype=torch.float64)
    dots, squares = ghost.materialised_products(d, x, queries, lengths)
    torch.testing.assert_close(ghost.fixed_dot(d, x, queries), dots, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ghost.ghost_squared_norm(d, ghost.gram(x)), squares, rtol=1e-12, atol=1e-12
    )
    for row, length in enumerate(lengths):
        g = gradient(d[row, :length], x[row, :length])
        torch.testing.assert_close(squares[row], (g * g).sum(), rtol=1e-12, atol=1e-12)


def test_no_queries_give_no_columns() -> None:
    x, d = rows(3, 4, 0)[None], rows(3, 2, 1)[None]
    empty = torch.zeros(0, 2, 4, dtype=torch.float64)
    assert ghost.fixed_dot(d, x, empty).shape == (1, 0)
    assert ghost.materialised_products(d, x, empty, [3])[0].shape == (1, 0)


def test_bfloat16_rows_are_widened_before_they_are_multiplied() -> None:
    x, d = rows(40, 6, 0).bfloat16(), rows(40, 5, 1).bfloat16()
    exact = d.double().T @ x.double()
    assert ghost.materialised(d, x).dtype == torch.float32
    torch.testing.assert_close(ghost.materialised(d, x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_queries", [0, 1, 2, 57])
@pytest.mark.parametrize(("features", "out"), [(576, 576), (576, 1536), (2048, 64), (1, 1)])
def test_short_examples_use_ghost_products_up_to_the_stated_limit(
    features: int, out: int, n_queries: int
) -> None:
    limit = ghost.ghost_limit(features, out, n_queries)
    for tokens in (1, limit // 2, limit - 1, limit, limit + 1, 3 * limit + 5):
        if tokens > 0:
            kernel = ghost.choose_kernel(tokens, features, out, n_queries).kernel
            assert kernel == ("ghost" if tokens < limit else "materialise")


def test_without_queries_the_limit_is_near_mn_over_m_plus_n() -> None:
    assert ghost.ghost_limit(4096, 4096, 0) == pytest.approx(2048, rel=0.01)
