"""Sketches against their theory: unbiased, of known variance, linear, the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iprox.numerics import sketch as module
from iprox.numerics.sketch import (
    CountSketch,
    FreshLora,
    Logra,
    RandomProjection,
    Sketch,
    mix,
    normals,
    orthonormal_rows,
    signs,
)

CPU = torch.device("cpu")
SHAPES = {"b": (6, 5), "a": (4, 7), "c": (5, 4)}
SEEDS = 2000

Maker = Callable[..., Sketch]
KINDS: dict[str, Maker] = {
    "countsketch": lambda seed=0, dim=16, shapes=SHAPES: CountSketch(shapes, dim, seed, CPU),
    "rademacher": lambda seed=0, dim=16, shapes=SHAPES: RandomProjection(
        shapes, dim, seed, CPU, "rademacher"
    ),
    "gaussian": lambda seed=0, dim=16, shapes=SHAPES: RandomProjection(
        shapes, dim, seed, CPU, "gaussian"
    ),
    "logra": lambda seed=0, dim=2, shapes=SHAPES: Logra(shapes, dim, seed, CPU),
    "lora": lambda seed=0, dim=16, shapes=SHAPES: FreshLora(shapes, dim, 3, seed, CPU),
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Maker:
    return KINDS[request.param]


def rows_of(n: int = 2, tokens: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of some examples, by layer."""
    return {
        name: (torch.randn(n, tokens, inn).double(), torch.randn(n, tokens, out).double())
        for name, (out, inn) in SHAPES.items()
    }


def gradients_of(rows: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: d.mT @ x for name, (x, d) in rows.items()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def sketched(sketch: Sketch, gradients: dict[str, Tensor]) -> Tensor:
    out = torch.zeros(len(next(iter(gradients.values()))), sketch.dim, dtype=torch.float64)
    for name, gradient in gradients.items():
        sketch.add_gradients(name, gradient, out)
    return out


def sketched_rows(sketch: Sketch, rows: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    out = torch.zeros(len(next(iter(rows.values()))[0]), sketch.dim, dtype=torch.float64)
    for name, (x, d) in rows.items():
        sketch.add_rows(name, x, d, out)
    return out


def products(make: Maker, gradients: dict[str, Tensor], seeds: int = SEEDS, **sizes: int) -> Tensor:
    """Sketched inner product of the first two examples, by seed."""
    found = (sketched(make(seed, **sizes), gradients) for seed in range(seeds))
    return torch.stack([s[0] @ s[1] for s in found])


def test_inner_products_are_unbiased(make: Maker) -> None:
    gradients = gradients_of(rows_of())
    g, other = flat(gradients)
    values = products(make, gradients)
    error = values.std() / SEEDS**0.5
    assert abs(values.mean() - g @ other) < 4 * error
    squares = torch.stack(
        [sketched(make(seed), gradients)[0].square().sum() for seed in range(SEEDS)]
    )
    assert abs(squares.mean() - g @ g) < 4 * squares.std() / SEEDS**0.5


@pytest.mark.parametrize("kind", ["countsketch", "rademacher", "gaussian"])
def test_the_variance_is_the_formulas(kind: str) -> None:
    """Of a count sketch and of signs; normal entries lack the term of fourth moments."""
    gradients = gradients_of(rows_of())
    g, other = flat(gradients)
    spread = (g @ g) * (other @ other) + (g @ other) ** 2
    if kind != "gaussian":
        spread -= 2 * (g.square() @ other.square())
    values = products(KINDS[kind], gradients, seeds=4000)
    assert float(values.var()) == pytest.approx(float(spread / 16), rel=0.1)


def test_a_sketch_is_linear(make: Maker) -> None:
    gradients = gradients_of(rows_of(3))
    sketch = make()
    parts = sketched(sketch, gradients)
    mixed = {n: (2 * g[0] - 3 * g[1] + g[2])[None] for n, g in gradients.items()}
    torch.testing.assert_close(
        sketched(sketch, mixed)[0], 2 * parts[0] - 3 * parts[1] + parts[2], rtol=1e-10, atol=1e-10
    )


def test_rows_and_gradients_give_the_same_sketch(make: Maker) -> None:
    rows = rows_of(3)
    torch.testing.assert_close(
        sketched_rows(make(), rows), sketched(make(), gradients_of(rows)), rtol=1e-10, atol=1e-10
    )


def test_padding_adds_nothing(make: Maker) -> None:
    rows = rows_of()
    padded = {
        name: (torch.cat([x, torch.ones_like(x)], 1), torch.cat([d, torch.zeros_like(d)], 1))
        for name, (x, d) in rows.items()
    }
    torch.testing.assert_close(sketched_rows(make(), padded), sketched_rows(make(), rows))


@pytest.mark.parametrize("size", [1, 8, 10**6])
def test_blocks_change_nothing(make: Maker, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = gradients_of(rows_of())
    whole = sketched(make(), gradients)
    monkeypatch.setattr(module, "BLOCK_COORDINATES", size)
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 16 * size)
    found = sketched(make(), gradients)
    if isinstance(make(), CountSketch):
        assert torch.equal(found, whole)  # the sums are taken in the same order
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_the_order_of_layers_changes_nothing(make: Maker) -> None:
    gradients = gradients_of(rows_of())
    turned = {name: gradients[name] for name in reversed(gradients)}
    other = make(shapes={name: SHAPES[name] for name in turned})
    torch.testing.assert_close(sketched(other, turned), sketched(make(), gradients))


def test_layers_and_seeds_draw_their_own_numbers(make: Maker) -> None:
    same = torch.randn(1, 5, 5).double()
    shapes = {"one": (5, 5), "two": (5, 5)}
    zero = torch.zeros_like(same)
    one = sketched(make(shapes=shapes), {"one": same, "two": zero})
    two = sketched(make(shapes=shapes), {"one": zero, "two": same})
    assert not torch.allclose(one.sort().values, two.sort().values)
    assert not torch.allclose(one, sketched(make(1, shapes=shapes), {"one": same, "two": zero}))


PROGRAM = """
import torch
from test_sketch import KINDS, SHAPES, sketched
torch.manual_seed(123)
gradients = {n: torch.arange(o * i).reshape(1, o, i).double().sin() for n, (o, i) in SHAPES.items()}
for make in KINDS.values():
    print(sketched(make(7), gradients)[0].tolist())
"""


def test_another_process_makes_the_same_sketch() -> None:
    run = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{PROGRAM}"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    gradients = {
        n: torch.arange(o * i).reshape(1, o, i).double().sin() for n, (o, i) in SHAPES.items()
    }
    ours = [str(sketched(make(7), gradients)[0].tolist()) for make in KINDS.values()]
    assert text.splitlines() == ours


def test_countsketch_is_its_definition() -> None:
    """Every coordinate goes to one place with one sign."""
    out, inn = SHAPES["a"]
    units = torch.eye(out * inn).double().reshape(-1, out, inn)
    columns = torch.zeros(out * inn, 16).double()
    KINDS["countsketch"]().add_gradients("a", units, columns)
    assert (columns.abs().sum(1) == 1).all()
    assert (columns != 0).sum(1).tolist() == [1] * (out * inn)
    assert len(set(columns.nonzero()[:, 1].tolist())) > 8
    assert len(set(columns.sum(1).tolist())) == 2


def test_logra_with_square_projections_is_the_dense_product() -> None:
    gradients = gradients_of(rows_of(4))
    sketch = Logra(SHAPES, 7, 0, CPU)  # no side is wider: both projections are orthogonal
    dense = flat(gradients)
    found = sketched(sketch, gradients)
    assert sketch.dim == dense.shape[1]
    torch.testing.assert_close(found @ found.mT, dense @ dense.mT, rtol=1e-10, atol=1e-10)


def test_logra_on_one_side_is_the_gradient_of_a_fresh_adapter() -> None:
    """With the narrow side whole, features are ``G A^T`` up to a rotation and a scale.

    That is the gradient of the second factor of an untrained LoRA (B = 0) with A as its first.
    """
    sketch = Logra({"a": (4, 30)}, 5, 0, CPU)
    gradients = torch.randn(3, 4, 30).double()
    p_in = sketch.maps["a"][1]
    adapter = torch.zeros(3, 4, 5).double().requires_grad_()
    ((adapter @ p_in) * gradients).sum().backward()
    assert adapter.grad is not None
    dense = adapter.grad.flatten(1)
    found = sketched(sketch, {"a": gradients})
    torch.testing.assert_close(found @ found.mT, dense @ dense.mT, rtol=1e-10, atol=1e-10)


def test_one_sided_cosines_are_close_on_average() -> None:
    common = torch.randn(16, 60).double()
    pair = torch.stack([common + torch.randn(16, 60), common + torch.randn(16, 60)])
    dense = torch.cosine_similarity(*pair.flatten(1), dim=0)
    found = [
        torch.cosine_similarity(*sketched(Logra({"a": (16, 60)}, 16, s, CPU), {"a": pair}), dim=0)
        for s in range(200)
    ]
    assert abs(torch.stack(found).mean() - dense) < 0.03


@pytest.mark.parametrize("kind", ["countsketch", "rademacher", "gaussian"])
def test_cosines_are_kept_at_8192(kind: str) -> None:
    common = torch.randn(1, 40, 50)
    gradients = {"a": (common + torch.randn(6, 40, 50)).double()}
    found = sketched(KINDS[kind](dim=8192, shapes={"a": (40, 50)}), gradients)
    unit = torch.nn.functional.normalize(found)
    dense = torch.nn.functional.normalize(gradients["a"].flatten(1))
    assert (unit @ unit.mT - dense @ dense.mT).abs().max() < 0.05


def test_words_are_splitmix() -> None:
    """First outputs of the published generator for the seed 1234567."""
    words = mix(torch.arange(3), 1234567)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [w % 2**64 for w in words.tolist()] == expected


def test_signs_and_normals_have_the_moments_of_their_kind() -> None:
    n = 20_000
    drawn = signs(torch.arange(n), 130, 3)
    assert drawn.shape == (n, 130)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert (drawn.mean(0).abs() < 5 / n**0.5).all()
    covariance = drawn.mT @ drawn / n - torch.eye(130)
    assert covariance.abs().max() < 6 / n**0.5
    normal = normals(torch.arange(n), 7, 3).double()
    assert normal.shape == (n, 7)
    assert (normal.mean(0).abs() < 5 / n**0.5).all()
    assert (normal.mT @ normal / n - torch.eye(7)).abs().max() < 8 / n**0.5
    assert float((normal**4).mean()) == pytest.approx(3, rel=0.05)


def test_frames_are_orthonormal() -> None:
    frame = orthonormal_rows(4, 9, 5)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(4).double(), rtol=0, atol=1e-12)


def adapted(
    weight: Tensor, a: Tensor, b: Tensor, alpha: float, x: Tensor, target: Tensor
) -> Tensor:
    """Loss of a linear layer with a LoRA adapter."""
    out = x @ (weight + alpha / len(a) * b @ a).mT
    return (out - target).square().sum()


def test_a_fresh_adapter_sees_the_gradient_times_its_a() -> None:
    """With B = 0, dL/dA = 0 and dL/dB = (alpha / r) G A^T (Influcoder's teacher)."""
    x, target = torch.randn(9, 7).double(), torch.randn(9, 5).double()
    weight = torch.randn(5, 7).double().requires_grad_()
    a, b = torch.randn(3, 7).double().requires_grad_(), torch.zeros(5, 3).double().requires_grad_()
    gradient, by_a, by_b = torch.autograd.grad(
        adapted(weight, a, b, 6.0, x, target), (weight, a, b)
    )
    assert by_a.abs().max() == 0
    torch.testing.assert_close(by_b, 6.0 / 3 * gradient @ a.mT, rtol=1e-10, atol=1e-10)


def test_lora_features_sketch_the_gradient_times_a() -> None:
    gradients = gradients_of(rows_of())
    sketch = FreshLora(SHAPES, 4096, 3, 0, CPU)
    thin = {n: g @ sketch.maps[n].mT for n, g in gradients.items()}
    counted = CountSketch({n: tuple(g.shape[1:]) for n, g in thin.items()}, 4096, 0, CPU)
    torch.testing.assert_close(sketched(sketch, gradients), sketched(counted, thin))


def test_lora_cosines_are_the_gradients_on_average() -> None:
    """Over seeds at rank 16; one seed scatters by several hundredths."""
    shapes = {"a": (12, 40), "b": (10, 30)}
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(2, *s, generator=generator).double() for n, s in shapes.items()}
    for g in gradients.values():
        g[1] += 0.7 * g[0]
    g, other = flat(gradients)
    cosines = []
    for seed in range(200):
        one, two = sketched(FreshLora(shapes, 4096, 16, seed, CPU), gradients)
        cosines.append(torch.cosine_similarity(one, two, dim=0))
    exact = torch.cosine_similarity(g, other, dim=0)
    assert abs(float(torch.stack(cosines).mean() - exact)) < 0.03
