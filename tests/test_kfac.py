"""Kronecker-factored curvature against Fisher matrices written out in full."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.kfac import (
    Damping,
    Eigenbasis,
    LayerCurvature,
    add_second_moment,
    add_squared_gradients,
    eigenbasis,
)
from iprox.numerics.sides import block_sides

Example = tuple[Tensor, Tensor]
"""Output gradients (tokens, out) and inputs (tokens, in)."""

ABSOLUTE = Damping(1e-3, "absolute")
RELATIVE = Damping(0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(examples: Sequence[Example], corrected: bool = False, limit: int = 99) -> LayerCurvature:
    """The curvature of some examples, by the functions under test."""
    d, x = (torch.cat([e[side] for e in examples]) for side in (0, 1))
    bases = []
    for rows in (d, x):
        sums = [rows.new_zeros(side, side) for side in block_sides(rows.shape[1], limit)]
        add_second_moment(sums, rows)
        bases.append(eigenbasis(sums, len(rows)))
    grads, inputs = bases
    layer = LayerCurvature("layer", grads, inputs, len(d) / len(examples))
    if not corrected:
        return layer
    total = d.new_zeros(d.shape[1], x.shape[1])
    add_squared_gradients(total, grads.into(d), inputs.into(x), [len(e[0]) for e in examples])
    return LayerCurvature("layer", grads, inputs, corrected=total / len(examples))


def fisher(examples: Sequence[Example]) -> Tensor:
    """Mean of vec(G) vec(G)^T over examples, (out * in, out * in)."""
    vectors = torch.stack([(d.mT @ x).flatten() for d, x in examples])
    return vectors.mT @ vectors / len(vectors)


def solve_by_definition(curvature: Tensor, gradients: Tensor, damping: float) -> Tensor:
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return torch.linalg.solve(damped, gradients.flatten(1).mT).mT.reshape(gradients.shape)


def full_eigenvectors(layer: LayerCurvature) -> Tensor:
    """Q_S kron Q_A, (out * in, out * in)."""
    return torch.kron(*(torch.block_diag(*basis.blocks) for basis in (layer.grads, layer.inputs)))


@pytest.fixture
def factorial() -> list[Example]:
    """Single tokens: every input with every output gradient, so that both are independent."""
    inputs, grads = normal(7, 4), normal(6, 3, seed=1)
    return [(d[None], x[None]) for d, x in product(grads, inputs)]


@pytest.fixture
def sequences() -> list[Example]:
    """Examples of several tokens whose inputs and output gradients depend on each other."""
    lengths = (3, 5, 2, 4, 6, 3, 4, 5, 2, 7, 3, 4, 5, 6, 3, 2)
    return [
        (torch.tanh(x @ normal(4, 3, seed=8)) + 0.5 * normal(n, 3, seed=50 + i), x)
        for i, n in enumerate(lengths)
        for x in [normal(n, 4, seed=20 + i)]
    ]


@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_independent_factors_give_the_exact_inverse(
    factorial: list[Example], corrected: bool, damping: float
) -> None:
    gradients = normal(2, 3, 4, seed=2)
    expected = solve_by_definition(fisher(factorial), gradients, damping)
    found = fit(factorial, corrected).solve(gradients, Damping(damping, "absolute"))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_the_curvature_is_s_kron_a_with_rows_of_g_one_behind_the_other(
    factorial: list[Example],
) -> None:
    layer = fit(factorial)
    s, a = (q @ torch.diag(v) @ q.mT for (q,), v in (layer.grads, layer.inputs))
    torch.testing.assert_close(fisher(factorial), torch.kron(s, a), rtol=1e-10, atol=1e-12)
    columns = torch.stack([(d.mT @ x).mT.flatten() for d, x in factorial])
    by_columns = columns.mT @ columns / len(columns)
    torch.testing.assert_close(by_columns, torch.kron(a, s), rtol=1e-10, atol=1e-12)


def test_corrected_eigenvalues_are_the_diagonal_of_the_fisher_in_the_eigenbasis(
    sequences: list[Example],
) -> None:
    layer, exact = fit(sequences, corrected=True), fisher(sequences)
    basis = full_eigenvectors(layer)
    diagonal = (basis.mT @ exact @ basis).diagonal().reshape(3, 4)
    torch.testing.assert_close(layer.eigenvalues(), diagonal, rtol=1e-10, atol=1e-12)


def test_no_other_diagonal_is_nearer_to_the_fisher(sequences: list[Example]) -> None:
    layer, exact = fit(sequences, corrected=True), fisher(sequences)
    basis = full_eigenvectors(layer)

    def distance(eigenvalues: Tensor) -> float:
        return float((exact - basis @ torch.diag(eigenvalues.flatten()) @ basis.mT).norm())

    best = distance(layer.eigenvalues())
    assert best < distance(fit(sequences).eigenvalues())
    for seed in range(100):
        assert best < distance(layer.eigenvalues() * normal(3, 4, seed=seed).exp())


def network() -> list[tuple[list[Example], Tensor]]:
    """Both layers of a small network: examples for each possible label, and Gauss-Newton matrices.

    An example counts once for every label, its output gradient scaled so that a mean over all is
    the expectation over the model's own labels. Only then is the Fisher matrix Gauss and Newton's.
    """
    x, weights = normal(9, 4), [normal(5, 4, seed=1), normal(3, 5, seed=2)]

    def logits(first: Tensor, second: Tensor, one: Tensor) -> Tensor:
        return torch.tanh(one @ first.mT) @ second.mT

    layers: list[tuple[list[Example], Tensor]] = []
    for place, weight in enumerate(weights):
        examples, matrix = [], torch.zeros(weight.numel(), weight.numel(), dtype=weight.dtype)
        for one in x:
            hidden = torch.tanh(one @ weights[0].mT)
            p = torch.softmax(hidden @ weights[1].mT, -1)
            jacobian = torch.func.jacrev(logits, argnums=place)(*weights, one).flatten(1)
            matrix += jacobian.mT @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(x)
            for label, share in enumerate(p):
                d = p - torch.eye(3, dtype=p.dtype)[label]
                if place == 0:
                    d = (d @ weights[1]) * (1 - hidden**2)
                examples.append(((3 * share) ** 0.5 * d[None], (hidden if place else one)[None]))
        layers.append((examples, matrix))
    return layers


@pytest.mark.parametrize("place", [0, 1])
def test_on_a_network_no_other_diagonal_is_nearer_to_gauss_and_newton_s_matrix(place: int) -> None:
    examples, exact = network()[place]
    layer = fit(examples, corrected=True)
    basis, shape = full_eigenvectors(layer), layer.eigenvalues().shape
    diagonal = (basis.mT @ exact @ basis).diagonal().reshape(shape)
    torch.testing.assert_close(layer.eigenvalues(), diagonal, rtol=1e-10, atol=1e-12)

    def distance(eigenvalues: Tensor) -> float:
        return float((exact - basis @ torch.diag(eigenvalues.flatten()) @ basis.mT).norm())

    best = distance(layer.eigenvalues())
    assert best < distance(fit(examples).eigenvalues())
    for seed in range(100):
        assert best < distance(layer.eigenvalues() * normal(*shape, seed=seed).exp())


def test_examples_are_not_mixed_before_squares_are_taken(sequences: list[Example]) -> None:
    pairs = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(sequences[::2], sequences[1::2], strict=True)
    ]
    ours, mixed = (fit(e, corrected=True).eigenvalues() for e in (sequences, pairs))
    assert float((mixed / 2 - ours).norm() / ours.norm()) > 0.01


def test_moments_of_factors_follow_from_those_of_the_dense_layer() -> None:
    left, right = normal(5, 2, seed=3), normal(2, 4, seed=4)
    x, d = normal(9, 4), normal(9, 5, seed=1)
    z, e = x @ right.mT, d @ left
    torch.testing.assert_close(z.mT @ z, right @ (x.mT @ x) @ right.mT)
    torch.testing.assert_close(e.mT @ e, left.mT @ (d.mT @ d) @ left)


@pytest.mark.parametrize("mode", ["relative", "absolute", "factored"])
def test_solving_is_symmetric_and_repeatable(sequences: list[Example], mode: str) -> None:
    layer, (v, g) = fit(sequences), normal(2, 1, 3, 4, seed=2)
    damping = Damping(0.1, mode)  # type: ignore[arg-type]
    before = layer.eigenvalues().clone()
    first, again = layer.solve(v, damping), layer.solve(v, damping)
    assert torch.equal(first, again)
    assert torch.equal(layer.eigenvalues(), before)
    other = layer.solve(g, damping)
    torch.testing.assert_close((first * g).sum(), (v * other).sum(), rtol=1e-12, atol=0)


def test_factored_damping_is_added_to_each_factor(sequences: list[Example]) -> None:
    layer, gradients = fit(sequences), normal(1, 3, 4, seed=2)
    d, x = (torch.cat([e[side] for e in sequences]) for side in (0, 1))
    s, a = d.mT @ d / len(d), x.mT @ x / len(x)
    n = len(d) / len(sequences)
    amount = 0.1 * n * float(s.trace() / 3 * a.trace() / 4)
    ratio = float((a.trace() / 4) / (s.trace() / 3)) ** 0.5
    damped_s = n**0.5 * s + amount**0.5 / ratio * torch.eye(3, dtype=s.dtype)
    damped_a = n**0.5 * a + amount**0.5 * ratio * torch.eye(4, dtype=s.dtype)
    expected = solve_by_definition(torch.kron(damped_s, damped_a), gradients, 0.0)
    torch.testing.assert_close(layer.solve(gradients, Damping(0.1, "factored")), expected)


@pytest.mark.parametrize("corrected", [False, True], ids=["kfac", "ekfac"])
def test_relative_damping_does_not_see_the_scale_of_the_loss(
    sequences: list[Example], corrected: bool
) -> None:
    gradients = normal(1, 3, 4, seed=2)
    scaled = [(1e-3 * d, x) for d, x in sequences]
    ours = fit(sequences, corrected).solve(gradients, RELATIVE)
    torch.testing.assert_close(fit(scaled, corrected).solve(gradients, RELATIVE), ours * 1e6)
    absolute = fit(scaled, corrected).solve(gradients, ABSOLUTE)
    assert not torch.allclose(absolute, fit(sequences, corrected).solve(gradients, ABSOLUTE) * 1e6)


def test_much_damping_leaves_the_direction_and_little_gives_newtons(
    factorial: list[Example],
) -> None:
    layer, gradients = fit(factorial), normal(1, 3, 4, seed=2)
    flat = layer.solve(gradients, Damping(1e12, "absolute")) * 1e12
    torch.testing.assert_close(flat, gradients, rtol=1e-9, atol=1e-9)
    newton = torch.linalg.solve(fisher(factorial), gradients.flatten()).reshape(gradients.shape)
    torch.testing.assert_close(layer.solve(gradients, Damping(0.0)), newton, rtol=1e-8, atol=0)


def test_influence_on_ridge_regression_is_leaving_an_example_out() -> None:
    x, noise, ridge = normal(200, 10), normal(200, seed=1), 0.1
    y = x @ normal(10, seed=2) + noise
    x_test, y_test = normal(1, 10, seed=3), 0.5

    def fitted(x: Tensor, y: Tensor) -> Tensor:
        gram = x.mT @ x / 200 + ridge * torch.eye(10, dtype=x.dtype)
        return torch.linalg.solve(gram, x.mT @ y / 200)

    def test_loss(w: Tensor) -> float:
        return 0.5 * float((x_test @ w - y_test) ** 2)

    w = fitted(x, y)
    inputs = eigenbasis([x.mT @ x], 200)
    hessian = LayerCurvature("ridge", _flat(1, 1.0), inputs)
    query = (x_test @ w - y_test)[:, None, None] * x_test
    direction = hessian.solve(query, Damping(ridge, "absolute"))
    gradients = (x @ w - y)[:, None, None] * x[:, None]
    scores = (direction * gradients).sum((1, 2)) / 200
    keep = ~torch.eye(200, dtype=torch.bool)
    truth = torch.tensor([test_loss(fitted(x[k], y[k])) - test_loss(w) for k in keep])
    # leaving a helpful example out raises the loss: a higher score is more helpful
    assert float(torch.corrcoef(torch.stack([scores.float(), truth]))[0, 1]) > 0.99


def test_a_split_side_is_block_diagonal(sequences: list[Example]) -> None:
    gradients = normal(1, 3, 4, seed=2)
    whole, split = fit(sequences), fit(sequences, limit=2)
    assert [len(q) for q in split.inputs.blocks] == [2, 2]
    assert [len(q) for q in split.grads.blocks] == [1, 2]
    d, x = (torch.cat([e[side] for e in sequences]) for side in (0, 1))
    s, a = d.mT @ d / len(d), x.mT @ x / len(x)
    s[0, 1:], s[1:, 0], a[:2, 2:], a[2:, :2] = 0, 0, 0, 0
    n = len(d) / len(sequences)
    expected = solve_by_definition(n * torch.kron(s, a), gradients, 1e-3)
    torch.testing.assert_close(split.solve(gradients, ABSOLUTE), expected, rtol=1e-8, atol=0)
    assert not torch.allclose(split.solve(gradients, ABSOLUTE), whole.solve(gradients, ABSOLUTE))


@pytest.mark.parametrize(
    ("dim", "limit", "expected"), [(8, 8, [8]), (9, 8, [4, 5]), (10, 3, [2, 3, 2, 3])]
)
def test_blocks_are_even(dim: int, limit: int, expected: list[int]) -> None:
    assert block_sides(dim, limit) == expected


def test_singular_curvature_without_damping_is_refused_with_its_numbers() -> None:
    layer = fit([(normal(2, 3), normal(2, 4, seed=1))])
    with pytest.raises(NumericsError, match=r"layer layer(.|\n)*damping of 0"):
        layer.solve(normal(1, 3, 4), Damping(0.0))


def test_a_layer_without_variance_is_refused_by_name() -> None:
    zero = LayerCurvature("mlp.up", *(_flat(n, 0.0) for n in (3, 4)))
    with pytest.raises(NumericsError, match=r"no curvature(.|\n)*mlp\.up"):
        zero.solve(normal(1, 3, 4), RELATIVE)
    broken = LayerCurvature("mlp.up", _flat(3, float("nan")), _flat(4, 1.0))
    with pytest.raises(NumericsError, match="cannot be inverted"):
        broken.solve(normal(1, 3, 4), ABSOLUTE)


def _flat(dim: int, value: float) -> Eigenbasis:
    eye = torch.eye(dim, dtype=torch.float64)
    return Eigenbasis([eye], torch.full((dim,), value, dtype=torch.float64))
