"""Token losses of frozen heads, without ever holding the logits of a whole batch.

Logits of a large vocabulary are the biggest tensors of a pass: 8,192 tokens of a vocabulary of
262,144 take 8 GB, and autograd keeps three copies. Here they are made, turned into losses and
into gradients of the hidden states, and dropped, a slice of the tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iprox.models.classifier import output_layer
from iprox.numerics.ghost import widen

SLICE_BYTES = 64 * 2**20

VOCABULARY_ROWS = 8192
"""Rows of the head that are widened at a time."""


def token_losses(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    """``-log p(target)`` at every hidden state, differentiable by the states alone.

    Args:
        model: A causal LM or a classifier; its head is a linear layer, soft-capped where its
            config says so.
        states: Last hidden states, (tokens, hidden), in the head's precision or a higher one.
        targets: Next tokens or labels, (tokens,).

    Returns:
        (tokens,) in float32 (float64 for a float64 model).
    """
    head = output_layer(model)
    cap = getattr(model.config, "final_logit_softcapping", None)
    losses: Tensor = _HeadLosses.apply(states, targets, head.weight, head.bias, cap)
    return losses


@torch.no_grad()
def draw_tokens(model: Any, states: Tensor, uniforms: Tensor) -> Tensor:
    """A next token for every hidden state, drawn from the model's own distribution.

    Args:
        model: A causal LM.
        states: Last hidden states, (tokens, hidden).
        uniforms: A number in [0, 1) for each draw, (tokens,) float64; equal ones draw equally.

    Returns:
        (tokens,) int64.
    """
    head = output_layer(model)
    cap = getattr(model.config, "final_logit_softcapping", None)
    rows = max(1, SLICE_BYTES // (8 * len(head.weight)))
    drawn = []
    for some, places in zip(states.split(rows), uniforms.split(rows), strict=True):
        logits = _logits(some, head.weight, head.bias)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        below = torch.softmax(logits.double(), dim=-1).cumsum(-1)
        drawn.append(torch.searchsorted(below, places[:, None] * below[:, -1:], right=True)[:, 0])
    return torch.cat(drawn).clamp_(max=len(head.weight) - 1)


class _HeadLosses(torch.autograd.Function):
    """Losses forward; their gradients, which cost one more product, are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Any, cap: float | None
    ) -> Tensor:
        gradients = torch.empty_like(states)
        rows = max(1, SLICE_BYTES // (4 * len(weight)))
        losses = [
            _slice(*part, weight, bias, cap)
            for part in zip(
                states.split(rows), targets.split(rows), gradients.split(rows), strict=True
            )
        ]
        ctx.save_for_backward(gradients)
        return torch.cat(losses) if losses else widen(states).new_zeros(0)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad_losses[:, None].to(gradients.dtype), None, None, None, None


def _slice(
    states: Tensor,
    targets: Tensor,
    gradients: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cap: float | None,
) -> Tensor:
    """Losses (tokens,) of some tokens; their gradients by the states go into ``gradients``."""
    logits = _logits(states, weight, bias)
    slope = None
    if cap is not None:
        bent = torch.tanh(logits / cap)
        logits, slope = bent * cap, 1 - bent.square()
    log_p = torch.log_softmax(logits, dim=-1)
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    by_logits = log_p.exp_()
    by_logits.scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None])
    if slope is not None:
        by_logits *= slope
    gradients.copy_(by_logits.to(weight.dtype) @ weight)
    return losses


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in at least float32, never rounded to less.

    In bfloat16 a logit of 20 is one of 8 per unit: rounding it changes probabilities by 6 %.
    """
    if weight.dtype in (torch.float32, torch.float64):
        return F.linear(states, weight, bias)
    if states.device.type == "cuda":
        logits = torch.mm(states.to(weight.dtype), weight.mT, out_dtype=torch.float32)
    else:
        logits = states.new_empty(len(states), len(weight), dtype=torch.float32)
        parts = zip(
            logits.split(VOCABULARY_ROWS, dim=1), weight.split(VOCABULARY_ROWS), strict=True
        )
        for part, rows in parts:
            part.copy_(states.float() @ rows.float().mT)
    return logits if bias is None else logits + bias
