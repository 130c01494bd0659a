"""Stage ``ranking``: every pool example's score and rank for every task."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from iprox.errors import ArtifactError, DataError, NumericsError
from iprox.numerics.influence import descending
from iprox.scorers import Corpus
from iprox.stages.feature_store import FeatureStore, open_scored
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_table, write_groups
from iprox.study.schema import InfluenceSection, ScorerSection
from iprox.study.scorers import GRADIENT

log = logging.getLogger(__name__)

GROUP_ROWS = 2**18
"""Rows of a row group; each holds rows of one task."""

SCHEMA = pa.schema(
    [
        ("task", pa.large_string()),
        ("rank", pa.int64()),
        ("example_id", pa.large_string()),
        ("score", pa.float32()),
    ]
)


def make(job: Job) -> Metrics:
    """Write ``ranking.parquet``: ``task, rank, example_id, score``, sorted by task and rank.

    Rank 1 is the most useful example. Examples that a prefilter left out are not there: they
    have neither score nor rank. Scores are float32 and equal ones are ranked by
    ``example_id``. An example that cannot be scored has the score -inf and ranks last: by
    gradients one without supervised tokens or, by cosine, without a gradient.

    Returns:
        Number of examples and tasks, of examples that could not be scored, and of those that a
        prefilter left out; of a scorer of texts also what it counts.

    Raises:
        ArtifactError: The features are of other tasks or settings, or incomplete.
        DataError: A scorer of texts finds no example better than another.
        NumericsError: It finds a score that is not a number.
    """
    scorer = job.section(ScorerSection, "scorer")
    settings: dict[str, Any] = {"scorer": scorer.kind}
    counted: Metrics = {}
    if scorer.kind != GRADIENT:
        ids, scores, counted = score_texts(job, scorer.kind)
        settings |= {k: v for k, v in job.params["scorer"].items() if k != "kind"}
    else:
        section, checkpoints = job.section(InfluenceSection, "influence"), open_checkpoints(job)
        ids, scores = score_all(checkpoints, section.score)
        counted["prefiltered"] = int(checkpoints[-1][1].count("prefiltered") or 0)
        settings |= {"influence": section.model_dump()}
        settings |= {"features": job.params["features"]} if "features" in job.params else {}
    counts: Metrics = {
        **counted,
        "examples": len(ids),
        "tasks": len(scores),
        "unscorable": int(np.isneginf(next(iter(scores.values()))).sum()),
    }
    if counts["unscorable"]:
        what = "gradient" if scorer.kind == GRADIENT else "score"
        log.warning(
            "%d of %d examples have no %s and rank last", counts["unscorable"], len(ids), what
        )
    write_groups(job.out / "ranking.parquet", SCHEMA, rank(scores, ids), {**settings, **counts})
    return counts


def score_texts(job: Job, kind: str) -> tuple[pa.Array, dict[str, np.ndarray], Metrics]:
    """Ids of the pool, ascending, their scores by a scorer of texts, and what it counted.

    Returns:
        (examples,), task -> (examples,) float32, and counts.

    Raises:
        DataError: All examples have the same score for a task.
        NumericsError: A score is not a number.
    """
    corpus = Corpus(job, job.params["tasks"])
    scores = importlib.import_module(f"iprox.scorers.{kind}").score(job, corpus)
    by_task = {task: s.astype(np.float32) for task, s in scores.by_task.items()}
    for task, found in by_task.items():
        if np.isnan(found).any() or np.isposinf(found).any():
            raise NumericsError(
                "a score is not a number",
                where=f"scorer {kind}, task {task}",
                value=f"example {corpus.ids[int(np.argmin(np.isfinite(found)))].as_py()}",
            )
        if len(found) > 1 and (found == found[0]).all():
            raise DataError(
                "a scorer finds no example of the pool better than another",
                where=f"scorer {kind}, task {task}",
                value=f"{len(found)} examples with the score {found[0]:g}",
                fix="look at the queries' texts and at scorer.text: they may share nothing with "
                "the pool",
            )
    return corpus.ids, by_task, scores.metrics


def open_checkpoints(job: Job) -> list[tuple[float, FeatureStore]]:
    """Weight and features of every checkpoint that scores are summed over; often of one alone.

    Raises:
        ArtifactError: The features are of other settings than the job's.
        NumericsError: The warm-up learnt nothing in an epoch: its weight is zero.
    """
    last = open_scored(job, "features", "query")
    earlier = sorted({role.split("/")[0] for role in job.roles("checkpoint")}, key=int)
    if not earlier:
        return [(1.0, last)]
    at = {n: f"checkpoint/{n}" for n in earlier}
    stores = [open_scored(job, f"{at[n]}/features", f"{at[n]}/query") for n in earlier] + [last]
    epochs = read_table(job.parents["warmup"] / "epochs.parquet")
    weights = epochs["weight"].tolist()
    if not all(weight > 0 for weight in weights):
        raise NumericsError(
            "an epoch of the warm-up has no learning rate, so its checkpoint has no weight",
            where=f"epoch {1 + int(epochs['weight'].argmin())}",
            value=weights,
            fix="train longer, or set influence.checkpoints to last",
        )
    return list(zip(weights, stores, strict=True))


def score_all(
    checkpoints: Sequence[tuple[float, FeatureStore]], score: str
) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Ids of all examples, ascending, and their scores by task; read block by block.

    Scores against each query gradient are summed over checkpoints (TracIn, arXiv:2002.08484,
    section 3; the weights of LESS, arXiv:2402.04333) before a task takes its maximum.

    Args:
        checkpoints: Weight and open features of each.
        score: ``cosine`` or ``dot``.

    Returns:
        (examples,), and task -> (examples,) float32.

    Raises:
        ArtifactError: The checkpoints scored different examples or tasks.
    """
    ids: list[pa.Array] = []
    parts: dict[str, list[np.ndarray]] = {}
    for blocks in zip(*(store.blocks() for _, store in checkpoints), strict=True):
        first = blocks[0]
        total = np.zeros((len(first.example_id), len(first.columns)))
        for (weight, _), block in zip(checkpoints, blocks, strict=True):
            if block.columns != first.columns or not block.example_id.equals(first.example_id):
                raise ArtifactError("checkpoints scored different examples or tasks")
            total += weight * block.column_scores(score)
        ids.append(first.example_id)
        for task, scores in first.best(total).items():
            parts.setdefault(task, []).append(scores)
    return pa.concat_arrays(ids), {task: np.concatenate(p) for task, p in parts.items()}


def rank(scores: Mapping[str, np.ndarray], ids: pa.Array) -> Iterator[pa.Table]:
    """Rows of the ranking in order, a row group at a time.

    Args:
        scores: Task -> (examples,) float32.
        ids: Ids of the examples, ascending, so that equal scores are in the order of ids.
    """
    for task in sorted(scores):
        order = descending(scores[task])
        for start in range(0, len(order), GROUP_ROWS):
            rows = order[start : start + GROUP_ROWS]
            columns = {
                "task": pa.repeat(pa.scalar(task, pa.large_string()), len(rows)),
                "rank": np.arange(start + 1, start + len(rows) + 1),
                "example_id": ids.take(pa.array(rows)),
                "score": scores[task][rows],
            }
            yield pa.table(columns, SCHEMA)
