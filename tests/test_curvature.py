"""Statistics of a model's layers against autograd, one example at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from oracles import exact_model, factorised, one_of, random_batch, weight_gradients
from torch import Tensor, nn

from iprox.engine.capture import backward_pass, input_sites
from iprox.engine.curvature import (
    Covariances,
    SquaredGradients,
    visit_examples,
)
from iprox.engine.gradients import weighted_gradients
from iprox.engine.head import draw_tokens
from iprox.engine.loss import Batch
from iprox.errors import NumericsError
from iprox.models.layers import scored_linears
from iprox.numerics.kfac import Eigenbasis, eigenbasis
from iprox.numerics.sketch import uniforms
from iprox.study.schema import LayersSection

LENGTHS, PROMPTS, IDS = [9, 4, 7], [3, 1, 5], ["a", "b", "c"]


def setting(kind: str) -> tuple[Any, dict[str, nn.Linear], Batch]:
    model = exact_model("llama" if kind == "factorised" else kind)
    if kind == "factorised":
        model = factorised(model, scored_linears(model, LayersSection()))
    return model, scored_linears(model, LayersSection()), random_batch(LENGTHS, PROMPTS)


def one_at_a_time(batch: Batch) -> list[tuple[Batch, list[str]]]:
    return [(one_of(batch, row), [IDS[row]]) for row in range(len(IDS))]


def covariances(
    model: Any, layers: dict[str, nn.Linear], batches: Any, **options: Any
) -> Covariances:
    sites = input_sites(model, layers, batches[0][0])
    found = Covariances(layers, sites, 8192)
    visit_examples(model, layers, batches, found, **options)
    return found


def assert_equal_sums(ours: Covariances, theirs: Covariances, rtol: float) -> None:
    for a, b in ((ours.inputs, theirs.inputs), (ours.output_grads, theirs.output_grads)):
        assert set(a) == set(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "factorised"])
def test_covariances_are_sums_over_all_tokens_but_padding(kind: str) -> None:
    model, layers, batch = setting(kind)
    found = covariances(model, layers, [(batch, IDS)])
    x_sums = {name: torch.zeros_like(found.inputs[name][0]) for name in found.inputs}
    d_sums = {name: torch.zeros_like(found.output_grads[name][0]) for name in layers}
    for row in range(len(IDS)):

        def visit(name: str, x: Tensor, d: Tensor) -> None:
            if name in x_sums:
                x_sums[name] += torch.einsum("bti,btj->ij", x, x)
            d_sums[name] += torch.einsum("bti,btj->ij", d, d)

        backward_pass(model, layers, one_of(batch, row), visit)
    assert len(x_sums) < len(layers)  # q, k, v share one; so do gate and up
    for name, expected in x_sums.items():
        torch.testing.assert_close(found.inputs[name][0], expected, rtol=1e-9, atol=1e-12)
    for name, expected in d_sums.items():
        torch.testing.assert_close(found.output_grads[name][0], expected, rtol=1e-9, atol=1e-14)
    assert set(found.tokens.values()) == {sum(LENGTHS)}


@pytest.mark.parametrize("kind", ["llama", "factorised"])
@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_squared_gradients_are_those_of_each_example(kind: str, reduction: str) -> None:
    model, layers, batch = setting(kind)
    sites = input_sites(model, layers, batch)
    moments = covariances(model, layers, [(batch, IDS)], reduction=reduction)
    inputs = {n: eigenbasis(b, sum(LENGTHS)) for n, b in moments.inputs.items()}
    grads = {n: eigenbasis(b, sum(LENGTHS)) for n, b in moments.output_grads.items()}
    found = SquaredGradients(inputs, grads, sites)
    visit_examples(model, layers, [(batch, IDS)], found, reduction)
    for name in layers:
        q_d, q_x = grads[name].blocks[0], inputs[sites[name]].blocks[0]
        expected = torch.zeros_like(found.sums[name])
        for row in range(len(IDS)):
            gradient = weight_gradients(model, layers, one_of(batch, row), reduction)[name]
            expected += (q_d.mT @ gradient @ q_x).square()
        torch.testing.assert_close(found.sums[name], expected, rtol=1e-7, atol=1e-16)


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_who_shares_a_batch_changes_nothing(labels: str) -> None:
    model, layers, batch = setting("llama")
    together = covariances(model, layers, [(batch, IDS)], labels=labels)
    alone = covariances(model, layers, one_at_a_time(batch), labels=labels)
    assert_equal_sums(together, alone, rtol=1e-9)


def test_sampled_labels_are_drawn_anew_for_another_seed_or_example() -> None:
    model, layers, batch = setting("llama")
    base = covariances(model, layers, [(batch, IDS)], labels="sampled").output_grads
    again = covariances(model, layers, [(batch, IDS)], labels="sampled").output_grads
    seeded = covariances(model, layers, [(batch, IDS)], labels="sampled", seed=1).output_grads
    renamed = covariances(model, layers, [(batch, ["x", "y", "z"])], labels="sampled").output_grads
    empirical = covariances(model, layers, [(batch, IDS)]).output_grads
    name = next(iter(layers))
    assert torch.equal(base[name][0], again[name][0])
    for other in (seeded, renamed, empirical):
        assert not torch.allclose(base[name][0], other[name][0])


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_sums_of_a_bfloat16_model_are_taken_in_float32(labels: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype).requires_grad_(False)
        layers = scored_linears(model, LayersSection())
        batch = random_batch(LENGTHS, PROMPTS)
        sums = found[dtype] = covariances(model, layers, [(batch, IDS)], labels=labels)
        single = [
            {n: Eigenbasis([b[0]], b[0].diagonal()) for n, b in blocks.items()}
            for blocks in (sums.inputs, sums.output_grads)
        ]
        squares = SquaredGradients(*single, input_sites(model, layers, batch))
        visit_examples(model, layers, [(batch, IDS)], squares, labels=labels)
        assert all(s.isfinite().all() and s.dtype == torch.float32 for s in squares.sums.values())
    exact, rough = found.values()
    for name, (block,) in rough.inputs.items():
        assert block.dtype == torch.float32
        error = (block - exact.inputs[name][0]).norm() / exact.inputs[name][0].norm()
        assert float(error) < 0.05


def test_a_sampled_label_has_the_fisher_matrix_of_a_softmax_regression() -> None:
    head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace())
    state, draws = torch.randn(4, dtype=torch.float64), 20_000
    places = uniforms(torch.arange(draws), key=5)
    drawn = draw_tokens(model, state.expand(draws, 4), places)
    p = torch.softmax(head(state), -1).detach()
    residuals = p - torch.eye(6, dtype=torch.float64)[drawn]
    found = torch.kron(residuals.mT @ residuals / draws, torch.outer(state, state))
    exact = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(state, state))
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_draws_reach_both_ends_of_the_vocabulary() -> None:
    head = nn.Linear(1, 3, bias=False, dtype=torch.float64)
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace())
    states = torch.zeros(4, 1, dtype=torch.float64)
    places = torch.tensor([0.0, 0.34, 0.67, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(model, states, places).tolist() == [0, 1, 2, 2]


def test_weighted_gradients_have_weights_of_their_own_in_every_layer() -> None:
    model, layers, batch = setting("llama")
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for name in layers}
    parts = [
        (one_of(batch, 0), {n: w[:, :1] for n, w in weights.items()}, IDS[:1]),
        (random_batch(LENGTHS, PROMPTS), {n: w * 0 for n, w in weights.items()}, IDS),
    ]
    found = weighted_gradients(model, layers, [(batch, weights, IDS), *parts])
    gradients = [weight_gradients(model, layers, one_of(batch, row)) for row in range(3)]
    for name in layers:
        stacked = torch.stack([g[name] for g in gradients])
        expected = torch.einsum("sn,noi->soi", weights[name], stacked)
        expected += torch.einsum("sn,noi->soi", weights[name][:, :1], stacked[:1])
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-14)


def test_a_loss_that_is_not_finite_names_the_example() -> None:
    model, layers, batch = setting("llama")
    model.get_input_embeddings().weight[batch.input_ids[1, 0]] = float("nan")
    with pytest.raises(NumericsError, match="example b"):
        covariances(model, layers, [one_at_a_time(batch)[1]])
