"""Stage ``features``: inner products of pool examples with all query gradients, and norms.

A pass over the pool is cut into shards; a shard's rows are in pool order whatever the batches
were, and all shards together are the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iprox.engine.scoring import Scorer
from iprox.errors import ArtifactError, ConfigError
from iprox.numerics.influence import UNSCORABLE, influence
from iprox.progress import Track, track
from iprox.stages.passes import Reader, free_bytes, open_reader
from iprox.stages.texts import Texts, pool_ids, pool_texts, split_ids
from iprox.store.arrays import create_store, open_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, InfluenceSection

log = logging.getLogger(__name__)

WHOLE_POOL = "all"


@dataclass(frozen=True)
class Features:
    """What a pass over pool examples is reduced to.

    Attributes:
        example_id: Ids, (examples,), ascending.
        dots: Inner products with the query gradients, (examples, columns) float64.
        norms: Norms of the examples' gradients, (examples,) float64.
        loss: Losses of the examples, (examples,); NaN where there is no supervised token.
        tokens: Tokens per example, (examples,).
        supervised: Supervised tokens per example, (examples,); 0 cannot be scored.
        columns: Names of the query gradients, ``<task>`` or ``<task>/<subtask>``.
        query_norms: Their norms, (columns,).
    """

    example_id: np.ndarray
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
        matrix = influence(self.dots, self.norms, self.query_norms, score)
        matrix[self.supervised == 0] = UNSCORABLE
        owners = np.array([column.split("/")[0] for column in self.columns])
        return {t: matrix[:, owners == t].max(axis=1).astype(np.float32) for t in self.tasks}


PER_EXAMPLE = ("example_id", "dots", "norms", "loss", "tokens", "supervised")


def make(job: Job) -> Metrics:
    """Write ``shard.zarr``: the rows ``job.rows`` of the examples to score, all when absent.

    Its arrays are those of :class:`Features`; the kernels used and the settings are in its
    root attributes.

    Returns:
        Counts of examples and tokens, and the number of passes.

    Raises:
        ArtifactError: The queries are not of this model's layers or of different settings.
        NumericsError: A loss or gradient is not finite; names the example and layer.
    """
    reader = open_reader(job, "model")
    queries = open_queries(job, reader)
    ids = example_ids(job)
    start, stop = job.rows or (0, len(ids))
    texts = pool_texts(
        job.parents["pool"], ids[start:stop], reader.tokenizer, job.section(ChatSection, "chat")
    )
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    features, kernels, n_passes = score_texts(reader, queries, texts, reduction)
    store = create_store(
        job.out / "shard.zarr",
        {"kernels": kernels, "loss_reduction": reduction, "queries": queries.about()},
    )
    for name in PER_EXAMPLE:
        array = getattr(features, name)
        put(store, name, array, ("examples", "columns")[: array.ndim])
    put(store, "columns", np.array(features.columns), ("columns",))
    put(store, "query_norms", features.query_norms, ("columns",))
    return {**texts.counts(), "passes": n_passes}


def example_ids(job: Job) -> list[str]:
    """Ids of all examples this stage scores, sorted: the pool, or one split of it."""
    subset = job.params["subset"]["name"]
    if subset == WHOLE_POOL:
        return pool_ids(job.parents["pool"])
    return sorted(split_ids(job.parents["split"], subset))


@dataclass(frozen=True)
class Queries:
    """The query gradients of all tasks, as columns; read from disk when asked for.

    Attributes:
        columns: Name of each column.
        norms: Its norm, (columns,).
        places: Store and group it is in.
        stores: Open stores.
        settings: What the gradients were made with.
    """

    columns: list[str]
    norms: np.ndarray
    places: list[tuple[int, int]]
    stores: list[Any]
    settings: dict[str, Any]

    def load(self, layer: str, columns: range) -> np.ndarray:
        """Query gradients of one layer, (columns, out, in) float32."""
        chosen = [self.places[c] for c in columns]
        return np.stack([self.stores[s][f"gradients/{layer}"][group] for s, group in chosen])

    def about(self) -> dict[str, Any]:
        """Settings and norms, for a store's attributes."""
        return {**self.settings, "norms": dict(zip(self.columns, self.norms.tolist(), strict=True))}


def open_queries(job: Job, reader: Reader) -> Queries:
    """Open the query stores of all tasks.

    Raises:
        ArtifactError: They were made with different settings, or not of the model's layers.
    """
    roles = job.roles("query")
    if not roles:
        raise ConfigError("features need the queries of at least one task", where="tasks")
    shapes = {name: list(layer.weight.shape) for name, layer in reader.layers.items()}
    stores = [open_store(folder / "query.zarr") for folder in roles.values()]
    agreed = {
        "layers": shapes,
        "loss_reduction": stores[0].attrs["loss_reduction"],
        "val_agg": stores[0].attrs["val_agg"],
        "estimator": stores[0].attrs["estimator"],
    }
    columns: list[str] = []
    norms: list[float] = []
    places: list[tuple[int, int]] = []
    for s, ((task, folder), store) in enumerate(zip(roles.items(), stores, strict=True)):
        for key, value in agreed.items():
            if store.attrs[key] != value:
                raise ArtifactError(
                    f"a task's query gradients differ in {key} from the pass they are for",
                    where=folder / "query.zarr",
                    value=store.attrs[key],
                    allowed=value,
                    fix="make the queries of all tasks with this model and the same settings",
                )
        groups = [str(g) for g in store["group"][:]]
        by_subtask = agreed["val_agg"] == "subtask_max"
        columns += [f"{task}/{group}" if by_subtask else task for group in groups]
        norms += store["norms"][:].tolist()
        places += [(s, g) for g in range(len(groups))]
    settings = {k: v for k, v in agreed.items() if k != "layers"}
    return Queries(columns, np.array(norms), places, stores, settings)


def score_texts(
    reader: Reader, queries: Queries, texts: Texts, reduction: str
) -> tuple[Features, list[dict[str, int | str]], int]:
    """Score encoded examples against all queries.

    When the query gradients of all columns do not fit in memory together, the examples are
    passed several times, each time against a block of columns.

    Returns:
        The features, the kernels used, and the number of passes.
    """
    n = len(texts.encoded)
    supervised = np.array([e.supervised for e in texts.encoded])
    features = Features(
        example_id=np.array(texts.ids, dtype=str),
        dots=np.zeros((n, len(queries.columns))),
        norms=np.zeros(n),
        loss=np.full(n, np.nan),
        tokens=np.array([len(e) for e in texts.encoded]),
        supervised=supervised,
        columns=queries.columns,
        query_norms=queries.norms,
    )
    scorable = np.flatnonzero(supervised)
    blocks = list(_column_blocks(reader, len(queries.columns)))
    kernels: list[dict[str, int | str]] = []
    with track(len(scorable) * len(blocks), "examples", "scoring") as progress:
        for block in blocks:
            tensors = {
                name: torch.from_numpy(queries.load(name, block)).to(reader.device)
                for name in reader.layers
            }
            scorer = Scorer(reader.model, reader.layers, tensors, reduction)
            _fill(features, scorer, reader, texts, scorable, block, progress)
            kernels = scorer.kernels()
    return features, kernels, len(blocks)


def _fill(
    features: Features,
    scorer: Scorer,
    reader: Reader,
    texts: Texts,
    scorable: np.ndarray,
    columns: range,
    progress: Track,
) -> None:
    """Write the norms, losses and inner products of some columns into ``features``."""
    for indices, batch in reader.batches([texts.encoded[i] for i in scorable]):
        rows = scorable[indices]
        scores = scorer.score(batch, [texts.encoded[i].example_id for i in rows])
        features.dots[rows, columns.start : columns.stop] = scores.dots.cpu().numpy()
        features.norms[rows] = scores.squared_norms.sqrt().cpu().numpy()
        features.loss[rows] = scores.losses.double().cpu().numpy()
        progress.advance(len(rows), tokens=int(batch.lengths.sum()))


def _column_blocks(reader: Reader, n_columns: int) -> Iterator[range]:
    """Columns in blocks whose query gradients fit in half of the free memory."""
    column_bytes = sum(4 * layer.weight.numel() for layer in reader.layers.values())
    size = max(1, free_bytes(reader.device) // 2 // column_bytes)
    for start in range(0, n_columns, size):
        yield range(start, min(start + size, n_columns))


def gather(shards: Sequence[Path]) -> Features:
    """All shards as one, ids ascending.

    Args:
        shards: The ``shard-*.zarr`` folders, in any order.

    Raises:
        ArtifactError: There is none, they are of different queries, or an example is in two.
    """
    stores = [(path, open_store(path)) for path in sorted(shards)]
    if not stores:
        raise ArtifactError("a features artifact has no shards", fix="make it again")
    first = stores[0][1]
    for path, store in stores[1:]:
        if store.attrs["queries"] != first.attrs["queries"]:
            raise ArtifactError(
                "shards were made with different queries or settings",
                where=path,
                fix="delete this artifact's folder and run Snakemake again",
            )
    joined = {name: np.concatenate([store[name][:] for _, store in stores]) for name in PER_EXAMPLE}
    joined["example_id"] = np.array(joined["example_id"].tolist(), dtype=str)
    order = np.argsort(joined["example_id"], kind="stable")
    joined = {name: array[order] for name, array in joined.items()}
    ids = joined["example_id"]
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise ArtifactError("an example is in two shards", where=f"example {repeated[0]}")
    columns = [str(c) for c in first["columns"][:]]
    return Features(**joined, columns=columns, query_norms=first["query_norms"][:])


def read_features(folder: Path) -> Features:
    """The whole of a features artifact.

    Raises:
        ArtifactError: As :func:`gather`.
    """
    return gather(sorted(folder.glob("shard-*.zarr")))


def restrict(features: Features, ids: Sequence[str]) -> Features:
    """The features of some examples, in their order among all.

    Raises:
        ArtifactError: An id is not among them.
    """
    keep = np.isin(features.example_id, np.array(list(ids), dtype=str))
    if keep.sum() != len(set(ids)):
        missing = sorted(set(ids) - set(features.example_id))
        raise ArtifactError("examples are missing from the features", value=missing[0])
    values = {f.name: getattr(features, f.name) for f in fields(features)}
    return Features(**values | {name: values[name][keep] for name in PER_EXAMPLE})
