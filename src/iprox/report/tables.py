"""The study's numbers as tables, and the short answer that the workflow prints at its end.

Every function turns a :class:`~iprox.report.artifacts.Study` into a data frame; a number that
was not made is missing in it, never filled in. Numbers are taken from the stages' own tables;
what is computed here is differences, shares, overlaps and rank correlations.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from iprox.report.artifacts import COMPARED, Artifact, Run, Study
from iprox.report.compare import Difference, intervals_overlap, paired_difference
from iprox.report.formats import (
    MISSING,
    duration,
    interval,
    known,
    number,
    settings_text,
    signed,
    text_table,
)
from iprox.report.selected import selection_overlap

MEAN = "mean"
"""Row of ``fidelity.parquet`` that averages the tasks."""

LOWER_IS_BETTER = ("loss", "loss_macro")
"""Metrics of an evaluation where less is better; of all others more is."""

MACRO = "_macro"
"""End of the name of a metric that is averaged over subtasks, not over items."""

ITEMS = {
    "loss": ("loss", "loss"),
    "accuracy": ("choice", "correct"),
    "accuracy_norm": ("choice", "accuracy_norm"),
    "exact_match": ("generate", "correct"),
    "f1": ("generate", "f1"),
}
"""Metrics that are plain means over test items: the kind of item and the column they average."""


def runs(study: Study) -> pd.DataFrame:
    """One row per run: its settings, its size, and its headline numbers.

    Columns beside the settings: ``sparsity_effective`` and ``parameters`` over the replaced
    layers; ``spearman_<task>`` and ``spearman_mean`` with ``_low`` and ``_high`` (95 %), and
    ``above_length``, its distance from what lengths alone reach (``length_spearman``);
    ``parameters_ratio``, ``flops_ratio`` and ``time_ratio`` of scoring, over the target's;
    ``making_seconds`` of the proxy; ``scoring_seconds`` of the pass over the pool (over its
    fidelity slice for a run until fidelity), ``seconds_per_1000`` examples, and ``speedup`` per
    example against the run that scores with the target; ``loss_<task>`` held out, after
    fine-tuning, with ``_low``, ``_high`` and ``_delta`` to the untouched target;
    ``overlap_<task>`` and ``overlap_mean``: share of the target run's selection that this run
    selected too.
    """
    return pd.DataFrame([_run_row(study, run) for run in study.runs])


def _run_row(study: Study, run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": run.name,
        "group": run.group,
        "scorer": run.scorer,
        "proxy": run.proxy,
        "preset": run.preset,
        "until": run.until,
        "changed": settings_text(run.changed),
        "sparsity": run.sparsity,
        **size(run),
        **_spearman(run, study.tasks),
        **_above_length(run),
        **cost_ratios(run),
        "making_seconds": making_seconds(run),
        "scoring_seconds": scoring_seconds(run),
        "seconds_per_1000": seconds_per_1000(study, run),
        "speedup": speedup(study, run),
        **_losses(study, run),
        **_overlaps(study, run),
    }
    return {key: np.nan if value is None else value for key, value in row.items()}


def size(run: Run) -> dict[str, float]:
    """Parameters of the layers a proxy replaces or leaves out, before and after.

    Factors for the backward pass alone are held beside the layers' weights.
    """
    if "factors" in run.artifacts:
        layers = run.artifacts["factors"].table("layers.parquet")
        kept, dense = float(layers["parameters"].sum()), float(layers["parameters_dense"].sum())
        proxy = run.artifacts.get("proxy")
        if proxy is not None and proxy.params.get("passes") == "backward":
            kept += dense
    elif "extraction" in run.artifacts:
        blocks = run.artifacts["extraction"].table("blocks.parquet")
        parts = blocks["parameters"]
        kept, dense = float(parts[blocks["kept"]].sum()), float(parts.sum())
    else:
        return {"sparsity_effective": np.nan, "parameters": np.nan, "parameters_dense": np.nan}
    return {"sparsity_effective": 1 - kept / dense, "parameters": kept, "parameters_dense": dense}


def _spearman(run: Run, tasks: list[str]) -> dict[str, float]:
    """Rank correlation with the target for each task, and its mean with interval."""
    names = {f"spearman_{task}": task for task in tasks} | {"spearman_mean": MEAN}
    row: dict[str, float] = {}
    for column, task in names.items():
        found = fidelity_value(run, task, "spearman")
        row[column] = found["value"] if found else np.nan
        row[f"{column}_low"] = found["low"] if found else np.nan
        row[f"{column}_high"] = found["high"] if found else np.nan
    return row


def _above_length(run: Run) -> dict[str, float]:
    """What lengths alone reach, and by how much the proxy exceeds it, with interval."""
    nothing = dict.fromkeys(("value", "low", "high"), np.nan)
    guess = fidelity_value(run, MEAN, "length_spearman") or nothing
    above = fidelity_value(run, MEAN, "above_length") or nothing
    return {
        "length_spearman": guess["value"],
        "above_length": above["value"],
        "above_length_low": above["low"],
        "above_length_high": above["high"],
    }


def cost_ratios(run: Run) -> dict[str, float]:
    """What the proxy takes of the target's parameters, scoring FLOPs, and seconds per token."""
    counted = {
        name: found["value"] if (found := fidelity_value(run, MEAN, name)) else np.nan
        for name in ("parameters_ratio", "flops_ratio")
    }
    return counted | {"time_ratio": _or_nan(time_ratio(run))}


def time_ratio(run: Run) -> float | None:
    """Seconds per token of the proxy's scoring pass over those of the target's.

    Of the two passes that fidelity compared, which are over the same examples; loading the
    models is left out.
    """
    ours = run.artifacts.get("slice-features") or run.artifacts.get("features")
    rates = [
        artifact.metric("tokens_per_s") if artifact else None
        for artifact in (ours, run.artifacts.get("target-features"))
    ]
    return rates[1] / rates[0] if rates[0] and rates[1] else None


def searches(study: Study) -> pd.DataFrame:
    """Proxies that were tried where a sparsity was looked for, ``run`` first."""
    return _of_all_runs(study, "sparsity", "tried.parquet")


def _of_all_runs(study: Study, step: str, file: str) -> pd.DataFrame:
    """A table that a step of some runs leaves, with ``run`` first; empty when no run has it."""
    tables = [
        run.artifacts[step].table(file).assign(run=run.name)
        for run in study.runs
        if step in run.artifacts
    ]
    if not tables:
        return pd.DataFrame(columns=["run"])
    table = pd.concat(tables, ignore_index=True)
    return table[["run", *(column for column in table.columns if column != "run")]]


def fidelity_layers(study: Study) -> pd.DataFrame:
    """How much of each layer's influence every distinct proxy keeps, ``run`` first."""
    columns = ["run", "layer", "task", "spearman", "cosine", "share", "n"]
    return _distinct_layers(study, "fidelity", columns)


def fidelity_value(run: Run, task: str, metric: str) -> dict[str, float] | None:
    """Value, low, high and n of one fidelity metric; None if it was not measured."""
    if "fidelity" not in run.artifacts:
        return None
    table = run.artifacts["fidelity"].table("fidelity.parquet")
    hit = table[(table["task"] == task) & (table["metric"] == metric)]
    if hit.empty:
        return None
    return {name: float(hit.iloc[0][name]) for name in ("value", "low", "high", "n")}


def scoring_seconds(run: Run) -> float | None:
    """Wall-clock seconds of the scoring pass, over the pool or, until fidelity, over its slice.

    A run that sums over checkpoints has a pass for each.
    """
    return _seconds(at_every_epoch(run, "features"))


def at_every_epoch(run: Run, name: str) -> list[Artifact]:
    """A step's artifacts at every checkpoint that a run sums over; often one, or none."""
    return [a for key, a in run.artifacts.items() if key.split("-epoch-")[0] == name]


def _seconds(steps: Sequence[Artifact]) -> float | None:
    """Seconds of some steps together; None when there are none, or one's are not known."""
    seconds = [step.seconds for step in steps]
    return sum(s for s in seconds if s is not None) if seconds and None not in seconds else None


def scored_examples(study: Study, run: Run) -> float | None:
    """Pool examples that the scoring pass went over."""
    features = run.artifacts.get("features")
    if features is None:
        return None
    counted = features.metric("examples")
    if counted is None and features.params.get("subset", {}).get("name") == "all":
        return pool_size(study)
    return counted


def pool_size(study: Study) -> int | None:
    """Examples in the candidate pool."""
    pool = study.shared.get("pool")
    return len(pool.table("pool.parquet")) if pool else None


def seconds_per_1000(study: Study, run: Run) -> float | None:
    """Scoring seconds for 1,000 examples: comparable between runs over pool and slice."""
    seconds, examples = scoring_seconds(run), scored_examples(study, run)
    return 1000 * seconds / examples if seconds is not None and examples else None


def speedup(study: Study, run: Run) -> float | None:
    """How many times faster than with the target an example was scored."""
    reference = seconds_per_1000(study, study.target_run) if study.target_run else None
    own = seconds_per_1000(study, run)
    return reference / own if reference and own else None


MAKING = ("probe", "decomposition", "sparsity", "factors", "proxy", "extraction", "proxy-warmup")
"""Steps that make a proxy: out of the warmed-up target, or of another model."""


def making_seconds(run: Run) -> float | None:
    """Seconds to make the run's proxy, None for a run without one or with a time missing."""
    return _seconds([step for name in MAKING for step in at_every_epoch(run, name)])


def _losses(study: Study, run: Run) -> dict[str, float]:
    """Held-out loss after fine-tuning on this run's selection, and its change."""
    row: dict[str, float] = {}
    evaluations = run.of("evaluation", study.tasks)
    for task in study.tasks:
        value = metric_value(evaluations.get(task), "loss")
        base = metric_value(study.base.get(task), "loss")
        row[f"loss_{task}"] = value["value"]
        row[f"loss_{task}_low"], row[f"loss_{task}_high"] = value["low"], value["high"]
        row[f"loss_{task}_delta"] = value["value"] - base["value"]
    return row


def metric_value(evaluation: Artifact | None, metric: str) -> dict[str, float]:
    """Value, low, high and n of one evaluation metric, NaN where not measured."""
    found = evaluation.json("metrics.json").get(metric) if evaluation else None
    found = found or {}
    return {
        name: np.nan if found.get(name) is None else float(found[name])
        for name in ("value", "low", "high", "n")
    }


def _overlaps(study: Study, run: Run) -> dict[str, float]:
    """Share of the target run's selection that this run selected too, and its mean over tasks."""
    row = {f"overlap_{task}": selection_overlap(study, run, task) for task in study.tasks}
    return {**row, "overlap_mean": float(np.mean(list(row.values())))}


def fidelity(study: Study) -> pd.DataFrame:
    """All fidelity metrics: run, task (or ``mean``), metric, value, low, high, n."""
    columns = ["run", "task", "metric", "value", "low", "high", "n"]
    tables = [
        run.artifacts["fidelity"].table("fidelity.parquet").assign(run=run.name)[columns]
        for run in study.runs
        if "fidelity" in run.artifacts
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def sketches(study: Study) -> pd.DataFrame:
    """Errors of the cosines of every run's sketches, ``run`` first; empty without sketches."""
    tables = [
        run.artifacts["features"].table("sketch.parquet").assign(run=run.name)
        for run in study.runs
        if run.sketch and (run.artifacts["features"].folder / "sketch.parquet").is_file()
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run"])


def diversity(study: Study) -> pd.DataFrame:
    """How every run's selection lies in feature space, ``run`` first; empty without sketches."""
    return _of_all_runs(study, "diversity", "diversity.parquet")


def heldout(study: Study) -> pd.DataFrame:
    """All metrics of all evaluations: run (or ``base``), group, task, metric, value, low, high, n.

    ``delta`` is the difference to the untouched target on the same items, with its paired 95 %
    interval ``delta_low``, ``delta_high`` and the paired test's ``delta_p``.
    """
    rows = [
        _heldout_row(study, "base", "base", task, metric, artifact)
        for task, artifact in study.base.items()
        for metric in metric_names(artifact)
    ]
    rows += [
        _heldout_row(study, run.name, run.group, task, metric, artifact)
        for run in study.runs
        for task, artifact in run.of("evaluation", study.tasks).items()
        for metric in metric_names(artifact)
    ]
    columns = ["run", "group", "task", "metric", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=[*columns, "delta", "delta_low", "delta_high", "delta_p"])


def paired(study: Study) -> pd.DataFrame:
    """Every two groups of runs (and ``base``) on the same test items, metric by metric.

    Columns task, metric, a, b, difference (a - b), low, high (paired 95 % interval), p (paired
    test) and n. Runs that differ only by a random draw are one group, averaged by item.
    """
    rows = []
    for task in study.tasks:
        sides = {"base": [study.base[task]]} if task in study.base else {}
        for group, members in study.groups.items():
            found = [m.of("evaluation", study.tasks).get(task) for m in members]
            made = [artifact for artifact in found if artifact is not None]
            if made and len(made) == len(found):
                sides[group] = made
        for (a, first), (b, second) in itertools.combinations(sides.items(), 2):
            for metric in metric_names(first[0]):
                difference = compare(metric, first, second)
                if difference is not None:
                    ends = (difference.low, difference.high, difference.p_value, difference.n)
                    rows.append([task, metric, a, b, difference.value, *ends])
    columns = ["task", "metric", "a", "b", "difference", "low", "high", "p", "n"]
    return pd.DataFrame(rows, columns=columns)


def metric_names(evaluation: Artifact) -> list[str]:
    """Metrics of an evaluation that have a value and an interval."""
    metrics = evaluation.json("metrics.json")
    return [name for name, entry in metrics.items() if isinstance(entry, dict) and "value" in entry]


def _heldout_row(
    study: Study, run: str, group: str, task: str, metric: str, artifact: Artifact
) -> dict[str, Any]:
    names = {"run": run, "group": group, "task": task, "metric": metric}
    row: dict[str, Any] = {**names, **metric_value(artifact, metric)}
    base = study.base.get(task)
    if run == "base" or base is None:
        return row
    difference = compare(metric, [artifact], [base])
    if difference is None:
        return row
    ends = {"delta_low": difference.low, "delta_high": difference.high}
    return {**row, "delta": difference.value, **ends, "delta_p": difference.p_value}


def item_values(evaluation: Artifact, metric: str) -> pd.Series | None:
    """Value of each test item of one metric (index: item); None if it is no mean over items."""
    return values_of(evaluation.table("items.parquet"), metric) if metric in ITEMS else None


def values_of(items: pd.DataFrame, metric: str) -> pd.Series | None:
    """Value of each item of one of the ``ITEMS`` metrics; None where nothing was measured.

    Args:
        items: Rows of ``items.parquet``.
        metric: Its name.
    """
    kind, column = ITEMS[metric]
    values: pd.Series = items[items["kind"] == kind].set_index("example_id")[column]
    values = values.dropna().astype(float)
    return values if len(values) else None


def compare(metric: str, first: list[Artifact], second: list[Artifact]) -> Difference | None:
    """Paired difference (first - second) of one metric; several evaluations are averaged by item.

    None when the metric does not come as one value per item.
    """
    means = []
    for evaluations in (first, second):
        values = [item_values(evaluation, metric) for evaluation in evaluations]
        found = [v for v in values if v is not None]
        if not found or len(found) < len(values):
            return None
        means.append(pd.concat(found, axis=1).mean(axis=1, skipna=False))
    return paired_difference(means[0], means[1])


def agreement(study: Study) -> pd.DataFrame:
    """Spearman correlation of the runs' scores over the pool: task, run_a, run_b, spearman, n.

    Of runs that differ only by a random draw the first stands for all.
    """
    ranked = [run for run in study.drawn_once if "ranking" in run.artifacts]
    rows = []
    for task in study.tasks:
        ranks = pd.DataFrame({run.name: _score_ranks(run, task) for run in ranked})
        for i, first in enumerate(ranked):
            for second in ranked[i:]:
                pair = ranks[[first.name, second.name]].dropna() if first is not second else ranks
                value = 1.0
                if first is not second:  # ranked anew: a prefilter leaves other examples out
                    again = pair.rank()
                    value = float(again[first.name].corr(again[second.name]))
                rows.append([task, first.name, second.name, value, len(pair)])
    return pd.DataFrame(rows, columns=["task", "run_a", "run_b", "spearman", "n"])


def _score_ranks(run: Run, task: str) -> pd.Series:
    """Rank of each example's score, ties averaged, by example id."""
    ranking = run.artifacts["ranking"].table("ranking.parquet")
    own = ranking[ranking["task"] == task].set_index("example_id")
    return own["score"].rank()


def layers(study: Study) -> pd.DataFrame:
    """Layers of every distinct proxy, ``run`` first; runs with the same factors appear once."""
    return _distinct_layers(study, "factors", ["run"])


def _distinct_layers(study: Study, step: str, columns: list[str]) -> pd.DataFrame:
    """``layers.parquet`` of one step of all runs, that of a shared artifact once.

    Args:
        study: The study.
        step: The artifact's name in a run.
        columns: Columns of the empty table when no run has it.
    """
    seen: set[str] = set()
    tables = []
    for run in study.runs:
        made = run.artifacts.get(step)
        if made is None or made.id in seen:
            continue
        seen.add(made.id)
        table = made.table("layers.parquet")
        tables.append(table.assign(run=run.name)[["run", *table.columns]])
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def stages(study: Study) -> pd.DataFrame:
    """One row per distinct stage folder: stage, id, runs that use it, seconds, memory, content."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for owner, _, artifact in study.artifacts():
        row = rows.setdefault((artifact.stage, artifact.id), _stage_row(artifact))
        if owner not in row["runs"]:
            row["runs"].append(owner)
    columns = ["stage", "id", "runs", "seconds", "peak_memory_bytes", "content"]
    table = pd.DataFrame(list(rows.values()), columns=columns)
    return table.assign(runs=[", ".join(names) for names in table["runs"]])


def _stage_row(artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "id": artifact.id,
        "runs": [],
        "seconds": _or_nan(artifact.seconds),
        "peak_memory_bytes": _or_nan(artifact.peak_memory_bytes),
        "content": artifact.content,
    }


def costs(study: Study) -> pd.DataFrame:
    """What each run's stages cost: run, step, id, seconds, memory, tokens, FLOPs.

    A folder that several runs share is listed for each; ``shared_by`` counts the runs, so that
    sums over runs can leave the repetitions out.
    """
    users: dict[str, set[str]] = {}
    for owner, _, artifact in study.artifacts():
        users.setdefault(artifact.id, set()).add(owner)
    rows = [
        {
            "run": run.name,
            "step": name,
            "id": artifact.id,
            "seconds": _or_nan(artifact.seconds),
            "peak_memory_bytes": _or_nan(artifact.peak_memory_bytes),
            "tokens": _or_nan(artifact.metric("tokens")),
            "flops": _or_nan(artifact.metric("flops")),
            "shared_by": len(users[artifact.id]),
        }
        for run in study.runs
        for name, artifact in run.artifacts.items()
        if name not in COMPARED
    ]
    columns = ["run", "step", "id", "seconds", "peak_memory_bytes", "tokens", "flops", "shared_by"]
    return pd.DataFrame(rows, columns=columns)


def headline(study: Study) -> pd.DataFrame:
    """The short answer: base first, then one row per group of runs.

    Columns: ``run``, ``draws``; ``fidelity`` (mean Spearman with the target) with interval;
    ``scoring_seconds``, ``speedup``; for each task ``loss_<task>`` (mean over draws) with
    ``_low``, ``_high`` (the 95 % interval of a single run, the range over several draws),
    ``_delta`` to base, with its paired interval ``_delta_low``, ``_delta_high``.
    """
    rows = [_headline_row(study, "base", None)] if study.base else []
    rows += [_headline_row(study, group, members) for group, members in study.groups.items()]
    return pd.DataFrame(rows)


def _headline_row(study: Study, name: str, members: list[Run] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"run": name, "draws": len(members) if members else np.nan}
    first = members[0] if members else None
    found = fidelity_value(first, MEAN, "spearman") if first else None
    row["fidelity"] = found["value"] if found else np.nan
    row["fidelity_low"] = found["low"] if found else np.nan
    row["fidelity_high"] = found["high"] if found else np.nan
    row["scoring_seconds"] = _or_nan(scoring_seconds(first)) if first else np.nan
    row["speedup"] = _or_nan(speedup(study, first)) if first else np.nan
    for task in study.tasks:
        row |= _headline_loss(study, members, task)
    return row


def _headline_loss(study: Study, members: list[Run] | None, task: str) -> dict[str, float]:
    base = study.base.get(task)
    evaluations = evaluations_of(study, members, task) if members else [e for e in [base] if e]
    measured = [metric_value(evaluation, "loss") for evaluation in evaluations]
    values = [m["value"] for m in measured if known(m["value"])]
    single = measured[0] if len(values) == 1 else {"low": np.nan, "high": np.nan}
    several = len(values) > 1
    difference = None
    if members and values and base is not None:
        difference = compare("loss", evaluations, [base])
    return {
        f"loss_{task}": float(np.mean(values)) if values else np.nan,
        f"loss_{task}_low": min(values) if several else single["low"],
        f"loss_{task}_high": max(values) if several else single["high"],
        f"loss_{task}_delta": difference.value if difference else np.nan,
        f"loss_{task}_delta_low": difference.low if difference else np.nan,
        f"loss_{task}_delta_high": difference.high if difference else np.nan,
    }


def evaluations_of(study: Study, members: Iterable[Run], task: str) -> list[Artifact]:
    """Evaluations on one task of the runs of a group."""
    found = (run.of("evaluation", [task]).get(task) for run in members)
    return [evaluation for evaluation in found if evaluation is not None]


def question(study: Study) -> str:
    """What the study asked, in one sentence."""
    n = pool_size(study)
    share = study.config.get("select", {}).get("fraction")
    which = f"Which {100 * share:g} % of" if share else "Which of"
    examples = f"the {n:,} examples" if n else "the examples"
    model = study.config.get("target", {}).get("model", "the target")
    ways = len(study.groups)
    compared = f"{ways} ways of ranking the pool were compared."
    if ways == 1:
        compared = "One way of ranking the pool was tried."
    return (
        f"{which} {examples} of {pool_name(study)} should {model} be fine-tuned on "
        f"to do well at {listed(study.tasks)}? {compared}"
    )


def pool_name(study: Study) -> str:
    """What the study file calls its pool."""
    source = study.config.get("pool", {})
    names = [
        source.get("name"),
        source.get("path"),
        (source.get("hub") or {}).get("name"),
        (source.get("package") or {}).get("requirement"),
    ]
    return next((str(name) for name in names if name), "the pool")


def findings(study: Study) -> list[str]:
    """The answer in sentences, each saying whether its difference is more than noise."""
    told = [_fidelity_finding(study), _length_finding(study), _cost_finding(study)]
    told += [_loss_finding(study, task) for task in study.tasks]
    return [sentence for sentence in told if sentence]


def _fidelity_finding(study: Study) -> str | None:
    """Which proxy orders the pool most like the target, and which cannot be told from it."""
    measured = _faithful(study)
    if not measured:
        return None
    best, top = next(iter(measured.items()))
    rivals = [
        name
        for name, other in measured.items()
        if name != best
        and intervals_overlap((other["low"], other["high"]), (top["low"], top["high"]))
    ]
    text = (
        f"{best} ranks most like the target: Spearman {number(top['value'], 2)} "
        f"{interval(top['low'], top['high'], 2)}".rstrip()
        + f" averaged over tasks, on {top['n']:,.0f} examples"
    )
    unseen = fidelity_value(next(r for r in study.runs if r.name == best), MEAN, "unseen_spearman")
    if unseen and known(unseen["value"]) and unseen["n"] < top["n"]:
        text += f"; {number(unseen['value'], 2)} on the {unseen['n']:,.0f} it was not made from"
    text += "."
    if rivals:
        text += f" Its interval overlaps that of {listed(rivals)}: no order among them is certain."
    return text


def _faithful(study: Study) -> dict[str, Any]:
    """Agreement of runs with the target, the one that agrees most first."""
    measured = {
        run.name: found
        for run in study.drawn_once
        if (found := fidelity_value(run, MEAN, "spearman")) and known(found["value"])
    }
    return dict(sorted(measured.items(), key=lambda item: -item[1]["value"]))


def _length_finding(study: Study) -> str | None:
    """Which proxies know more than how long the examples are."""
    measured = {
        run.name: found
        for run in study.drawn_once
        if (found := fidelity_value(run, MEAN, "above_length")) and known(found["value"])
    }
    if not measured:
        return None
    beyond = [name for name, found in measured.items() if found["low"] > 0]
    below = [name for name, found in measured.items() if not found["low"] > 0]
    text = "A guess from lengths alone, without any model, is "
    parts = [f"clearly beaten by {listed(beyond)}"] if beyond else []
    if below:
        parts.append(f"not clearly beaten by {listed(below)}")
    return text + ", ".join(parts) + "."


def _cost_finding(study: Study) -> str | None:
    """How much faster than the target a proxy scores, and what making it cost.

    The proxy is the one that ranks most like the target; where that was not measured, the fastest.
    """
    timed = {r.name: s for r in study.drawn_once if not r.is_target and (s := speedup(study, r))}
    if not timed or study.target_run is None:
        return None
    fastest = max(timed, key=lambda name: timed[name])
    name = next((name for name in _faithful(study) if name in timed), fastest)
    run = next(run for run in study.runs if run.name == name)
    own, whole = seconds_per_1000(study, run), seconds_per_1000(study, study.target_run)
    text = (
        f"Scoring 1,000 examples takes {duration(own)} with {name} and {duration(whole)} "
        f"with the target, {timed[name]:.2f} times the speed"
    )
    making = making_seconds(run)
    return f"{text}; making the proxy took {duration(making)} once." if making else f"{text}."


def _loss_finding(study: Study, task: str) -> str | None:
    """The best selection for one task, against base and against chance."""
    scored = {
        group: evaluations
        for group, members in study.groups.items()
        if not members[0].is_random and (evaluations := evaluations_of(study, members, task))
    }
    losses = {group: _mean_loss(evaluations) for group, evaluations in scored.items()}
    losses = {group: loss for group, loss in losses.items() if known(loss)}
    if not losses:
        return None
    best = min(losses, key=lambda group: losses[group])
    text = (
        f"{task}: lowest held-out loss after training on the selection of {best}, "
        f"{number(losses[best])}"
    )
    base = study.base.get(task)
    if base is not None:
        text += f" (untouched target {number(_mean_loss([base]))})"
    chance = [
        e
        for members in study.groups.values()
        if members[0].is_random
        for e in evaluations_of(study, members, task)
    ]
    return f"{text}. {against_chance(best, scored[best], chance)}"


def against_chance(name: str, evaluations: list[Artifact], chance: list[Artifact]) -> str:
    """Whether a selection beat random ones by more than the test items' and the draws' noise."""
    if not chance:
        return "No random selection was trained on, so what choosing adds is not known."
    draws = [metric_value(evaluation, "loss")["value"] for evaluation in chance]
    count = "one draw" if len(draws) == 1 else f"mean of {len(draws)} draws"
    against = f"Against random ({count}, {number(float(np.mean(draws)))})"
    difference = compare("loss", evaluations, chance)
    if difference is None:
        return f"{against} nothing can be said: the test items carry no losses."
    told = f"{against} the difference is {signed(difference.value)}"
    if ends := interval(difference.low, difference.high):
        told += f" {ends} over {difference.n} items"
    if not difference.beyond_noise:
        return f"{told}: within its interval, so not a difference this study can show."
    if len(draws) > 1 and min(draws) <= _mean_loss(evaluations) <= max(draws):
        scatter = f"single draws scatter from {number(min(draws))} to {number(max(draws))}"
        return f"{told}, but {scatter}, around {name}: luck of the draw explains it as well."
    word = "lower" if difference.value < 0 else "higher"
    if len(draws) == 1:
        return f"{told}: {word} than chance; with one draw, its luck is not in the interval."
    return f"{told}: {word} than chance, and outside the range of the draws."


def _mean_loss(evaluations: list[Artifact]) -> float:
    return float(np.mean([metric_value(evaluation, "loss")["value"] for evaluation in evaluations]))


def summary(study: Study) -> str:
    """The text printed at the end: question, short table, findings, where the rankings are."""
    with_target = study.target_run is not None
    header = ["run", "fidelity", *(f"loss {task}" for task in study.tasks)]
    header += ["scoring", "speed-up"] if with_target else ["scoring"]
    rows = [_summary_row(study, row) for row in headline(study).to_dict("records")]
    where = [
        f"ranking of {run.name}: {place(run.artifacts['ranking'], 'ranking.parquet')}"
        for run in study.drawn_once
        if "ranking" in run.artifacts and not run.is_random
    ]
    parts = [
        f"Study {study.name}. {question(study)}",
        text_table(header, [row[: len(header)] for row in rows]),
        "Fidelity: mean Spearman with the target. Loss: held out, after fine-tuning on the "
        "selection. [95 % interval, or range over draws]",
        "\n".join(findings(study)),
        "\n".join(where),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary_row(study: Study, row: Mapping[Hashable, Any]) -> list[str]:
    """A row of the headline as text, its speed-up last."""
    draws = f" (x{row['draws']:.0f})" if row["draws"] > 1 else ""
    losses = [f"loss_{task}" for task in study.tasks]
    return [
        f"{row['run']}{draws}",
        _with_interval(row, "fidelity", 2),
        *(_with_interval(row, loss, 3) for loss in losses),
        duration(row["scoring_seconds"]),
        f"{row['speedup']:.2f}x" if known(row["speedup"]) else MISSING,
    ]


def _with_interval(row: Mapping[Hashable, Any], name: str, digits: int) -> str:
    ends = interval(row[f"{name}_low"], row[f"{name}_high"], digits)
    return f"{number(row[name], digits)} {ends}".rstrip()


def place(artifact: Artifact, name: str) -> str:
    """Path of an artifact's file as seen from the folder that holds ``results``."""
    return "/".join([*artifact.folder.parts[-3:], name])


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
