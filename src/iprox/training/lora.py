"""Low-rank updates in place of full fine-tuning (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from iprox.errors import ConfigError
from iprox.models.layers import block_linears
from iprox.numerics.adapters import DOWN, UP
from iprox.study.schema import LayersSection


def attach(model: Any, rank: int, alpha: float, seed: int) -> Any:
    """Put updates ``alpha / rank * B A`` beside every block linear; only they are trained.

    ``A`` (rank, in) is drawn, ``B`` (out, rank) begins at zero, so that the model starts unchanged.

    Args:
        model: A ``PreTrainedModel``; its linears are replaced in place.
        rank: Rank of the updates.
        alpha: Their scale, over the rank.
        seed: Seed of ``A``.

    Returns:
        The model to train, a ``PeftModel``.

    Raises:
        ConfigError: The package peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            "LoRA needs the package peft, which is not installed",
            where="finetune.lora_rank",
            value=rank,
            fix="pip install 'iprox-flow[lora]', or set finetune.lora_rank to 0",
        ) from None
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(block_linears(model, LayersSection())),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks the model for a property by a name that transformers has replaced.
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return get_peft_model(model, settings)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The updates of a model under training: ``<layer>.lora_A`` and ``<layer>.lora_B``."""
    ends = {f".{part}.default.weight": part for part in (DOWN, UP)}
    return {
        f"{name.removesuffix(end)}.{part}": weight.detach()
        for name, weight in model.named_parameters()
        for end, part in ends.items()
        if name.endswith(end)
    }


def merged_weights(model: nn.Module, scale: float) -> dict[str, Tensor]:
    """Weights of the plain model with the updates added; the model goes on training.

    Args:
        model: With updates beside its block linears.
        scale: Factor of the updates.
    """
    state = {n: w for n, w in model.state_dict().items() if ".lora_" not in n}
    plain = {name.replace(".base_layer.", "."): weight for name, weight in state.items()}
    updates = adapters(model)
    for name, down in updates.items():
        layer, _, part = name.rpartition(".")
        if part == DOWN:
            up = updates[f"{layer}.{UP}"]
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * (up @ down)
    return plain


def merge(trained: Any) -> None:
    """Add the updates to the weights and leave the plain model, as it was loaded, behind."""
    trained.merge_and_unload()
