"""How much each decoder block of a model turns the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from iprox.engine.loss import Batch, hidden_states
from iprox.models.blocks import decoder_blocks
from iprox.numerics.blocks import direction_changes


def block_influence(
    model: Any, batches: Iterable[Batch], done: Callable[[Batch], None] = lambda batch: None
) -> Tensor:
    """Block influence of ShortGPT (arXiv:2403.03853): the mean over tokens of 1 - cos(h, h').

    h and h' are a token's hidden states before and after the block. Padding does not count.

    Args:
        model: A causal LM.
        batches: Examples on the model's device.
        done: Called after each batch.

    Returns:
        (blocks,), float64, on the CPU.

    Raises:
        ModelError: The model's blocks cannot be found.
    """
    blocks = decoder_blocks(model)
    sums, count = torch.zeros(len(blocks), dtype=torch.float64), 0
    for batch in batches:
        places = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        real = places[None, :] < batch.lengths[:, None]  # (examples, tokens)
        sums += _summed_changes(model, batch, real)
        count += int(real.sum())
        done(batch)
    return sums / count


def _summed_changes(model: Any, batch: Batch, real: Tensor) -> Tensor:
    """Sum over the real tokens of a batch of each block's change, (blocks,)."""
    blocks = decoder_blocks(model)
    sums = torch.zeros(len(blocks), dtype=torch.float64)

    def hook(place: int) -> Callable[..., None]:
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[place] += direction_changes(before[real], after[real]).double().sum().cpu()

        return add

    handles = [
        block.register_forward_hook(hook(place), with_kwargs=True)
        for place, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums
