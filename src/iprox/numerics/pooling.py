"""One vector for a text from its hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def last_token(states: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of every text's last token.

    Args:
        states: (texts, tokens, dim), padded at the right.
        lengths: Tokens of each text, (texts,).

    Returns:
        (texts, dim).
    """
    return states[torch.arange(len(states), device=states.device), lengths - 1]


def position_weighted(states: Tensor, lengths: Tensor) -> Tensor:
    """Mean of hidden states, the i-th of a text weighing ``i / (1 + 2 + ... + n)``.

    Later tokens of a causal model have seen more of the text (Muennighoff, arXiv:2202.08904; as
    RDS+ in Ivison et al., arXiv:2503.01807).

    Args:
        states: (texts, tokens, dim), padded at the right.
        lengths: Tokens of each text, (texts,).

    Returns:
        (texts, dim).
    """
    places = torch.arange(1, states.shape[1] + 1, device=states.device)
    weights = torch.where(places <= lengths[:, None], places, 0).to(states.dtype)
    return torch.einsum("tp,tpd->td", weights / weights.sum(1, keepdim=True), states)


POOLINGS = {"last": last_token, "weighted": position_weighted}
"""Ways to one vector by name."""
