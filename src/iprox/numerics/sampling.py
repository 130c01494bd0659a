"""Drawing token positions evenly over sequences, and rows that blend others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iprox.errors import ConfigError

NEIGHBOURS = 5
"""Nearest rows of which one is blended with, as in SMOTE (Chawla et al., 2002)."""


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


class Blends(NamedTuple):
    """Rows that give way to blends of two others; each of shape (blends,)."""

    replaced: np.ndarray
    """Places of the rows that give way."""
    kept: np.ndarray
    """Places of rows that stay."""
    neighbours: np.ndarray
    """Of each of these a near one, which stays too."""
    shares: np.ndarray
    """How far a blend lies on the way from the one to the other, 0 to 1."""


def draw_blends(rows: np.ndarray, share: float, seed: int) -> Blends:
    """Replace a share of rows by blends of a row that stays and one of its nearest neighbours.

    Nearness is the cosine. Study of redundant probes in IProX (arXiv:2602.17835, Table 8).

    Args:
        rows: (rows, features).
        share: Of the rows that give way, 0 to 1.
        seed: Seed of the draws.

    Raises:
        ConfigError: Too few rows stay.
    """
    generator = np.random.default_rng(seed)
    replaced = np.sort(generator.choice(len(rows), round(share * len(rows)), replace=False))
    staying = np.setdiff1d(np.arange(len(rows)), replaced)
    if len(staying) <= NEIGHBOURS:
        raise ConfigError(
            "too few probe tokens stay to be blended",
            where="probe.redundancy, probe.tokens",
            value=f"{len(staying)} of {len(rows)}",
            allowed=f"at least {NEIGHBOURS + 1}",
            fix="lower probe.redundancy, or raise probe.tokens",
        )
    first = generator.integers(len(staying), size=len(replaced))
    unit = rows[staying].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    cosines = unit[first] @ unit.T
    cosines[np.arange(len(first)), first] = -np.inf  # not its own neighbour
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBOURS]
    which = generator.integers(NEIGHBOURS, size=len(replaced))
    second = nearest[np.arange(len(first)), which]
    return Blends(replaced, staying[first], staying[second], generator.random(len(replaced)))


def blend(rows: np.ndarray, blends: Blends) -> np.ndarray:
    """The rows with blends in place of those that give way.

    Args:
        rows: (..., rows, features).
        blends: Of :func:`draw_blends`.
    """
    mixed = rows.copy()
    start, end = rows[..., blends.kept, :], rows[..., blends.neighbours, :]
    mixed[..., blends.replaced, :] = start + blends.shares[:, None] * (end - start)
    return mixed
