"""Sparsity to rank and back, and the sizes that follow from an architecture.

A layer (out, in) replaced by factors of rank r has r (out + in) parameters instead of out · in.
Sparsity is the share of parameters removed from each replaced layer, before the rank is rounded:
r = (1 - sparsity) · out · in / (out + in). This reading, with ranks rounded up to multiples of
128, reproduces all model sizes of IProX (arXiv:2602.17835, Table 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from iprox.errors import ConfigError

Rounding = Literal["ceil", "round_ceil"]
DenseRule = Literal["parameters", "min_dim"]
Multiple = int | Literal["auto"]


def rank_for(
    out_dim: int,
    in_dim: int,
    sparsity: float,
    multiple: Multiple = "auto",
    rounding: Rounding = "ceil",
    dense_rule: DenseRule = "parameters",
) -> int | None:
    """Rank of a layer's factors at a sparsity, or None when the layer is kept dense.

    Args:
        out_dim: Outputs of the layer.
        in_dim: Inputs of the layer.
        sparsity: Share of the layer's parameters to remove, between 0 and 1.
        multiple: The rank is rounded up to a multiple of this; ``auto`` as :func:`auto_multiple`.
        rounding: ``round_ceil`` rounds to the nearest integer before rounding up.
        dense_rule: When the layer is kept dense, see :func:`max_useful_rank`.

    Raises:
        ConfigError: Sparsity is not inside (0, 1), or the multiple is not a positive integer.
    """
    check_sparsity(sparsity)
    step = multiple_of(out_dim, in_dim, multiple)
    # exact: in floats 1 - 0.7 is above 0.3, and a rank that fits would round up by one multiple
    exact = (1 - Fraction(str(sparsity))) * out_dim * in_dim / (out_dim + in_dim)
    wanted = exact if rounding == "ceil" else Fraction(max(1, round(exact)))
    rank = step * math.ceil(wanted / step)
    return rank if rank <= max_useful_rank(out_dim, in_dim, dense_rule) else None


def max_useful_rank(out_dim: int, in_dim: int, dense_rule: DenseRule = "parameters") -> int:
    """Largest rank at which a layer is still replaced; 0 when there is none.

    With dense rule ``parameters``: the largest whose factors have fewer parameters than the layer.
    With ``min_dim`` (IProX's reference code): the largest below min(out, in), though its factors
    may have more.
    """
    if dense_rule == "min_dim":
        return min(out_dim, in_dim) - 1
    return (out_dim * in_dim - 1) // (out_dim + in_dim)


def auto_multiple(out_dim: int, in_dim: int) -> int:
    """Rank multiple by layer size: 128 as in the paper for large layers, less for small ones."""
    smaller = min(out_dim, in_dim)
    return next((q for at_least, q in ((1024, 128), (256, 32), (64, 8)) if smaller >= at_least), 1)


def multiple_of(out_dim: int, in_dim: int, multiple: Multiple) -> int:
    """What ranks of a layer are multiples of.

    Raises:
        ConfigError: The multiple is not a positive integer.
    """
    step = auto_multiple(out_dim, in_dim) if multiple == "auto" else multiple
    if step < 1:
        raise ConfigError(
            "a rank multiple is out of range",
            where="proxy.rank_multiple",
            value=multiple,
            allowed="auto, or an integer of at least 1",
        )
    return step


def layer_parameters(out_dim: int, in_dim: int, rank: int | None) -> int:
    """Weights of a layer kept dense (rank None) or replaced by factors, bias not counted."""
    return out_dim * in_dim if rank is None else rank * (out_dim + in_dim)


def blocks_kept(n_blocks: int, sparsity: float) -> int:
    """Blocks left at a sparsity: (1 - sparsity) n_blocks, halves rounded up, at least 1.

    Raises:
        ConfigError: Sparsity is not inside (0, 1), or too low to drop a block.
    """
    check_sparsity(sparsity)
    kept = max(1, math.floor((1 - Fraction(str(sparsity))) * n_blocks + Fraction(1, 2)))
    if kept == n_blocks:
        raise ConfigError(
            "no block is dropped, so the proxy would be the target itself",
            where="proxy.sparsity",
            value=sparsity,
            allowed=f"more than {1 / (2 * n_blocks):.3g} for a model of {n_blocks} blocks",
            fix="raise the sparsity",
        )
    return kept


def check_sparsity(sparsity: float) -> None:
    """Refuse a share to remove that is nothing or everything.

    Raises:
        ConfigError: It is not inside (0, 1).
    """
    if not 0 < sparsity < 1:
        raise ConfigError(
            "sparsity is out of range", where="proxy.sparsity", value=sparsity, allowed="0 < s < 1"
        )


def effective_sparsity(parameters: int, parameters_dense: int) -> float:
    """Share of parameters really removed; negative when factors are larger than the layer."""
    return 1 - parameters / parameters_dense


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer with gated feed-forward networks.

    Attributes:
        hidden: Width of the residual stream.
        blocks: Number of decoder blocks.
        ff: Width of the feed-forward network.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Rows of the token embedding.
        tied: Whether the head is the token embedding.
        qkv_bias: Whether q, k and v have biases.
        qk_norm: Whether queries and keys are normalised per head.
        block_norms: Norms of the hidden width in a block.
    """

    hidden: int
    blocks: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    block_norms: int = 2


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model or proxy.

    Attributes:
        linears: Weights of the decoder blocks' linear layers, dense or factorised.
        embeddings: Token embedding, and head if it is not tied to it.
        other: Norm gains and biases.
    """

    linears: int
    embeddings: int
    other: int

    @property
    def total(self) -> int:
        """All parameters, a tied head counted once."""
        return self.linears + self.embeddings + self.other


def block_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Linear layers of one decoder block: name -> (out, in)."""
    query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {
        "self_attn.q_proj": (query, arch.hidden),
        "self_attn.k_proj": (key, arch.hidden),
        "self_attn.v_proj": (key, arch.hidden),
        "self_attn.o_proj": (arch.hidden, query),
        "mlp.gate_proj": (arch.ff, arch.hidden),
        "mlp.up_proj": (arch.ff, arch.hidden),
        "mlp.down_proj": (arch.hidden, arch.ff),
    }


def model_size(
    arch: Architecture,
    sparsity: float | None = None,
    multiple: Multiple = "auto",
    rounding: Rounding = "ceil",
    dense_rule: DenseRule = "parameters",
) -> ModelSize:
    """Parameter counts of the model (sparsity None), or of its proxy with every linear replaced.

    Args:
        arch: Sizes of the model.
        sparsity: Share of each layer's parameters removed.
        multiple: As :func:`rank_for`.
        rounding: As :func:`rank_for`.
        dense_rule: As :func:`rank_for`.

    Raises:
        ConfigError: As :func:`rank_for`.
    """
    linears = 0
    for out_dim, in_dim in block_shapes(arch).values():
        rank = None
        if sparsity is not None:
            rank = rank_for(out_dim, in_dim, sparsity, multiple, rounding, dense_rule)
        linears += layer_parameters(out_dim, in_dim, rank)
    biases = (arch.heads + 2 * arch.kv_heads) * arch.head_dim if arch.qkv_bias else 0
    gains = arch.block_norms * arch.hidden + (2 * arch.head_dim if arch.qk_norm else 0)
    return ModelSize(
        linears=arch.blocks * linears,
        embeddings=arch.vocab * arch.hidden * (1 if arch.tied else 2),
        other=arch.blocks * (biases + gains) + arch.hidden,
    )
