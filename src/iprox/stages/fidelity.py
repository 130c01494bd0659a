"""Stage ``fidelity``: how well a proxy's scores agree with the target's on the same examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from iprox.errors import ArtifactError, NumericsError
from iprox.numerics.correlation import (
    Measure,
    bootstrap,
    interval,
    kendall,
    pearson,
    spearman,
    top_overlap,
)
from iprox.numerics.regression import cross_validated_ridge
from iprox.stages.feature_store import Features, FeatureStore, open_scored, restrict
from iprox.stages.texts import split_ids
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import FidelitySection, InfluenceSection

log = logging.getLogger(__name__)

MEAN = "mean"
UNSEEN = "unseen_spearman"

MIN_RANKED = 3
"""Fewest examples whose order says anything."""


def make(job: Job) -> Metrics:
    """Write ``fidelity.parquet`` and ``layers.parquet``.

    ``fidelity.parquet`` has the columns ``task, metric, value, low, high, n``. Metrics are
    ``spearman``, ``kendall``, ``pearson`` and ``top_<percent>`` (shared part of the best
    examples); ``length_spearman``, what a guess from lengths alone reaches, and
    ``above_length``, by how much the proxy's Spearman exceeds it. The task ``mean`` is their mean
    over tasks, and has these rows besides: ``loss_mean_proxy``, ``loss_mean_target`` and
    ``loss_retention`` (target's loss over the proxy's); ``parameters_ratio`` of the whole
    models, ``scored_parameters_ratio`` of the layers whose gradients count, and ``flops_ratio``
    of the two scoring passes (proxy's over target's, no interval). ``unseen_spearman`` is Spearman
    on the examples that the proxy was not made from, NaN for fewer than 3. Of a scorer that
    learns, ``teacher_spearman`` is its agreement with its own teacher. ``low`` and ``high`` bound
    the 95 % bootstrap interval over examples.

    ``layers.parquet`` has a row per layer and task, see :func:`layer_table`; none when a pass
    kept no inner products by layer, as passes that make sketches.

    Returns:
        Number of examples compared and left out, of layers compared and of those that only one
        model has, and each metric's mean over tasks.

    Raises:
        ArtifactError: The two passes are of different examples or tasks.
        NumericsError: Fewer than two examples can be scored, or scores are constant.
    """
    section = job.section(FidelitySection, "fidelity")
    score = job.section(InfluenceSection, "influence").score
    stores = [open_scored(job, r, f"{r}_query") for r in ("proxy", "target")]
    proxy, target = whole = [store.read() for store in stores]
    kept = np.ones(len(proxy.example_id), dtype=bool)
    if "split" in job.parents:
        ids = split_ids(job.parents["split"], "fidelity")
        proxy, target = (restrict(features, ids) for features in whole)
        kept = pc.is_in(whole[0].example_id, proxy.example_id).to_numpy(zero_copy_only=False)
    _check_same(proxy, target)
    pairs, scorable = score_pairs(proxy, target, score)
    rows = agreement(pairs, section) + above_length(pairs, target, scorable, section)
    if stores[0].has_losses:
        rows += losses(proxy, target, scorable, section)
    rows += cost_ratios(stores)
    if made_of := job.roles("made_of"):
        seen = {example for name, folder in made_of.items() for example in split_ids(folder, name)}
        rows += on_unseen(pairs, proxy, scorable, seen, section)
    if "teacher" in job.parents:
        teacher = open_scored(job, "teacher", "teacher_query").read()
        rows += beside_teacher(proxy, teacher, section)
    table = pd.DataFrame(rows)
    kept[kept] = scorable
    layers, layer_counts = layer_table(stores, whole, kept, score)
    n_left_out = int((~scorable).sum())
    if n_left_out:
        log.warning("%d of %d examples cannot be scored", n_left_out, len(scorable))
    counts = {"examples": int(scorable.sum()), "left_out": n_left_out}
    write_table(job.out / "fidelity.parquet", table, {**counts, "score": score})
    write_table(job.out / "layers.parquet", layers, {**counts, **layer_counts, "score": score})
    means = table[(table["task"] == MEAN) & table["value"].notna()]
    known = dict(zip(means["metric"], means["value"].tolist(), strict=True))
    return {**counts, **layer_counts, **known}


def score_pairs(
    proxy: Features, target: Features, score: str
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Scores of both models by task, for the examples that both can score.

    Returns:
        Task -> (proxy's scores, target's scores), and the mask (examples,) of who is in them.

    Raises:
        NumericsError: Fewer than two examples can be scored.
    """
    ours, theirs = proxy.scores(score), target.scores(score)
    scorable = np.ones(len(proxy.example_id), dtype=bool)
    for scores in (*ours.values(), *theirs.values()):
        scorable &= np.isfinite(scores)
    if scorable.sum() < 2:
        raise NumericsError(
            "agreement needs at least two examples that both models can score",
            where="split.fidelity",
            value=int(scorable.sum()),
        )
    return {t: (ours[t][scorable], theirs[t][scorable]) for t in ours}, scorable


def measures(section: FidelitySection) -> dict[str, Measure]:
    """All measures of agreement by the name they have in the table."""
    tops = {f"top_{100 * share:g}%": top_overlap(share) for share in section.top}
    return {"spearman": spearman, "kendall": kendall, "pearson": pearson, **tops}


def agreement(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of all measures for each task and for the mean over tasks.

    All tasks are resampled together, so that the interval of the mean is of one and the same
    draw of examples.

    Raises:
        NumericsError: A measure is undefined because all scores of a model are equal.
    """
    rows = []
    for metric, measure in measures(section).items():
        values, draws = [], []
        for task, (ours, theirs) in pairs.items():
            value = float(measure(ours.astype(np.float64), theirs.astype(np.float64)))
            if np.isnan(value):
                raise NumericsError(
                    "agreement is undefined: all scores of a model are equal",
                    where=f"task {task}, {metric}",
                )
            draw = bootstrap(measure, ours, theirs, section.bootstrap, section.seed)
            rows.append(_row(task, metric, value, draw, len(ours)))
            values.append(value)
            draws.append(draw)
        n = len(next(iter(pairs.values()))[0])
        rows.append(_row(MEAN, metric, float(np.mean(values)), np.mean(draws, axis=0), n))
    return rows


def above_length(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    target: Features,
    scorable: np.ndarray,
    section: FidelitySection,
) -> list[dict[str, Any]]:
    """Rows of what lengths alone say about the target's scores, and how much more the proxy does.

    The guess is a ridge regression of the target's scores on the number of tokens, its logarithm
    and the number of supervised tokens, five-fold cross-validated. The difference is taken on the
    same resamples of examples; the guesses are not fitted anew for each. Both are NaN when all
    lengths are equal.
    """
    tokens, supervised = target.tokens[scorable], target.supervised[scorable]
    lengths = np.column_stack([tokens, np.log(tokens), supervised]).astype(np.float64)
    rows: dict[str, list[tuple[str, float, np.ndarray]]] = {"length_spearman": []}
    rows["above_length"] = []
    for task, (ours, theirs) in pairs.items():
        guess = cross_validated_ridge(lengths, theirs.astype(np.float64), seed=section.seed)
        by_guess = float(spearman(guess, theirs))
        guessed, found = (
            bootstrap(spearman, scores, theirs, section.bootstrap, section.seed)
            for scores in (guess, ours)
        )
        rows["length_spearman"].append((task, by_guess, guessed))
        difference = float(spearman(ours, theirs)) - by_guess
        rows["above_length"].append((task, difference, found - guessed))
    n = int(scorable.sum())
    return [
        _row(task, metric, value, draws, n)
        for metric, measured in rows.items()
        for task, value, draws in [*measured, _mean_over_tasks(measured)]
    ]


def _mean_over_tasks(
    measured: list[tuple[str, float, np.ndarray]],
) -> tuple[str, float, np.ndarray]:
    """The mean of values and, resample by resample, of their draws."""
    _, values, draws = zip(*measured, strict=True)
    return MEAN, float(np.mean(values)), np.mean(draws, axis=0)


def on_unseen(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    proxy: Features,
    scorable: np.ndarray,
    seen: set[str],
    section: FidelitySection,
) -> list[dict[str, Any]]:
    """Rows of the rank correlation on examples that the proxy was not made from.

    A proxy agrees better on those it was made from, which in a small pool are many.

    Args:
        pairs: Scores of both models by task.
        proxy: Its features.
        scorable: Which of their examples are in ``pairs``.
        seen: Ids of the examples it was made from.
        section: Settings of the intervals.
    """
    unseen = np.array([name not in seen for name in proxy.example_id.to_pylist()])[scorable]
    n = int(unseen.sum())
    if n < MIN_RANKED:
        log.warning("the proxy was made from all but %d of the examples compared", n)
        return [_row(task, UNSEEN, float("nan"), np.zeros(0), n) for task in [*pairs, MEAN]]
    kept = {task: (ours[unseen], theirs[unseen]) for task, (ours, theirs) in pairs.items()}
    return _correlations(kept, UNSEEN, section)


def beside_teacher(
    ours: Features, teacher: Features, section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of a learned scorer's rank correlation with the teacher it learnt from.

    Both score by the mean over a task's queries of cosines: of embeddings, of gradients.
    """
    return _correlations(score_pairs(ours, teacher, "cosine")[0], "teacher_spearman", section)


def _correlations(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], metric: str, section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of the rank correlation of each pair, and of their mean, under the name ``metric``."""
    measured = []
    for task, (a, b) in pairs.items():
        draws = bootstrap(spearman, a, b, section.bootstrap, section.seed)
        measured.append((task, float(spearman(a, b)), draws))
    n = len(next(iter(pairs.values()))[0])
    return [
        _row(task, metric, value, draws, n)
        for task, value, draws in [*measured, _mean_over_tasks(measured)]
    ]


def cost_ratios(stores: Sequence[FeatureStore]) -> list[dict[str, Any]]:
    """Rows of the proxy's size and operations over the target's, where both passes counted them.

    Args:
        stores: Features of the proxy and of the target.
    """
    rows = []
    for metric, count in (
        ("parameters_ratio", "parameters"),
        ("scored_parameters_ratio", "scored_parameters"),
        ("flops_ratio", "flops"),
    ):
        # every shard states the whole model's sizes, but its own operations
        ours, theirs = (
            store.count(count) if count == "flops" else store.shards[0][1].attrs.get(count)
            for store in stores
        )
        if ours is not None and theirs is not None:
            n = sum(shard["example_id"].shape[0] for _, shard in stores[0].shards)
            rows.append(_row(MEAN, metric, ours / theirs, np.zeros(0), n))
    return rows


def layer_table(
    stores: Sequence[FeatureStore], features: Sequence[Features], kept: np.ndarray, score: str
) -> tuple[pd.DataFrame, Metrics]:
    """How much of each layer's influence the proxy keeps.

    A layer's influence is what it adds to an example's score; over all layers it sums to the
    score. Of a factorised layer both factors are added up.

    Args:
        stores: Features of the proxy and of the target.
        features: All their examples.
        kept: Who of them is compared, (examples,).
        score: ``cosine`` or ``dot``.

    Returns:
        ``layer, task, spearman, cosine, share, n``: rank correlation and cosine, over examples,
        of the layer's influence in proxy and target (NaN where one of them is constant), and the
        layer's share of the sum of all layers' mean absolute influence in the target; the task
        ``mean`` averages them. And counts of layers compared, of those that one model lacks, and
        of undefined correlations.
    """
    columns = ["layer", "task", "spearman", "cosine", "share", "n"]
    ours, theirs = (store.layer_dots() for store in stores)
    if ours is None or theirs is None:
        log.warning(
            "influence is not compared layer by layer: a pass kept no inner products of layers "
            "(it made sketches, or the slice is too large)"
        )
        return pd.DataFrame(columns=columns), {"layers": 0, "unmatched_layers": 0}
    common = [layer for layer in theirs.layers if layer in set(ours.layers)]
    n_unmatched = len(set(ours.layers) ^ set(theirs.layers))
    if n_unmatched:
        log.warning("%d layers are in one model only and not compared", n_unmatched)
    proxys, targets = (
        layers.contributions(read, score)
        for layers, read in zip((ours, theirs), features, strict=True)
    )
    rows = []
    for task in targets:
        a, b = proxys[task][kept].T, targets[task][kept].T  # (layers, examples)
        shares = np.abs(b).mean(1) / max(np.abs(b).mean(1).sum(), np.finfo(float).tiny)
        for layer in common:
            x, y = a[ours.layers.index(layer)], b[theirs.layers.index(layer)]
            share = float(shares[theirs.layers.index(layer)])
            rows.append([layer, task, float(spearman(x, y)), cosine(x, y), share, len(x)])
    table = pd.DataFrame(rows, columns=columns)
    undefined = int(table["spearman"].isna().sum())
    means = table.groupby("layer", sort=False, as_index=False)[columns[2:5]].mean()
    means = means.assign(task=MEAN, n=int(kept.sum()))[columns]
    counts: Metrics = {"layers": len(common), "unmatched_layers": n_unmatched}
    return pd.concat([table, means], ignore_index=True), counts | {"undefined_layers": undefined}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; NaN when one is zero."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else float("nan")


def losses(
    proxy: Features, target: Features, scorable: np.ndarray, section: FidelitySection
) -> list[dict[str, Any]]:
    """Rows of both models' mean losses, and of the share of the target's that the proxy keeps."""
    ours, theirs = proxy.loss[scorable], target.loss[scorable]
    wanted: dict[str, Measure] = {
        "loss_mean_proxy": lambda a, b: a.mean(-1),
        "loss_mean_target": lambda a, b: b.mean(-1),
        "loss_retention": lambda a, b: b.mean(-1) / a.mean(-1),
    }
    return [
        _row(
            MEAN,
            metric,
            float(measure(ours, theirs)),
            bootstrap(measure, ours, theirs, section.bootstrap, section.seed),
            len(ours),
        )
        for metric, measure in wanted.items()
    ]


def _row(task: str, metric: str, value: float, draws: np.ndarray, n: int) -> dict[str, Any]:
    low, high = interval(draws)
    return {"task": task, "metric": metric, "value": value, "low": low, "high": high, "n": n}


def _check_same(proxy: Features, target: Features) -> None:
    """Refuse to compare passes over different examples or tasks."""
    for what, ours, theirs in (
        ("examples", proxy.example_id.tolist(), target.example_id.tolist()),
        ("tasks", proxy.tasks, target.tasks),
    ):
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs))
            raise ArtifactError(
                f"the proxy's and the target's features are of different {what}",
                value=odd[:3],
                fix="make both with the same pool, split and queries",
            )
