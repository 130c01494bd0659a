"""How the gradients of examples lie to each other: the geometry that influence scores come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iprox.engine.capture import backward_pass
from iprox.engine.loss import Batch
from iprox.numerics.alignment import example_gram

ExampleT = TypeVar("ExampleT")


def gradient_gram(
    model: Any,
    layers: Mapping[str, nn.Linear],
    examples: Sequence[ExampleT],
    collate: Callable[[Sequence[ExampleT]], Batch],
    chunk: int,
    reduction: str = "token_mean",
) -> Tensor:
    """Inner products of all examples' gradients, over all layers together.

    Two gradients can be compared while both are at hand, so every pair of chunks shares a pass.
    That costs each example several passes, but a pass holds no more than ``2 * chunk`` examples,
    and of the gradients themselves only one layer's at a time.

    Args:
        model: A causal LM.
        layers: The linear layers whose weight gradients count.
        examples: What to compare.
        collate: Makes a batch of examples.
        chunk: Half the examples of a pass.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Returns:
        (examples, examples), in float64 on the CPU; its diagonal holds the squared norms.

    Raises:
        NumericsError: The loss of an example is not finite.
    """
    places = torch.arange(len(examples)).split(chunk)
    passes = [torch.cat(pair) for pair in combinations(places, 2)] or list(places)
    gram = torch.zeros(len(examples), len(examples), dtype=torch.float64)
    for rows in passes:
        batch = collate([examples[i] for i in rows.tolist()])
        block = torch.zeros(len(rows), len(rows), dtype=torch.float64)

        def visit(_: str, inputs: Tensor, output_grads: Tensor, block: Tensor = block) -> None:
            block += example_gram(inputs, output_grads).cpu()

        backward_pass(model, layers, batch, visit, reduction)
        gram[rows[:, None], rows] = block
    return gram
