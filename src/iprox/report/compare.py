"""When one measurement differs from another: paired on the same test items, interval included."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models on the same items.

    Attributes:
        value: Mean of (first - second) over items.
        low: Lower end of its 95 % interval; NaN with fewer than two items.
        high: Upper end.
        n: Items both were measured on.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval is known and leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(first: pd.Series, second: pd.Series) -> Difference:
    """Difference of two models' values on the test items they share.

    Pairing removes what makes an item hard for both models, so the interval is much narrower
    than the two separate intervals suggest (the paired t-interval with its normal quantile).

    Args:
        first: Value of each item (index: item id).
        second: Likewise.

    Raises:
        ValueError: The two share no item.
    """
    both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"]).dropna()
    if both.empty:
        raise ValueError("the two models share no test item")
    delta = both["first"] - both["second"]
    mean = float(delta.mean())
    spread = Z95 * float(delta.std(ddof=1)) / math.sqrt(len(delta))
    return Difference(mean, mean - spread, mean + spread, len(delta))


def intervals_overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two intervals (low, high) share a point; unknown ends count as overlap."""
    return not (first[1] < second[0] or second[1] < first[0])
