"""Recovery: training a proxy's factors until it predicts as the target does.

Low-rank factors change what a model predicts far more than what it weighs: at half of the
parameters the loss of a small model more than doubles. The output gradient of a token is the
difference between the predicted distribution and the label, carried back through the layers, so
the gradients of a model that predicts something else point elsewhere, whatever its factors
preserve. Distilling the target's predictions at every position (Hinton et al., arXiv:1503.02531)
needs first-order passes only and one forward pass of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprox.engine.loss import Batch, attention_mask, head, hidden_states

LOGITS_PER_SLICE = 1 << 25
"""Logits held at once; the vocabulary makes them the largest tensor of a pass."""


class Imitation(NamedTuple):
    """The divergence of a proxy's predictions on one batch, and its gradient."""

    divergence: float
    gradients: list[Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether the divergence is neither infinite nor undefined."""
        return bool(torch.isfinite(torch.tensor(self.divergence)))


def imitate(
    target: Any, proxy: Any, parameters: Sequence[nn.Parameter], batch: Batch, tau: float = 1.0
) -> Imitation:
    """tau² KL(target ‖ proxy) of the next-token predictions, the mean over all tokens.

    Every token of the batch counts, prompts included: gradients of the response pass through the
    states of the prompt. Heads are applied to slices of the tokens, so that memory does not grow
    with the vocabulary times the batch.

    Args:
        target: The frozen target.
        proxy: The proxy.
        parameters: Its weights to differentiate by.
        batch: Examples.
        tau: Temperature.
    """
    mask = attention_mask(batch)
    tokens = torch.ones_like(batch.input_ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        expected = hidden_states(target, batch)[tokens]
    with torch.enable_grad():
        states = hidden_states(proxy, batch)[tokens]
        divergence, by_states = _divergence(target, proxy, expected, states.detach(), tau)
        gradients = torch.autograd.grad(states, list(parameters), by_states)
    return Imitation(divergence, list(gradients))


def _divergence(
    target: Any, proxy: Any, expected: Tensor, states: Tensor, tau: float
) -> tuple[float, Tensor]:
    """Divergence of the predictions made from last states (tokens, hidden), and its gradient."""
    vocabulary = len(proxy.get_output_embeddings().weight)
    rows = max(1, LOGITS_PER_SLICE // vocabulary)
    total, by_states = 0.0, []
    for theirs, ours in zip(expected.split(rows), states.split(rows), strict=True):
        leaf = ours.requires_grad_()
        with torch.no_grad():
            teacher = _log_probabilities(head(target, theirs), tau)
        student = _log_probabilities(head(proxy, leaf), tau)
        divergence = F.kl_div(student, teacher.to(student.dtype), reduction="sum", log_target=True)
        divergence = tau**2 * divergence / len(states)
        by_states.append(torch.autograd.grad(divergence, leaf)[0])
        total += float(divergence.detach())
    return total, torch.cat(by_states)


def _log_probabilities(logits: Tensor, tau: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(logits / tau, dim=-1)
