"""Choosing a subset: not only good examples, but ones that differ from each other.

Examples come in the order of their quality, best first, and are told apart by features at unit
length, (examples, dim); a result lists places in that order. Every greedy choice takes the
earlier of equal examples, so that results are deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from iprox.errors import NumericsError

Accept = Callable[[int], bool]
"""Whether an example may be chosen; asked once for each, in order, and told so by True."""

SINGULAR = 1e-9
"""Share of an example's own volume below which it lies in the span of those chosen."""

THRESHOLD_ROWS = 512
"""Examples compared with all chosen ones at once. Changes no result."""


class Chosen(NamedTuple):
    """A subset in the order in which it was chosen.

    Attributes:
        places: Places of the examples, (chosen,).
        gains: What each added by the method's own measure, (chosen,).
    """

    places: np.ndarray
    gains: np.ndarray


def calibrate(scores: np.ndarray, how: str) -> np.ndarray:
    """Scores of one task on a scale that those of other tasks can be compared on.

    Args:
        scores: (examples,); -inf where there is none, which stays.
        how: ``zscore``, or ``rank``: shares of the examples scored lower, 0 to 1.

    Returns:
        (examples,) float64.

    Raises:
        NumericsError: All scores are the same, so that they have no scale.
    """
    scores = np.asarray(scores, dtype=np.float64)
    known = np.isfinite(scores)
    values, out = scores[known], np.full(scores.shape, -np.inf)
    if len(values) < 2 or values.min() == values.max():
        raise NumericsError("constant scores cannot be calibrated", value=values[:1].tolist())
    if how == "zscore":
        out[known] = (values - values.mean()) / values.std()
    else:
        from scipy import stats

        out[known] = (stats.rankdata(values) - 1) / (len(values) - 1)
    return out


def first(n: int, k: int, accept: Accept) -> Chosen:
    """The first ``k`` of ``n`` examples that may be chosen, or as many as there are."""
    places: list[int] = []
    for place in range(n):
        if len(places) == k:
            break
        if accept(place):
            places.append(place)
    return Chosen(np.array(places, dtype=np.int64), np.zeros(len(places)))


def round_robin(orders: Sequence[np.ndarray], k: int, accept: Accept) -> list[tuple[int, int]]:
    """Each task in turn takes the best example that is left, until ``k`` are taken.

    Args:
        orders: Examples in the order of each task, best first.
        k: How many are taken; fewer when a task finds none any more.
        accept: Whether an example, no one's yet, may be taken.

    Returns:
        (task, example) in the order taken; two tasks' numbers differ by one at most.
    """
    taken: list[tuple[int, int]] = []
    refused: set[int] = set()
    lines: list[Iterator[int]] = [iter(order.tolist()) for order in orders]
    while len(taken) < k:
        task = len(taken) % len(lines)
        for example in lines[task]:
            if example in refused:
                continue
            refused.add(example)  # no one else's, whether it is taken or not
            if accept(example):
                taken.append((task, example))
                break
        else:
            break
    return taken


def below_similarity(
    features: np.ndarray, k: int, limit: float, accept: Accept = lambda _: True
) -> Chosen:
    """The first ``k`` examples whose cosine to every one chosen before is at most ``limit``.

    Args:
        features: At unit length, (examples, dim).
        k: How many; fewer are returned when there are no more.
        limit: Largest cosine.
        accept: Whether an example may be chosen besides.

    Returns:
        The examples, and each one's largest cosine to those before (-1 for the first).
    """
    places: list[int] = []
    gains: list[float] = []
    chosen = np.empty((min(k, len(features)), features.shape[1]), dtype=np.float32)
    for start in range(0, len(features), THRESHOLD_ROWS):
        block = np.asarray(features[start : start + THRESHOLD_ROWS], dtype=np.float32)
        closest = np.full(len(block), -1.0)
        if places:
            np.maximum(closest, (block @ chosen[: len(places)].T).max(axis=1), out=closest)
        within = block @ block.T
        for row in range(len(block)):
            if len(places) == k:
                return Chosen(np.array(places), np.array(gains))
            if closest[row] <= limit and accept(start + row):
                chosen[len(places)] = block[row]
                places.append(start + row)
                gains.append(float(closest[row]))
                np.maximum(closest, within[row], out=closest)
    return Chosen(np.array(places, dtype=np.int64), np.array(gains))


def k_centre(features: np.ndarray, k: int) -> Chosen:
    """Greedy k-centre: the first example, then ever the one farthest from those chosen.

    At most twice as far from the farthest example as the best choice is (Gonzalez, 1985).

    Args:
        features: At unit length, (examples, dim).
        k: How many, at most as many as there are examples.

    Returns:
        The examples, and each one's distance to the nearest chosen before (inf for the first).
    """
    distances = np.full(len(features), np.inf)
    places, gains = np.empty(k, dtype=np.int64), np.empty(k)
    for step in range(k):
        place = int(distances.argmax())
        places[step], gains[step] = place, distances[place]
        squares = 2 - 2 * (features @ features[place]).astype(np.float64)
        np.minimum(distances, np.sqrt(np.clip(squares, 0, None)), out=distances)
        distances[places[: step + 1]] = -1  # one is not chosen twice, were it a duplicate
    return Chosen(places, gains)


def coverage(features: np.ndarray) -> np.ndarray:
    """Similarities of facility location: cosines, 0 where they are negative, (n, n).

    So one example more never covers less.
    """
    similarities = features @ features.T
    return np.asarray(np.maximum(similarities, 0, out=similarities))


def facility_location(
    similarities: np.ndarray, quality: np.ndarray, k: int, weight: float
) -> Chosen:
    """Greedy maximum of ``sum_i max_{j in S} sim_ij + weight sum_{j in S} quality_j``.

    Each step takes the example of the largest gain. An example's gain never grows, so an old one
    is an upper bound, and few are computed again (lazy greedy, Minoux 1978). At least 1 - 1/e of
    the best value (Nemhauser et al., 1978).

    Args:
        similarities: Symmetric, not negative, (n, n).
        quality: Not negative, (n,).
        k: How many, at most n.
        weight: Weight of quality against coverage.

    Returns:
        The examples and their gains.
    """
    covered = np.zeros(len(similarities), dtype=similarities.dtype)

    def gain(j: int) -> float:
        added = np.maximum(similarities[j] - covered, 0).sum(dtype=np.float64)
        return float(added + weight * quality[j])

    heap = [(-gain(j), j) for j in range(len(similarities))]
    heapq.heapify(heap)
    fresh = np.zeros(len(similarities), dtype=np.int64)  # number chosen when it was computed
    places: list[int] = []
    gains: list[float] = []
    while len(places) < k:
        bound, j = heapq.heappop(heap)
        if fresh[j] < len(places):
            fresh[j] = len(places)
            heapq.heappush(heap, (-gain(j), j))
            continue
        places.append(j)
        gains.append(-bound)
        np.maximum(covered, similarities[j], out=covered)
    return Chosen(np.array(places, dtype=np.int64), np.array(gains))


def dpp_map(features: np.ndarray, quality: np.ndarray, k: int, weight: float) -> Chosen:
    """Greedy maximum of ``det L_S`` with ``L = diag(q) F F^T diag(q)``, ``q = exp(weight s / 2)``.

    The mode of a determinantal point process, found with a Cholesky factor that grows by a row
    at each step (Chen et al., arXiv:1709.05135).

    Args:
        features: F at unit length, (n, dim).
        quality: s, (n,).
        k: How many, at most n.
        weight: Weight of quality against diversity.

    Returns:
        The examples and the factors by which each multiplies the determinant.

    Raises:
        NumericsError: The examples span fewer than ``k`` directions.
    """
    scaled = features * np.exp(weight * np.asarray(quality) / 2)[:, None].astype(features.dtype)
    volume = np.einsum("nd,nd->n", scaled, scaled, dtype=np.float64)
    own = volume.copy()
    rows = np.zeros((k, len(scaled)))  # of the Cholesky factor, by the example chosen
    places, gains = np.empty(k, dtype=np.int64), np.empty(k)
    for step in range(k):
        place = int(volume.argmax())
        if not volume[place] > SINGULAR * own[place]:
            raise NumericsError(
                "a determinantal process cannot choose more examples than directions they span",
                value=f"{step} of {k} examples, features of {scaled.shape[1]} numbers",
                fix="take larger features, or select.method: facility_location",
            )
        places[step], gains[step] = place, volume[place]
        kernel = (scaled @ scaled[place]).astype(np.float64)
        rows[step] = (kernel - rows[:step, place] @ rows[:step]) / np.sqrt(volume[place])
        volume -= rows[step] ** 2
        volume[place] = -np.inf
    return Chosen(places, gains)


def partition(n: int, size: int, k: int, seed: int) -> Iterator[tuple[np.ndarray, int]]:
    """Random parts of ``n`` examples, and how many of the ``k`` to be chosen come from each.

    Choosing in each part costs memory and time of the part, and random parts look alike
    (Mirzasoleiman et al., arXiv:1306.5098).

    Args:
        n: Number of examples.
        size: Most examples of a part.
        k: How many are to be chosen in all.
        seed: Seed of the parts.

    Yields:
        Places of a part, ascending, and its share of ``k``.
    """
    parts = -(-n // size)
    order = np.random.default_rng(seed).permutation(n) if parts > 1 else np.arange(n)
    done = chosen = 0
    for part in np.array_split(order, parts):
        done += len(part)
        share = done * k // n - chosen
        chosen += share
        yield np.sort(part), share
