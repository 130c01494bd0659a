"""CPU time of things run in turn, and peak memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Case = TypeVar("Case", bound=Hashable)


def in_turn(cases: Mapping[Case, Callable[[], object]], rounds: int) -> dict[Case, list[float]]:
    """CPU seconds of every case in every round.

    The cases of a round follow each other, so that a machine that slows down or is shared slows
    all of them; CPU time leaves out the time that other processes take.

    Args:
        cases: What to run, by name.
        rounds: How often. No run is left out as a warm-up: take medians.
    """
    seconds: dict[Case, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.process_time()
            case()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio_to_best(
    seconds: Sequence[float], floors: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Median over the rounds of a case's time over that of the fastest floor of its round.

    Returns:
        The median ratio, and half the distance between the largest and the smallest.
    """
    ratios = [t / min(floor) for t, floor in zip(seconds, zip(*floors, strict=True), strict=True)]
    return statistics.median(ratios), (max(ratios) - min(ratios)) / 2


def peak_bytes() -> int:
    """Largest resident memory of this process so far; it never falls."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
