"""Low-rank updates in place of full fine-tuning (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from iprox.errors import ConfigError
from iprox.models.layers import block_linears
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


def merge(trained: Any) -> None:
    """Add the updates to the weights and leave the plain model, as it was loaded, behind."""
    trained.merge_and_unload()
