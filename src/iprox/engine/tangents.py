"""How far each layer's input moves when the weights move along a query gradient.

A score is a derivative: the inner product of an example's gradient with a query gradient Q is
how fast its loss changes when the weights move along Q. Seen from a layer with weight W, output
gradients D (tokens, out) and inputs that move by T (tokens, in), the layers before it add the sum
of D ∘ (T Wᵀ) to the score. With W̃ in place of W in the backward pass this becomes D ∘ (T W̃ᵀ): the
score's error is the sum of D ∘ (T (W̃ - W)ᵀ), exactly so if one layer is replaced. T is therefore to
the backward pass what the inputs themselves are to the forward pass, where the loss changes by
D ∘ (X (W̃ - W)ᵀ) (IProX, arXiv:2602.17835, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from iprox.engine.loss import Batch, hidden_states
from iprox.engine.objective import TWICE, forward_derivatives

TangentVisitor = Callable[[str, Tensor], None]
"""Called as visitor(layer, T (examples, tokens, in))."""


def input_tangents(
    model: Any,
    layers: Mapping[str, nn.Linear],
    directions: Mapping[str, Tensor],
    batch: Batch,
    visit: TangentVisitor,
) -> None:
    """One forward pass that carries along its derivative by the weights of some layers.

    Args:
        model: A frozen causal LM. An attention kernel that cannot be differentiated forward is
            exchanged for one that can.
        layers: The layers whose weights move.
        directions: Layer -> where its weight moves to, (out, in), in the model's precision.
        batch: Examples on the model's device.
        visit: Sees every layer and how far its input moves.
    """
    if model.config._attn_implementation not in TWICE:
        model.set_attn_implementation("sdpa")

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def move(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, moved = forward_ad.unpack_dual(args[0])
            visit(name, torch.zeros_like(x) if moved is None else moved)
            y, carried = forward_ad.unpack_dual(output)
            own = F.linear(x, directions[name])
            return forward_ad.make_dual(y, own if carried is None else own + carried)

        return move

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), forward_ad.dual_level(), forward_derivatives():
            hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
