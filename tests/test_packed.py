"""Examples that share a row are as if each were alone, and nothing is computed in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import exact_model, factorised, inner, one_of, random_batch, weight_gradients
from torch import Tensor

from iprox.engine import packed
from iprox.engine.capture import packed_pass
from iprox.engine.head import token_losses
from iprox.engine.loss import hidden_states
from iprox.engine.packed import pack, packed_states
from iprox.engine.scoring import Scorer
from iprox.errors import ModelError
from iprox.models.layers import scored_linears
from iprox.numerics import ghost, matmul
from iprox.study.schema import LayersSection

LENGTHS, PROMPTS = [21, 5, 13], [7, 1, 11]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_each_example_alone(architecture: str, attention: str) -> None:
    model = exact_model(architecture)
    model.set_attn_implementation(attention)
    batch = random_batch(LENGTHS, PROMPTS, pad=4)
    states = packed_states(model, pack(batch)).split(LENGTHS)
    assert model.config._attn_implementation == attention
    model.set_attn_implementation("sdpa")
    for row, found in enumerate(states):
        alone = hidden_states(model, one_of(batch, row))[0]
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)


def test_bfloat16_attends_as_the_model_library_does() -> None:
    model = tiny_model("gemma3", dtype=torch.bfloat16)
    batch = random_batch(LENGTHS, PROMPTS)
    for row, found in enumerate(packed_states(model, pack(batch)).split(LENGTHS)):
        alone = hidden_states(model, one_of(batch, row))[0]
        torch.testing.assert_close(found, alone.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_a_softmax_over_the_tokens_before(
    window: int | None, cap: float | None, by_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_products_are_faster", lambda _: by_products)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 9, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    found, _ = packed.segment_attention(
        None, query, key, value, None, segments=[6, 3], sliding_window=window, softcap=cap
    )
    for start, stop in ((0, 6), (6, 9)):
        for head in range(4):
            for t in range(start, stop):
                first = start if window is None else max(start, t - window + 1)
                seen = slice(first, t + 1)
                logits = key[0, head // 2, seen] @ query[0, head, t] / 8**0.5
                logits = logits if cap is None else torch.tanh(logits / cap) * cap
                expected = torch.softmax(logits, 0) @ value[0, head // 2, seen]
                torch.testing.assert_close(found[0, t, head], expected, rtol=1e-12, atol=1e-12)


def test_an_attention_with_sinks_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ModelError, match="cannot be packed"):
        packed.segment_attention(None, q, q, q, None, segments=[2], s_aux=torch.zeros(1))


def test_nothing_is_computed_below_the_first_watched_layer() -> None:
    model = exact_model()
    layers = scored_linears(model, LayersSection(include=["model.layers.1.*"]))
    reached: list[Tensor] = []
    output = model.model.layers[0].register_forward_hook(
        lambda module, args, out: reached.append(out)
    )
    rows: dict[str, Tensor] = {}
    batch = random_batch(LENGTHS, PROMPTS)
    packed_pass(model, layers, pack(batch), lambda name, x, d, _: rows.update({name: d}))
    output.remove()
    assert not any(t.requires_grad for t in reached)  # the first block is outside the graph
    assert set(rows) == set(layers)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_token_losses_in_slices_are_those_of_whole_logits(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iprox.engine import head, loss

    model = exact_model(tie_word_embeddings=False)
    model.config.final_logit_softcapping = cap
    states = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(7)
    weights = torch.rand(7, dtype=torch.float64)
    whole = torch.nn.functional.cross_entropy(loss.head(model, states), targets, reduction="none")
    (expected,) = torch.autograd.grad((whole * weights).sum(), states)
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 260 * 3)  # three tokens at a time
    found = token_losses(model, states, targets)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=4),
    kv_heads=st.sampled_from([1, 2, 4]),
    architecture=st.sampled_from(ARCHITECTURES),
    tied=st.booleans(),
    proxy=st.booleans(),
    n_queries=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_scores_of_any_shape_equal_autograd(
    lengths: list[int],
    kv_heads: int,
    architecture: str,
    tied: bool,
    proxy: bool,
    n_queries: int,
    seed: int,
) -> None:
    model: Any = exact_model(architecture, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    layers = scored_linears(model, LayersSection())
    if proxy:
        model = factorised(model, layers)
        layers = scored_linears(model, LayersSection())
    generator = torch.Generator().manual_seed(seed)
    queries = {
        name: torch.randn(n_queries, *layer.weight.shape, generator=generator, dtype=torch.float64)
        for name, layer in layers.items()
    }
    batch = random_batch(lengths, [seed % n for n in lengths], seed=seed)
    supervised = (batch.labels[:, 1:] >= 0).any(1)
    scores = Scorer(model, layers, queries).score(batch)
    for row in range(len(lengths)):
        if not supervised[row]:
            assert float(scores.squared_norms[row]) == 0
            continue
        gradient = weight_gradients(model, layers, one_of(batch, row))
        norm = inner(gradient, gradient)
        assert float(scores.squared_norms[row]) == pytest.approx(norm, rel=1e-9)
        for k in range(n_queries):
            expected = inner(gradient, {name: q[k] for name, q in queries.items()})
            found = float(scores.dots[row, k])
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-10 * norm**0.5)


def test_products_by_the_fastest_library_are_exact_and_can_be_left_for_vectors() -> None:
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    try:
        name = matmul.use_fastest()
        assert name in ("oneDNN", "default")
        chosen = switch.fp32_precision
        assert matmul._error() < matmul.EXACT
        with matmul.vector_products():
            assert switch.fp32_precision == "none"
        assert switch.fp32_precision == chosen
        d, x = torch.randn(40, 30), torch.randn(40, 20)
        dots, squares = ghost.materialised_products(d, x, torch.ones(1, 30, 20), [40])
        exact = d.double().T @ x.double()
        torch.testing.assert_close(dots[0, 0].double(), exact.sum(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(squares[0].double(), exact.square().sum(), rtol=1e-5, atol=0)
    finally:
        switch.fp32_precision = before
