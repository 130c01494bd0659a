"""Stage ``query``: the query gradients of a task at a scoring model."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from iprox.data.chat import Encoded
from iprox.engine.gradients import mean_gradient
from iprox.engine.loss import Batch
from iprox.engine.scoring import Scorer
from iprox.errors import NumericsError
from iprox.models.flops import load_of, network_of
from iprox.numerics import flops
from iprox.progress import Track, track
from iprox.stages.passes import Reader, fingerprint, open_reader
from iprox.stages.queries import create_query_store, norm_of
from iprox.stages.texts import Texts, query_texts
from iprox.store.arrays import put
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, InfluenceSection

log = logging.getLogger(__name__)

WHOLE_TASK = "all"


def make(job: Job) -> Metrics:
    """Write ``query.zarr``.

    ``gradients/<layer>`` (groups, out, in) float32 are means of the queries' gradients, one
    group per subtask for ``subtask_max``, else one group; ``norms`` (groups,) their norms over
    all layers; ``group`` (groups,) the groups' names.

    Returns:
        Counts of queries, groups, tokens and supervised tokens, and FLOPs.

    Raises:
        DataError: No query has a supervised token, or its label is not one of the classifier's.
        NumericsError: A loss or gradient is not finite, or a mean gradient is zero.
    """
    influence = job.section(InfluenceSection, "influence")
    reader = open_reader(job, "model")
    chat = job.section(ChatSection, "chat")
    texts = query_texts(job.parents["task"], reader.tokenizer, chat, reader.labels)
    groups = group_queries(texts.supervised_only(), influence.val_agg)
    store = create_query_store(
        job.out / "query.zarr",
        {name: tuple(layer.weight.shape) for name, layer in reader.layers.items()},
        list(groups),
        {
            "val_agg": influence.val_agg,
            "loss_reduction": influence.loss_reduction,
            "estimator": influence.estimator,
            "model": fingerprint(reader.layers),
            "n_queries": {name: len(members) for name, members in groups.items()},
            "truncated": texts.n_truncated,
            "unsupervised": texts.n_unsupervised,
        },
    )
    norms = []
    with track(sum(map(len, groups.values())), "queries", "query gradients") as progress:
        for place, (group, members) in enumerate(groups.items()):
            gradients = group_gradient(reader, members, influence, progress)
            for name, gradient in gradients.items():
                store[f"gradients/{name}"][place] = gradient.float().cpu().numpy()
            norms.append(gradient_norm(gradients, group))
    put(store, "norms", np.array(norms), ("groups",))
    load = load_of(texts.encoded)
    unit = influence.val_agg == "mean_unit"
    return {
        **texts.counts(),
        "groups": len(groups),
        "flops": flops.query(network_of(reader.model, reader.layers), load, unit),
    }


def group_queries(texts: Texts, val_agg: str) -> dict[str, list[Encoded]]:
    """Queries whose gradients are averaged together, by the group's name, sorted."""
    groups: dict[str, list[Encoded]] = {}
    for encoded, subtask in zip(texts.encoded, texts.subtasks, strict=True):
        name = subtask if val_agg == "subtask_max" else WHOLE_TASK
        groups.setdefault(name, []).append(encoded)
    return dict(sorted(groups.items()))


def group_gradient(
    reader: Reader, queries: list[Encoded], influence: InfluenceSection, progress: Track
) -> dict[str, Tensor]:
    """Mean gradient of some queries, of their gradients as they are or as unit vectors.

    Returns:
        Layer -> (out, in).

    Raises:
        NumericsError: A loss or gradient is not finite, or (unit vectors) zero.
    """
    weights = torch.full((len(queries),), 1 / len(queries), dtype=torch.float64)
    if influence.val_agg == "mean_unit":
        weights /= query_norms(reader, queries, influence.loss_reduction)

    def weighted() -> Iterator[tuple[Batch, Tensor, list[str]]]:
        for indices, batch in reader.batches(queries):
            yield batch, weights[indices], [queries[i].example_id for i in indices]
            progress.advance(len(indices), tokens=int(batch.lengths.sum()))

    return mean_gradient(reader.model, reader.layers, weighted(), influence.loss_reduction)


def query_norms(reader: Reader, queries: list[Encoded], reduction: str) -> Tensor:
    """Norm of every query's gradient over all layers, (queries,) float64.

    Raises:
        NumericsError: A gradient is not finite or zero; names the query.
    """
    scorer = Scorer(reader.model, reader.layers, {}, reduction)
    norms = torch.zeros(len(queries), dtype=torch.float64)
    for indices, batch in reader.batches(queries):
        ids = [queries[i].example_id for i in indices]
        norms[indices] = scorer.score(batch, ids).squared_norms.sqrt().cpu()
    for query, norm in zip(queries, norms, strict=True):
        if norm == 0:
            raise NumericsError(
                "the gradient of a query is zero and has no direction",
                where=f"query {query.example_id}",
                fix="set influence.val_agg: mean_raw",
            )
    return norms


def gradient_norm(gradients: dict[str, Tensor], group: str) -> float:
    """Norm of a group's gradient over all layers, summed in float64.

    Raises:
        NumericsError: It is zero or not finite.
    """
    return norm_of(sum(float(g.double().square().sum()) for g in gradients.values()), group)
