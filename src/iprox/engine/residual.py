"""The residual stream of bfloat16 models in float32, as training in mixed precision keeps it.

A block adds a small update to a large stream. In bfloat16 the sum is rounded to one part in 256
twice a block, on the way forward and on the way back; over 30 blocks that is most of the error
of a bfloat16 score. A stream in float32 costs nothing where work is done: products still take
rows and weights in bfloat16, and norms compute in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

STRICT = (nn.Linear, nn.LayerNorm)
"""Modules that compute only on rows of their weights' precision."""


@contextmanager
def wide_residuals(model: Any) -> Iterator[None]:
    """Within this context a bfloat16 model adds up its blocks' updates in float32.

    Norms hand rows on in bfloat16, once for all layers that read them. The last norm does not:
    hidden states, and with them logits, keep their precision. Other models are left alone.
    """
    if model.dtype != torch.bfloat16:
        yield
        return
    body = model.base_model
    norms = [module for module in body.modules() if _is_norm(module)]
    with ExitStack() as stack:
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(_widen_output).remove)
        for norm in norms[:-1]:
            stack.callback(norm.register_forward_hook(_narrow_output).remove)
        for module in body.modules():
            if isinstance(module, STRICT):
                stack.callback(module.register_forward_pre_hook(_narrow_input).remove)
        yield


def _is_norm(module: nn.Module) -> bool:
    """Whether all a module has are vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.ndim == 1 for p in parameters)


def _widen_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _narrow_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(torch.bfloat16)


def _narrow_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(torch.bfloat16), *args[1:])
