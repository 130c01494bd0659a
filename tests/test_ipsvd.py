"""IPSVD against the definition: two symmetric roots and a full SVD, on tiny matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from iprox.errors import ConfigError, NumericsError
from iprox.numerics import ipsvd
from iprox.numerics.ipsvd import (
    DampedRoot,
    Directions,
    Factors,
    balance,
    decompose,
    plain_svd,
    truncate,
    truncation_error,
)

SHAPES = [(7, 12), (12, 7), (9, 9)]
N_ROWS = [4, 40]  # fewer rows than dimensions, and more


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


class Layer:
    """A weight with probe rows whose moments are far from the identity."""

    def __init__(self, shape: tuple[int, int], n_rows: int, seed: int = 0) -> None:
        out_dim, in_dim = shape
        self.weight = random(out_dim, in_dim, seed=seed)
        self.inputs = random(n_rows, in_dim, seed=seed + 1) * torch.logspace(1, -1, in_dim)
        self.grads = random(n_rows, out_dim, seed=seed + 2) * torch.logspace(-1, -3, out_dim)

    def roots(self, damping: float = 0.1, mode: str = "relative") -> tuple[DampedRoot, DampedRoot]:
        return (
            DampedRoot.from_rows(self.inputs, damping, mode),
            DampedRoot.from_rows(self.grads, damping, mode),
        )

    def damped(self) -> tuple[Tensor, Tensor]:
        """C + 0.1 tr(C)/dim I of inputs and of gradients, by definition."""
        moments = [second_moment(self.inputs), second_moment(self.grads)]
        x, d = (c + 0.1 * c.trace() / len(c) * torch.eye(len(c)).double() for c in moments)
        return x, d

    def oracle(self, rank: int, exponent: float = 0.5) -> Tensor:
        """The damped solution by two roots, their inverses and a full SVD."""
        x, d = (matrix_power(c, exponent) for c in self.damped())
        u, s, vh = torch.linalg.svd(d @ self.weight @ x)
        core = u[:, :rank] * s[:rank] @ vh[:rank]
        return torch.linalg.inv(d) @ core @ torch.linalg.inv(x)

    def error(self, approximation: Tensor) -> float:
        x, d = (matrix_power(c, 0.5) for c in self.damped())
        return float((d @ (self.weight - approximation) @ x).norm())


def product(directions: Directions, rank: int) -> Tensor:
    return directions.left[:, :rank] @ directions.right[:rank]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(params=N_ROWS)
def layer(shape: tuple[int, int], request: pytest.FixtureRequest) -> Layer:
    return Layer(shape, request.param)


# roots


@pytest.mark.parametrize("n_rows", [3, 8, 40])
@pytest.mark.parametrize(("damping", "mode"), [(0.1, "relative"), (1e-3, "absolute")])
def test_root_squares_to_the_damped_moment(n_rows: int, damping: float, mode: str) -> None:
    rows = random(n_rows, 8)
    root = DampedRoot.from_rows(rows, damping, mode)
    eye = torch.eye(8).double()
    moment = second_moment(rows)
    lam = damping * moment.trace() / 8 if mode == "relative" else damping
    half = root.apply(eye)

    assert root.rank == min(n_rows, 8)
    torch.testing.assert_close(half @ half, moment + lam * eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(half @ root.apply_inverse(eye), eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(root.apply_moment(eye), moment + lam * eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(root.quadratic(eye), moment + lam * eye, rtol=0, atol=1e-10)
    column = random(8, 1, seed=1)
    expected = column.T @ (moment + lam * eye) @ column
    torch.testing.assert_close(root.quadratic(column), expected, rtol=0, atol=1e-10)
    factor = root.cholesky
    torch.testing.assert_close(factor @ factor.T, moment + lam * eye, rtol=0, atol=1e-10)


def test_fewer_rows_than_dimensions_use_the_gram_matrix_of_tokens() -> None:
    rows = random(5, 8)
    few = DampedRoot.from_rows(rows, 0.1)
    same = DampedRoot.from_covariance(second_moment(rows), 0.1)
    assert (few.gram, same.gram) == ("tokens", "features")
    assert few.vectors.shape == (8, 5)
    assert few.known_rank == same.rank == 5
    m = random(8, 3, seed=1)
    torch.testing.assert_close(few.apply_inverse(m), same.apply_inverse(m), rtol=0, atol=1e-10)


def test_a_repeated_row_adds_no_rank() -> None:
    rows = random(3, 8)
    root = DampedRoot.from_rows(torch.cat([rows, rows]), 0.1)
    assert root.rank == 3
    torch.testing.assert_close(root.vectors.T @ root.vectors, torch.eye(3).double())


def test_damping_zero_needs_full_rank() -> None:
    eye = torch.eye(8).double()
    full = DampedRoot.from_rows(random(20, 8), 0.0)
    torch.testing.assert_close(full.apply(full.apply_inverse(eye)), eye)
    with pytest.raises(NumericsError, match="rank 5 of 8"):
        DampedRoot.from_rows(random(5, 8), 0.0)


def test_bad_rows_are_named() -> None:
    rows = random(5, 8)
    rows[3, 2] = math.nan
    with pytest.raises(NumericsError, match=r"1 of 5 .*not finite[\s\S]*row: 3"):
        DampedRoot.from_rows(rows, 0.1)
    with pytest.raises(NumericsError, match="no probe rows"):
        DampedRoot.from_rows(rows[:0], 0.1)
    with pytest.raises(NumericsError, match="not finite"):
        DampedRoot.from_covariance(torch.full((2, 2), math.inf), 0.1)


def test_vanishing_damping_is_refused_where_it_is_needed() -> None:
    layer = Layer((7, 12), 4)
    with pytest.raises(NumericsError, match="singular to rounding"):
        decompose(layer.weight, *layer.roots(1e-30, "absolute"))


def test_large_matrices_are_solved_in_single_precision_and_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = second_moment(random(40, 8)) * 1e-60  # would underflow if not scaled
    exact = ipsvd.symmetric_eigen(matrix)[0]
    monkeypatch.setattr(ipsvd, "FLOAT64_LIMIT", 4)
    values, vectors = ipsvd.symmetric_eigen(matrix)
    torch.testing.assert_close(values, exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-4, atol=1e-65
    )
    monkeypatch.setattr(ipsvd, "RESIDUAL_LIMIT", 1e-12)
    with pytest.raises(NumericsError, match="too inaccurate"):
        ipsvd.symmetric_eigen(matrix)


# the exact solution


def test_every_rank_equals_the_two_sided_solution(layer: Layer) -> None:
    directions = decompose(layer.weight, *layer.roots())
    for rank in range(1, min(layer.weight.shape) + 1):
        expected = layer.oracle(rank)
        assert float((product(directions, rank) - expected).norm()) <= 1e-9 * layer.weight.norm()


def test_error_is_the_tail_of_singular_values(layer: Layer) -> None:
    directions = decompose(layer.weight, *layer.roots())
    singular = directions.singular_values
    limit = min(layer.weight.shape)
    assert len(singular) == limit
    assert directions.total_norm == pytest.approx(layer.error(torch.zeros(1)), rel=1e-9)
    for rank in range(1, limit):
        tail = float(singular[rank:].square().sum().sqrt())
        assert layer.error(product(directions, rank)) == pytest.approx(tail, rel=1e-9)
        relative = truncation_error(singular, directions.floor, rank)
        assert relative == pytest.approx(tail / directions.total_norm, rel=1e-12)


def test_full_rank_returns_the_weight(layer: Layer) -> None:
    directions = decompose(layer.weight, *layer.roots())
    limit = min(layer.weight.shape)
    torch.testing.assert_close(product(directions, limit), layer.weight, rtol=0, atol=1e-9)
    assert directions.rank_effective == limit
    assert truncation_error(directions.singular_values, directions.floor, limit) == 0


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_nothing_of_the_same_rank_does_better(layer: Layer, rank: int) -> None:
    best = decompose(layer.weight, *layer.roots())
    ours = layer.error(product(best, rank)) / (1 + 1e-9)
    assert ours <= layer.error(product(plain_svd(layer.weight), rank))
    assert ours <= layer.error(product(decompose(layer.weight, *layer.roots(), mode="paper"), rank))
    out_dim, in_dim = layer.weight.shape
    for seed in range(200):
        rival = random(out_dim, rank, seed=seed) @ random(rank, in_dim, seed=1000 + seed)
        assert ours <= layer.error(rival)


def test_descent_from_nearby_finds_nothing_better(shape: tuple[int, int]) -> None:
    layer = Layer(shape, 40)
    x, d = layer.damped()
    solution = truncate(decompose(layer.weight, *layer.roots()), 3)
    best = layer.error(solution.left @ solution.right)
    for seed in range(50):
        left = solution.left + 0.1 * random(*solution.left.shape, seed=seed)
        right = solution.right + 0.1 * random(*solution.right.shape, seed=100 + seed)
        left.requires_grad_(), right.requires_grad_()
        descent = torch.optim.LBFGS([left, right], max_iter=30, line_search_fn="strong_wolfe")

        def loss(left: Tensor = left, right: Tensor = right) -> Tensor:
            gap = layer.weight - left @ right
            value = (d @ gap @ x * gap).sum() * 1e4
            left.grad, right.grad = torch.autograd.grad(value, [left, right])
            return value

        descent.step(loss)
        assert best <= layer.error((left @ right).detach()) * (1 + 1e-9)


def test_directions_are_nested(layer: Layer) -> None:
    all_of_them = decompose(layer.weight, *layer.roots())
    few = decompose(layer.weight, *layer.roots(), max_rank=2)
    assert few.left.shape[1] == 2
    torch.testing.assert_close(few.left, all_of_them.left[:, :2])
    torch.testing.assert_close(few.right, all_of_them.right[:2])
    torch.testing.assert_close(few.singular_values, all_of_them.singular_values)


def test_both_forms_agree() -> None:
    """The right form of W is the left form of its transpose with the sides exchanged."""
    layer = Layer((9, 9), 40)
    inputs, grads = layer.roots()
    left = decompose(layer.weight, inputs, grads)
    right = ipsvd._transposed(ipsvd._left_form(layer.weight.T, inputs, grads, "tracin", 9))
    assert (left.form, right.form) == ("left", "right")
    for rank in (1, 4, 9):
        torch.testing.assert_close(product(left, rank), product(right, rank), rtol=0, atol=1e-9)
    for gauge in ("balanced", "paper"):
        a, b = (truncate(directions, 4, gauge) for directions in (left, right))
        signs = (a.left * b.left).sum(dim=0).sign()
        torch.testing.assert_close(a.left, b.left * signs, rtol=0, atol=1e-8)


def test_identity_moments_give_truncated_svd(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    out_dim, in_dim = shape
    directions = decompose(
        weight,
        DampedRoot.from_covariance(torch.eye(in_dim).double(), 0.1),
        DampedRoot.from_covariance(torch.eye(out_dim).double(), 0.1),
    )
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    plain = plain_svd(weight)
    torch.testing.assert_close(plain.singular_values, s)
    for rank in (1, 4, 7):
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(product(directions, rank), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(product(plain, rank), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)], ids=str)
def test_inputs_alone_give_the_best_outputs(shape: tuple[int, int], mode: str) -> None:
    out_dim, in_dim = shape
    weight, inputs = random(out_dim, in_dim, seed=1), random(30, in_dim, seed=2)
    inputs = inputs * torch.linspace(0.1, 3, in_dim, dtype=torch.float64)
    roots = DampedRoot.from_rows(inputs, 0.0), DampedRoot.identity(out_dim, weight)
    solved = decompose(weight, *roots, mode=mode)
    outputs = inputs @ weight.T
    singular = torch.linalg.svdvals(outputs)[: min(shape)] / math.sqrt(len(inputs))
    torch.testing.assert_close(solved.singular_values, singular)
    for rank in range(1, min(shape)):
        # no outputs of that rank are nearer (Eckart & Young), whatever made them
        error = (outputs - inputs @ product(solved, rank).T).norm() / math.sqrt(len(inputs))
        torch.testing.assert_close(error, singular[rank:].norm())


def test_influence_objective_weights_by_inverse_roots(layer: Layer) -> None:
    directions = decompose(layer.weight, *layer.roots(), objective="influence")
    for rank in (1, 4, 7):
        expected = layer.oracle(rank, exponent=-0.5)
        assert float((product(directions, rank) - expected).norm()) <= 1e-9 * layer.weight.norm()


def test_single_token_error_is_the_weighted_norm() -> None:
    """With every input paired with every gradient, independence of the two is exact."""
    layer, other = Layer((5, 4), 6), random(5, 4, seed=9)
    mean = np.mean([float(d @ other @ x) ** 2 for d in layer.grads for x in layer.inputs])
    inputs, grads = layer.roots(1e-12)
    weighted = grads.apply(inputs.apply(other.T).T)
    assert float(weighted.square().sum()) == pytest.approx(mean, rel=1e-10)


# the paper's approximation


def test_paper_mode_projects_on_the_probe_spans(shape: tuple[int, int]) -> None:
    layer = Layer(shape, 4)
    directions = decompose(layer.weight, *layer.roots(), mode="paper")
    limit = min(shape)
    on_inputs, on_grads = (torch.linalg.pinv(r) @ r for r in (layer.inputs, layer.grads))
    expected = on_grads @ layer.weight @ on_inputs
    torch.testing.assert_close(product(directions, limit), expected, rtol=0, atol=1e-9)
    assert directions.floor == pytest.approx(layer.error(expected), rel=1e-9)
    assert directions.total_norm == pytest.approx(layer.error(torch.zeros(1)), rel=1e-9)
    error = truncation_error(directions.singular_values, directions.floor, 2)
    assert error * directions.total_norm == pytest.approx(
        layer.error(product(directions, 2)), rel=1e-9
    )


def test_paper_mode_is_exact_with_enough_probe_rows(shape: tuple[int, int]) -> None:
    layer = Layer(shape, 40)
    exact, paper = (decompose(layer.weight, *layer.roots(), mode=m) for m in ("exact", "paper"))
    for rank in (1, 4, 7):
        torch.testing.assert_close(product(paper, rank), product(exact, rank), rtol=0, atol=1e-8)
    assert paper.floor == pytest.approx(0, abs=1e-6 * paper.total_norm)


@pytest.mark.parametrize("gauge", ["balanced", "paper"])
def test_paper_mode_cannot_fill_a_rank_above_the_rows(shape: tuple[int, int], gauge: str) -> None:
    layer = Layer(shape, 4)
    paper = decompose(layer.weight, *layer.roots(), mode="paper")
    assert paper.rank_effective == 4
    factors = truncate(paper, 6, gauge)
    assert factors.left.shape == (shape[0], 6)
    assert not factors.left[:, 4:].any()
    assert not factors.right[4:].any()
    assert factors.left.isfinite().all()
    torch.testing.assert_close(factors.left @ factors.right, product(paper, 4))
    assert decompose(layer.weight, *layer.roots()).rank_effective == min(shape)


def test_paper_mode_cannot_have_the_inverse_objective() -> None:
    layer = Layer((7, 12), 4)
    with pytest.raises(ConfigError, match="objective influence"):
        decompose(layer.weight, *layer.roots(), mode="paper", objective="influence")


def held_out_errors(rank: int, n_rows: int, seed: int) -> dict[str, float]:
    """Relative population error of each kind of solution, moments with spectra 1/k known."""
    out_dim, in_dim = 192, 256
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def moment(dim: int, scale: float) -> tuple[Tensor, Tensor]:
        basis = torch.linalg.qr(draw(dim, dim))[0]
        spectrum = scale / torch.arange(1, dim + 1, dtype=torch.float64)
        rows = draw(n_rows, dim) * spectrum.sqrt() @ basis.T
        return basis * spectrum @ basis.T, rows

    weight = draw(out_dim, in_dim) / math.sqrt(in_dim)
    (c_x, xs), (c_d, ds) = moment(in_dim, 1.0), moment(out_dim, 1e-6)

    def relative(solution: Directions) -> float:
        gap = weight - product(solution, rank)
        return math.sqrt(((c_d @ gap @ c_x) * gap).sum() / ((c_d @ weight @ c_x) * weight).sum())

    def ipsvd_of(damping: float, mode: str) -> float:
        roots = (DampedRoot.from_rows(rows, damping) for rows in (xs, ds))
        return relative(decompose(weight, *roots, mode=mode))

    truth = (DampedRoot.from_covariance(c, 0.0) for c in (c_x, c_d))
    return {
        "oracle": relative(decompose(weight, *truth)),
        "svd": relative(plain_svd(weight)),
        "paper": ipsvd_of(1e-3, "paper"),
        "exact": ipsvd_of(0.1, "exact"),
    }


@pytest.mark.parametrize(("rank", "n_rows"), [(48, 64), (96, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_held_out_error_with_few_rows(rank: int, n_rows: int, seed: int) -> None:
    errors = held_out_errors(rank, n_rows, seed)
    assert errors["oracle"] < errors["exact"] < errors["svd"] < errors["paper"]


@pytest.mark.parametrize("seed", range(3))
def test_held_out_error_with_many_rows_is_near_the_oracle(seed: int) -> None:
    errors = held_out_errors(96, 2048, seed)
    assert errors["exact"] <= 1.1 * errors["oracle"]


# gauges and scale


def factor_scores(factors: Factors, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Cosines of single samples' gradients of both factors, by autograd, (samples, samples)."""
    features = []
    for x, target in samples:
        left, right = (f.detach().clone().requires_grad_() for f in factors)
        loss = ((x @ right.T @ left.T).tanh() - target).square().mean()
        features.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [left, right])]))
    unit = torch.nn.functional.normalize(torch.stack(features))
    return unit @ unit.T


def samples_for(shape: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    out_dim, in_dim = shape
    return [(random(3, in_dim, seed=s), random(3, out_dim, seed=50 + s)) for s in range(4)]


def test_scale_of_the_loss_changes_nothing_under_relative_damping(shape: tuple[int, int]) -> None:
    layer, small = Layer(shape, 40), Layer(shape, 40)
    layer.grads, small.grads = layer.grads * 1e2, small.grads * 1e-1
    samples = samples_for(shape)
    solutions = [decompose(each.weight, *each.roots()) for each in (layer, small)]
    torch.testing.assert_close(
        product(solutions[1], 3), product(solutions[0], 3), rtol=0, atol=1e-9
    )

    balanced = [factor_scores(truncate(s, 3), samples) for s in solutions]
    torch.testing.assert_close(balanced[1], balanced[0], rtol=0, atol=1e-9)
    paper = [factor_scores(truncate(s, 3, "paper"), samples) for s in solutions]
    assert float((paper[1] - paper[0]).abs().max()) > 1e-3


def test_scale_of_the_loss_matters_under_absolute_damping(shape: tuple[int, int]) -> None:
    layer, small = Layer(shape, 40), Layer(shape, 40)
    small.grads = small.grads * 1e-3
    a, b = (decompose(each.weight, *each.roots(1e-3, "absolute")) for each in (layer, small))
    assert float((product(a, 3) - product(b, 3)).abs().max()) > 1e-3


def test_balanced_factors_have_equal_moments(layer: Layer) -> None:
    directions = decompose(layer.weight, *layer.roots())
    left, right = truncate(directions, 4)
    torch.testing.assert_close(left @ right, product(directions, 4), rtol=0, atol=1e-10)
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=0, atol=1e-10)
    again = balance(left, right)
    torch.testing.assert_close(again.left, left, rtol=0, atol=1e-9)


def test_rotating_balanced_factors_leaves_scores_alone() -> None:
    layer = Layer((7, 12), 40)
    factors = truncate(decompose(layer.weight, *layer.roots()), 4)
    rotation = torch.linalg.qr(random(4, 4, seed=3))[0]
    rotated = Factors(factors.left @ rotation, rotation.T @ factors.right)
    samples = samples_for((7, 12))
    torch.testing.assert_close(
        factor_scores(rotated, samples), factor_scores(factors, samples), rtol=0, atol=1e-12
    )


def test_paper_gauge_splits_the_singular_values_evenly(layer: Layer) -> None:
    inputs, grads = layer.roots()
    directions = decompose(layer.weight, inputs, grads)
    left, right = truncate(directions, 4, "paper")
    torch.testing.assert_close(left @ right, product(directions, 4), rtol=0, atol=1e-10)
    weighted_left, weighted_right = grads.apply(left), inputs.apply(right.T)
    expected = torch.diag(directions.singular_values[:4])
    torch.testing.assert_close(weighted_left.T @ weighted_left, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(weighted_right.T @ weighted_right, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scales", [(1e200, 1e200), (1e300, 1e-300), (1e-200, 1e-200)], ids=str)
def test_balance_does_not_overflow_where_its_result_does_not(scales: tuple[float, float]) -> None:
    left, right = random(6, 3, seed=1), random(3, 5, seed=2)
    found = balance(scales[0] * left, scales[1] * right)
    expected = balance(left, right)
    root = math.sqrt(scales[0]) * math.sqrt(scales[1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours / root, theirs)


def test_powers_of_four_change_no_digit_of_balanced_factors() -> None:
    left, right = random(6, 3, seed=1), random(3, 5, seed=2)
    for ours, theirs in zip(balance(4.0**9 * left, right), balance(left, right), strict=True):
        assert torch.equal(ours, 2.0**9 * theirs)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_factors_that_are_not_finite_have_no_balance(value: float) -> None:
    right = random(3, 5)
    right[1, 2] = value
    with pytest.raises(NumericsError, match=r"(?s)not finite.*1 of 15"):
        balance(random(6, 3), right)


def test_balance_keeps_the_dtype() -> None:
    left, right = balance(random(6, 2).float(), random(2, 5).float())
    assert (left.dtype, right.dtype) == (torch.float32, torch.float32)


# edges and errors


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_a_layer_without_gradients_gets_plain_svd_and_says_so(mode: str) -> None:
    layer = Layer((7, 12), 40)
    layer.grads.zero_()
    directions = decompose(layer.weight, *layer.roots(), mode=mode, max_rank=5)
    assert directions.fallback == "output gradients are all zero"
    torch.testing.assert_close(directions.left, plain_svd(layer.weight, 5).left)
    layer.inputs.zero_()
    both = decompose(layer.weight, *layer.roots(), mode=mode)
    assert both.fallback == "inputs and output gradients are all zero"


def test_a_zero_weight_stays_zero() -> None:
    layer = Layer((7, 12), 40)
    directions = decompose(torch.zeros(7, 12), *layer.roots())
    assert directions.rank_effective == 0
    assert truncation_error(directions.singular_values, 0.0, 3) == 0
    for gauge in ("balanced", "paper"):
        left, right = truncate(directions, 3, gauge)
        assert not (left @ right).any()
        assert left.isfinite().all()


def test_mistakes_are_refused() -> None:
    layer = Layer((7, 12), 40)
    inputs, grads = layer.roots()
    with pytest.raises(NumericsError, match="does not fit"):
        decompose(layer.weight.T, inputs, grads)
    for rank in (0, 8):
        with pytest.raises(NumericsError, match="out of range"):
            decompose(layer.weight, inputs, grads, max_rank=rank)
        with pytest.raises(NumericsError, match="out of range"):
            truncate(plain_svd(layer.weight), rank)
    layer.weight[0, 0] = math.inf
    with pytest.raises(NumericsError, match="weight is not finite"):
        decompose(layer.weight, inputs, grads)
