"""What lies between linear layers, compiled.

The layers themselves, whose inputs and output gradients are captured, run as they are: a graph
around them would hide both. So does attention, whose shapes are each batch's own. What remains are
norms and activations, rows by themselves, each a chain of small operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from iprox.errors import ModelError
from iprox.models.blocks import decoder_blocks

UNTOUCHED = (nn.Dropout, nn.Identity)
"""Modules that do nothing in a pass."""


def compile_between_layers(model: Any) -> None:
    """Compile the norms and activations of a model's blocks with inductor, forward and backward.

    Results differ from those of the model as it was in the last digits.

    Args:
        model: A causal LM; changed in place.

    Raises:
        ModelError: The model's blocks cannot be found, or this machine cannot compile.
    """
    modules = list(_between_layers(model))
    for module in modules:
        # As one graph or not at all: otherwise what cannot be compiled would run uncompiled.
        module.forward = torch.compile(module.forward, dynamic=True, fullgraph=True)
    width = model.config.get_text_config().hidden_size
    rows = torch.zeros(1, 2, width, dtype=model.dtype, device=model.device, requires_grad=True)
    try:
        next(m for m in modules if _width(m) in (width, None))(rows).sum().backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ModelError(
            "the model cannot be compiled on this machine",
            where=type(error).__name__,
            value=" ".join(str(error).split()),
            fix="install a C++ compiler (and Python's headers), or set target.compile: false",
        ) from error


def _between_layers(model: Any) -> Iterator[nn.Module]:
    """Modules of the blocks that have no parts, and no weights but vectors."""
    for module in decoder_blocks(model).modules():
        if not list(module.children()) and not isinstance(module, UNTOUCHED):
            if all(p.ndim == 1 for p in module.parameters()):
                yield module


def _width(module: nn.Module) -> int | None:
    """Features of the rows a norm takes; None of what takes rows of any width."""
    return next((p.numel() for p in module.parameters()), None)
