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
    norm = ghost.ghost_squared_norm(d, ghost.half_gram(x))
    torch.testing.assert_close(norm, (g * g).sum(), **close)
    expected = torch.stack([(g * g_other).sum(), (g * g).sum()])
    torch.testing.assert_close(ghost.fixed_dot(d, x, queries, [tokens])[0], expected, **close)


def test_kernels_agree_on_packed_examples() -> None:
    lengths = [6, 2, 5]
    x = [rows(n, 4, seed) for seed, n in enumerate(lengths)]
    d = [rows(n, 3, seed + 9) for seed, n in enumerate(lengths)]
    queries = torch.randn(2, 3, 4, dtype=torch.float64)
    packed = torch.cat(d), torch.cat(x)
    dots, squares = ghost.materialised_products(*packed, queries, lengths)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ghost.fixed_dot(*packed, queries, lengths), dots, **close)
    for i in range(3):
        g = gradient(d[i], x[i])
        torch.testing.assert_close(squares[i], (g * g).sum(), **close)
        torch.testing.assert_close(dots[i], (queries * g).sum((1, 2)), **close)
        norm = ghost.ghost_squared_norm(d[i], ghost.half_gram(x[i]))
        torch.testing.assert_close(norm, squares[i], **close)


def test_a_long_examples_gram_matrix_is_cut_into_slices() -> None:
    step = ghost.GRAM_ROWS
    tokens = 2 * step + 7
    x, d = rows(tokens, 3, 0), rows(tokens, 2, 1)
    slices = ghost.half_gram(x)
    assert [s.beyond.shape for s in slices] == [(step, step + 7), (step, 7), (7, 0)]
    whole = x @ x.T
    for i, part in enumerate(slices):
        found = torch.cat([part.diagonal, part.beyond], dim=1)
        torch.testing.assert_close(found, whole[step * i : step * i + step, step * i :])
    g = d.T @ x
    norm = ghost.ghost_squared_norm(d, slices)
    torch.testing.assert_close(norm, (g * g).sum(), rtol=1e-12, atol=0)


def test_a_gradient_too_large_for_the_cache_is_formed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d, x, queries = rows(7, 11, 0), rows(7, 5, 1), torch.randn(3, 11, 5, dtype=torch.float64)
    whole = ghost.materialised_products(d, x, queries, [4, 3])
    monkeypatch.setattr(ghost, "SCRATCH_BYTES", 2 * 5 * 4)  # two rows at a time
    assert ghost._part(11, 5, d) == 2
    parts = ghost.materialised_products(d, x, queries, [4, 3])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_low_rank_queries_give_the_products_of_their_approximation() -> None:
    d, x, queries = rows(9, 6, 0), rows(9, 8, 1), torch.randn(3, 6, 8, dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for rank in (1, 3, 6):
        thin, lost = ghost.truncate_queries(queries, rank)
        assert thin.left.shape == (6, 3 * rank)
        near = thin.matrices()
        torch.testing.assert_close(lost, (queries - near).square().sum((1, 2)), **close)
        expected = ghost.fixed_dot(d, x, near, [5, 4])
        torch.testing.assert_close(ghost.low_rank_dot(d, x, thin, [5, 4]), expected, **close)
    assert float(lost.max()) < 1e-20  # at full rank nothing is left out


def test_no_queries_give_no_columns() -> None:
    x, d = rows(3, 4, 0), rows(3, 2, 1)
    empty = torch.zeros(0, 2, 4, dtype=torch.float64)
    assert ghost.fixed_dot(d, x, empty, [2, 1]).shape == (2, 0)
    assert ghost.materialised_products(d, x, empty, [2, 1])[0].shape == (2, 0)


def test_bfloat16_rows_are_summed_in_float32() -> None:
    x, d = rows(400, 60, 0).bfloat16(), rows(400, 50, 1).bfloat16()
    queries = torch.randn(2, 50, 60)
    exact = d.double().T @ x.double()
    assert ghost.materialised(d, x).dtype == torch.float32
    torch.testing.assert_close(ghost.materialised(d, x).double(), exact, rtol=1e-5, atol=1e-4)
    dots, squares = ghost.materialised_products(d, x, queries, [400])
    assert dots.dtype == squares.dtype == torch.float32
    norm = float(exact.norm())
    assert float(squares[0]) ** 0.5 == pytest.approx(norm, rel=1e-4)
    scale = norm * queries.double().flatten(1).norm(dim=1)
    expected = (queries.double() * exact).sum((1, 2))
    # Each element of the gradient is rounded once, at random: far below the 4e-3 of one number.
    assert float(((dots[0].double() - expected) / scale).abs().max()) < 2e-4


@pytest.mark.parametrize("n_queries", [0, 1, 2, 57])
@pytest.mark.parametrize(("features", "out"), [(576, 576), (576, 1536), (2048, 64), (1, 1)])
def test_short_examples_use_ghost_products_up_to_the_stated_limit(
    features: int, out: int, n_queries: int
) -> None:
    for costs in ghost.COSTS.values():
        limit = ghost.ghost_limit(features, out, n_queries, costs)
        for tokens in (1, limit // 2, limit - 1, limit, limit + 1, 3 * limit + 5):
            if tokens > 0:
                kernel = ghost.choose_kernel(tokens, features, out, n_queries, costs).kernel
                assert kernel == ("ghost" if tokens < limit else "materialise")


def test_without_queries_the_limit_is_near_that_of_equal_counts() -> None:
    free = ghost.Costs(bandwidth=0, ghost=1)  # half a Gram matrix: T^2 (m + n) / 2 against T m n
    assert ghost.ghost_limit(4096, 4096, 0, free) == pytest.approx(4096, rel=0.01)
