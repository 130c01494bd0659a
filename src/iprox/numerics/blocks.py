"""Which decoder blocks change the residual stream least (ShortGPT, arXiv:2403.03853)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.ghost import widen


def direction_changes(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos between hidden states before and after a block, exactly 0 where it changes nothing.

    Half the squared distance of the unit vectors, which equals 1 - cos without its cancellation.

    Args:
        before: (tokens, hidden).
        after: (tokens, hidden).

    Returns:
        (tokens,), in float32 at least.
    """
    units = F.normalize(widen(after), dim=-1) - F.normalize(widen(before), dim=-1)
    return units.square().sum(-1) / 2


def most_influential(influence: Sequence[float], count: int) -> list[int]:
    """Places of the ``count`` blocks with the largest influence, in model order.

    Of equal ones the earlier is kept.

    Raises:
        NumericsError: An influence is not finite.
    """
    wrong = [i for i, value in enumerate(influence) if not math.isfinite(value)]
    if wrong:
        raise NumericsError(
            "the influence of a block is not finite",
            where=f"block {wrong[0]}",
            value=influence[wrong[0]],
            fix="use target.dtype float32, and check the warm-up's loss for divergence",
        )
    order = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    return sorted(order[:count])
