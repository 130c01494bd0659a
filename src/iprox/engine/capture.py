"""Inputs and output gradients of linear layers, handed over one layer at a time.

During the backward pass each layer's output gradient arrives; the visitor then sees the pair
(inputs X, output gradients D) of that layer and the pair is dropped. No weight ever gets a
``.grad``, and layers that read the same tensor (q, k, v; gate, up) share one X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iprox.engine.loss import Batch, example_losses, input_embeddings
from iprox.errors import NumericsError

Visitor = Callable[[str, Tensor, Tensor], None]
"""Called as visitor(layer, X (examples, tokens, in), D (examples, tokens, out))."""


@contextmanager
def watch(layers: Mapping[str, nn.Linear], visit: Visitor) -> Iterator[None]:
    """Within this context, every backward pass calls ``visit`` for each of ``layers``.

    A module that is called several times in a pass is visited once per call; its gradient is
    the sum over the calls.
    """

    def forward_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].detach()
            output.register_hook(lambda grad: visit(name, inputs, grad.detach()))

        return hook

    handles = [module.register_forward_hook(forward_hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_pass(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batch: Batch,
    visit: Visitor,
    reduction: str = "token_mean",
) -> Tensor:
    """One forward and one backward pass over a batch with frozen weights.

    Args:
        model: A causal LM whose parameters do not require gradients.
        layers: Layers to visit.
        batch: Examples, right-padded. Output gradients at padding are exactly zero.
        visit: Receives each layer's inputs and output gradients of the *sum* of the examples'
            losses, so that the rows of an example are its own gradient.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Returns:
        Loss of every example, (examples,).

    Raises:
        NumericsError: A loss is not finite (the message gives its place in the batch).
    """
    embeds = input_embeddings(model, batch)
    with watch(layers, visit), torch.enable_grad():
        losses = example_losses(model, batch, reduction, embeds)
        check_finite(losses)
        torch.autograd.backward(losses.sum(), inputs=[embeds])
    return losses.detach()


def check_finite(losses: Tensor) -> None:
    """Raise ``NumericsError`` naming the first example of the batch whose loss is not finite."""
    bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            "the loss of an example is not finite",
            where=f"place {bad[0]} in the batch",
            value=float(losses[bad[0]]),
            allowed="a finite number",
            fix="look for broken text, or for weights or a precision that overflow",
        )
