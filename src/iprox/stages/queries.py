"""The stored query gradients of all tasks, as columns that examples are scored against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iprox.errors import ArtifactError, ConfigError
from iprox.store.arrays import open_store


@dataclass(frozen=True)
class Queries:
    """The query gradients of all tasks, as columns; read from disk when asked for.

    Attributes:
        columns: Name of each column: ``<task>``, or ``<task>/<subtask>``.
        norms: Its norm, (columns,).
        places: Store and group it is in.
        stores: Open stores.
        layers: Layer -> (out, in).
        settings: What the gradients were made with.
    """

    columns: list[str]
    norms: np.ndarray
    places: list[tuple[int, int]]
    stores: list[Any]
    layers: dict[str, tuple[int, int]]
    settings: dict[str, Any]

    def load(self, layer: str, columns: range) -> np.ndarray:
        """Query gradients of one layer, (columns, out, in) float32."""
        chosen = [self.places[c] for c in columns]
        return np.stack([self.stores[s][f"gradients/{layer}"][group] for s, group in chosen])

    def about(self) -> dict[str, Any]:
        """Settings and norms, for a store's attributes."""
        return {**self.settings, "norms": dict(zip(self.columns, self.norms.tolist(), strict=True))}


def open_queries(
    folders: Mapping[str, Path], layers: Mapping[str, tuple[int, int]] | None = None
) -> Queries:
    """Open the query stores of all tasks.

    Args:
        folders: Task -> folder of its query artifact.
        layers: Layer -> (out, in) of the model that scores; those of the first task when absent.

    Raises:
        ConfigError: There is no task.
        ArtifactError: They were made with different settings, or not of these layers.
    """
    if not folders:
        raise ConfigError("scores need the queries of at least one task", where="tasks")
    stores = [open_store(folder / "query.zarr") for folder in folders.values()]
    first = stores[0].attrs
    shapes = first["layers"] if layers is None else {n: list(s) for n, s in layers.items()}
    settings = {key: first[key] for key in ("loss_reduction", "val_agg", "estimator")}
    columns: list[str] = []
    norms: list[float] = []
    places: list[tuple[int, int]] = []
    for s, ((task, folder), store) in enumerate(zip(folders.items(), stores, strict=True)):
        for key, value in {"layers": shapes, **settings}.items():
            if store.attrs[key] != value:
                raise ArtifactError(
                    f"a task's query gradients differ in {key} from the pass they are for",
                    where=folder / "query.zarr",
                    value=store.attrs[key],
                    allowed=value,
                    fix="make the queries of all tasks with this model and the same settings",
                )
        groups = [str(g) for g in store["group"][:]]
        by_subtask = settings["val_agg"] == "subtask_max"
        columns += [f"{task}/{group}" if by_subtask else task for group in groups]
        norms += store["norms"][:].tolist()
        places += [(s, g) for g in range(len(groups))]
    sizes = {name: (int(out), int(inn)) for name, (out, inn) in shapes.items()}
    return Queries(columns, np.array(norms), places, stores, sizes, settings)
