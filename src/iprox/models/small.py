"""A tiny language model and its tokenizer, built from texts on the spot: retrained in seconds.

Retraining on hundreds of subsets, which is how attribution is checked, is out of reach for any
model of use. What is measured on a model of this size says how methods compare on it, not how
they would on a large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from iprox.errors import DataError

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, END = SPECIAL[0], SPECIAL[3]

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer learned from texts, with a chat template.

    Args:
        texts: What merges are learned from; the same texts give the same tokenizer.
        vocabulary: Tokens, special ones and the 256 bytes included.

    Raises:
        DataError: The vocabulary has no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIAL)
    if vocabulary < least:
        raise DataError("a vocabulary without all bytes", value=vocabulary, allowed=f">= {least}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def small_model(
    tokenizer: Any, *, width: int, blocks: int, heads: int, max_length: int, seed: int
) -> Any:
    """A Llama of random weights.

    Args:
        tokenizer: Gives the vocabulary and its special tokens.
        width: Size of the residual stream; the feed-forward layers are twice as wide.
        blocks: Decoder blocks.
        heads: Attention heads.
        max_length: Longest text in tokens.
        seed: Seed of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
