"""Texts and models of the benchmark: real ones, made once in a work folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iprox.data.chat import Encoded, encode, pad_id
from iprox.data.pools import build_pool
from iprox.data.sources import resolve
from iprox.models.layers import block_linears
from iprox.models.load import load_model, load_tokenizer, save_proxy
from iprox.models.lowrank import Passes, replace_linears
from iprox.numerics.ipsvd import plain_svd, truncate
from iprox.numerics.ranks import max_useful_rank, rank_for
from iprox.stages.target import load_target, save_target
from iprox.study.schema import LayersSection, PoolSection, TargetSection

MODEL = "smollm2-135m"
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
BACKWARD = 0.5
"""Sparsity of the proxy of the backward pass alone."""
PROXIES = [f"backward-{BACKWARD}", *(f"svd-{sparsity}" for sparsity in SPARSITIES)]
MAX_LENGTH = 512
LARGE_VOCABULARY = 8192
N_QUERIES = 3
DEMO_POOL = PoolSection(name="alpaca-demo", limit=80, max_chars=400)
"""The demo's pool. Its first examples are scored, the last ones give the query gradients."""


def make(work: Path, cache_dir: Path) -> None:
    """Write the target, plain-SVD proxies of it, and the tokens of the demo's pool.

    What exists is kept. Nothing comes from a study; the texts come from the same package as the
    demo's, and the weights of proxies do not change what they cost.
    """
    target = work / "target"
    if not target.is_dir():
        target.mkdir(parents=True)
        save_target(*load_target(TargetSection(model=MODEL), Path(), cache_dir), target)
    if not all((work / name).is_dir() for name in PROXIES):
        _make_proxies(work)
    if not (work / "texts.json").is_file():
        tokenizer = load_tokenizer(target)
        pool = build_pool(resolve(DEMO_POOL, Path(), cache_dir), DEMO_POOL).candidates
        texts = [
            encode(list(c.messages), tokenizer, "tokenizer", MAX_LENGTH, example_id=c.example_id)
            for c in pool
        ]
        content = {"pad_id": pad_id(tokenizer), "texts": [asdict(t) for t in texts]}
        (work / "texts.json").write_text(json.dumps(content), encoding="utf-8")


def read_texts(work: Path) -> tuple[list[Encoded], int]:
    """All texts, and the token id of padding."""
    content = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    return [Encoded(**text) for text in content["texts"]], content["pad_id"]


def cut(
    texts: Sequence[Encoded], lengths: Sequence[int], vocabulary: int | None = None
) -> list[Encoded]:
    """Examples of given lengths, cut one after the other out of the texts put end to end.

    The first quarter of each is taken as its prompt, without a loss. Token ids are taken modulo
    ``vocabulary`` for a model that has fewer.
    """
    stream = [token % (vocabulary or token + 1) for text in texts for token in text.input_ids]
    stream = stream * (1 + sum(lengths) // len(stream))
    examples, start = [], 0
    for length in lengths:
        ids = stream[start : start + length]
        examples.append(Encoded(ids, [-100] * (length // 4) + ids[length // 4 :]))
        start += length
    return examples


def large_blocks(sparsity: float | None) -> Any:
    """Four blocks of Llama-3.2-3B's shapes with random weights and a small vocabulary.

    Args:
        sparsity: Of the block linears, replaced by random factors; None leaves them dense.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=LARGE_VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if sparsity is not None:
        replace_linears(model, _ranks(model, sparsity))
        for name, parameter in model.named_parameters():
            if name.endswith((".left.weight", ".right.weight")):
                nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def _make_proxies(work: Path) -> None:
    """Plain SVD of every block linear at each sparsity, and one for the backward pass alone."""
    target, tokenizer = load_model(work / "target"), load_tokenizer(work / "target")
    directions = {
        name: plain_svd(layer.weight, max(1, max_useful_rank(*layer.weight.shape)))
        for name, layer in block_linears(target, LayersSection()).items()
    }

    def save(name: str, sparsity: float, passes: Passes) -> None:
        ranks = _ranks(target, sparsity)
        factors = {layer: truncate(directions[layer], rank) for layer, rank in ranks.items()}
        (work / name).mkdir(exist_ok=True)
        pairs = {layer: (f.left, f.right) for layer, f in factors.items()}
        save_proxy(work / name, target, pairs, tokenizer, {}, passes)

    save(f"backward-{BACKWARD}", BACKWARD, "backward")
    for sparsity in SPARSITIES:
        save(f"svd-{sparsity}", sparsity, "both")


def _ranks(model: Any, sparsity: float) -> dict[str, int]:
    """Rank of every layer that is not kept dense."""
    layers = block_linears(model, LayersSection())
    ranks = {name: rank_for(*layer.weight.shape, sparsity) for name, layer in layers.items()}
    return {name: rank for name, rank in ranks.items() if rank is not None}
