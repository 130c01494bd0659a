"""Ranks and sizes against the paper's table and known parameter counts."""

from __future__ import annotations

import math

import pytest

from iprox.errors import ConfigError
from iprox.numerics.ranks import (
    Architecture,
    auto_multiple,
    block_shapes,
    effective_sparsity,
    layer_parameters,
    max_useful_rank,
    model_size,
    rank_for,
)

LLAMA = Architecture(3072, 28, 8192, 24, 8, 128, 128256)
GEMMA = Architecture(2560, 34, 10240, 8, 4, 256, 262208, qk_norm=True, block_norms=4)
QWEN3 = Architecture(2560, 36, 9728, 32, 8, 128, 151936, qk_norm=True)
QWEN2 = Architecture(3584, 28, 18944, 28, 4, 128, 152064, tied=False, qkv_bias=True)
SMOLLM2 = Architecture(576, 30, 1536, 9, 3, 64, 49152)
QWEN_SMALL = Architecture(896, 24, 4864, 14, 2, 64, 151936, qkv_bias=True)

# IProX (arXiv:2602.17835), Table 2: sparsity -> billions of parameters, cut to one decimal;
# with the ranks of q, of k and v, and of the feed-forward layers that give them
TABLE_2 = [
    (LLAMA, 0.3, (1152, 640, 1664), 2.5),
    (LLAMA, 0.5, (768, 384, 1152), 1.8),
    (LLAMA, 0.7, (512, 256, 768), 1.3),
    (GEMMA, 0.3, (896, 512, 1536), 3.0),
    (GEMMA, 0.5, (640, 384, 1024), 2.3),
    (GEMMA, 0.7, (384, 256, 640), 1.6),
    (QWEN3, 0.3, (1152, 512, 1536), 3.1),
    (QWEN3, 0.5, (896, 384, 1024), 2.2),
    (QWEN3, 0.7, (512, 256, 640), 1.5),
    (QWEN2, 0.3, (1280, 384, 2176), 5.8),
    (QWEN2, 0.5, (896, 256, 1536), 4.4),
    (QWEN2, 0.7, (640, 256, 1024), 3.3),
]


@pytest.mark.parametrize(("arch", "sparsity", "ranks", "billions"), TABLE_2)
def test_sizes_of_the_paper(
    arch: Architecture, sparsity: float, ranks: tuple[int, int, int], billions: float
) -> None:
    found = {n: rank_for(*s, sparsity, multiple=128) for n, s in block_shapes(arch).items()}
    q, kv, ff = ranks
    assert [found[f"self_attn.{p}_proj"] for p in "qkvo"] == [q, kv, kv, q]
    assert [found[f"mlp.{p}_proj"] for p in ("gate", "up", "down")] == [ff] * 3
    total = model_size(arch, sparsity, multiple=128).total
    assert math.floor(total / 1e8) / 10 == billions


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        (LLAMA, 3_212_749_824),
        (QWEN3, 4_022_468_096),
        (QWEN2, 7_615_616_512),
        (SMOLLM2, 134_515_008),
        (QWEN_SMALL, 494_032_768),
    ],
)
def test_dense_sizes_are_those_of_the_published_checkpoints(
    arch: Architecture, parameters: int
) -> None:
    assert model_size(arch).total == parameters


def test_small_key_and_value_layers_stay_dense() -> None:
    shapes = block_shapes(QWEN_SMALL)
    assert rank_for(*shapes["self_attn.k_proj"], 0.5, multiple=128) is None
    assert rank_for(*shapes["self_attn.q_proj"], 0.5, multiple=128) == 256


def test_exact_multiples_are_not_rounded_past() -> None:
    # 0.3 of 2000 * 2000 / 4000 is 300, though (1 - 0.7) * 1000 is above it in floats
    assert (1 - 0.7) * 1000 > 300
    assert rank_for(2000, 2000, 0.7, multiple=100) == 300


def test_round_ceil_rounds_to_the_nearest_integer_first() -> None:
    # 0.5 * 10 * 16 / 26 = 3.08
    assert rank_for(10, 16, 0.5, multiple=1) == 4
    assert rank_for(10, 16, 0.5, multiple=1, rounding="round_ceil") == 3
    assert rank_for(10, 16, 0.99, multiple=1, rounding="round_ceil") == 1


def test_dense_rules_differ_between_no_saving_and_full_rank() -> None:
    # at 10 of (16, 16) factors have 320 weights instead of 256
    assert rank_for(16, 16, 0.3, multiple=10) is None
    assert rank_for(16, 16, 0.3, multiple=10, dense_rule="min_dim") == 10
    assert rank_for(16, 16, 0.3, multiple=16, dense_rule="min_dim") is None


@pytest.mark.parametrize(("out_dim", "in_dim"), [(16, 16), (7, 12), (3, 100), (1, 5)])
def test_max_useful_rank_is_the_last_that_saves(out_dim: int, in_dim: int) -> None:
    limit = max_useful_rank(out_dim, in_dim)
    dense = layer_parameters(out_dim, in_dim, None)
    assert layer_parameters(out_dim, in_dim, limit) < dense
    assert layer_parameters(out_dim, in_dim, limit + 1) >= dense
    assert max_useful_rank(out_dim, in_dim, "min_dim") == min(out_dim, in_dim) - 1


@pytest.mark.parametrize(
    ("smaller", "multiple"), [(1024, 128), (1023, 32), (256, 32), (255, 8), (64, 8), (63, 1)]
)
def test_auto_multiple_by_the_smaller_side(smaller: int, multiple: int) -> None:
    assert auto_multiple(smaller, 4096) == auto_multiple(4096, smaller) == multiple


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_sparsity_must_be_inside_its_range(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity is out of range"):
        rank_for(16, 16, sparsity)


def test_multiple_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="rank multiple"):
        rank_for(16, 16, 0.5, multiple=0)


def test_effective_sparsity_is_that_of_the_rounded_rank() -> None:
    rank = rank_for(3072, 8192, 0.5, multiple=128)
    after, before = layer_parameters(3072, 8192, rank), layer_parameters(3072, 8192, None)
    assert effective_sparsity(after, before) == 1 - 1152 * 11264 / (3072 * 8192)
