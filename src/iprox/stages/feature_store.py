"""Reading what a pass over the pool left: inner products or sketches, as scores.

Features are read block by block in the order of the examples' ids, so that a ranking of a pool
of any size holds ids and scores, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iprox.errors import ArtifactError
from iprox.numerics.influence import UNSCORABLE, influence
from iprox.store.arrays import open_store
from iprox.store.job import Job
from iprox.study.schema import FeaturesSection

BLOCK_ROWS = 2**20
"""Examples that are in memory at once."""

EXACT = "exact"

EMBEDDING = "embedding"
"""What shards of text embeddings say they are, where sketches of gradients name their map."""

ROWS = "rows.zarr"
"""Store with a row for each query of a task."""

PER_EXAMPLE = ("example_id", "dots", "norms", "loss", "tokens", "supervised")


@dataclass(frozen=True)
class Features:
    """What a pass over pool examples is reduced to.

    Attributes:
        example_id: Ids, (examples,) large_string, ascending.
        dots: Inner products with the query gradients, (examples, columns) float64.
        norms: Norms of the examples' gradients, (examples,) float64.
        loss: Losses of the examples, (examples,); NaN where it cannot be scored: there is no
            supervised token, or a number of it was not finite.
        tokens: Tokens per example, (examples,).
        supervised: Supervised tokens per example, (examples,).
        columns: Names of the query gradients, ``<task>`` or ``<task>/<subtask>``.
        query_norms: Their norms, (columns,).
    """

    example_id: pa.Array
    dots: np.ndarray
    norms: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    supervised: np.ndarray
    columns: list[str]
    query_norms: np.ndarray

    @property
    def tasks(self) -> list[str]:
        """Tasks, in the order of the columns."""
        return list(dict.fromkeys(column.split("/")[0] for column in self.columns))

    def scores(self, score: str) -> dict[str, np.ndarray]:
        """Score of every example by task: the maximum over the task's columns.

        Args:
            score: ``cosine`` or ``dot``.

        Returns:
            Task -> (examples,) float32; -inf for examples that cannot be scored.
        """
        return self.best(self.column_scores(score))

    def column_scores(self, score: str) -> np.ndarray:
        """Score of every example against every query gradient.

        Args:
            score: ``cosine`` or ``dot``.

        Returns:
            (examples, columns) float64; -inf for examples that cannot be scored.
        """
        matrix = influence(self.dots, self.norms, self.query_norms, score)
        matrix[np.isnan(self.loss)] = UNSCORABLE
        return matrix

    def best(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Scores by task from those by query gradient: the maximum over a task's columns.

        Args:
            matrix: Scores by query gradient, (examples, columns).

        Returns:
            Task -> (examples,) float32.
        """
        owners = np.array([column.split("/")[0] for column in self.columns])
        return {t: matrix[:, owners == t].max(axis=1).astype(np.float32) for t in self.tasks}


@dataclass(frozen=True)
class LayerDots:
    """What each layer adds to examples' inner products with the query gradients.

    Attributes:
        layers: Layers of the dense model; of a factorised one both factors are added up.
        dots: Inner products, (examples, columns, layers) float32.
    """

    layers: list[str]
    dots: np.ndarray

    def contributions(self, features: Features, score: str) -> dict[str, np.ndarray]:
        """What each layer adds to every example's score; over layers they sum to the score.

        Of several columns of a task the one counts that the score is taken from.

        Args:
            features: The features of the same examples.
            score: ``cosine`` or ``dot``.

        Returns:
            Task -> (examples, layers) float64; zero for examples that cannot be scored.
        """
        matrix = influence(features.dots, features.norms, features.query_norms, score)
        owners = np.array([column.split("/")[0] for column in features.columns])
        found = {}
        for task in features.tasks:
            own = np.flatnonzero(owners == task)
            best = own[matrix[:, own].argmax(axis=1)]
            parts = self.dots[np.arange(len(best)), best].astype(np.float64)
            if score != "dot":
                norms = np.where(features.norms > 0, features.norms, np.inf)
                parts /= (norms * features.query_norms[best])[:, None]
            found[task] = parts
        return found


@dataclass(frozen=True)
class QuerySketches:
    """Sketches of the query gradients of all tasks, made with the map of a sketched pool.

    Attributes:
        columns: Names of the query gradients.
        rows: Their sketches, (columns, dim) float32.
        expected: Root attributes of the shards they can be compared with.
    """

    columns: list[str]
    rows: np.ndarray
    expected: dict[str, Any]

    @property
    def norms(self) -> np.ndarray:
        """Norms of the sketches, (columns,) float64."""
        return np.asarray(np.linalg.norm(self.rows.astype(np.float64), axis=1))


@dataclass(frozen=True)
class FeatureStore:
    """The open shards of a features artifact.

    Attributes:
        shards: Path and group of each shard, in order.
        columns: Names of the query gradients.
        query_norms: Their norms, (columns,).
        dots: Inner products of some rows of a shard with the query gradients.
    """

    shards: list[tuple[Path, Any]]
    columns: list[str]
    query_norms: np.ndarray
    dots: Callable[[Any, slice], np.ndarray]

    @property
    def has_losses(self) -> bool:
        """Whether the examples passed a model that gives them a loss."""
        return all(shard.attrs.get("kind") != EMBEDDING for _, shard in self.shards)

    def blocks(self) -> Iterator[Features]:
        """The examples in ascending order of their ids, at most ``BLOCK_ROWS`` at a time.

        Raises:
            ArtifactError: The ids do not ascend, or an example is in two shards.
        """
        last: str | None = None
        for path, shard in self.shards:
            ids = _read_ids(shard["example_id"])
            last = _check_ascending(ids, last, path)
            for start in range(0, len(ids), BLOCK_ROWS):
                rows = slice(start, min(start + BLOCK_ROWS, len(ids)))
                yield self._block(shard, ids[rows], rows)

    def read(self) -> Features:
        """All examples at once.

        Raises:
            ArtifactError: As :meth:`blocks`.
        """
        blocks = list(self.blocks())
        if not blocks:
            return self._block(self.shards[0][1], pa.array([], pa.large_string()), slice(0, 0))
        joined = {
            name: np.concatenate([getattr(b, name) for b in blocks]) for name in PER_EXAMPLE[1:]
        }
        ids = pa.concat_arrays([b.example_id for b in blocks])
        return Features(ids, columns=self.columns, query_norms=self.query_norms, **joined)

    def layer_dots(self) -> LayerDots | None:
        """Inner products by layer, of the examples of :meth:`read`; None when none were kept."""
        if not all("layer_dots" in shard for _, shard in self.shards):
            return None
        layers = [str(name) for name in self.shards[0][1]["layers"][:]]
        return LayerDots(
            layers, np.concatenate([shard["layer_dots"][:] for _, shard in self.shards])
        )

    def count(self, name: str) -> float | None:
        """A count in the shards' attributes, summed; None when one does not say."""
        counts = [shard.attrs.get(name) for _, shard in self.shards]
        return None if None in counts else float(sum(counts))

    def _block(self, shard: Any, ids: pa.Array, rows: slice) -> Features:
        arrays = {name: shard[name][rows] for name in ("norms", "loss", "tokens", "supervised")}
        dots = self.dots(shard, rows)
        return Features(ids, dots, columns=self.columns, query_norms=self.query_norms, **arrays)


def open_scored(job: Job, role: str, queries: str) -> FeatureStore:
    """Open a parent's features; when they are sketches, sketch its query gradients too.

    Of queries that come as a row each, sketches or embeddings, means are taken.

    Args:
        job: Has the section ``features`` when there are sketches among its parents.
        role: Role of the parent.
        queries: Prefix of the roles of its tasks' queries, parents of a job with sketches only.

    Raises:
        ArtifactError: The features are of other settings than the job's, or not of one kind.
    """
    folders = job.roles(queries)
    sketches: QuerySketches | None = None
    if folders and all((folder / ROWS).is_dir() for folder in folders.values()):
        from iprox.stages.query_rows import mean_rows

        by_subtask = job.params["influence"]["val_agg"] == "subtask_max"
        sketches = mean_rows(folders, by_subtask)
    elif folders:
        from iprox.stages.sketches import query_sketches

        sketches = query_sketches(folders, job.section(FeaturesSection, "features"))
    return open_features(job.parents[role], sketches)


def open_features(folder: Path, queries: QuerySketches | None = None) -> FeatureStore:
    """Open a features artifact.

    Args:
        folder: Its folder.
        queries: Sketches of the query gradients; absent for exact features, which hold inner
            products.

    Raises:
        ArtifactError: There are no shards, or they are of different settings.
    """
    return open_shards(sorted(folder.glob("shard-*.zarr")), queries)


def open_shards(paths: Sequence[Path], queries: QuerySketches | None = None) -> FeatureStore:
    """Open shards in the order of their examples.

    Raises:
        ArtifactError: As :func:`open_features`.
    """
    shards = [(path, open_store(path)) for path in paths]
    if not shards:
        raise ArtifactError("a features artifact has no shards", fix="make it again")
    if queries is not None:
        for path, shard in shards:
            check_settings(path, shard.attrs, queries.expected)
        return FeatureStore(shards, queries.columns, queries.norms, _sketched_dots(queries))
    first = shards[0][1]
    expected = {"kind": EXACT, "queries": first.attrs.get("queries")}
    for path, shard in shards:
        check_settings(path, {"kind": EXACT, **shard.attrs}, expected)
    columns = [str(c) for c in first["columns"][:]]
    return FeatureStore(shards, columns, first["query_norms"][:], lambda s, rows: s["dots"][rows])


def check_settings(path: Path, found: Any, expected: dict[str, Any]) -> None:
    """Refuse a shard that was made with other settings than expected.

    Raises:
        ArtifactError: Names the first setting that differs.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise ArtifactError(
                f"features were made with another {key}",
                where=path,
                value=found.get(key),
                allowed=value,
                fix="delete this artifact's folder and run Snakemake again",
            )


def read_features(folder: Path, queries: QuerySketches | None = None) -> Features:
    """The whole of a features artifact.

    Raises:
        ArtifactError: As :func:`open_features` and :meth:`FeatureStore.blocks`.
    """
    return open_features(folder, queries).read()


def restrict(features: Features, ids: Sequence[str]) -> Features:
    """The features of some examples, in their order among all.

    Raises:
        ArtifactError: An id is not among them.
    """
    wanted = pa.array(sorted(set(ids)), pa.large_string())
    missing = wanted.filter(pc.invert(pc.is_in(wanted, features.example_id)))
    if len(missing):
        raise ArtifactError("examples are missing from the features", value=missing[0].as_py())
    keep = pc.is_in(features.example_id, wanted)
    rows = keep.to_numpy(zero_copy_only=False)
    values = {f.name: getattr(features, f.name) for f in fields(features)}
    kept = {name: values[name][rows] for name in PER_EXAMPLE[1:]}
    return Features(**values | kept | {"example_id": features.example_id.filter(keep)})


def sketch_rows(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """Sketches of some examples at unit length, in the order asked for.

    Only rows that are asked for are kept; the rest passes by a chunk at a time.

    Args:
        folder: A features artifact of sketches.
        ids: Ids of the examples.

    Returns:
        (examples, dim) in the precision they are stored in.

    Raises:
        ArtifactError: There are no sketches, or an example has none.
    """
    wanted = pa.array(list(ids), pa.large_string())
    rows: np.ndarray | None = None
    found = np.zeros(len(wanted), dtype=bool)
    for path in sorted(folder.glob("shard-*.zarr")):
        shard = open_store(path)
        if "sketch" not in shard:
            raise ArtifactError("features are not sketches", where=path, fix="set features.kind")
        sketch, places = shard["sketch"], pc.index_in(_read_ids(shard["example_id"]), wanted)
        here = places.fill_null(-1).to_numpy()
        if rows is None:
            rows = np.zeros((len(wanted), sketch.shape[1]), dtype=sketch.dtype)
        for start in range(0, len(here), sketch.chunks[0]):
            part = here[start : start + sketch.chunks[0]]
            if (part >= 0).any():
                rows[part[part >= 0]] = sketch[start : start + len(part)][part >= 0]
        found[here[here >= 0]] = True
    if rows is None or not found.all():
        missing = [] if rows is None else wanted.filter(pa.array(~found))[:1].to_pylist()
        raise ArtifactError("examples are missing from the features", where=folder, value=missing)
    return rows


def _sketched_dots(queries: QuerySketches) -> Callable[[Any, slice], np.ndarray]:
    """Inner products from sketches, which are stored at unit length beside their norms."""

    def dots(shard: Any, rows: slice) -> np.ndarray:
        sketch = shard["sketch"]
        step = sketch.chunks[0]
        products = np.empty((rows.stop - rows.start, len(queries.columns)))
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            unit = sketch[part].astype(np.float32)
            products[start - rows.start : part.stop - rows.start] = unit @ queries.rows.T
        return products * shard["norms"][rows][:, None]

    return dots


def _read_ids(array: Any) -> pa.Array:
    """Ids of a shard; one chunk at a time passes through Python."""
    step = max(1, array.chunks[0])
    parts = [
        pa.array(array[start : start + step].tolist(), pa.large_string())
        for start in range(0, array.shape[0], step)
    ]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())


def _check_ascending(ids: pa.Array, last: str | None, path: Path) -> str | None:
    """The last id of a shard, after checking that its ids ascend, and follow those before.

    Raises:
        ArtifactError: They do not.
    """
    if not len(ids):
        return last
    before = pa.concat_arrays([pa.array([last], pa.large_string()), ids[:-1]])
    wrong = pc.greater_equal(before, ids).fill_null(False)
    place = wrong.index(True).as_py()
    if place >= 0:
        same = before[place] == ids[place]
        raise ArtifactError(
            "an example is in two shards" if same else "examples are not in the order of their ids",
            where=f"{path}, example {ids[place].as_py()}",
            fix="delete this artifact's folder and run Snakemake again",
        )
    return str(ids[-1].as_py())
