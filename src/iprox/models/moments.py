"""Adam's moments at the end of a training, stored beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from iprox.errors import ArtifactError, ModelError
from iprox.numerics.adam import Moments

MOMENTS = "moments.safetensors"
"""``<parameter>.first`` and ``<parameter>.second``, of the parameter's shape, float32."""


def save_moments(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the moments of all parameters that an AdamW optimizer has trained."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            tensors[f"{name}.first"] = state["exp_avg"].detach().cpu().contiguous()
            tensors[f"{name}.second"] = state["exp_avg_sq"].detach().cpu().contiguous()
    save_file(tensors, folder / MOMENTS)


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
