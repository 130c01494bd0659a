"""A linear layer as the product of two thin ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iprox.errors import ModelError


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


def replace_linears(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace linear layers by factors with unset weights, in place.

    Args:
        model: Model whose modules are replaced.
        ranks: Full module name -> rank.

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
