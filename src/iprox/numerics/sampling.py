"""Drawing token positions evenly over sequences and inside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iprox.errors import ConfigError


def stratified_positions(lengths: Sequence[int], budget: int, seed: int) -> list[np.ndarray]:
    """Token positions that represent a set of sequences, long and short ones alike.

    The budget is spread evenly over the sequences. One that is shorter than its share gives all its
    positions, and the rest goes around the others. Inside a sequence the positions are cut into as
    many equal strata as are drawn, and one position is drawn uniformly from each.

    Args:
        lengths: Usable positions of each sequence; 0 for a sequence without any.
        budget: Positions wanted in all. When there are fewer, all are taken.
        seed: Seed of the draws.

    Returns:
        Per sequence its positions, ascending, int64, from 0 to its length - 1.

    Raises:
        ConfigError: The budget is too small to draw from every usable sequence.
        ValueError: A length is negative.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if (sizes < 0).any():
        raise ValueError(f"lengths must not be negative, got {sizes.min()}")
    usable = int((sizes > 0).sum())
    if budget < max(1, usable):
        raise ConfigError(
            "there are fewer probe tokens than probe sequences, so some would go unused",
            where="probe.tokens",
            value=budget,
            allowed=f"at least {max(1, usable)}",
            fix="raise probe.tokens, or lower split.probe",
        )
    generator = np.random.default_rng(seed)
    return [
        _one_per_stratum(int(size), int(count), generator)
        for size, count in zip(sizes, spread(sizes, budget), strict=True)
    ]


def spread(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Shares of a budget that differ by at most 1, except where a size caps them.

    Args:
        sizes: Upper limit of each share.
        budget: Sum of the shares, if the sizes allow it.
    """
    shares = np.zeros_like(sizes)
    while (left := budget - int(shares.sum())) > 0 and (shares < sizes).any():
        room = np.flatnonzero(shares < sizes)
        if left < len(room):
            shares[room[:left]] += 1
        else:
            shares[room] = np.minimum(shares[room] + left // len(room), sizes[room])
    return shares


def _one_per_stratum(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """One uniform draw from each of ``count`` strata of ``range(size)``, equal up to one."""
    edges = np.arange(count + 1, dtype=np.int64) * size // max(count, 1)
    return generator.integers(edges[:-1], edges[1:], dtype=np.int64)
