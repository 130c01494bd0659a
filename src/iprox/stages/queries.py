"""The stored query gradients of all tasks, as columns that examples are scored against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iprox.errors import ArtifactError, ConfigError, NumericsError
from iprox.store.arrays import create_store, open_store, put

SETTINGS = ("loss_reduction", "val_agg", "estimator", "damping")
"""Root attributes that the queries of all tasks agree in; ``damping`` of directions only."""


def create_query_store(
    path: Path,
    layers: Mapping[str, tuple[int, ...]],
    groups: Sequence[str],
    attrs: Mapping[str, Any],
) -> Any:
    """Make the store of one task's query gradients, with ``gradients/<layer>`` to be filled.

    Args:
        path: Where it goes.
        layers: Layer -> (out, in).
        groups: Names of the groups of queries, a gradient each.
        attrs: Settings, for the root attributes.
    """
    shapes = {name: list(shape) for name, shape in layers.items()}
    store = create_store(path, {**attrs, "layers": shapes})
    for name, shape in layers.items():
        store.create_array(
            f"gradients/{name}",
            shape=(len(groups), *shape),
            dtype="float32",
            chunks=(1, *shape),
            compressors=None,
            dimension_names=["groups", "out", "in"],
        )
    put(store, "group", np.array(groups), ("groups",))
    return store


def norm_of(squares: float, group: str) -> float:
    """Norm of a group's gradient over all layers, from the sum of its squares in float64.

    Raises:
        NumericsError: It is zero or not finite.
    """
    norm = math.sqrt(squares)
    if not (math.isfinite(norm) and norm > 0):
        raise NumericsError(
            "a mean query gradient has no direction",
            where=f"query group {group}",
            value=norm,
            allowed="a finite norm above 0",
            fix="look at this group's queries, or for a precision that overflows",
        )
    return norm


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


class Columns(Mapping[str, Tensor]):
    """The query gradients of some columns by layer, each read when it is asked for."""

    def __init__(self, queries: Queries, columns: range, device: torch.device) -> None:
        self.queries, self.columns, self.device = queries, columns, device

    def __getitem__(self, layer: str) -> Tensor:
        return torch.from_numpy(self.queries.load(layer, self.columns)).to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.queries.layers)

    def __len__(self) -> int:
        return len(self.queries.layers)


def check_origin(query: Mapping[str, Any], found: Mapping[str, Any], where: Path) -> None:
    """Refuse what was not made where a query's gradients were taken.

    Args:
        query: Root attributes of the query's store.
        found: What another store or model says of itself by the same names.
        where: That store or model.

    Raises:
        ArtifactError: It is of another model, of other layers or of another loss.
    """
    for key in ("layers", "loss_reduction", "model"):
        if found[key] != query[key]:
            raise ArtifactError(
                f"curvature and query gradients are of another {key}",
                where=where,
                value=found[key],
                allowed=query[key],
                fix="take both at the model that scores, with the same layers and loss",
            )


def open_queries(
    folders: Mapping[str, Path],
    layers: Mapping[str, tuple[int, int]] | None = None,
    norms_name: str = "norms",
) -> Queries:
    """Open the query stores of all tasks.

    Args:
        folders: Task -> folder of its query artifact.
        layers: Layer -> (out, in) of the model that scores; those of the first task when absent.
        norms_name: Array of their norms: ``norms``, or ``half_norms`` of a direction.

    Raises:
        ConfigError: There is no task.
        ArtifactError: They were made with different settings, or not of these layers.
    """
    if not folders:
        raise ConfigError("scores need the queries of at least one task", where="tasks")
    stores = [open_store(folder / "query.zarr") for folder in folders.values()]
    first = stores[0].attrs
    shapes = first["layers"] if layers is None else {n: list(s) for n, s in layers.items()}
    settings = {key: first[key] for key in SETTINGS if key in first}
    columns: list[str] = []
    norms: list[float] = []
    places: list[tuple[int, int]] = []
    for s, ((task, folder), store) in enumerate(zip(folders.items(), stores, strict=True)):
        for key, value in {"layers": shapes, **settings}.items():
            if store.attrs.get(key) != value:
                raise ArtifactError(
                    f"a task's query gradients differ in {key} from the pass they are for",
                    where=folder / "query.zarr",
                    value=store.attrs.get(key),
                    allowed=value,
                    fix="make the queries of all tasks with this model and the same settings",
                )
        groups = [str(g) for g in store["group"][:]]
        by_subtask = settings["val_agg"] == "subtask_max"
        columns += [f"{task}/{group}" if by_subtask else task for group in groups]
        norms += store[norms_name][:].tolist()
        places += [(s, g) for g in range(len(groups))]
    sizes = {name: (int(out), int(inn)) for name, (out, inn) in shapes.items()}
    return Queries(columns, np.array(norms), places, stores, sizes, settings)
