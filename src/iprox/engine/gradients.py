"""Weighted sums of examples' weight gradients, in one pass and without holding any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iprox.engine.capture import check_finite, packed_pass
from iprox.engine.loss import Batch
from iprox.engine.packed import pack
from iprox.numerics.ghost import widen


def mean_gradient(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Batch, Tensor, Sequence[str] | None]],
    reduction: str = "token_mean",
) -> dict[str, Tensor]:
    """Weighted sum of examples' gradients; with weights 1/n their mean.

    Args:
        model: A causal LM with frozen weights.
        layers: The layers whose weights' gradients count.
        batches: Batches, at least one, each with the weights (examples,) and, for messages, the
            ids of its examples. For a mean of unit gradients the weights are 1 / (n * norm), the
            norms from a :class:`iprox.engine.scoring.Scorer`.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Returns:
        Layer -> (out, in), in float32 (float64 for a float64 model).

    Raises:
        ModelError: A layer has no influence on the loss.
        NumericsError: A loss is not finite.
    """
    equal = ((batch, dict.fromkeys(layers, weights[None]), ids) for batch, weights, ids in batches)
    sums = weighted_gradients(model, layers, equal, reduction)
    return {name: sums[name][0] for name in layers}


def weighted_gradients(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[tuple[Batch, Mapping[str, Tensor], Sequence[str] | None]],
    reduction: str = "token_mean",
) -> dict[str, Tensor]:
    """Weighted sums of examples' gradients, with weights of their own in every layer.

    Args:
        model: A causal LM with frozen weights.
        layers: Layers whose gradients are summed.
        batches: Batches, each with layer -> weights (sums, examples) and, for messages, the ids of
            its examples.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.

    Returns:
        Layer -> (sums, out, in), in at least float32.

    Raises:
        ModelError: A layer has no influence on the loss.
        NumericsError: A loss is not finite; names the example.
    """
    sums: dict[str, Tensor] = {}
    for batch, weights, ids in batches:

        def visit(
            name: str, x: Tensor, d: Tensor, rows: list[int], of: Mapping[str, Tensor] = weights
        ) -> None:
            d, x = widen(d), widen(x)
            of_tokens = of[name].to(d).repeat_interleave(torch.tensor(rows, device=d.device), 1)
            if name not in sums:
                sums[name] = d.new_zeros(len(of_tokens), d.shape[1], x.shape[1])
            for total, factors in zip(sums[name], of_tokens, strict=True):
                total.addmm_((d * factors[:, None]).mT, x)

        def check(losses: Tensor, ids: Sequence[str] | None = ids) -> None:
            check_finite(losses, ids)

        packed_pass(model, layers, pack(batch), visit, reduction, check)
    return sums
