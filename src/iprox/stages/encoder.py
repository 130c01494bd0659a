"""Stage ``encoder``: a text encoder that has learnt a teacher's influence scores.

Influcoder (arXiv:2606.13668). The teacher is the run's scoring model, the target or a proxy of
it: inner products of sketched gradients, at unit length, of single queries and of the examples
of the ``teach`` split. The encoder is judged on the ``fidelity`` slice, of which it has seen
nothing, with queries it was taught and with queries it was not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iprox.data.leaks import Group, hold_out, refuse_overlap
from iprox.errors import ArtifactError
from iprox.models.device import pick_device
from iprox.models.encoder import Encoder, load_encoder
from iprox.numerics.correlation import bootstrap, interval, spearman
from iprox.numerics.distillation import aggregated, per_anchor
from iprox.stages.encoding import (
    EncoderTexts,
    check_cut,
    embed_texts,
    example_texts,
    query_texts,
)
from iprox.stages.feature_store import QuerySketches, read_features
from iprox.stages.query_rows import QueryRows, read_rows
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import EncoderSection
from iprox.training.distil import Lesson, distil

log = logging.getLogger(__name__)

ALL = "all"
MEAN = "mean"
RESAMPLES = 1000


@dataclass(frozen=True)
class Labelled:
    """Queries, candidates, and the teacher's scores of all pairs.

    Attributes:
        queries: Texts of the queries, of all tasks one after the other.
        tasks: Task of each query.
        candidates: Texts of the candidates.
        labels: (queries, candidates) float32.
        unscorable: Candidates that were left out, because the teacher has no gradient of them.
    """

    queries: EncoderTexts
    tasks: list[str]
    candidates: EncoderTexts
    labels: np.ndarray
    unscorable: int = 0

    def take(self, queries: np.ndarray, candidates: np.ndarray) -> Labelled:
        """Some of the queries and candidates, by mask."""
        q, c = np.flatnonzero(queries).tolist(), np.flatnonzero(candidates).tolist()
        tasks = [self.tasks[i] for i in q]
        labels = self.labels[np.ix_(q, c)]
        return Labelled(self.queries.take(q), tasks, self.candidates.take(c), labels)

    def by_task(self) -> dict[str, np.ndarray]:
        """Task -> mask of its queries; ``all`` of them when there are several tasks."""
        tasks = np.array(self.tasks)
        masks = {task: tasks == task for task in dict.fromkeys(self.tasks)}
        return masks | ({ALL: np.ones(len(tasks), dtype=bool)} if len(masks) > 1 else {})


def make(job: Job) -> Metrics:
    """Write the encoder as a Hugging Face folder, and how well it has learnt.

    ``log.parquet`` has a row per step, ``epochs.parquet`` the validation after each epoch.
    ``quality.parquet`` has the columns ``queries`` (``known`` to the encoder or ``heldout``),
    ``encoder`` (``untrained`` or ``trained``), ``task`` (or ``all`` queries together, or the
    ``mean`` over tasks), ``metric`` (``aggregated``: rank correlation of scores averaged over
    queries; ``per_anchor``: its mean over single queries), ``value``, ``low`` and ``high`` (95 %
    bootstrap interval over candidates), ``n_queries`` and ``n_candidates``.

    A killed job goes on after the last epoch it kept, to the same bytes.

    Returns:
        Counts, and the held-out agreement before and after.

    Raises:
        ArtifactError: The teacher's sketches are of different settings.
        DataError: Splits overlap, or the encoder is too short for the texts.
        NumericsError: All labels are equal, or training diverged.
    """
    section = job.section(EncoderSection, "encoder")
    encoder = load_encoder(job.parents["backbone"], section.max_length, pick_device())
    taught, heldout = (read_labels(job, role, section.instruction) for role in ("teach", "heldout"))
    parts = divide(taught, heldout, section)
    _check_lengths(encoder, parts, section.max_cut)
    untrained = quality(encoder, parts, "untrained")
    lesson, validate = _lesson(encoder, parts["train"]), _validator(encoder, parts)
    done = distil(encoder, lesson, validate, section, job.progress)
    trained = quality(encoder, parts, "trained")
    encoder.save(job.out)
    table = pd.DataFrame(untrained + trained)
    write_table(job.out / "log.parquet", done.log, section.model_dump())
    write_table(job.out / "epochs.parquet", done.epochs, {"chosen": done.chosen})
    write_table(job.out / "quality.parquet", table)
    return {
        "queries": len(parts["train"].queries.ids),
        "queries_heldout": len(parts["queries"].queries.ids),
        "candidates": len(parts["train"].candidates.ids),
        "candidates_validation": len(parts["validation"].candidates.ids),
        "candidates_heldout": len(heldout.candidates.ids),
        "unscorable": taught.unscorable + heldout.unscorable,
        "steps": len(done.log),
        "epoch": done.chosen,
        "tokens": done.tokens,
        "spearman_untrained": _headline(untrained),
        "spearman_trained": _headline(trained),
    }


def read_labels(job: Job, role: str, instruction: str) -> Labelled:
    """The teacher's scores of one split's examples with all queries, and their texts.

    Args:
        job: Has the parents ``<role>`` (sketched features of the split), ``sketches/<task>``,
            ``task/<task>`` and ``pool``.
        role: ``teach`` or ``heldout``.
        instruction: Put before the queries' texts.

    Raises:
        ArtifactError: The sketches are of different settings.
    """
    rows = {task: read_rows(folder) for task, folder in job.roles("sketches").items()}
    queries, tasks = _queries(job.roles("task"), rows, instruction)
    sketches = np.concatenate([found.rows for found in rows.values()])
    about = _one_about(rows)
    asked = QuerySketches(queries.ids, sketches, about)
    features = read_features(job.parents[role], asked)
    usable = np.flatnonzero(np.isfinite(features.loss) & (features.norms > 0))
    labels = (features.dots[usable] / features.norms[usable, None]).T
    ids = features.example_id.take(usable).to_pylist()
    unscorable = len(features.norms) - len(usable)
    if unscorable:
        log.warning("%d examples of %s have no gradient and are left out", unscorable, role)
    texts = example_texts(job.parents["pool"], ids)
    return Labelled(queries, tasks, texts, labels.astype(np.float32), unscorable)


def divide(taught: Labelled, heldout: Labelled, section: EncoderSection) -> dict[str, Labelled]:
    """What is taught, what an epoch is chosen by, and what is judged on; none of it overlaps.

    Returns:
        ``train`` and ``validation``: known queries with labelled candidates; ``known`` and
        ``queries``: known and held-out queries with held-out candidates.

    Raises:
        DataError: Something would be judged on that was taught.
    """
    aside = np.zeros(len(taught.queries.ids), dtype=bool)
    for task, own in taught.by_task().items():
        if task != ALL:
            places = np.flatnonzero(own)
            chosen = taught.queries.take(places.tolist())
            group = Group(f"queries of {task}", chosen.ids, chosen.hashes)
            aside[places] = hold_out(group, section.heldout, section.seed)
    # a text that another task holds out is not taught either
    out = {h for h, held in zip(taught.queries.hashes, aside, strict=True) if held}
    aside |= np.isin(np.array(taught.queries.hashes), list(out))
    candidates = taught.candidates
    group = Group("labelled candidates", candidates.ids, candidates.hashes)
    later = np.array(hold_out(group, section.validation, section.seed))
    everyone = np.ones(len(heldout.candidates.ids), dtype=bool)
    parts = {
        "train": taught.take(~aside, ~later),
        "validation": taught.take(~aside, later),
        "known": heldout.take(~aside, everyone),
        "queries": heldout.take(aside, everyone),
    }
    audit(parts)
    return parts


def audit(parts: dict[str, Labelled]) -> None:
    """Refuse parts that share an example or a text with what is taught.

    Raises:
        DataError: Names the first one shared.
    """

    def candidates(part: str, name: str) -> Group:
        texts = parts[part].candidates
        return Group(name, texts.ids, texts.hashes)

    def queries(part: str, name: str) -> Group:
        texts = parts[part].queries
        named = zip(parts[part].tasks, texts.ids, strict=True)  # two tasks may use one id
        return Group(name, [f"query {i} of {task}" for task, i in named], texts.hashes)

    train = candidates("train", "labelled candidates")
    refuse_overlap(train, candidates("validation", "validation candidates"))
    refuse_overlap(train, candidates("known", "held-out candidates"))
    known, heldout = queries("train", "queries taught"), queries("queries", "held-out queries")
    refuse_overlap(known, heldout)
    refuse_overlap(train, heldout)
    refuse_overlap(known, candidates("known", "held-out candidates"))


def quality(encoder: Encoder, parts: dict[str, Labelled], name: str) -> list[dict[str, Any]]:
    """Rows of ``quality.parquet`` for one state of the encoder."""
    rows = []
    for queries, part in (("known", parts["known"]), ("heldout", parts["queries"])):
        if not part.tasks:
            continue
        scores = predict(encoder, part)
        own = []
        for task, mask in part.by_task().items():
            a, b = scores[mask], part.labels[mask].astype(np.float64)
            draws = bootstrap(spearman, a.mean(0), b.mean(0), RESAMPLES, seed=0)
            low, high = interval(draws)
            shared = {"queries": queries, "encoder": name, "task": task, "n_queries": len(a)}
            shared["n_candidates"] = a.shape[1]
            own.append(
                shared
                | {"metric": "aggregated", "value": aggregated(a, b), "low": low}
                | {"high": high}
            )
            own.append(shared | {"metric": "per_anchor", "value": per_anchor(a, b)})
        rows += own + _means(own)
    return rows


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that average the tasks."""
    found = []
    for metric in ("aggregated", "per_anchor"):
        tasks = [r for r in rows if r["task"] != ALL and r["metric"] == metric]
        value = float(np.mean([r["value"] for r in tasks]))
        n_queries = sum(r["n_queries"] for r in tasks)
        found.append(
            {**tasks[0], "task": MEAN, "value": value, "n_queries": n_queries}
            | {"low": np.nan, "high": np.nan}
        )
    return found


def predict(encoder: Encoder, part: Labelled) -> np.ndarray:
    """The encoder's scores, (queries, candidates) float64."""
    queries = embed_texts(encoder, part.queries.texts).rows
    candidates = embed_texts(encoder, part.candidates.texts).rows
    return np.asarray(queries.astype(np.float64) @ candidates.astype(np.float64).T)


def _validator(encoder: Encoder, parts: dict[str, Labelled]) -> Callable[[], float]:
    """Mean over tasks of the aggregated rank correlation on the validation candidates."""
    part = parts["validation"]

    def validate() -> float:
        scores = predict(encoder, part)
        masks = {t: mask for t, mask in part.by_task().items() if t != ALL}
        return float(np.mean([aggregated(scores[m], part.labels[m]) for m in masks.values()]))

    return validate


def _lesson(encoder: Encoder, part: Labelled) -> Lesson:
    queries, candidates = (
        encoder.inputs(texts.texts).ids for texts in (part.queries, part.candidates)
    )
    return Lesson(queries, candidates, part.labels)


def _check_lengths(encoder: Encoder, parts: dict[str, Labelled], max_cut: float) -> None:
    """Refuse an encoder that does not see what the teacher's gradients saw.

    Raises:
        DataError: Too many texts are cut.
    """
    queries = [t for p in ("train", "queries") for t in parts[p].queries.texts]
    candidates = [t for p in ("train", "validation", "known") for t in parts[p].candidates.texts]
    for what, texts in (("the queries", queries), ("the candidates", candidates)):
        check_cut(encoder.inputs(texts).n_cut, len(texts), max_cut, what)


def _queries(
    tasks: dict[str, Path], rows: dict[str, QueryRows], instruction: str
) -> tuple[EncoderTexts, list[str]]:
    """Texts of the queries that have a row, of all tasks, and the task of each."""
    found = []
    for task, folder in tasks.items():
        texts = query_texts(folder, instruction)
        places = {one: i for i, one in enumerate(texts.ids)}
        found.append(texts.take([places[i] for i in rows[task].ids]))
    joined = EncoderTexts(*(_chained([getattr(f, n) for f in found]) for n in _FIELDS))
    return joined, [task for task, one in zip(tasks, found, strict=True) for _ in one.ids]


_FIELDS = ("ids", "texts", "hashes", "subtasks")


def _chained(lists: Sequence[list[str]]) -> list[str]:
    return [one for part in lists for one in part]


def _one_about(rows: dict[str, QueryRows]) -> dict[str, Any]:
    """Settings that all tasks' sketches have.

    Raises:
        ArtifactError: They differ.
    """
    abouts = [found.about for found in rows.values()]
    if any(about != abouts[0] for about in abouts):
        raise ArtifactError("tasks' queries were sketched with different settings")
    return abouts[0]


def _headline(rows: list[dict[str, Any]]) -> float:
    """Mean over tasks of the aggregated agreement on held-out candidates, with known queries."""
    keys = {"queries": "known", "task": MEAN, "metric": "aggregated"}
    return float(next(r["value"] for r in rows if all(r[k] == v for k, v in keys.items())))
