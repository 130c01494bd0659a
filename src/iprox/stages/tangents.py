"""How far layer inputs move along the tasks' query gradients, at a probe's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iprox.engine.tangents import input_tangents
from iprox.stages.passes import Reader
from iprox.stages.positions import Drawn
from iprox.stages.queries import Queries

MAX_DIRECTIONS = 4
"""Most directions that inputs are moved along; each is a pass over the probe examples."""


def mixtures(norms: np.ndarray, seed: int) -> np.ndarray:
    """Coefficients (directions, columns) of the query gradients in each direction.

    Columns count alike, whatever their norms. Of a few, each is a direction. Of many, directions
    are sums with random signs: the second moments of what they move are, in expectation, those of
    all columns together, because products of different columns cancel.

    Args:
        norms: Norm of every column (columns,).
        seed: Of the signs.
    """
    n = len(norms)
    if n <= MAX_DIRECTIONS:
        return np.diag(1 / norms)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (MAX_DIRECTIONS, n))
    return signs / norms


def record_tangents(
    reader: Reader,
    sites: Sequence[str],
    drawn: Drawn,
    queries: Queries,
    coefficients: np.ndarray,
    progress: Any,
) -> dict[str, np.ndarray]:
    """Rows of moving inputs at the drawn positions: ``inputs/<site>``.

    Args:
        reader: The model and all layers whose weights move.
        sites: Layers whose inputs are recorded.
        drawn: The probe examples and their positions.
        queries: The query gradients.
        coefficients: Of :func:`mixtures`.
        progress: Counts examples.

    Returns:
        Arrays (directions * tokens, in) in float32: direction by direction, in the order of the
        examples.
    """
    n_rows = len(coefficients) * drawn.n_tokens
    rows = {
        f"inputs/{name}": np.zeros((n_rows, reader.layers[name].in_features), np.float32)
        for name in sites
    }
    for number, mix in enumerate(coefficients):
        directions = _mixed(reader, queries, mix)
        for batch, _, places, chosen in drawn.batches(reader):
            own = places + number * drawn.n_tokens

            def visit(
                name: str,
                moved: Tensor,
                own: np.ndarray = own,
                chosen: tuple[Tensor, Tensor] = chosen,
            ) -> None:
                if f"inputs/{name}" in rows:
                    rows[f"inputs/{name}"][own] = moved[chosen].float().cpu().numpy()

            input_tangents(reader.model, reader.layers, directions, batch, visit)
            progress.advance(len(batch.lengths), tokens=int(batch.lengths.sum()))
    return rows


def _mixed(reader: Reader, queries: Queries, mix: np.ndarray) -> dict[str, Tensor]:
    """One direction: a mixture of the query gradients in every layer, in the model's precision."""
    columns = range(len(queries.columns))
    found = {}
    for name, layer in reader.layers.items():
        mixed = np.tensordot(mix, queries.load(name, columns), axes=1)
        found[name] = torch.from_numpy(mixed).to(layer.weight)
    return found
