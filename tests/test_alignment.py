"""Gradient alignment against autograd, finite differences and hand-made cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES
from oracles import exact_model
from torch import Tensor, nn

from iprox.engine import align as align_module
from iprox.engine import objective, recovery
from iprox.engine.align import align_proxy, hold_out, rebalanced
from iprox.engine.align_run import Alignment
from iprox.engine.geometry import gradient_gram
from iprox.engine.loss import IGNORE, Batch, example_losses
from iprox.engine.objective import Factorised
from iprox.errors import ConfigError, NumericsError
from iprox.models.layers import block_linears, scored_linears
from iprox.models.load import as_proxy
from iprox.models.lowrank import LowRankLinear
from iprox.numerics import alignment
from iprox.numerics.alignment import FactorPair, Observed
from iprox.numerics.ipsvd import plain_svd, truncate
from iprox.study.schema import AlignSection, LayersSection
from iprox.training import checkpoints as checkpoints_module

ALL = LayersSection()
RANK = 6


def float64_model(architecture: str = "llama") -> Any:
    """A tiny model that computes in float64, with weights large enough to matter."""
    model = exact_model(architecture)
    for linear in block_linears(model, ALL).values():
        linear.weight.data *= 5
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return model


def svd_factors(model: Any, rank: int | None = RANK, layers: LayersSection = ALL) -> dict[str, Any]:
    linears = block_linears(model, layers)
    return {
        name: truncate(plain_svd(linear.weight), rank or min(linear.weight.shape))
        for name, linear in linears.items()
    }


def make_batch(lengths: Sequence[int] = (9, 7), seed: int = 0, prompt: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        labels[row, length:] = IGNORE
    return Batch(ids, labels, torch.tensor(lengths))


def collate(rows: Sequence[Batch]) -> Batch:
    """Examples are batches of one, all of one length."""
    return Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def examples(n: int, seed: int = 10) -> list[Batch]:
    return [make_batch((8,), seed + i) for i in range(n)]


def setup(
    architecture: str = "llama", **settings: Any
) -> tuple[Factorised, Batch, objective.TargetView]:
    target = float64_model(architecture)
    proxy = Factorised(as_proxy(target, svd_factors(target)), AlignSection(**settings))
    batch = make_batch()
    return (
        proxy,
        batch,
        objective.TargetView(target, block_linears(target, ALL), batch, proxy.align),
    )


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def same(ours: dict[str, FactorPair], theirs: dict[str, FactorPair]) -> bool:
    return all(torch.equal(a, b) for n in theirs for a, b in zip(ours[n], theirs[n], strict=True))


# --- distances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_distance_is_one_minus_cosine_at_any_scale(scale: float) -> None:
    u, v = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = 1 - F.cosine_similarity(u.flatten(), v.flatten(), dim=0)
    assert float(alignment.cosine_distance(u * scale, v)) == pytest.approx(
        float(expected), rel=1e-12
    )


def test_distance_of_nearly_equal_gradients_does_not_cancel() -> None:
    u = torch.randn(50, dtype=torch.float32)
    found = float(alignment.cosine_distance(u, u + 1e-5 * torch.randn(50)))
    assert 0 < found < 1e-8  # 1 - cos in float32 would be 0 or a multiple of 6e-8


def test_a_zero_gradient_has_no_distance_and_no_derivative() -> None:
    u = torch.zeros(3, requires_grad=True)
    v = torch.randn(3, requires_grad=True)
    distance = alignment.cosine_distance(u, v)
    assert distance == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(distance, (u, v)))
    assert all(bool((g == 0).all()) for g in alignment.cosine_distance_derivatives(u, v))


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_closed_form_derivatives_are_those_of_autograd(scale: float) -> None:
    u, v = (scale * torch.randn(2, 4, 5, dtype=torch.float64)).unbind()
    u.requires_grad_()
    v.requires_grad_()
    expected = torch.autograd.grad(alignment.cosine_distance(u, v), (u, v))
    found = alignment.cosine_distance_derivatives(u.detach(), v.detach())
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) < 1e-12


def test_alignment_loss_is_the_mean_over_layers_and_counts_zeros() -> None:
    one, other = (
        FactorPair(torch.tensor([1.0, 0.0]), torch.ones(3)),
        FactorPair(torch.tensor([0.0, 1.0]), -torch.ones(3)),
    )
    zero = FactorPair(torch.zeros(2), torch.ones(3))
    terms = alignment.alignment_loss([one, zero], [other, one], distance_weight=0.5)
    assert float(terms.loss) == pytest.approx(0.5 * (1 + 2 + 0 + 0) / 2)
    assert terms.n_zero == 1
    expected = torch.tensor([[0.0, -1.0], [torch.nan, 1.0]])
    torch.testing.assert_close(terms.cosines, expected, equal_nan=True)


# --- projections -------------------------------------------------------------------------------


def test_projection_from_token_rows_is_that_of_the_dense_gradient() -> None:
    x, d = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    pair = FactorPair(*(torch.randn(s, dtype=torch.float64) for s in ((5, 3), (3, 7))))
    dense = d.T @ x
    found = alignment.project(Observed(x, d), pair)
    assert relative_error(found, [dense @ pair.right.T, pair.left.T @ dense]) < 1e-12


def test_projection_is_its_own_adjoint() -> None:
    observed = Observed(*torch.randn(2, 11, 5, dtype=torch.float64))
    pair, by_result = (
        FactorPair(*(torch.randn(s, dtype=torch.float64) for s in ((5, 3), (3, 5)))) for _ in "ab"
    )
    live = FactorPair(*(t.requires_grad_() for t in pair))
    expected = torch.autograd.grad(alignment.project(observed, live), live, by_result)
    assert relative_error(alignment.project(observed, by_result), expected) < 1e-12


def test_factor_gradients_are_the_projected_dense_gradient() -> None:
    target = float64_model()
    factors = svd_factors(target)
    product = float64_model()  # the dense model that computes what the proxy computes
    for name, linear in block_linears(product, ALL).items():
        linear.weight.data = factors[name].left @ factors[name].right
    proxy, batch = Factorised(as_proxy(target, factors), AlignSection()), make_batch()
    view = objective.TargetView(product, block_linears(product, ALL), batch, proxy.align)
    own = torch.autograd.grad(objective._loss(proxy.model, batch), proxy.parameters)
    seen = view.layers
    projected = [t for name in proxy.layers for t in alignment.project(seen[name], factors[name])]
    assert relative_error(own, projected) < 1e-10


# --- the anchor --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_anchor_of_two_tokens_by_hand(tau: float) -> None:
    p, q = 0.8, 0.6
    teacher = tau * torch.tensor([[p, 1 - p], [0.5, 0.5]], dtype=torch.float64).log()
    student = tau * torch.tensor([[q, 1 - q], [0.5, 0.5]], dtype=torch.float64).log()
    token = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))  # teacher first
    found = alignment.anchor(teacher, student, torch.tensor([0, 0]), tau)
    assert float(found) == pytest.approx(tau**2 * token / 2, rel=1e-12)


def test_anchor_is_a_mean_inside_examples_then_over_them() -> None:
    teacher, student = torch.randn(2, 4, 6, dtype=torch.float64)
    owner = torch.tensor([0, 0, 0, 2])  # the example between has no position
    kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    expected = (kl[:3].mean() + kl[3]) / 2
    assert float(alignment.anchor(teacher, student, owner)) == pytest.approx(float(expected))
    assert float(alignment.anchor(teacher, teacher, owner)) == 0
    assert float(expected) > 0


# --- the geometry of examples ------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [5, 400])  # by slices of the gradients, and token by token
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_gram_is_that_of_the_gradients(
    in_dim: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "ELEMENTS_PER_SLICE", elements)
    x = torch.randn(3, 4, in_dim, dtype=torch.float64)
    d = torch.randn(3, 4, 300, dtype=torch.float64)
    gradients = torch.stack([(b.T @ a).flatten() for a, b in zip(x, d, strict=True)])
    assert relative_error([alignment.example_gram(x, d)], [gradients @ gradients.T]) < 1e-12


def test_agreement_is_a_rank_correlation_of_cosines() -> None:
    gradients = torch.randn(6, 9, dtype=torch.float64)
    gram = gradients @ gradients.T
    scales = torch.rand(6, dtype=torch.float64) + 0.1
    assert alignment.gram_agreement(gram * scales * scales[:, None], gram) == pytest.approx(1)
    opposite = 2 * gram.diagonal().diag() - gram
    assert alignment.gram_agreement(opposite, gram) == pytest.approx(-1)
    assert math.isnan(alignment.gram_agreement(torch.eye(6), gram))
    assert math.isnan(alignment.gram_agreement(gram * torch.nan, gram))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_gram_of_examples_is_that_of_autograd_for_any_chunk(chunk: int) -> None:
    target = float64_model()
    proxy = as_proxy(target, svd_factors(target)).requires_grad_(False)
    layers, rows = scored_linears(proxy, ALL), examples(5)
    gradients = []
    for row in rows:
        weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
        gradients.append(flat(torch.autograd.grad(example_losses(proxy, row).sum(), weights)))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    found = gradient_gram(proxy, layers, rows, collate, chunk)
    assert relative_error([found], [expected]) < 1e-10


# --- the objective and its gradient ------------------------------------------------------------


def test_a_proxy_of_full_rank_is_aligned() -> None:
    target = float64_model()
    proxy = Factorised(as_proxy(target, svd_factors(target, rank=None)), AlignSection(lambda_kl=1))
    batch = make_batch()
    view = objective.TargetView(target, block_linears(target, ALL), batch, proxy.align)
    found, gradient = objective.gradient(proxy, batch, view)
    assert found.loss_ga <= 1e-12
    assert 0 <= found.kl + 1e-15 <= 1e-12
    assert found.proxy_loss == pytest.approx(found.target_loss, rel=1e-12)
    assert float(flat(gradient).norm()) < 1e-6


SETTINGS: list[dict[str, Any]] = [
    {},
    {"kl_positions": "all", "tau": 2.0, "lambda_kl": 1.0},
    {"lambda_kl": 0.0, "distance_weight": 0.5},
]


def numeric_derivative(
    proxy: Factorised, batch: Batch, view: objective.TargetView, along: list[Tensor]
) -> float:
    """Slope of the objective along a direction, by central differences."""
    here, values, step = [p.detach().clone() for p in proxy.parameters], [], 1e-5
    for sign in (1, -1):
        for p, origin, d in zip(proxy.parameters, here, along, strict=True):
            p.data = origin + sign * step * d
        values.append(objective.evaluate(proxy, batch, view).objective)
    for p, origin in zip(proxy.parameters, here, strict=True):
        p.data = origin
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_ways_give_the_gradient_of_the_objective(architecture: str) -> None:
    gradients = {}
    for hvp in ("double_backward", "jvp", "central_diff"):
        proxy, batch, view = setup(architecture, hvp=hvp)
        found, gradients[hvp] = objective.gradient(proxy, batch, view)
        assert found.objective == pytest.approx(objective.evaluate(proxy, batch, view).objective)
    assert relative_error(gradients["jvp"], gradients["double_backward"]) < 1e-9
    assert relative_error(gradients["central_diff"], gradients["double_backward"]) < 1e-4
    along = [torch.randn_like(p) for p in proxy.parameters]
    slope = float(flat(gradients["jvp"]) @ flat(along))
    assert slope == pytest.approx(numeric_derivative(proxy, batch, view, along), rel=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("hvp", ["double_backward", "jvp"])
def test_the_gradient_is_right_under_all_settings(settings: dict[str, Any], hvp: str) -> None:
    proxy, batch, view = setup(hvp=hvp, **settings)
    _, gradient = objective.gradient(proxy, batch, view)
    along = [torch.randn_like(p) for p in proxy.parameters]
    slope = float(flat(gradient) @ flat(along))
    assert slope == pytest.approx(numeric_derivative(proxy, batch, view, along), rel=1e-5)


def test_without_the_second_order_term_the_gradient_is_wrong() -> None:
    proxy, batch, view = setup()
    _, exact = objective.gradient(proxy, batch, view)
    _, direction, explicit = objective._first_order(proxy, batch, view)
    assert relative_error(explicit, exact) > 0.1
    product = objective._jvp(proxy, batch, direction)
    assert relative_error([h + e for h, e in zip(product, explicit, strict=True)], exact) < 1e-9


def test_a_stopped_projection_gives_another_gradient_and_all_ways_agree() -> None:
    proxy, batch, view = setup(grad="stop_projection")
    _, stopped = objective.gradient(proxy, batch, view)
    first_order, *_ = setup(grad="stop_projection", hvp="jvp")
    assert relative_error(objective.gradient(first_order, batch, view)[1], stopped) < 1e-9
    live, *_ = setup()
    assert relative_error(objective.gradient(live, batch, view)[1], stopped) > 0.01


def test_central_differences_hold_in_float32_and_leave_the_factors_as_they_were() -> None:
    target = float64_model().float()
    batch, gradients = make_batch(), {}
    for hvp in ("double_backward", "central_diff"):
        proxy = Factorised(as_proxy(target, svd_factors(target)), AlignSection(hvp=hvp))
        view = objective.TargetView(target, block_linears(target, ALL), batch, proxy.align)
        before = proxy.copy()
        gradients[hvp] = objective.gradient(proxy, batch, view)[1]
        assert same(proxy.copy(), before)
    assert relative_error(gradients["central_diff"], gradients["double_backward"]) < 2e-2


# --- training ----------------------------------------------------------------------------------


def run(
    architecture: str = "llama",
    layers: LayersSection = ALL,
    balanced: bool = True,
    target: Any = None,
    n: int = 10,
    rank: int = RANK,
    checkpoints: Path | None = None,
    **settings: Any,
) -> tuple[Alignment, Any, Any]:
    """Align a tiny proxy; the alignment, the proxy afterwards, and as it was before."""
    target = target or float64_model(architecture)
    proxy = as_proxy(target, svd_factors(target, rank, layers))
    before = as_proxy(target, svd_factors(target, rank, layers))
    section = AlignSection(**({"epochs": 2.0, "lr": 1e-3} | settings))
    train, heldout = hold_out(n, section)
    rows = examples(n)
    done = align_proxy(
        target,
        proxy,
        [rows[i] for i in train],
        [rows[i] for i in heldout],
        collate,
        section,
        layers=ALL,
        balanced=balanced,
        checkpoints=checkpoints,
    )
    return done, proxy, before


def test_only_factors_change() -> None:
    some = LayersSection(exclude=["*down_proj"])
    _, after, before = run("qwen2", some, select_by="last")
    factors = {
        f"{name}.{side}.weight"
        for name, module in after.named_modules()
        if isinstance(module, LowRankLinear)
        for side in ("left", "right")
    }
    old = before.state_dict()
    changed = {name for name, t in after.state_dict().items() if not torch.equal(t, old[name])}
    assert changed == factors
    assert any("bias" in name for name in old)
    assert any("down_proj.weight" in name for name in old)


@pytest.mark.parametrize("hvp", ["double_backward", "central_diff"])
def test_training_aligns_gradients_and_keeps_the_predictions(hvp: str) -> None:
    done, *_ = run(epochs=10, n=16, rank=12, lr=3e-3, hvp=hvp, select_by="objective")
    first, last = done.curve[0], [p for p in done.curve if p.split == "heldout"][-1]
    train = [p for p in done.curve if p.split == "train"]
    assert train[-1].loss_ga < 0.7 * train[0].loss_ga
    assert last.kl <= first.kl
    assert done.chosen.point.objective < first.objective
    assert done.steps == done.planned_steps == 30


def test_the_start_is_kept_when_training_harms() -> None:
    done, after, before = run(lr=3.0, n=20, rank=14, heldout=0.5)
    assert [p.chosen for p in done.curve] == [True] + [False] * (len(done.curve) - 1)
    assert done.chosen is done.start
    kept, start = (Factorised(m, AlignSection()).copy() for m in (after, before))
    assert same(kept, start)


@pytest.mark.parametrize("select_by", ["fidelity", "objective", "last"])
def test_a_diverged_run_keeps_the_best_before(
    select_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    done, after, _ = run(lr=1e200, lr_warmup=0, select_by=select_by)
    assert done.diverged_at is not None
    assert done.steps < done.planned_steps
    assert "diverged" in caplog.text
    assert all(bool(p.isfinite().all()) for p in after.state_dict().values())
    for point in done.curve:
        assert math.isfinite(point.objective)
    assert same(Factorised(after, AlignSection()).copy(), done.chosen.factors)


@pytest.mark.parametrize("lr", [1e100, 1e160, 1e200, 1e300])
@pytest.mark.parametrize("phase", ["epochs", "recover_epochs"])
def test_factors_too_large_to_balance_are_a_divergence(
    phase: str, lr: float, caplog: pytest.LogCaptureFixture
) -> None:
    # judged after the very step that threw them off, before another pass could show it
    settings = {"epochs": 1.0, phase: 1.0, "lr": lr, "recover_lr": lr, "lr_warmup": 0}
    done, after, _ = run(evaluate_every=1, **settings)
    assert done.diverged_at == 1
    assert done.chosen is done.start
    assert "diverged" in caplog.text
    assert same(Factorised(after, AlignSection()).copy(), done.start.factors)


def test_factors_that_overflow_at_the_end_of_an_epoch_are_a_divergence() -> None:
    # no candidate is judged before the gauge would be restored
    done, after, _ = run(epochs=2, batch=10, lr=1e308, weight_decay=100, evaluate_every=9)
    assert (done.diverged_at, done.planned_steps) == (1, 2)
    assert same(Factorised(after, AlignSection()).copy(), done.start.factors)


@pytest.mark.parametrize("side", ["target", "proxy"])
def test_a_start_that_is_not_finite_names_the_layer(side: str) -> None:
    target = float64_model()
    proxy = as_proxy(target, svd_factors(target))
    name = "model.layers.1.mlp.up_proj"
    broken = target.get_submodule(name) if side == "target" else proxy.get_submodule(name).left
    broken.weight.data[0, 0] = torch.inf
    rows = examples(5)
    with pytest.raises(NumericsError, match=f"{side}, {name}"):
        align_proxy(target, proxy, rows[:1], rows[1:], collate, AlignSection(), layers=ALL)


def test_the_step_is_chosen_by_what_the_config_says() -> None:
    done, *_ = run(epochs=4, lr=1e-2)
    heldout = [p for p in done.curve if p.split == "heldout"]
    assert done.chosen.point.fidelity == max(p.fidelity for p in heldout)
    done, *_ = run(epochs=4, lr=1e-2, select_by="objective")
    heldout = [p for p in done.curve if p.split == "heldout"]
    assert done.chosen.point.objective == min(p.objective for p in heldout)
    done, *_ = run(epochs=2, lr=1e-2, select_by="last")
    assert done.chosen.point.step == done.planned_steps


def test_fidelity_of_the_start_is_the_agreement_of_brute_force_gradients() -> None:
    target = float64_model()
    done, _, before = run(target=target, epochs=0.1)
    _, places = hold_out(10, AlignSection())
    grams = []
    for model in (before, target):
        weights = [layer.weight.requires_grad_() for layer in scored_linears(model, ALL).values()]
        rows = torch.stack(
            [
                flat(torch.autograd.grad(example_losses(model, examples(10)[i]).sum(), weights))
                for i in places
            ]
        )
        grams.append(rows @ rows.T)
    assert done.start.point.fidelity == pytest.approx(alignment.gram_agreement(*grams))


def test_the_kept_factors_are_balanced_unless_they_came_otherwise() -> None:
    done, *_ = run(select_by="last", evaluate_every=1)
    for left, right in done.chosen.factors.values():
        torch.testing.assert_close(left.T @ left, right @ right.T)
    done, *_ = run(select_by="last", balanced=False)
    left, right = next(iter(done.chosen.factors.values()))
    assert not torch.allclose(left.T @ left, right @ right.T)


def test_rebalancing_keeps_the_product() -> None:
    pair = FactorPair(*(torch.randn(s, dtype=torch.float64) for s in ((5, 3), (3, 7))))
    again = rebalanced({"layer": pair})["layer"]
    torch.testing.assert_close(again.left @ again.right, pair.left @ pair.right)


def test_evaluating_more_often_does_not_change_the_training() -> None:
    often, *_ = run(evaluate_every=1)
    rarely, *_ = run()
    train = [[p.objective for p in done.curve if p.split == "train"] for done in (often, rarely)]
    assert train[0] == train[1]
    assert len(often.curve) > len(rarely.curve)


def test_layers_of_each_candidate_are_recorded() -> None:
    done, proxy, _ = run()
    names = [n for n, m in proxy.named_modules() if isinstance(m, LowRankLinear)]
    assert [(p.step, p.layer) for p in done.layers] == [(s, n) for s in (0, 2, 4) for n in names]
    cosines = [c for p in done.layers if p.step == 0 for c in (p.cosine_left, p.cosine_right)]
    distances = sum(1 - c for c in cosines) / len(names)
    assert done.start.point.loss_ga == pytest.approx(distances, rel=1e-9)


def test_learning_rate_rises_then_stays() -> None:
    schedule = align_module._Schedule(40, AlignSection(epochs=2, lr=1.0, lr_warmup=0.2, batch=4))
    rates = [schedule.lr(step) for step, _ in schedule.batches()]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(rates[4:]) == {1.0}
    seen = [sorted(i for _, b in list(schedule.batches())[e : e + 10] for i in b) for e in (0, 10)]
    assert seen == [list(range(40))] * 2


def test_the_recovery_rises_and_falls_and_is_counted_before_the_alignment() -> None:
    align = AlignSection(recover_epochs=2, recover_lr=1.0, recover_batch=8, epochs=1, lr_warmup=0.2)
    recovery = align_module._Schedule(40, align, recovers=True)
    rates = [recovery.lr(step) for step, _ in recovery.batches()]
    assert rates[0] == 0.5
    assert rates[1:] == [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(1, 10)]
    assert [len(places) for _, places in recovery.batches()] == [8] * 10
    after = align_module._Schedule(40, align, before=recovery)
    assert (after.steps_before, after.epoch(10)) == (10, 3.0)
    assert align_module._Schedule(40, AlignSection(), recovers=True).total == 0


def divergence_by_hand(target: Any, proxy: Any, batch: Batch, tau: float) -> Tensor:
    """Mean over real tokens, example by example, token by token."""
    found = []
    for ids, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
        logits = [m(input_ids=ids[None, :length]).logits[0] / tau for m in (target, proxy)]
        p, q = (one.softmax(-1) for one in logits)
        found += [tau**2 * (p[t] * (p[t] / q[t]).log()).sum() for t in range(length)]
    return torch.stack(found).mean()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("slice_size", [1, 10**9])
def test_imitation_is_the_mean_divergence_of_all_tokens(
    architecture: str, slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "LOGITS_PER_SLICE", slice_size)
    target = float64_model(architecture)
    factorised = Factorised(as_proxy(target, svd_factors(target)), AlignSection())
    batch = make_batch((9, 7, 4))
    found = recovery.imitate(target, factorised.model, factorised.parameters, batch, tau=1.5)
    expected = divergence_by_hand(target, factorised.model, batch, 1.5)
    assert found.divergence == pytest.approx(float(expected.detach()), rel=1e-10)
    gradients = torch.autograd.grad(expected, factorised.parameters)
    assert relative_error(found.gradients, gradients) < 1e-9


def test_recovery_brings_predictions_back_before_gradients_are_aligned() -> None:
    done, after, before = run(
        n=16,
        rank=12,
        epochs=1,
        recover_epochs=20,
        recover_lr=1e-2,
        recover_batch=8,
        select_by="objective",
    )
    train = [p for p in done.curve if p.split == "train"]
    recovered = [p for p in train if p.loss_ga is None]
    assert len(recovered) == 40
    assert [p.loss_ga is None for p in train] == [True] * 40 + [False] * 3
    assert recovered[-1].kl < 0.5 * recovered[0].kl
    assert [p.step for p in train] == list(range(1, 44))
    assert done.planned_steps == done.steps == 43
    assert done.chosen.point.kl < done.start.point.kl
    old = before.state_dict()
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, old[n])}
    assert all(".left." in name or ".right." in name for name in changed)


def test_the_alignment_goes_on_from_the_best_step_of_the_recovery() -> None:
    harmful = {"recover_epochs": 2, "recover_lr": 3.0, "recover_batch": 4, "n": 20, "rank": 14}
    done, *_ = run(epochs=1, **harmful)
    alone, *_ = run(epochs=1, n=20, rank=14)
    gradients = [
        [p.objective for p in r.curve if p.split == "train" and p.loss_ga is not None]
        for r in (done, alone)
    ]
    assert done.chosen.point.fidelity >= done.start.point.fidelity
    assert gradients[0] == gradients[1]


def test_a_recovery_that_diverges_keeps_the_start(caplog: pytest.LogCaptureFixture) -> None:
    done, after, _ = run(recover_epochs=1, recover_batch=2, recover_lr=1e200, lr_warmup=0)
    assert done.diverged_at is not None
    assert done.chosen is done.start
    assert "align.recover_lr" in caplog.text
    assert same(Factorised(after, AlignSection()).copy(), done.start.factors)


def test_held_out_examples_are_a_share_and_never_trained_on() -> None:
    train, heldout = hold_out(100, AlignSection(heldout=0.13))
    assert len(heldout) == 13
    assert sorted(train + heldout) == list(range(100))
    assert len(hold_out(8, AlignSection())[1]) == align_module.MIN_HELDOUT
    assert hold_out(100, AlignSection(seed=1)) != hold_out(100, AlignSection())
    with pytest.raises(ConfigError, match="too few examples"):
        hold_out(4, AlignSection())


# --- checkpoints ---------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the package catches it."""


BOTH_PHASES = {
    "recover_epochs": 1.0,
    "recover_batch": 2,
    "epochs": 2.0,
    "batch": 2,
    "evaluate_every": 2,
    "lr": 3e-3,
}
"""Three steps of recovery, then six of alignment, with rebalancing after the third of them."""


@pytest.mark.parametrize(
    ("steps", "select_by"),
    [(1, "fidelity"), (3, "last"), (5, "fidelity"), (6, "last"), (7, "fidelity")],
)
def test_a_killed_alignment_goes_on_to_the_same_bytes(
    steps: int, select_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in either phase, where one ends, and where the optimizer starts afresh."""
    settings = BOTH_PHASES | {"select_by": select_by}
    whole, proxy, _ = run(**settings)
    assert (whole.planned_steps, whole.diverged_at) == (9, None)
    monkeypatch.setattr(checkpoints_module, "SECONDS", 0.0)
    keep = align_module.replace_checkpoint

    def keep_and_die(folder: Path, step: int, write: Any) -> None:
        keep(folder, step, write)
        if step == steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(align_module, "replace_checkpoint", keep_and_die)
        with pytest.raises(Killed):
            run(checkpoints=tmp_path, **settings)
    assert [one.name for one in tmp_path.iterdir()] == [f"step-{steps:08d}"]
    starts = []
    patched = align_module._Judge.start
    monkeypatch.setattr(align_module._Judge, "start", lambda s: starts.append(s) or patched(s))
    resumed, again, _ = run(checkpoints=tmp_path, **settings)
    assert not starts
    assert resumed.curve == whole.curve
    assert resumed.layers == whole.layers
    assert (resumed.steps, resumed.tokens, resumed.recovery_tokens, resumed.n_zero) == (
        whole.steps,
        whole.tokens,
        whole.recovery_tokens,
        whole.n_zero,
    )
    assert resumed.start.point == whole.start.point
    expected = proxy.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())
