"""Slow and obvious definitions that fast code is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from conftest import tiny_model
from torch import Tensor, nn

from iprox.engine.loss import IGNORE, Batch
from iprox.models.load import as_proxy

VOCABULARY = 260


class _Norm(nn.Module):
    """A model's RMS norm without its detour through float32."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.weight = old.weight
        self.eps = getattr(old, "variance_epsilon", None) or old.eps
        self.offset = 1.0 if type(old).__name__.startswith("Gemma") else 0.0

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * (self.offset + self.weight)


def exact_model(architecture: str = "llama", **changes: Any) -> Any:
    """A frozen tiny model that really computes in float64.

    The library's norms and eager attention pass through float32 in any precision, which hides
    differences below 1e-7.
    """
    return in_float64(tiny_model(architecture, **changes))


def in_float64(model: Any) -> Any:
    """A model of float64 weights, frozen and without detours through float32."""
    model.set_attn_implementation("sdpa")
    norms = [n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    for name in norms:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Norm(model.get_submodule(name)))
    return model.requires_grad_(False)


def random_batch(lengths: list[int], prompts: list[int], seed: int = 0, pad: int = 0) -> Batch:
    """Random examples, right-padded; the first ``prompt`` tokens of each carry no label."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + pad
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        labels[row, prompt:length] = ids[row, prompt:length]
    return Batch(ids, labels, torch.tensor(lengths))


def one_of(batch: Batch, row: int) -> Batch:
    """One example of a batch alone, without padding."""
    length = int(batch.lengths[row])
    rows = slice(row, row + 1)
    return Batch(batch.input_ids[rows, :length], batch.labels[rows, :length], batch.lengths[rows])


def loss_of(model: Any, example: Batch, reduction: str = "token_mean") -> Tensor:
    """Loss of one unpadded example, token by token from the model's own logits."""
    logits = model(input_ids=example.input_ids).logits[0]
    terms = [
        -torch.log_softmax(logits[t], -1)[example.labels[0, t + 1]]
        for t in range(len(logits) - 1)
        if example.labels[0, t + 1] != IGNORE
    ]
    total = torch.stack(terms).sum()
    return total / len(terms) if reduction == "token_mean" else total


def weight_gradients(
    model: Any, layers: Mapping[str, nn.Linear], example: Batch, reduction: str = "token_mean"
) -> dict[str, Tensor]:
    """Weight gradients of one example's loss by autograd, (out, in) each."""
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    try:
        grads = torch.autograd.grad(loss_of(model, example, reduction), weights)
    finally:
        model.requires_grad_(False)
    return dict(zip(layers, grads, strict=True))


def inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product over all layers, in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def factorised(target: Any, layers: Mapping[str, nn.Linear], rank: int = 5) -> Any:
    """A proxy of ``target`` with random factors in all layers."""
    generator = torch.Generator().manual_seed(3)

    def draw(rows: int, columns: int) -> Tensor:
        return 0.2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    factors = {
        name: (draw(layer.out_features, rank), draw(rank, layer.in_features))
        for name, layer in layers.items()
    }
    return as_proxy(target, factors).requires_grad_(False)
