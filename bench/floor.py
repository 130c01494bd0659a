"""Plain passes over the pool: what a scorer cannot do without, and what is often done instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.problem import Problem, batch_of
from iprox.engine.loss import Batch, example_losses, input_embeddings
from iprox.numerics.matmul import vector_products

FROZEN = (
    "frozen",
    "frozen, padded batches",
    "frozen, eager attention",
    "frozen, PyTorch's choice of library",
)
"""The passes that a ratio is taken to, whichever of them is fastest."""


def floors(problem: Problem, batches: Sequence[Batch]) -> dict[str, Callable[[], None]]:
    """The plain passes, by name.

    Args:
        problem: Model and pool.
        batches: The pool in padded batches, for the passes that pad.
    """
    singles = [batch_of([example], problem.pad_id) for example in problem.pool]
    return {
        "forward": lambda: forward(problem, singles),
        "frozen": lambda: frozen(problem, singles),
        "frozen, padded batches": lambda: frozen(problem, batches),
        "frozen, eager attention": lambda: eager(problem, singles),
        "frozen, PyTorch's choice of library": lambda: own_library(problem, singles),
        "weight gradients": lambda: weight_gradients(problem, singles),
        "forward(labels=...), padded batches": lambda: labelled(problem, batches),
    }


def frozen_floors(problem: Problem, batches: Sequence[Batch]) -> dict[str, Callable[[], None]]:
    """Those of :func:`floors` that ratios are taken to."""
    return {name: run for name, run in floors(problem, batches).items() if name in FROZEN}


@torch.no_grad()
def forward(problem: Problem, batches: Sequence[Batch]) -> None:
    """Losses alone."""
    for batch in batches:
        example_losses(problem.model, batch)


def frozen(problem: Problem, batches: Sequence[Batch]) -> None:
    """Losses and the backward pass through all blocks, without any weight's gradient.

    The head is applied at supervised positions only; there is no mask where nothing is padded.
    """
    for batch in batches:
        embeds = input_embeddings(problem.model, batch)
        losses = example_losses(problem.model, batch, embeds=embeds)
        torch.autograd.backward(losses.sum(), inputs=[embeds])


def eager(problem: Problem, batches: Sequence[Batch]) -> None:
    """The frozen pass with attention by plain products instead of the fused kernel."""
    before = problem.model.config._attn_implementation
    problem.model.set_attn_implementation("eager")
    frozen(problem, batches)
    problem.model.set_attn_implementation(before)


def own_library(problem: Problem, batches: Sequence[Batch]) -> None:
    """The frozen pass with products from the library that PyTorch would take by itself."""
    with vector_products():
        frozen(problem, batches)


def weight_gradients(problem: Problem, batches: Sequence[Batch]) -> None:
    """The same with the gradients of the block linears' weights."""
    weights = [layer.weight.requires_grad_() for layer in problem.layers.values()]
    for batch in batches:
        losses = example_losses(problem.model, batch)
        torch.autograd.backward(losses.sum(), inputs=weights)
        for weight in weights:
            weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)


def labelled(problem: Problem, batches: Sequence[Batch]) -> None:
    """The model's own ``forward(labels=...)`` with a mask of ones, and its backward pass.

    Weights are frozen; the head is applied at every position, padding included.
    """
    for batch in batches:
        embeds = input_embeddings(problem.model, batch)
        output = problem.model(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(batch.input_ids),
            labels=batch.labels,
            use_cache=False,
        )
        torch.autograd.backward(output.loss, inputs=[embeds])
