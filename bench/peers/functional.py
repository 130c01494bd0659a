"""The loss of one example as libraries on ``torch.func`` want it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def example_loss(model: nn.Module, weights: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of one example, with no operation whose shape depends on its data.

    Under ``vmap`` no position can be left out, so the head is applied at every position; the
    causal mask is given, because making it looks at the data.

    Args:
        model: A causal LM.
        weights: Parameters by name in place of its own.
        input_ids: (tokens,).
        labels: (tokens,), -100 where there is no loss.
    """
    tokens = len(input_ids)
    hidden = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    output = functional_call(
        model,
        weights,
        args=(),
        kwargs={"input_ids": input_ids[None], "attention_mask": hidden, "use_cache": False},
    )
    targets = labels[1:]
    losses = F.cross_entropy(output.logits[0, :-1], targets.clamp(min=0), reduction="none")
    supervised = (targets != -100).to(losses)
    return (losses * supervised).sum() / supervised.sum()
