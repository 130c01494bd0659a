"""How long sides of a second moment are split. Imports no tensor library: costs depend on it."""

from __future__ import annotations


def block_sides(dim: int, limit: int) -> list[int]:
    """Sides of the contiguous blocks a second moment is split into; they differ by at most 1."""
    blocks = -(-dim // limit)
    return [dim * (i + 1) // blocks - dim * i // blocks for i in range(blocks)]
