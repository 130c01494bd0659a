"""How a selection lies in feature space: near its task, and how far apart."""

from __future__ import annotations

import numpy as np

EXACT_SIDE = 1024
"""Smaller side of a matrix up to which all of its singular vectors are computed."""

SPANNED = 1e-6
"""Share of the largest singular value from which a direction counts as spanned."""

NEAREST_ROWS = 512
"""Examples compared with all others at once. Changes no result."""


def principal_directions(rows: np.ndarray, k: int) -> np.ndarray:
    """The first right singular vectors of the rows at unit length, (spanned, dim), at most ``k``.

    Args:
        rows: (examples, dim); rows of zeros count for nothing.
        k: Most directions.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = (rows / np.where(norms == 0, 1, norms)).astype(np.float64)
    if min(unit.shape) <= max(EXACT_SIDE, k):
        _, values, directions = np.linalg.svd(unit, full_matrices=False)
    else:
        from scipy.sparse.linalg import svds

        start = np.full(min(unit.shape), 1 / np.sqrt(min(unit.shape)))
        _, values, directions = svds(unit, k=k, v0=start)
        order = np.argsort(-values)
        values, directions = values[order], directions[order]
    kept = min(k, int((values > SPANNED * values.max(initial=0)).sum()))
    return np.asarray(directions[:kept])


def subspace_affinity(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean squared cosine of the principal angles between two subspaces, 0 to 1.

    ``||A B^T||_F / sqrt(min(k_a, k_b))`` (Soltanolkotabi, Elhamifar and Candes,
    arXiv:1301.2603).

    Args:
        a: An orthonormal basis, (k_a, dim).
        b: Another, (k_b, dim).

    Returns:
        NaN when either is empty.
    """
    least = min(len(a), len(b))
    return float(np.linalg.norm(a @ b.T) / np.sqrt(least)) if least else float("nan")


def random_affinity(k_a: int, k_b: int, dim: int) -> float:
    """Affinity of two random subspaces, in the root mean square: ``sqrt(max(k_a, k_b) / dim)``."""
    return float(np.sqrt(max(k_a, k_b) / dim))


def nearest_distances(rows: np.ndarray) -> np.ndarray:
    """Distance of every row to its nearest other row, (examples,) float64; 0 for a repeated row.

    Args:
        rows: (examples, dim), at least two.
    """
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), NEAREST_ROWS):
        part = slice(start, min(start + NEAREST_ROWS, len(rows)))
        distances = squares[part, None] + squares - 2 * (rows[part] @ rows.T).astype(np.float64)
        distances[np.arange(part.stop - start), np.arange(start, part.stop)] = np.inf
        nearest[part] = np.sqrt(np.clip(distances.min(axis=1), 0, None))
    return nearest
