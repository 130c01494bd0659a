"""What the papers' tables measure of a group of runs, each number with the artifacts it is from.

A measure is a function of the study and the runs of one group (draws of a random order, or one
run) that returns numbers by column. What was not made is absent, never filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from iprox.numerics.correlation import spearman
from iprox.report import learned, tables
from iprox.report.artifacts import Artifact, Run, Study
from iprox.report.formats import known

SCORES = ("exact_match", "accuracy")
"""Metrics that the papers print, in percent; of a task the first that was measured."""

STAGE_2 = ("proxy",)
STAGE_1 = tuple(link for link in tables.MAKING if link not in STAGE_2)


@dataclass(frozen=True)
class Measured:
    """A number of ours.

    Attributes:
        value: The number; over several draws their mean.
        sources: What it was read from.
        low: Lower end of the 95 % interval of one run, or the lowest of several draws.
        high: Upper end, or the highest.
        n: Items it was measured on.
    """

    value: float
    sources: Sequence[Artifact]
    low: float = np.nan
    high: float = np.nan
    n: float = np.nan


Columns = dict[str, Measured]
Measure = Callable[[Study, list[Run]], Columns]


def outcome(study: Study, runs: list[Run]) -> Columns:
    """Scores on the benchmarks' tasks and losses on held-out examples, after fine-tuning.

    Columns: those of the IProX tables, in percent, and ``<task> loss``.
    """
    return evaluated(
        {task: tables.evaluations_of(study, runs, task) for task in study.tasks},
        task_columns(study),
    )


def evaluated(evaluations: dict[str, list[Artifact]], names: dict[str, str]) -> Columns:
    """The columns of :func:`outcome` from evaluations by task, several of them being draws.

    Args:
        evaluations: Task -> evaluations.
        names: Task -> column.
    """
    found: Columns = {}
    for task, artifacts in evaluations.items():
        for metric in SCORES:
            score = _over_draws(artifacts, metric, 100.0)
            if score is not None:
                found.setdefault(names[task], score)
        loss = _over_draws(artifacts, "loss", 1.0)
        if loss is not None:
            found[f"{names[task]} loss"] = loss
    scores = [found[name] for name in BENCHMARKS.values() if name in found]
    if len(scores) == len(BENCHMARKS):
        sources = [source for score in scores for source in score.sources]
        found["Avg."] = Measured(float(np.mean([score.value for score in scores])), sources)
    return found


BENCHMARKS = {"mmlu": "MMLU", "bbh": "BBH", "tydiqa": "TyDiQA"}
"""Kind of a task -> its column in the tables of IProX."""


def task_columns(study: Study) -> dict[str, str]:
    """Task -> column: a benchmark's by its kind, of any other task its name."""
    kinds = {task["name"]: task["kind"] for task in study.config["tasks"]}
    return {task: BENCHMARKS.get(kinds[task], task) for task in study.tasks}


def _over_draws(artifacts: Sequence[Artifact], metric: str, scale: float) -> Measured | None:
    """A metric of one evaluation, or its mean over several with their range."""
    rows = [tables.metric_value(artifact, metric) for artifact in artifacts]
    values = [row["value"] * scale for row in rows]
    if not values or not all(known(value) for value in values):
        return None
    if len(values) > 1:
        ends = (min(values), max(values))
    else:
        ends = (rows[0]["low"] * scale, rows[0]["high"] * scale)
    return Measured(float(np.mean(values)), artifacts, *ends, n=rows[0]["n"])


def diversity(study: Study, runs: list[Run]) -> Columns:
    """Affinity of a selection with the queries' subspace and distance of nearest neighbours.

    Both of unit-length sketches, x100; over draws their mean. ``<task> affinity`` of random
    subspaces of the same size stands in the stage's own table.
    """
    found: Columns = {}
    made = [run.artifacts["diversity"] for run in runs]
    made_tables = [a.table("diversity.parquet").set_index("task") for a in made]
    for task, column in task_columns(study).items():
        for name in ("affinity", "nearest"):
            values = [100 * float(table[name][task]) for table in made_tables]
            ends = (min(values), max(values)) if len(values) > 1 else (np.nan, np.nan)
            n = float(made_tables[0]["compared"][task])
            found[f"{column} {name}"] = Measured(float(np.mean(values)), made, *ends, n=n)
    return found


def minutes(study: Study, runs: list[Run]) -> Columns:
    """Wall-clock minutes of the jobs that make a proxy and score with it."""
    return _by_stage(runs[0], lambda artifact: artifact.seconds, 60.0)


def teraflops(study: Study, runs: list[Run]) -> Columns:
    """Operations of the same jobs, in 10^12, as they counted them."""
    return _by_stage(runs[0], lambda artifact: artifact.metric("flops") or 0.0, 1e12)


def _by_stage(run: Run, count: Callable[[Artifact], float | None], unit: float) -> Columns:
    """What a run's jobs took, by the stages of IProX; absent where one was not recorded."""
    steps = {
        "stage 1": _steps(run, STAGE_1),
        "stage 2": _steps(run, STAGE_2),
        "influence": _steps(run, ("features", "query")),
    }
    steps["total"] = [artifact for part in steps.values() for artifact in part]
    found: Columns = {}
    for name, artifacts in steps.items():
        counts = [count(artifact) for artifact in artifacts]
        numbers = [number for number in counts if number is not None]
        if numbers and len(numbers) == len(counts):
            found[name] = Measured(sum(numbers) / unit, artifacts)
    return found


def _steps(run: Run, kinds: tuple[str, ...]) -> list[Artifact]:
    """A run's artifacts of some kinds: ``query`` is every ``query-<task>``."""
    return [
        artifact
        for name, artifact in run.artifacts.items()
        if name in kinds or (name.split("-")[0] == "query" and "query" in kinds)
    ]


def agreement(study: Study, runs: list[Run]) -> Columns:
    """Rank correlation with the target's exact scores, mean over tasks, and milliseconds an item.

    On examples that no scorer has learnt from: the fidelity slice, where the study has one.
    ``per query`` is that of an encoder, on queries it was not taught.
    """
    run, exact = runs[0], study.target_run
    found: Columns = {}
    if exact is not None and "ranking" in run.artifacts:
        pair = [run.artifacts["ranking"], exact.artifacts["ranking"]]
        values = [_rank_correlation(study, pair, task) for task in study.tasks]
        found["aggregated"] = Measured(float(np.mean(values)), pair)
    if "encoder" in run.artifacts:
        table = run.artifacts["encoder"].table("quality.parquet")
        task = study.tasks[0] if len(study.tasks) == 1 else tables.MEAN
        wanted = {"queries": "heldout", "encoder": "trained", "metric": "per_anchor", "task": task}
        row = table.loc[(table[list(wanted)] == list(wanted.values())).all(axis=1)].iloc[0]
        ends = (float(row["low"]), float(row["high"]))
        sources = [run.artifacts["encoder"]]
        found["per query"] = Measured(float(row["value"]), sources, *ends)
    return found | _ms_an_item(run)


def _rank_correlation(study: Study, rankings: Sequence[Artifact], task: str) -> float:
    """Spearman of two rankings' scores on the fidelity slice, or on the pool without one."""
    scores = []
    for artifact in rankings:
        table = artifact.table("ranking.parquet")
        scores.append(table[table["task"] == task].set_index("example_id")["score"])
    ids = scores[0].index.intersection(scores[1].index)
    if "split" in study.shared:
        judged = study.shared["split"].table("split.parquet")["example_id"]
        ids = ids[ids.isin(judged)]
    return float(spearman(scores[0].loc[ids].to_numpy(), scores[1].loc[ids].to_numpy()))


def _ms_an_item(run: Run) -> Columns:
    """Milliseconds an item of the pass over the pool, without loading the model."""
    features = run.artifacts.get("features")
    each = learned.per_1000(features)
    return {"ms an item": Measured(each, [features])} if features and known(each) else {}


def training_size(study: Study, runs: list[Run]) -> Columns:
    """What an encoder was taught with, and how well it agrees afterwards."""
    encoder = runs[0].artifacts.get("encoder")
    counted = {"queries": "queries", "candidates": "candidates"}
    numbers = {name: encoder.metric(key) if encoder else None for name, key in counted.items()}
    found = {
        name: Measured(value, [encoder])
        for name, value in numbers.items()
        if encoder is not None and value is not None
    }
    return found | {k: v for k, v in agreement(study, runs).items() if k == "aggregated"}


def amortisation(study: Study, runs: list[Run]) -> Columns:
    """Seconds paid once, milliseconds an item, and from how many items on that pays."""
    run = runs[0]
    found = _ms_an_item(run)
    costs = learned.costs(run)
    sources = [a for a in (run.artifacts.get("teach"), run.artifacts.get("encoder")) if a]
    names = {
        "labelling s": "labelling_seconds",
        "training s": "training_seconds",
        "break-even items": "break_even",
    }
    for column, name in names.items():
        if sources and known(costs[name]):
            found[column] = Measured(float(costs[name]), sources)
    return found


def storage(study: Study, runs: list[Run]) -> Columns:
    """Bytes kept of an example: of its embedding or its sketch."""
    features = runs[0].artifacts.get("features")
    size = learned.row_bytes(features) if features else np.nan
    return {"bytes": Measured(size, [features])} if features and known(size) else {}


MEASURES: dict[str, Measure] = {
    "outcome": outcome,
    "diversity": diversity,
    "minutes": minutes,
    "teraflops": teraflops,
    "agreement": agreement,
    "training_size": training_size,
    "amortisation": amortisation,
    "storage": storage,
}


def origins(measured: Measured) -> str:
    """The artifacts a number is from, as paths below ``results``."""
    return " ".join(_unique(f"{a.stage}/{a.id}" for a in measured.sources))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
