"""How far layer inputs move along the tasks' query gradients, at a probe's positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iprox.data.chat import Encoded
from iprox.engine.tangents import input_tangents
from iprox.stages.passes import Reader
from iprox.stages.queries import Queries

MAX_DIRECTIONS = 4
"""Most directions that inputs are moved along; each is a pass over the probe examples."""


def directions_of(queries: Queries, seed: int) -> np.ndarray:
    """Coefficients (directions, columns) of the query gradients in each direction.

    Columns count alike, whatever their norms. Of a few, each is a direction. Of many, directions
    are sums with random signs: the second moments of what they move are, in expectation, those of
    all columns together, because products of different columns cancel.
    """
    n = len(queries.columns)
    if n <= MAX_DIRECTIONS:
        return np.diag(1 / queries.norms)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (MAX_DIRECTIONS, n))
    return signs / queries.norms


def record_tangents(
    reader: Reader,
    sites: Mapping[str, str],
    wanted: Sequence[str],
    encoded: Sequence[Encoded],
    positions: Sequence[np.ndarray],
    queries: Queries,
    coefficients: np.ndarray,
    progress: Any,
) -> dict[str, np.ndarray]:
    """Rows of some layers' moving inputs at the drawn positions: ``inputs/<site>``.

    Args:
        reader: The model and all layers whose weights move.
        sites: Layer -> the first layer that reads its input.
        wanted: Layers whose inputs are recorded.
        encoded: The probe examples.
        positions: Positions of every example.
        queries: The query gradients.
        coefficients: Of :func:`directions_of`.
        progress: Counts examples.

    Returns:
        Arrays (directions * tokens, in) in float32: direction by direction, in the order of the
        examples.
    """
    starts = np.concatenate([[0], np.cumsum([len(p) for p in positions])])
    shape = (len(coefficients) * starts[-1],)
    rows = {
        f"inputs/{name}": np.zeros((*shape, reader.layers[name].in_features), np.float32)
        for name in wanted
        if sites[name] == name
    }
    for number, mix in enumerate(coefficients):
        directions = _mixed(reader, queries, mix)
        first = number * starts[-1]
        for indices, batch in reader.batches(encoded):
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices]) + first
            of_batch = np.repeat(np.arange(len(indices)), [len(positions[i]) for i in indices])
            tokens = np.concatenate([positions[i] for i in indices])

            def visit(
                name: str,
                moved: Tensor,
                places: np.ndarray = places,
                of_batch: np.ndarray = of_batch,
                tokens: np.ndarray = tokens,
            ) -> None:
                if f"inputs/{name}" in rows:
                    rows[f"inputs/{name}"][places] = moved[of_batch, tokens].float().cpu().numpy()

            input_tangents(reader.model, reader.layers, directions, batch, visit)
            progress.advance(len(indices), tokens=int(batch.lengths.sum()))
    return rows


def _mixed(reader: Reader, queries: Queries, mix: np.ndarray) -> dict[str, Tensor]:
    """One direction: a mixture of the query gradients in every layer, in the model's precision."""
    columns = range(len(queries.columns))
    found = {}
    for name, layer in reader.layers.items():
        mixed = np.tensordot(mix, queries.load(name, columns), axes=1)
        found[name] = torch.from_numpy(mixed).to(layer.weight)
    return found
