"""When one measurement differs from another: paired on the same test items, interval included."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""

RESAMPLES = 9999
"""Sign patterns drawn where there are more than can be listed."""

BATCH = 500


@dataclass(frozen=True)
class Difference:
    """Mean difference of two models on the same items.

    Attributes:
        value: Mean of (first - second) over items.
        low: Lower end of its 95 % interval; NaN with fewer than two items.
        high: Upper end.
        n: Items both were measured on.
        p_value: Chance of a difference as large, either way, were the two models alike.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float = math.nan

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval is known and leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(first: pd.Series, second: pd.Series) -> Difference:
    """Difference of two models' values on the test items they share.

    Pairing removes what makes an item hard for both models, so the interval is much narrower
    than the two separate intervals suggest (the paired t-interval with its normal quantile).
    The test needs no distribution: were the models alike, each item's difference could as well
    have the other sign.

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
    return Difference(mean, mean - spread, mean + spread, len(delta), sign_flip_p(delta.to_numpy()))


def sign_flip_p(delta: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference under random signs (Fisher 1935).

    Of right and wrong answers it is exactly McNemar's test: the binomial test on the items that
    only one of the models gets right. Of other values all patterns of signs are tried where
    there are few, else a seeded draw of them.

    Args:
        delta: Difference on each item, (items,).
        seed: Seed of the draw.
    """
    from scipy import stats

    delta = delta[delta != 0]
    n = len(delta)
    if n == 0:
        return 1.0
    if len(np.unique(np.abs(delta))) == 1:
        return float(stats.binomtest(int((delta > 0).sum()), n).pvalue)
    observed = abs(delta.sum()) * (1 - 1e-12)  # a pattern that differs by rounding alone counts
    if 2**n <= RESAMPLES:
        patterns = np.array(list(itertools.product((-1, 1), repeat=n)))
        return float((np.abs(patterns @ delta) >= observed).mean())
    draw = np.random.default_rng(seed)
    as_large = 0
    for size in [BATCH] * (RESAMPLES // BATCH) + [RESAMPLES % BATCH]:
        signs = draw.integers(0, 2, (size, n), dtype=np.int8)
        as_large += int((np.abs((2.0 * signs - 1) @ delta) >= observed).sum())
    return (as_large + 1) / (RESAMPLES + 1)


def intervals_overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether two intervals (low, high) share a point; unknown ends count as overlap."""
    return not (first[1] < second[0] or second[1] < first[0])
