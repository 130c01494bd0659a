"""Near duplicates among texts: Jaccard similarity of word n-grams, found by MinHash."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict

import numpy as np

WORDS = 5
"""Words of an n-gram."""

BANDS, ROWS = 32, 4
"""Signatures of 128 hashes in bands. Texts that agree in a band are compared exactly; of two with
similarity 0.8 at least one band agrees with probability 1 - 5e-8, with 0.6 with 0.988."""

_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """Words in lower case, one space between them: texts equal in this are the same text."""
    return " ".join(_WORD.findall(text.casefold()))


def shingles(text: str) -> np.ndarray:
    """Hashes of a text's word n-grams, sorted and distinct, (n-grams,) uint64.

    A text of fewer words is one n-gram of them all.
    """
    words = normalised(text).split(" ")
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    length = min(WORDS, len(hashes))
    grams = np.zeros(len(hashes) - length + 1, dtype=np.uint64)
    for offset in range(length):
        grams = (grams ^ hashes[offset : offset + len(grams)]) * _MIX
        grams ^= grams >> np.uint64(29)
    return np.unique(grams)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Share of two sets' union that is in both."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


class NearDuplicates:
    """Texts seen so far, and whether another is nearly one of them.

    Args:
        limit: Jaccard similarity from which two texts are duplicates.
        seed: Seed of the hashes.
    """

    def __init__(self, limit: float, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.limit = limit
        self.factors = draw.integers(0, 2**64, (BANDS * ROWS, 1), dtype=np.uint64) | np.uint64(1)
        self.terms = draw.integers(0, 2**64, (BANDS * ROWS, 1), dtype=np.uint64)
        self.seen: list[np.ndarray] = []
        self.buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Remember a text unless it is nearly one that is remembered; returns whether it is new."""
        grams = shingles(text)
        keys = self._bands(grams)
        for other in sorted({i for key in keys for i in self.buckets.get(key, ())}):
            if jaccard(grams, self.seen[other]) >= self.limit:
                return False
        for key in keys:
            self.buckets[key].append(len(self.seen))
        self.seen.append(grams)
        return True

    def _bands(self, grams: np.ndarray) -> list[tuple[int, bytes]]:
        signature = ((grams * self.factors + self.terms) >> np.uint64(32)).min(axis=1)
        bands = signature.astype(np.uint32).reshape(BANDS, ROWS)
        return [(place, band.tobytes()) for place, band in enumerate(bands)]
