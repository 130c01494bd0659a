"""Proxies of the backward pass alone: the target's forward pass, gradients through factors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import job
from conftest import tiny_model, tiny_tokenizer
from oracles import exact_model, inner, one_of, random_batch, weight_gradients
from test_proxy import factors_of, write_factors
from torch import Tensor, nn

from iprox.engine.scoring import Scorer
from iprox.errors import ModelError
from iprox.models.layers import block_linears, scored_linears
from iprox.models.load import as_proxy, load_model, load_proxy, save_proxy
from iprox.models.lowrank import LowRankBackward, find_linear
from iprox.stages import proxy
from iprox.store.job import Job
from iprox.study.schema import LayersSection

ALL = LayersSection()
LENGTHS, PROMPTS = [17, 9, 12], [5, 2, 6]


class Slow(nn.Module):
    """The definition: the product's value is W x, its slope in x is that of the factors."""

    def __init__(self, old: nn.Linear, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.left, self.right = old.weight, old.bias, left, right

    def forward(self, x: Tensor) -> Tensor:
        thin = x @ self.right.T @ self.left.T
        y = x.detach() @ self.weight.T + thin - thin.detach()
        return y if self.bias is None else y + self.bias


def backward_only(target: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> Any:
    return as_proxy(target, factors, passes="backward").requires_grad_(False)


def slow(target: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> Any:
    model = copy.deepcopy(target)
    for name, pair in factors.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Slow(find_linear(model, name), *pair))
    return model.requires_grad_(False)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_scores_are_those_of_the_definition(architecture: str) -> None:
    target = exact_model(architecture)
    factors = {n: (f.left, f.right) for n, f in factors_of(target).items()}
    fast, reference = backward_only(target, factors), slow(target, factors)
    layers = scored_linears(fast, ALL)
    assert list(layers) == list(scored_linears(target, ALL))
    names = dict(reference.named_modules())
    generator = torch.Generator().manual_seed(0)
    queries = {
        n: torch.randn(2, *m.weight.shape, generator=generator, dtype=torch.float64)
        for n, m in layers.items()
    }
    batch = random_batch(LENGTHS, PROMPTS)
    scores = Scorer(fast, layers, queries).score(batch)
    for i in range(len(LENGTHS)):
        expected = weight_gradients(reference, {n: names[n] for n in layers}, one_of(batch, i))
        assert float(scores.squared_norms[i]) == pytest.approx(inner(expected, expected), rel=1e-9)
        for k in range(2):
            dot = inner(expected, {n: q[k] for n, q in queries.items()})
            assert float(scores.dots[i, k]) == pytest.approx(dot, rel=1e-8, abs=1e-12)


def test_whole_factors_score_as_the_target_does() -> None:
    target = exact_model()
    factors = {}
    for name, layer in block_linears(target, ALL).items():
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        factors[name] = (u * s, v)
    batch = random_batch(LENGTHS, PROMPTS)
    models = (target, backward_only(target, factors))
    exact, found = (Scorer(m, scored_linears(m, ALL), {}).score(batch) for m in models)
    torch.testing.assert_close(found.squared_norms, exact.squared_norms, rtol=1e-10, atol=0)
    assert torch.equal(found.losses, exact.losses)


def test_the_forward_pass_is_the_target_s_and_training_is_refused(tmp_path: Path) -> None:
    target = tiny_model(dtype=torch.float32)
    save_proxy(tmp_path, target, factors_of(target), tiny_tokenizer(), {}, "backward")
    model = load_proxy(tmp_path)
    ids = torch.arange(4, 24)[None]
    logits = (m(input_ids=ids).logits for m in (model, target))
    torch.testing.assert_close(*logits)
    with pytest.raises(ModelError, match="cannot be trained"):
        model(input_ids=ids, labels=ids).loss.backward()
    again = tmp_path / "again"
    model.save_pretrained(again)
    for name, tensor in load_proxy(again).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_stage_writes_one_that_loads(tmp_path: Path, target_folder: Path) -> None:
    target = load_model(target_folder)
    made = write_factors(tmp_path / "factors", factors_of(target))
    out = tmp_path / "out"
    work: Job = job(
        "proxy",
        out,
        {"warmup": target_folder, "factors": made},
        align={"epochs": 0.0, "recover_epochs": 0.0},
        gauge="balanced",
        passes="backward",
    )
    metrics = proxy.make(work)
    model = load_model(out)
    thin = [m for m in model.modules() if isinstance(m, LowRankBackward)]
    assert len(thin) == len(factors_of(target))
    held = sum(p.numel() for p in model.parameters())
    assert metrics["parameters"] == held + sum(m.left.numel() + m.right.numel() for m in thin)
