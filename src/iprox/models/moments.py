"""What a training leaves beside its weights: Adam's moments, and the updates it merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from iprox.errors import ArtifactError, ModelError
from iprox.numerics.adam import Moments
from iprox.numerics.adapters import DOWN, UP, Adapters

MOMENTS = "moments.safetensors"
"""``<parameter>.first`` and ``<parameter>.second``, of the parameter's shape, float32."""

ADAPTERS = "adapters.safetensors"
"""``<layer>.lora_A`` and ``<layer>.lora_B`` as they were merged, with rank and scale."""

ABOUT = "adapters"
"""Key of the file's metadata that has them."""


def save_moments(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the moments of all parameters that an AdamW optimizer has trained."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            plain = name.replace(".default.", ".")  # peft's name of the only set of adapters
            tensors[f"{plain}.first"] = state["exp_avg"].detach().cpu().contiguous()
            tensors[f"{plain}.second"] = state["exp_avg_sq"].detach().cpu().contiguous()
    save_file(tensors, folder / MOMENTS)


def save_adapters(folder: Path, adapters: Mapping[str, Tensor], rank: int, scale: float) -> None:
    """Write the low-rank updates that a model was trained by."""
    tensors = {name: weight.cpu().contiguous() for name, weight in adapters.items()}
    about = json.dumps({"rank": rank, "scale": scale})
    save_file(tensors, folder / ADAPTERS, metadata={ABOUT: about})


def open_adapters(folder: Path) -> tuple[Adapters, int, float]:
    """Adapters of a layer, read when they are asked for, their rank, and their scale.

    Raises:
        ArtifactError: The model was not trained by any.
    """
    path = folder / ADAPTERS
    if not path.is_file():
        raise ArtifactError(
            "the warm-up kept no low-rank updates",
            where=path,
            fix="delete this artifact's folder and run Snakemake again",
        )
    stored = safe_open(path, framework="pt")
    about = json.loads(stored.metadata()[ABOUT])

    def adapters(layer: str) -> tuple[Tensor, Tensor]:
        down, up = (stored.get_tensor(f"{layer}.{part}") for part in (DOWN, UP))
        return down, up

    return adapters, about["rank"], about["scale"]


def open_moments(folder: Path) -> Moments:
    """Moments of a layer's weight, read when they are asked for.

    Raises:
        ArtifactError: The training kept none.
    """
    path = folder / MOMENTS
    if not path.is_file():
        raise ArtifactError(
            "the warm-up kept no moments of its optimizer",
            where=path,
            fix="set warmup.epochs above 0, and run Snakemake again",
        )
    stored = safe_open(path, framework="pt")
    known = set(stored.keys())

    def moments(layer: str) -> tuple[Tensor, Tensor]:
        names = [f"{layer}.weight.{kind}" for kind in ("first", "second")]
        if not known.issuperset(names):
            raise ModelError("a layer has no moments", where=layer, value=str(path))
        first, second = (stored.get_tensor(name).to(torch.float32) for name in names)
        return first, second

    return moments
