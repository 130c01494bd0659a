"""A linear layer as the product of two thin ones, in both passes or in the backward pass alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprox.errors import ModelError

Passes = Literal["both", "backward"]
"""Which passes factors stand in for a weight in."""


class LowRankLinear(nn.Module):
    """``y = left(right(x))`` in place of ``y = W x + b`` with ``W ≈ left @ right``.

    Both factors are ordinary linear layers, so that everything that walks over a model's
    linear layers (gradient hooks, adapters, quantisers) sees them without knowing this class.
    ``right`` maps in -> rank without bias, ``left`` maps rank -> out with the layer's bias.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Inner width.
        bias: Whether the layer has a bias.
        device: Where the factors live.
        dtype: Their precision.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.left(self.right(x))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


class _BackThroughFactors(torch.autograd.Function):
    """``y = W x + b``, whose gradient by x is ``right^T left^T dy`` instead of ``W^T dy``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[1:]):
            raise ModelError(
                "a model whose backward pass goes through factors cannot be trained",
                where="proxy.passes: backward",
                fix="freeze it (model.requires_grad_(False)); it is made for scoring examples",
            )
        left, right = ctx.saved_tensors
        return (output_grads @ left) @ right, None, None, None, None


class LowRankBackward(nn.Linear):
    """The layer itself going forward; going back, gradients pass two thin factors.

    Activations and the loss are the target's own, and so are the gradients of the last layers;
    those of earlier ones carry the error of ``W ≈ left @ right`` in what reaches them. Of the
    three products of a layer's pass (forward, backward, weight gradient) one becomes thin.

    Args:
        layer: The layer, whose weight and bias are taken over.
        rank: Inner width of the factors, buffers ``left`` (out, rank) and ``right`` (rank, in)
            with unset values.
    """

    left: Tensor
    right: Tensor

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        bias = layer.bias is not None
        # no memory and no random numbers for a weight that is there already
        super().__init__(layer.in_features, layer.out_features, bias, device="meta")
        self.weight, self.bias, self.rank = layer.weight, layer.bias, rank
        self.register_buffer("left", layer.weight.new_empty(layer.out_features, rank))
        self.register_buffer("right", layer.weight.new_empty(rank, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        output: Tensor = _BackThroughFactors.apply(x, self.weight, self.bias, self.left, self.right)
        return output


def replace_linears(model: nn.Module, ranks: Mapping[str, int], passes: Passes = "both") -> None:
    """Replace linear layers by factors with unset weights, in place.

    Args:
        model: Model whose modules are replaced.
        ranks: Full module name -> rank.
        passes: Passes in which the factors stand in for the weight.

    Raises:
        ModelError: A name is not a linear layer of this model, or a rank does not fit it.
    """
    for name, rank in ranks.items():
        old = find_linear(model, name)
        if not 1 <= rank <= min(old.weight.shape):
            raise ModelError(
                "a factor's rank does not fit its layer",
                where=name,
                value=rank,
                allowed=f"1..{min(old.weight.shape)}",
                fix="use factors that were made from this very model",
            )
        new: LowRankLinear | LowRankBackward
        if passes == "backward":
            new = LowRankBackward(old, rank)
        else:
            new = LowRankLinear(
                old.in_features,
                old.out_features,
                rank,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            if old.bias is not None:
                new.left.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name.

    Raises:
        ModelError: There is no such module, or it is not a linear layer.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            "the model has no such layer",
            where=name,
            fix="use factors that were made from a model of the same architecture",
        ) from None
    if not isinstance(module, nn.Linear):
        raise ModelError(
            "not a linear layer", where=name, value=type(module).__name__, allowed="Linear"
        )
    return module
