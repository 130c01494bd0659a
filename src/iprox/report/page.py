"""The report's page: one HTML file that opens anywhere, with no request to anywhere.

The template escapes everything that comes from data. A content security policy allows only the
page's own script, by its digest, so that text of a pool could not run even if it got through.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pandas as pd

from iprox.report import selected, tables
from iprox.report.artifacts import Run, Study
from iprox.report.charts import CSS_VARIABLES, Chart, colours
from iprox.report.formats import (
    MISSING,
    duration,
    interval,
    known,
    number,
    percent,
    scaled,
    settings_text,
    signed,
)

TEXT_LIMIT = 4000
"""Characters of one message that the page shows; the rest is counted."""

OPENING = 180
"""Characters of an example shown before it is opened."""

VALUES_SHOWN = 8
"""Sources or categories listed by name; rarer ones are added up."""

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters drawn as their symbols."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table on the page.

    Attributes:
        text: What is shown.
        note: Shown on hover: an exact value, or why there is none.
        detail: Smaller, behind the text: an interval.
        colour: CSS variable of the run this cell names.
        bar: Share of 0..1 drawn as a bar behind the text.
        code: Whether the text is an id or setting.
        sure: Whether the detail is a difference beyond its interval.
    """

    text: str
    note: str = ""
    detail: str = ""
    colour: str = ""
    bar: float | None = None
    code: bool = False
    sure: bool = True


@dataclass(frozen=True)
class Grid:
    """A table on the page: column names (numeric ones flagged) and rows of cells."""

    columns: list[tuple[str, bool]]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Example:
    """One pool example among the best or worst of some run."""

    id: str
    task: str
    best_in: str
    worst_in: str
    ranks: dict[str, int]
    opening: str
    messages: list[tuple[str, str, int]] = field(default_factory=list)
    """(role, text, characters left out) of each message."""


def render(study: Study, frames: dict[str, pd.DataFrame], charts: dict[str, list[Chart]]) -> str:
    """The whole page.

    Args:
        study: What is reported.
        frames: The report's tables by name.
        charts: Its figures by section.
    """
    import jinja2
    from markupsafe import Markup

    assets = files("iprox.report")
    script = assets.joinpath("page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(assets.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        study=study,
        question=tables.question(study),
        findings=tables.findings(study),
        headline=headline_grid(study, frames["headline"]),
        runs=runs_grid(study),
        stages=stages_grid(frames["stages"]),
        kept=kept_grid(study, frames["runs"], frames["fidelity"]),
        fidelity=fidelity_grid(study, frames["fidelity"]),
        searches=searches_grid(study, tables.searches(study)),
        encoders=encoders_grid(study, frames["encoders"]),
        amortisation=amortisation_grid(study, frames["amortisation"]),
        sketches=sketches_grid(study, tables.sketches(study)),
        overlap=overlap_grid(study, frames["runs"]),
        diversity=diversity_grid(study, frames["diversity"]),
        found=found_grid(study, frames["found"]),
        composition=composition_grids(study, frames["composition"]),
        examples=examples_shown(study, frames["examples"]),
        heldout=heldout_grid(study, frames["heldout"]),
        paired=paired_grid(study, frames["paired"]),
        layers=layers_grid(frames["layers"]),
        costs=costs_grid(study, frames["costs"]),
        versions=versions(study),
        config=json.dumps(study.config, indent=2, sort_keys=True, ensure_ascii=False),
        charts={name: [Markup(c.inline()) for c in made] for name, made in charts.items()},
        style=Markup(assets.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def visible(text: str) -> str:
    """Text with its control characters drawn as symbols, so that none acts on the page."""
    return text.translate(_CONTROLS)


def headline_grid(study: Study, frame: pd.DataFrame) -> Grid:
    """The short answer as a table."""
    columns = [("", False), ("fidelity", True)]
    columns += [(f"held-out loss, {task}", True) for task in study.tasks]
    columns += [("speed-up", True), ("per 1,000 scored", True)]
    rows = []
    for row in frame.to_dict("records"):
        members = study.groups.get(row["run"], [])
        first = members[0] if members else None
        rows.append(
            [
                _group_cell(study, row["run"], len(members)),
                _measured(
                    row["fidelity"],
                    row["fidelity_low"],
                    row["fidelity_high"],
                    2,
                    _why(first, "fidelity"),
                ),
                *(_loss_cell(row, task, first) for task in study.tasks),
                _plain(
                    row["speedup"],
                    lambda v: f"{v:.2f}\N{MULTIPLICATION SIGN}",
                    _why_no_speedup(study, first),
                ),
                _plain(
                    tables.seconds_per_1000(study, first) if first else None,
                    duration,
                    _why(first, "features"),
                ),
            ]
        )
    return Grid(columns, rows)


def _loss_cell(row: Mapping[Any, Any], task: str, first: Run | None) -> Cell:
    """Loss, and below it the change to base with its paired interval."""
    name = f"loss_{task}"
    if not known(row[name]):
        return Cell(MISSING, _why(first, f"evaluation-{task}"))
    text, ends = number(row[name]), interval(row[f"{name}_low"], row[f"{name}_high"])
    if first is None or not known(row[f"{name}_delta"]):
        return Cell(text, f"{row[name]:.6g} {ends}", ends)
    low, high = row[f"{name}_delta_low"], row[f"{name}_delta_high"]
    sure = low > 0 or high < 0
    verdict = "" if sure else ": its interval holds zero, so not a difference that can be shown"
    note = f"{row[name]:.6g} {ends}; change to base, item by item{verdict}"
    return Cell(text, note, f"{signed(row[f'{name}_delta'])} {interval(low, high)}", sure=sure)


def _why(run: Run | None, name: str) -> str:
    if run is None:
        return (
            "the untouched target selects nothing"
            if not name.startswith("evaluation")
            else "not evaluated"
        )
    if name in run.artifacts:
        return "the stage did not record this number"
    return run.why_missing(name)


def _why_no_speedup(study: Study, run: Run | None) -> str:
    if study.target_run is None:
        return "no run scores with the target itself"
    return _why(run, "features")


def _plain(value: float | None, show: Callable[[float], str], why: str) -> Cell:
    """A number, or a dash with the reason."""
    return (
        Cell(show(value), f"{value:.6g}")
        if value is not None and known(value)
        else Cell(MISSING, why)
    )


def _measured(value: float, low: float, high: float, digits: int, why: str) -> Cell:
    """A number with its interval, or a dash with the reason."""
    if not known(value):
        return Cell(MISSING, why)
    return Cell(
        number(value, digits).replace("-", "\N{MINUS SIGN}"),
        f"{value:.6g}",
        interval(low, high, digits),
    )


def _group_cell(study: Study, group: str, draws: int = 1) -> Cell:
    detail = f"{draws} draws" if draws > 1 else ""
    return Cell(group, detail=detail, colour=CSS_VARIABLES[colours(study)[group]])


def _run_cell(study: Study, name: str) -> Cell:
    group = next((run.group for run in study.runs if run.name == name), name)
    return Cell(name, colour=CSS_VARIABLES[colours(study)[group]])


def runs_grid(study: Study) -> Grid:
    """What each run is: scorer, proxy, sizes, and the keys it changes."""
    columns = [
        "run",
        "scorer",
        "proxy",
        "sparsity",
        "parameters kept",
        "until",
        "preset",
        "changed keys",
    ]
    frame = tables.runs(study)
    rows = []
    for run, row in zip(study.runs, frame.to_dict("records"), strict=True):
        why = _why(run, "factors")
        kept = Cell(MISSING, why)
        if known(row["parameters"]):
            kept = Cell(
                percent(1 - row["sparsity_effective"], 1),
                f"{row['parameters']:,.0f} of {row['parameters_dense']:,.0f} parameters",
            )
        rows.append(
            [
                _run_cell(study, run.name),
                Cell(run.scorer),
                Cell(run.proxy) if run.proxy else Cell(MISSING, _why(run, "proxy")),
                _plain(run.sparsity, lambda v: f"{v:g}", why),
                kept,
                Cell(run.until),
                Cell(run.preset),
                Cell(settings_text(run.changed) or "none", code=bool(run.changed)),
            ]
        )
    return Grid([(c, c in ("sparsity", "parameters kept")) for c in columns], rows)


def stages_grid(frame: pd.DataFrame) -> Grid:
    """Every stage folder with what it cost."""
    columns = [
        ("stage", False),
        ("id", False),
        ("used by", False),
        ("seconds", True),
        ("peak memory", True),
        ("content", False),
    ]
    rows = [
        [
            Cell(row["stage"]),
            Cell(row["id"], code=True),
            Cell(row["runs"]),
            _plain(row["seconds"], duration, "not in the stage's provenance"),
            _plain(
                row["peak_memory_bytes"], lambda v: scaled(v, "B"), "not in the stage's provenance"
            ),
            Cell(row["content"][:12], row["content"], code=True),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid(columns, rows)


def kept_grid(study: Study, runs: pd.DataFrame, frame: pd.DataFrame) -> Grid | None:
    """How much influence every proxy keeps, beside a guess from lengths, and at what cost."""
    measured = set(frame["run"])
    if not measured:
        return None
    columns = [("run", False), ("Spearman", True), ("lengths only", True), ("above lengths", True)]
    columns += [("loss retention", True), ("parameters", True)]
    columns += [("FLOPs of scoring", True), ("time of scoring", True)]
    rows = []
    for row in runs.to_dict("records"):
        if row["run"] not in measured:
            continue
        above = row["above_length"]
        by_metric = frame[(frame["run"] == row["run"]) & (frame["task"] == tables.MEAN)]
        rows.append(
            [
                _run_cell(study, row["run"]),
                _measured(
                    row["spearman_mean"],
                    row["spearman_mean_low"],
                    row["spearman_mean_high"],
                    2,
                    "undefined",
                ),
                _plain(row["length_spearman"], _two_digits, "all examples have the same length"),
                Cell(
                    signed(above, 2),
                    f"{above:.6g}",
                    interval(row["above_length_low"], row["above_length_high"], 2),
                    sure=row["above_length_low"] > 0,
                )
                if known(above)
                else Cell(MISSING, "all examples have the same length"),
                _fidelity_cell(by_metric.set_index("metric"), "loss_retention", tables.MEAN),
                *(_plain(row[name], percent, why) for name, why in RATIOS.items()),
            ]
        )
    return Grid(columns, rows)


RATIOS = {
    "parameters_ratio": "not recorded",
    "flops_ratio": "operations of sketches are not counted",
    "time_ratio": "a pass did not record its speed",
}
"""Costs over the target's, and why one may be missing."""


def _two_digits(value: float) -> str:
    return number(value, 2).replace("-", "\N{MINUS SIGN}")


def fidelity_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """All measures of agreement: a row for each run and task, a column for each metric."""
    if frame.empty:
        return None
    frame = frame[~frame["metric"].str.endswith("_ratio")]
    metrics = list(dict.fromkeys(frame["metric"]))
    columns = [
        ("run", False),
        ("task", False),
        *((_metric_name(m), True) for m in metrics),
        ("n", True),
    ]
    rows = []
    for (run, task), part in frame.groupby(["run", "task"], sort=False):
        by_metric = part.set_index("metric")
        cells = [_fidelity_cell(by_metric, metric, str(task)) for metric in metrics]
        n = part["n"].max()
        rows.append(
            [
                _run_cell(study, str(run)),
                Cell(str(task)),
                *cells,
                _plain(float(n), lambda v: f"{v:,.0f}", "not recorded"),
            ]
        )
    return Grid(columns, rows)


def searches_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Proxies that were tried to find a sparsity."""
    if frame.empty:
        return None
    columns = [("run", False), ("sparsity", True), ("Spearman", True)]
    columns += [("parameters", True), ("FLOPs of scoring", True), ("verdict", False)]
    rows = [
        [
            _run_cell(study, row["run"]),
            Cell(f"{row['sparsity']:g}"),
            _measured(row["spearman"], row["low"], row["high"], 2, "not scored"),
            *(_plain(row[n], percent, "") for n in ("parameters_ratio", "flops_ratio")),
            Cell("chosen" if row["chosen"] else row["verdict"]),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid(columns, rows)


def sketches_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Size and errors of every run's sketches against exact gradients."""
    if frame.empty:
        return None
    columns = [("run", False), ("sketch", False), ("per example", True), ("examples", True)]
    columns += [("mean error", True), ("largest error", True), ("Spearman", True)]
    rows = [
        [
            _run_cell(study, row["run"]),
            Cell(f"{row['kind']}, {row['dim']:,} numbers, {row['dtype']}"),
            _plain(row["bytes_per_example"], lambda v: scaled(v, "B"), "not recorded"),
            _plain(row["examples"], lambda v: f"{v:,.0f}", "not recorded"),
            *(_plain(row[e], lambda v: f"{v:.3f}", "undefined") for e in ERRORS),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid(columns, rows)


def diversity_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """How every run's selection lies in feature space."""
    if frame.empty:
        return None
    columns = [("run", False), ("task", False), ("compared", True)]
    columns += [("nearest other", True), ("affinity to the task", True), ("by chance", True)]
    rows = [
        [
            _run_cell(study, row["run"]),
            Cell(row["task"]),
            Cell(f"{row['compared']:,}", f"of {row['selected']:,} selected"),
            _plain(row["nearest"], lambda v: f"{v:.3f}", "fewer than two examples"),
            _plain(row["affinity"], lambda v: f"{v:.3f}", "no direction"),
            _plain(row["affinity_random"], lambda v: f"{v:.3f}", "no direction"),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid(columns, rows)


def encoders_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Agreement of trained encoders with their teachers, beside the same encoders untrained."""
    if frame.empty:
        return None
    columns = [("run", False), ("queries", False), ("task", False), ("metric", False)]
    columns += [("untrained", True), ("trained", True), ("n", True)]
    rows = []
    for key, part in frame.groupby(["run", "queries", "task", "metric"], sort=False):
        run, queries, task, metric = map(str, key)
        cells = []
        for state in ("untrained", "trained"):
            row = part[part["encoder"] == state].iloc[0]
            cells.append(_measured(row["value"], row["low"], row["high"], 2, "undefined"))
        n = f"{part['n_queries'].max():,} x {part['n_candidates'].max():,}"
        names = [Cell(queries), Cell(task), Cell(_metric_name(metric))]
        rows.append([_run_cell(study, run), *names, *cells, Cell(n)])
    return Grid(columns, rows)


def amortisation_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """What scorers that embed texts cost once and for each example."""
    if frame.empty:
        return None
    columns = [("run", False), ("labelled", True), ("labelling", True), ("training", True)]
    columns += [("1,000 examples", True), ("exact scores of 1,000", True), ("speed", True)]
    columns += [("pays off from", True), ("embedding", True), ("teacher's sketch", True)]
    untaught, unmeasured = "it was taught nothing", "not recorded"
    rows = [
        [
            _run_cell(study, row["run"]),
            _plain(row["labelled"], lambda v: f"{v:,.0f}", untaught),
            _plain(row["labelling_seconds"], lambda v: f"{v:,.0f} s", untaught),
            _plain(row["training_seconds"], lambda v: f"{v:,.0f} s", untaught),
            _plain(row["seconds_per_1000"], lambda v: f"{v:,.1f} s", unmeasured),
            _plain(row["exact_seconds_per_1000"], lambda v: f"{v:,.1f} s", unmeasured),
            _plain(row["speedup"], lambda v: f"{v:,.1f} x", unmeasured),
            _plain(row["break_even"], lambda v: f"{v:,.0f} examples", "it never does"),
            _plain(row["bytes_per_example"], lambda v: scaled(v, "B"), unmeasured),
            _plain(row["teacher_bytes_per_example"], lambda v: scaled(v, "B"), "none is kept"),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid(columns, rows)


ERRORS = ("mean_error", "max_error", "spearman")


def _fidelity_cell(by_metric: pd.DataFrame, metric: str, task: str) -> Cell:
    """One metric of one run and task."""
    if metric in by_metric.index:
        ends = by_metric.loc[[metric], ["value", "low", "high"]].to_numpy(dtype=float)
        value, low, high = ends[0].tolist()
        return _measured(value, low, high, 2, "undefined")
    whole = "measured task by task only" if task == tables.MEAN else "measured over all tasks only"
    return Cell(MISSING, whole)


def _metric_name(metric: str) -> str:
    return metric.replace("_", " ")


def overlap_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Share of the target's selection that each run selected too."""
    if study.target_run is None or "selection" not in study.target_run.artifacts:
        return None
    columns = [("run", False), *((task, True) for task in study.tasks), ("mean", True)]
    rows = []
    for run, row in zip(study.runs, frame.to_dict("records"), strict=True):
        if run.is_target:
            continue
        names = [*(f"overlap_{task}" for task in study.tasks), "overlap_mean"]
        cells = [
            Cell(percent(row[n]), f"{row[n]:.6g}", bar=row[n])
            if known(row[n])
            else Cell(MISSING, _why(run, "selection"))
            for n in names
        ]
        rows.append([_run_cell(study, run.name), *cells])
    return Grid(columns, rows)


def found_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """How early every ranking lists the categories that are looked for."""
    if frame.empty:
        return None
    columns = [("run", False), ("task", False), ("area", True), ("chance", True)]
    columns += [("among as many", True), ("in the first 5 %", True)]
    rows = []
    for row in frame.to_dict("records"):
        area, chance = (f"{row[name]:.3f}" for name in ("average_precision", "chance"))
        shares = [Cell(percent(row[name])) for name in ("precision", "found_first")]
        names = [_run_cell(study, row["run"]), Cell(row["task"])]
        rows.append([*names, Cell(area), Cell(chance), *shares])
    return Grid(columns, rows)


def composition_grids(
    study: Study, frame: pd.DataFrame
) -> list[tuple[str, list[tuple[str, Grid | str]]]]:
    """Per task, for source, category and length: shares in the pool and in each selection.

    A dimension with one value only comes as a sentence in place of a table.
    """
    if frame.empty:
        return []
    group = {run.name: run.group for run in study.runs}
    frame = frame.assign(group=[group.get(run, run) for run in frame["run"]])
    shown = []
    for task in study.tasks:
        part = frame[(frame["task"] == task) | (frame["run"] == selected.POOL)]
        if (part["run"] != selected.POOL).any():
            dimensions = part.groupby("dimension", sort=False)
            shown.append(
                (task, [(str(name), _composition_grid(study, rows)) for name, rows in dimensions])
            )
    return shown


def _composition_grid(study: Study, part: pd.DataFrame) -> Grid | str:
    """One dimension: values as rows, pool and groups of runs as columns."""
    shares = part.groupby(["value", "group"], sort=False)["share"].mean().unstack("group")
    names = [selected.POOL, *(g for g in study.groups if g in shares)]
    shares = shares[names]
    if len(shares) == 1:
        return f"All examples: {visible(str(shares.index[0])) or 'none given'}."
    if part["dimension"].iloc[0] != "length" and len(shares) > VALUES_SHOWN + 1:
        rest = shares.iloc[VALUES_SHOWN:]
        other = rest.sum().rename(f"{len(rest)} others")
        shares = pd.concat([shares.iloc[:VALUES_SHOWN], other.to_frame().T])
    rows = [
        [
            Cell(
                _cut(visible(str(value)), 60) or "none given",
                str(value) if len(str(value)) > 60 else "",
            ),
            *(Cell(percent(share), f"{share:.4f}", bar=share) for share in row),
        ]
        for value, row in zip(shares.index, shares.to_numpy(), strict=True)
    ]
    return Grid([("", False), *((name, True) for name in names)], rows)


def examples_shown(study: Study, frame: pd.DataFrame) -> list[Example]:
    """The best and worst examples with their text."""
    texts = selected.texts(study, set(frame["example_id"]))
    ranks = [column for column in frame.columns if column.startswith("rank_")]
    return [
        Example(
            id=visible(row["example_id"]),
            task=row["task"],
            best_in=row["best_in"],
            worst_in=row["worst_in"],
            ranks={
                name.removeprefix("rank_"): int(row[name]) for name in ranks if known(row[name])
            },
            opening=_opening(texts.get(row["example_id"], [])),
            messages=[_message(m) for m in texts.get(row["example_id"], [])],
        )
        for row in frame.to_dict("records")
    ]


def _opening(messages: Sequence[dict[str, str]]) -> str:
    """The start of what the user asked, on one line."""
    asked = next((m["content"] for m in messages if m["role"] == "user"), "")
    return _cut(visible(" ".join(asked[: 8 * OPENING].split())), OPENING) or "(no text)"


def _message(message: dict[str, str]) -> tuple[str, str, int]:
    content = message["content"] or ""
    return message["role"], visible(content[:TEXT_LIMIT]), max(0, len(content) - TEXT_LIMIT)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def heldout_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Every evaluation: value with interval, change to base with paired interval."""
    if frame.empty:
        return None
    names = ["run", "task", "metric", "value", "change to base", "p", "items"]
    rows = []
    for row in frame.to_dict("records"):
        why = (
            "this is the base"
            if row["run"] == "base"
            else "the base was not measured on the same items"
        )
        delta = Cell(MISSING, why)
        if known(row["delta"]):
            delta = Cell(
                signed(row["delta"]),
                f"{row['delta']:.6g}",
                interval(row["delta_low"], row["delta_high"]),
            )
        rows.append(
            [
                _run_cell(study, row["run"]),
                Cell(row["task"]),
                Cell(_metric_name(row["metric"])),
                _measured(row["value"], row["low"], row["high"], 3, "not measured"),
                delta,
                _plain(row["delta_p"], p_text, why),
                _plain(row["n"], lambda v: f"{v:,.0f}", "not recorded"),
            ]
        )
    return Grid([(n, n in ("value", "change to base", "p", "items")) for n in names], rows)


def paired_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Every two groups of runs on the same items: difference, interval, test."""
    if frame.empty:
        return None
    names = ["task", "metric", "A", "B", "A - B", "p", "items"]
    rows = [
        [
            Cell(row["task"]),
            Cell(_metric_name(row["metric"])),
            *(_group_cell(study, row[side], len(study.groups.get(row[side], []))) for side in "ab"),
            Cell(
                signed(row["difference"]),
                f"{row['difference']:.6g}",
                interval(row["low"], row["high"]),
                sure=row["low"] > 0 or row["high"] < 0,
            ),
            _plain(row["p"], p_text, "not tested"),
            _plain(row["n"], lambda v: f"{v:,.0f}", "not recorded"),
        ]
        for row in frame.to_dict("records")
    ]
    return Grid([(n, n in ("A - B", "p", "items")) for n in names], rows)


def p_text(value: float) -> str:
    """A p-value as it is read."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def layers_grid(frame: pd.DataFrame) -> Grid | None:
    """Layers of each proxy, summed up by shape and rank."""
    if frame.empty:
        return None
    frame = frame.assign(kind=[name.rsplit(".", 1)[-1] for name in frame["layer"]])
    names = [
        "proxy of run",
        "layers",
        "count",
        "out \N{MULTIPLICATION SIGN} in",
        "rank",
        "parameters kept",
        "truncation error",
    ]
    rows = []
    for (run, kind, out_dim, in_dim, rank, dense), part in frame.groupby(
        ["run", "kind", "out", "in", "rank", "kept_dense"], sort=False
    ):
        kept = part["parameters"].sum() / part["parameters_dense"].sum()
        errors = part["truncation_error"]
        rows.append(
            [
                Cell(str(run)),
                Cell(str(kind), code=True),
                Cell(str(len(part))),
                Cell(f"{out_dim} \N{MULTIPLICATION SIGN} {in_dim}"),
                Cell("dense" if dense else str(rank)),
                Cell(percent(float(kept), 1)),
                Cell(
                    number(float(errors.mean())),
                    "mean over the layers",
                    f"[{number(float(errors.min()))}, {number(float(errors.max()))}]",
                ),
            ]
        )
    return Grid([(n, i >= 2) for i, n in enumerate(names)], rows)


def costs_grid(study: Study, frame: pd.DataFrame) -> Grid:
    """What each run cost: seconds by step and in all, memory, tokens and FLOPs scored."""
    steps = [
        s
        for s in (
            "warmup",
            "probe",
            "decomposition",
            "sparsity",
            "factors",
            "extraction",
            "proxy",
            "features",
            "finetune",
            "evaluation",
        )
        if frame["step"].str.startswith(s).any()
    ]
    columns = [("run", False), *((s, True) for s in steps)]
    columns += [
        ("all steps", True),
        ("peak memory", True),
        ("tokens scored", True),
        ("FLOPs scored", True),
    ]
    rows = []
    for run in study.runs:
        own = frame[frame["run"] == run.name]
        cells = [_step_cell(run, own, step) for step in steps]
        scored = own[own["step"] == "features"]
        rows.append(
            [
                _run_cell(study, run.name),
                *cells,
                _plain(
                    _total(own.drop_duplicates("id")["seconds"]),
                    duration,
                    "a step did not record its seconds",
                ),
                _plain(
                    own["peak_memory_bytes"].max(),
                    lambda v: scaled(v, "B"),
                    "no step recorded its memory",
                ),
                *(
                    _plain(_total(scored[c]), scaled, _why(run, "features"))
                    for c in ("tokens", "flops")
                ),
            ]
        )
    return Grid(columns, rows)


def _step_cell(run: Run, own: pd.DataFrame, step: str) -> Cell:
    """Seconds of one step, tasks added up."""
    part = own[own["step"].str.startswith(step)].drop_duplicates("id")
    if part.empty:
        return Cell(MISSING, run.why_missing(step))
    shared = int(part["shared_by"].max())
    note = f"shared by {shared} runs, made once" if shared > 1 else "made for this run alone"
    total = _total(part["seconds"])
    return (
        Cell(duration(total), note)
        if known(total)
        else Cell(MISSING, "not in the stage's provenance")
    )


def _total(column: pd.Series) -> float:
    """Sum of a column, NaN when it is empty or a part is missing."""
    return float(column.sum(skipna=False)) if len(column) else float("nan")


def versions(study: Study) -> list[tuple[str, str]]:
    """Versions and code revisions the stages were made with; several when stages differ."""
    found: dict[str, set[str]] = {}
    for _, _, artifact in study.artifacts():
        about = artifact.provenance
        for package, version in about.get("versions", {}).items():
            found.setdefault(package, set()).add(str(version))
        found.setdefault("git revision", set()).add(
            str(about.get("git_revision") or "not recorded")
        )
    return [(name, ", ".join(sorted(all_of))) for name, all_of in sorted(found.items())]
