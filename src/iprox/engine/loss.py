"""Per-example losses with the head applied only where there is a label.

The loss of an example is the mean (or sum) of ``-log p(token | tokens before)`` over its
supervised tokens. A batch returns one loss per example; back-propagating their *sum* makes
the rows of every output gradient belong to their own example, unscaled, because no operation
mixes examples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Right-padded examples."""

    input_ids: Tensor  # (examples, tokens) int64
    labels: Tensor  # (examples, tokens) int64, IGNORE where not supervised
    lengths: Tensor  # (examples,) int64, without padding

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(t.to(device) for t in self))


def attention_mask(batch: Batch) -> Tensor | None:
    """Mask (examples, tokens) of real tokens, or None when nothing is padded.

    Without padding the causal mask alone is enough, and attention kernels are faster for it.
    """
    tokens = batch.input_ids.shape[1]
    if bool((batch.lengths == tokens).all()):
        return None
    positions = torch.arange(tokens, device=batch.lengths.device)
    return (positions[None, :] < batch.lengths[:, None]).long()


def supervised_positions(labels: Tensor) -> Tensor:
    """Positions (examples, tokens) whose *next* token is supervised."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


def hidden_states(model: Any, batch: Batch, embeds: Tensor | None = None) -> Tensor:
    """Last hidden states (examples, tokens, hidden) of a causal LM, without its head."""
    tokens: dict[str, Any] = {"inputs_embeds": embeds}
    if embeds is None:
        tokens = {"input_ids": batch.input_ids}
    output = model.base_model(attention_mask=attention_mask(batch), use_cache=False, **tokens)
    states: Tensor = output.last_hidden_state
    return states


def head(model: Any, states: Tensor) -> Tensor:
    """Logits (rows, vocabulary) of hidden states (rows, hidden), soft-capped where the model is."""
    logits: Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def example_losses(
    model: Any, batch: Batch, reduction: str = "token_mean", embeds: Tensor | None = None
) -> Tensor:
    """Loss of every example of a batch.

    Args:
        model: A causal LM.
        batch: Its examples.
        reduction: ``token_mean`` or ``token_sum`` over an example's supervised tokens.
        embeds: Token embeddings (examples, tokens, hidden) to start from instead of ids.

    Returns:
        (examples,) in float32 (float64 for a float64 model); 0 for an example without
        supervised tokens.
    """
    states = hidden_states(model, batch, embeds)
    mask = supervised_positions(batch.labels)
    logits = head(model, states[mask])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = batch.labels[:, 1:][mask[:, :-1]]
    token_losses = F.cross_entropy(logits, targets, reduction="none")
    return reduced(token_losses, mask.nonzero()[:, 0], len(batch.labels), reduction)


def reduced(token_losses: Tensor, owners: Tensor, n_examples: int, reduction: str) -> Tensor:
    """Losses (examples,) from those of supervised tokens (tokens,) and whose they are (tokens,).

    An example without supervised tokens has the loss 0.
    """
    losses = token_losses.new_zeros(n_examples).index_add(0, owners, token_losses)
    if reduction == "token_sum":
        return losses
    return losses / torch.bincount(owners, minlength=n_examples).clamp(min=1)


def input_embeddings(model: Any, batch: Batch) -> Tensor:
    """Token embeddings as a leaf that requires gradients, so that frozen weights need none."""
    embeds: Tensor = model.get_input_embeddings()(batch.input_ids)
    return embeds.detach().requires_grad_()
