"""Dots and norms of a pass equal those of gradients taken one example at a time by autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from oracles import exact_model, factorised, inner, loss_of, one_of, random_batch, weight_gradients
from scipy.stats import spearmanr
from torch import Tensor, nn

from iprox.data.batches import collate, token_batches
from iprox.data.chat import encode
from iprox.data.tasks import build_task
from iprox.engine import scoring
from iprox.engine.gradients import mean_gradient
from iprox.engine.loss import Batch
from iprox.engine.scoring import Scorer
from iprox.errors import ModelError, NumericsError
from iprox.models.layers import scored_linears
from iprox.numerics.ghost import Choice
from iprox.stages.target import load_target
from iprox.study.schema import LayersSection, TargetSection, TaskSection

LENGTHS, PROMPTS = [21, 5, 13, 8], [7, 1, 11, 4]


def open_model(architecture: str, proxy: bool, bias: bool) -> tuple[Any, dict[str, nn.Linear]]:
    changes = {"attention_bias": bias} if architecture != "qwen2" else {}  # qwen2's is built in
    model = exact_model(architecture, **changes)
    layers = scored_linears(model, LayersSection())
    if bias:
        generator = torch.Generator().manual_seed(5)
        for layer in layers.values():
            if layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    if proxy:
        model = factorised(model, layers)
        layers = scored_linears(model, LayersSection())
    return model, layers


def gradients_of(model: Any, layers: dict[str, nn.Linear], batch: Batch, **kw: Any) -> list:
    examples = [one_of(batch, i) for i in range(len(batch.labels))]
    return [weight_gradients(model, layers, example, **kw) for example in examples]


def random_queries(layers: dict[str, nn.Linear], n: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(n, *layer.weight.shape, generator=generator, dtype=torch.float64)
        for name, layer in layers.items()
    }


@pytest.fixture
def setting() -> tuple[Any, dict[str, nn.Linear], dict[str, Tensor], Batch]:
    model, layers = open_model("llama", proxy=False, bias=False)
    return model, layers, random_queries(layers), random_batch(LENGTHS, PROMPTS)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("proxy", [False, True], ids=["dense", "factorised"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_autograd_one_example_at_a_time(
    architecture: str, proxy: bool, bias: bool
) -> None:
    model, layers = open_model(architecture, proxy, bias)
    queries, batch = random_queries(layers), random_batch(LENGTHS, PROMPTS)
    scores = Scorer(model, layers, queries).score(batch)
    for i, gradient in enumerate(gradients_of(model, layers, batch)):
        for k in range(2):
            expected = inner(gradient, {name: q[k] for name, q in queries.items()})
            assert float(scores.dots[i, k]) == pytest.approx(expected, rel=1e-10)
        assert float(scores.squared_norms[i]) == pytest.approx(inner(gradient, gradient), rel=1e-10)
        loss = loss_of(model, one_of(batch, i))
        assert float(scores.losses[i]) == pytest.approx(float(loss), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_bias_of_the_test_models_is_there() -> None:
    for architecture in ARCHITECTURES:
        _, layers = open_model(architecture, proxy=True, bias=True)
        assert any(n.endswith("q_proj.left") and m.bias is not None for n, m in layers.items())


def test_float32_is_close_to_autograd_in_float64(setting: Any) -> None:
    model, layers, queries, batch = setting
    expected = Scorer(model, layers, queries).score(batch)
    model.float()
    scores = Scorer(model, layers, {n: q.float() for n, q in queries.items()}).score(batch)
    assert scores.dots.dtype == scores.squared_norms.dtype == torch.float64
    torch.testing.assert_close(scores.squared_norms, expected.squared_norms, rtol=1e-5, atol=0)
    scale = expected.squared_norms.sqrt()[:, None]
    torch.testing.assert_close(scores.dots / scale, expected.dots / scale, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_finite_and_points_the_same_way(setting: Any) -> None:
    model, layers, queries, batch = setting
    exact = Scorer(model, layers, queries).score(batch)
    scores = Scorer(model.bfloat16(), layers, queries).score(batch)
    assert bool(torch.isfinite(scores.dots).all())
    torch.testing.assert_close(scores.squared_norms, exact.squared_norms, rtol=0.1, atol=0)


@pytest.mark.parametrize("kernel", ["ghost", "materialise"])
def test_both_kernels_give_the_same(
    setting: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers, queries, batch = setting
    expected = Scorer(model, layers, queries).score(batch)
    monkeypatch.setattr(scoring, "choose_kernel", lambda *_: Choice(kernel, "forced"))
    scores = Scorer(model, layers, queries).score(batch)
    torch.testing.assert_close(scores.dots, expected.dots, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.squared_norms, expected.squared_norms, rtol=1e-10, atol=0)


@pytest.mark.parametrize("proxy", [False, True], ids=["dense", "factorised"])
def test_gram_matrices_are_computed_once_per_input(
    proxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = open_model("llama", proxy, bias=False)
    monkeypatch.setattr(scoring, "choose_kernel", lambda *_: Choice("ghost", "forced"))
    calls = []
    original = scoring.half_gram
    monkeypatch.setattr(scoring, "half_gram", lambda x: calls.append(x) or original(x))
    Scorer(model, layers, {}).score(random_batch([9, 6], [2, 1]))
    inputs = 2 * 4  # two blocks; inputs of q k v, of o, of gate up, of down
    inputs += 2 * 7 if proxy else 0  # and each left factor's own
    assert len(calls) == 2 * inputs  # of two examples


def test_batching_and_order_change_nothing(setting: Any) -> None:
    model, layers, queries, batch = setting
    scorer = Scorer(model, layers, queries)
    together = scorer.score(batch)
    order = [2, 0, 3, 1]
    shuffled = scorer.score(Batch(*(t[order] for t in batch)))
    alone = [scorer.score(one_of(batch, i)) for i in range(4)]
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(shuffled.dots, together.dots[order], **close)
    torch.testing.assert_close(torch.cat([s.dots for s in alone]), together.dots, **close)
    squares = torch.cat([s.squared_norms for s in alone])
    torch.testing.assert_close(squares, together.squared_norms, **close)


def test_a_scaled_loss_keeps_the_cosine_and_scales_the_dot(setting: Any) -> None:
    model, layers, queries, batch = setting
    mean = Scorer(model, layers, queries, "token_mean").score(batch)
    total = Scorer(model, layers, queries, "token_sum").score(batch)
    supervised = (batch.labels[:, 1:] >= 0).sum(1).double()
    torch.testing.assert_close(total.dots, mean.dots * supervised[:, None], rtol=1e-10, atol=0)
    cosines = [s.dots / s.squared_norms.sqrt()[:, None] for s in (mean, total)]
    torch.testing.assert_close(cosines[0], cosines[1], rtol=1e-10, atol=1e-12)


def test_a_reused_module_counts_the_gradient_of_all_its_calls(setting: Any) -> None:
    model, layers, queries, batch = setting
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    layers = scored_linears(model, LayersSection())
    assert "model.layers.1.mlp.down_proj" not in layers  # one module, named once
    queries = {name: queries[name] for name in layers}
    for chosen in ("ghost", "materialise"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "choose_kernel", lambda *_, k=chosen: Choice(k, "forced"))
            scores = Scorer(model, layers, queries).score(batch)
        for i, gradient in enumerate(gradients_of(model, layers, batch)):
            norm = inner(gradient, gradient)
            assert float(scores.squared_norms[i]) == pytest.approx(norm, rel=1e-10)


def test_a_gradient_that_is_not_finite_names_example_and_layer(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers, queries, batch = setting
    original = scoring.materialised_products

    def broken(d: Tensor, x: Tensor, *rest: Any) -> Any:
        dots, squares = original(d, x, *rest)
        if d.shape[1] == 48:
            squares[2] = float("inf")
        return dots, squares

    monkeypatch.setattr(scoring, "choose_kernel", lambda *_: Choice("materialise", "forced"))
    monkeypatch.setattr(scoring, "materialised_products", broken)
    with pytest.raises(NumericsError) as error:
        Scorer(model, layers, queries).score(batch, ["a", "b", "c", "d"])
    assert "example c, layer model.layers.1.mlp.up_proj" in str(error.value)
    scores = Scorer(model, layers, queries, skip_nonfinite=True).score(batch)
    assert scores.unusable == {2: "model.layers.1.mlp.up_proj"}


def test_queries_of_other_layers_are_refused(setting: Any) -> None:
    model, layers, queries, _ = setting
    name = next(iter(queries))
    with pytest.raises(ModelError, match="not of the layers"):
        Scorer(model, layers, {n: q for n, q in queries.items() if n != name})
    with pytest.raises(ModelError, match="another shape"):
        Scorer(model, layers, queries | {name: queries[name][:, 1:]})


def test_the_kernel_table_counts_every_layer_once(setting: Any) -> None:
    model, layers, queries, _ = setting
    table = Scorer(model, layers, queries).kernels()
    assert sum(int(row["layers"]) for row in table) == len(layers)
    assert all("materialise" in str(row["reason"]) for row in table)


def test_mean_gradient_is_the_weighted_sum_over_batches(setting: Any) -> None:
    model, layers, _, batch = setting
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    parts = [one_of(batch, 0), Batch(*(t[1:] for t in batch))]
    mean = mean_gradient(
        model, layers, [(parts[0], weights[:1], None), (parts[1], weights[1:], None)]
    )
    gradients = gradients_of(model, layers, batch)
    for name in layers:
        expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
        torch.testing.assert_close(mean[name], expected, rtol=1e-10, atol=1e-14)


def test_a_copy_of_the_only_query_has_cosine_one_and_comes_first(setting: Any) -> None:
    model, layers, _, batch = setting
    query = one_of(batch, 2)
    vector = mean_gradient(model, layers, [(query, torch.ones(1), None)])
    scores = Scorer(model, layers, {n: v[None] for n, v in vector.items()}).score(batch)
    norm = inner(vector, vector) ** 0.5
    cosines = scores.dots[:, 0] / scores.squared_norms.sqrt() / norm
    assert int(cosines.argmax()) == 2
    assert float(cosines[2]) == pytest.approx(1.0, rel=1e-12)


def test_a_step_on_the_best_example_helps_the_query_more_than_one_on_the_worst(
    setting: Any,
) -> None:
    model, layers, _, _ = setting
    batch = random_batch([12] * 8, [4] * 8, seed=2)
    query = random_batch([12], [4], seed=2)  # the first of them
    query.input_ids[0, 6] = 9
    query.labels[0, 6] = 9
    vector = mean_gradient(model, layers, [(query, torch.ones(1), None)])
    scores = Scorer(model, layers, {n: v[None] for n, v in vector.items()}).score(batch)
    order = scores.dots[:, 0].argsort(descending=True).tolist()

    def loss_after_step(row: int) -> float:
        gradient = weight_gradients(model, layers, one_of(batch, row))
        for name, layer in layers.items():
            layer.weight.data -= 1e-3 * gradient[name]
        loss = float(loss_of(model, query))
        for name, layer in layers.items():
            layer.weight.data += 1e-3 * gradient[name]
        return loss

    assert loss_after_step(order[0]) < float(loss_of(model, query))
    assert loss_after_step(order[0]) < loss_after_step(order[-1])


@pytest.mark.model
@pytest.mark.usefixtures("smollm2_package")
def test_smollm2_scores_as_brute_force_does(tmp_path: Path) -> None:
    model, tokenizer = load_target(TargetSection(model="smollm2-135m"), tmp_path, tmp_path)
    model = model.float().eval().requires_grad_(False)
    layers = scored_linears(model, LayersSection())
    task = build_task(TaskSection(name="mmlu", kind="mmlu", queries=18), tmp_path)
    encoded = [
        encode(q.messages, tokenizer, "tokenizer", 384, prefix=q.prefix, eos=q.eos)
        for q in task.queries
    ]
    encoded = [e for e in encoded if e.supervised]
    assert len(encoded) >= 16
    query = Batch(*collate(encoded[:1], 0))
    vector = mean_gradient(model, layers, [(query, torch.ones(1), None)])
    scorer = Scorer(model, layers, {name: v[None] for name, v in vector.items()})
    ours = []
    for group in token_batches([len(e) for e in encoded], 512):
        scores = scorer.score(Batch(*collate([encoded[i] for i in group], 0)))
        ours += list(zip(group, scores.dots[:, 0] / scores.squared_norms.sqrt(), strict=True))
    theirs = []
    for example in encoded:  # the definition: one example, its whole gradient, two sums
        gradients = weight_gradients(model, layers, Batch(*collate([example], 0)))
        dot = sum(float((gradients[n].double() * vector[n].double()).sum()) for n in layers)
        theirs.append(dot / inner(gradients, gradients) ** 0.5)
    fast = np.array([float(score) for _, score in sorted(ours)])
    slow = np.array(theirs)
    scale = np.abs(slow).max()
    assert np.abs(fast - slow).max() / scale < 1e-4
    assert spearmanr(fast, slow).statistic >= 0.9999
