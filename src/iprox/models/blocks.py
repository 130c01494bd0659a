"""Decoder blocks as a whole: finding them, and a model of some of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iprox.errors import ModelError
from iprox.models.load import assign_weights

BLOCKS = "layers"


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Blocks of a causal LM, in the order they are called.

    Raises:
        ModelError: It has none where decoders have theirs.
    """
    blocks = getattr(model.base_model, BLOCKS, None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != model.config.num_hidden_layers:
        raise ModelError(
            "the model has no decoder blocks of a known shape",
            where=type(model).__name__,
            allowed=f"a list {model.base_model_prefix}.{BLOCKS} of num_hidden_layers blocks",
            fix="use a Llama, Qwen2, Qwen3 or Gemma3 style model",
        )
    return blocks


def with_blocks(model: Any, kept: Sequence[int]) -> Any:
    """A new model of some of a model's blocks: same class, fewer layers, in evaluation mode.

    Blocks are numbered anew, so that caches fit. What the config says of each block, such as which
    of them attend within a window, goes with the block and not with its number.

    Args:
        model: A causal LM; embedding, final norm and head are taken over.
        kept: Places of the blocks to keep, ascending.

    Raises:
        ModelError: The model's blocks cannot be found, or there are none to keep.
    """
    from transformers.initialization import no_init_weights

    blocks = decoder_blocks(model)
    if not kept or sorted(set(kept)) != list(kept) or kept[-1] >= len(blocks):
        raise ModelError(
            "blocks to keep are not places in ascending order",
            value=list(kept),
            allowed=f"at least one of 0 to {len(blocks) - 1}",
        )
    with no_init_weights():
        smaller = type(model)._from_config(
            _config_of(model.config, kept),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    assign_weights(smaller, _weights_of(model, kept), Path(type(model).__name__))
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).eval()


def _config_of(config: Any, kept: Sequence[int]) -> Any:
    """The config of the kept blocks: every list that has an entry per layer is cut with them."""
    values = config.to_dict()
    per_block = {
        key: [value[i] for i in kept]
        for key, value in values.items()
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers
    }
    return type(config)(**values | per_block | {"num_hidden_layers": len(kept)})


def _weights_of(model: Any, kept: Sequence[int]) -> dict[str, Tensor]:
    """The model's tensors without those of dropped blocks, under their new numbers."""
    prefix = f"{model.base_model_prefix}.{BLOCKS}."
    numbers = {str(old): str(new) for new, old in enumerate(kept)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name in tied:
            continue
        if not name.startswith(prefix):
            weights[name] = tensor
        elif number in numbers:
            weights[f"{prefix}{numbers[number]}.{rest}"] = tensor
    return weights
