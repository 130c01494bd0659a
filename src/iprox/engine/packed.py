"""Examples one behind the other in a single row: no padding, and no attention between them.

Linear layers see one long matrix of tokens, which they are fastest at; attention runs inside
each example by itself. So an example's results are those it has alone, and a batch costs what
its tokens cost, however different its examples' lengths are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iprox.engine.loss import IGNORE, Batch
from iprox.engine.residual import wide_residuals
from iprox.errors import ModelError
from iprox.numerics import matmul
from iprox.numerics.ghost import widen

ATTENTION = "iprox_packed"
REPLACED = ("sdpa", "eager")
"""Attention implementations that packing replaces by its own. The others (flash attention, flex)
find the borders of examples by themselves, where positions start again at 0."""

LONGEST_BY_PRODUCTS = 640
"""Tokens up to which attention by plain products is considered: its memory grows with their
square."""

UNSUPPORTED = ("s_aux", "position_bias")
"""Arguments of attention variants that are not a softmax over the tokens before alone."""


class Packed(NamedTuple):
    """A batch without its padding."""

    input_ids: Tensor  # (tokens,) int64
    targets: Tensor  # (tokens,) int64: the next token where it is supervised, else IGNORE
    positions: Tensor  # (tokens,) int64, from 0 in every example
    lengths: list[int]  # tokens of each example

    @property
    def owners(self) -> Tensor:
        """Example of each token, (tokens,)."""
        sizes = torch.tensor(self.lengths, device=self.input_ids.device)
        return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)


def pack(batch: Batch) -> Packed:
    """The examples of a padded batch one behind the other."""
    width = batch.input_ids.shape[1]
    places = torch.arange(width, device=batch.input_ids.device)
    real = places[None, :] < batch.lengths[:, None]
    targets = torch.full_like(batch.labels, IGNORE)
    targets[:, :-1] = batch.labels[:, 1:]
    positions = places.expand_as(real)
    lengths = [int(n) for n in batch.lengths]
    return Packed(batch.input_ids[real], targets[real], positions[real], lengths)


def packed_states(model: Any, packed: Packed) -> Tensor:
    """Last hidden states (tokens, hidden) of a causal LM, without its head.

    Those of a bfloat16 model are in float32, see :mod:`iprox.engine.residual`.
    """
    ids, positions = packed.input_ids[None], packed.positions[None]
    with _packed_attention(model) as own, wide_residuals(model):
        segments = {"segments": packed.lengths} if own else {}
        output = model.base_model(
            input_ids=ids, position_ids=positions, use_cache=False, **segments
        )
    states: Tensor = output.last_hidden_state
    return states[0]


@contextmanager
def _packed_attention(model: Any) -> Iterator[bool]:
    """Within this context the model's attention stays inside examples; yields whether by us."""
    _register()
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    if model.config._attn_implementation not in REPLACED:
        yield False
        return
    try:
        for config, _ in before:
            config._attn_implementation = ATTENTION
        yield True
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@functools.cache
def _register() -> None:
    """Make :func:`segment_attention` known to the model library under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, segment_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of several examples that share a row.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: (1, key heads, tokens, width).
        attention_mask: Not used; which tokens see each other follows from the segments.
        segments: Tokens of each example.
        scaling: Factor on the logits; 1 / sqrt(width) if absent.
        sliding_window: Each token sees only this many tokens, itself included.
        softcap: Limit that logits are bent towards.
        others: What else a model passes; none of it may change the attention.

    Returns:
        (1, tokens, heads, width), and no attention weights.

    Raises:
        ModelError: The model asks for an attention this is not.
    """
    odd = [name for name in UNSUPPORTED if others.get(name) is not None]
    if odd:
        raise ModelError(
            "the model's attention is of a kind that cannot be packed",
            where=type(module).__name__,
            value=odd[0],
            fix="set target.attention: flash_attention_2",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = zip(
        query.split(segments, dim=2),
        key.split(segments, dim=2),
        value.split(segments, dim=2),
        strict=True,
    )
    outputs = [_attend(q, k, v, scale, sliding_window, softcap) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Causal attention of one example, (1, heads, tokens, width)."""
    heads, tokens = key.shape[1], query.shape[2]
    groups = query.shape[1] // heads
    inside = window is None or tokens <= window
    if inside and cap is None and not _products_are_faster(value):
        q, k = query.to(value.dtype), key.to(value.dtype)  # rotated in float32
        return F.scaled_dot_product_attention(
            q, k, value, is_causal=True, scale=scale, enable_gqa=groups > 1
        )
    # In at least float32, as fused kernels do: logits rounded to bfloat16 shift the weights. The
    # query heads of one key head are one matrix: (key heads, groups * tokens, width).
    q, k = widen(query[0]) * scale, widen(key[0])
    q = q.unflatten(0, (heads, groups)).flatten(1, 2)
    bias = _bias(tokens, None if inside else window, groups, q.dtype, q.device)
    if cap is None:
        logits = torch.baddbmm(bias, q, k.mT)
    else:
        logits = torch.tanh(q @ k.mT / cap) * cap + bias
    attended = torch.softmax(logits, dim=-1).to(value.dtype) @ value[0]
    return attended.unflatten(1, (groups, tokens)).flatten(0, 1)[None]


def _products_are_faster(value: Tensor) -> bool:
    """Whether plain products beat the fused kernel, as measured on CPUs.

    They do in bfloat16 (2 to 4 times), and up to some hundred tokens in float32 when products
    come from oneDNN (2 to 5 times).
    """
    if value.device.type != "cpu" or value.shape[2] > LONGEST_BY_PRODUCTS:
        return False
    return value.dtype == torch.bfloat16 or (
        value.dtype == torch.float32 and matmul.is_from_onednn()
    )


@functools.lru_cache(maxsize=32)
def _bias(
    tokens: int, window: int | None, groups: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-inf where a token (rows) must not see another (columns), (groups * tokens, tokens)."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    hidden = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
    zeros = torch.zeros(tokens, tokens, dtype=dtype, device=device)
    return zeros.masked_fill(hidden, float("-inf")).repeat(groups, 1)
