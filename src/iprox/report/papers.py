"""A paper's table with a study's numbers beside it: lines, cells, what ours is, and drawings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from iprox.papers.tables import Row, Table
from iprox.report import tables
from iprox.report.artifacts import Run, Study
from iprox.report.charts import SERIES, Chart, drawing, label_points, short
from iprox.report.formats import cell_text, scaled, settings_text
from iprox.report.measures import MEASURES, Columns, evaluated, origins, task_columns

ANY = "any"
"""Name of a row of ours alone, which is called as its run is."""

TIMED = ("minutes", "agreement", "amortisation")
"""Measures that are times, or that have times among them."""

PAPER, OURS = SERIES[0], SERIES[1]

CELL_COLUMNS = [
    "line",
    "model",
    "setting",
    "column",
    "paper",
    "ours",
    "low",
    "high",
    "n",
    "runs",
    "changed",
    "sources",
    "note",
]


@dataclass(frozen=True)
class Line:
    """One line of a table: a row of the paper, of ours, or both.

    Attributes:
        model: The paper's name of the model; ours in a row of ours alone.
        setting: What is varied.
        paper: Printed numbers by column.
        runs: Runs of ours, one or the draws of one.
        ours: Measured numbers by column.
        note: What is to be known about the printed numbers.
    """

    model: str
    setting: str
    paper: dict[str, float | str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    ours: Columns = field(default_factory=dict)
    note: str | None = None

    @property
    def run(self) -> str:
        """Name of the runs: that of their group."""
        draws = f" (x{len(self.runs)})" if len(self.runs) > 1 else ""
        return f"{self.runs[0].group}{draws}" if self.runs else ""


def lines_of(table: Table, ours: list[list[str]], study: Study) -> list[Line]:
    """The lines of a table; a row in which several runs stand has a line for each.

    Args:
        table: The paper's table.
        ours: Names of the runs that stand in each row.
        study: The runs.
    """
    found = [
        line
        for row, names in zip(table.rows, ours, strict=True)
        for line in _lines(table, row, [run for run in study.runs if run.name in names], study)
    ]
    if not study.base:
        return found
    evaluations = {task: [artifact] for task, artifact in study.base.items()}
    untouched = evaluated(evaluations, task_columns(study))
    return [Line(model_name(study), "untouched target", ours=untouched), *found]


def _lines(table: Table, row: Row, runs: list[Run], study: Study) -> Iterator[Line]:
    """The lines of one row: one for each group of runs, or the printed numbers alone."""
    printed = {
        column: number
        for column, number in zip(table.columns, row.paper, strict=False)
        if number != "-"
    }
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    for group, members in groups.items():
        measured = MEASURES[table.measure](study, members)
        setting = group if row.row == ANY else row.row
        model = row.model if printed else model_name(study)
        yield Line(model, setting, printed, members, measured, row.note)
    if printed and not groups:
        yield Line(row.model, row.row, printed, note=row.note)


def model_name(study: Study) -> str:
    """What the study calls its target."""
    return str(study.config["target"]["model"])


def cells(lines: list[Line]) -> pd.DataFrame:
    """A row for each number that is printed or was measured, with what ours was read from."""
    rows = []
    for place, line in enumerate(lines):
        for column in dict.fromkeys([*line.paper, *line.ours]):
            ours = line.ours.get(column)
            rows.append(
                {
                    "line": place,
                    "model": line.model,
                    "setting": line.setting,
                    "column": column,
                    "paper": str(line.paper.get(column, "")),
                    "ours": ours.value if ours else None,
                    "low": ours.low if ours else None,
                    "high": ours.high if ours else None,
                    "n": ours.n if ours else None,
                    "runs": " ".join(run.name for run in line.runs),
                    "changed": settings_text(line.runs[0].changed) if line.runs else "",
                    "sources": origins(ours) if ours else "",
                    "note": line.note or "",
                }
            )
    numbers = dict.fromkeys(("ours", "low", "high", "n"), "float64")
    return pd.DataFrame(rows, columns=CELL_COLUMNS).astype(numbers)


def wide(table: Table, lines: list[Line]) -> pd.DataFrame:
    """The table as it is read: paper and ours side by side, a dash where nothing was measured."""
    extra = dict.fromkeys(c for line in lines for c in line.ours if c not in table.columns)
    rows = [
        {
            "model": line.model,
            "setting": line.setting,
            **{k: v for c in table.columns for k, v in _pair(line, c).items()},
            **{f"{c}, ours": line.ours[c].value if c in line.ours else None for c in extra},
            "run": line.run or None,
        }
        for line in lines
    ]
    frame = pd.DataFrame(rows)
    ranges = [c for c in map(str, frame) if any(isinstance(value, str) for value in frame[c])]
    ours = {c: "float64" for c in map(str, frame) if c.endswith(", ours")}
    return frame.assign(**{c: frame[c].map(cell_text) for c in ranges}).astype(ours)


def _pair(line: Line, column: str) -> dict[str, Any]:
    ours = line.ours.get(column)
    return {f"{column}, paper": line.paper.get(column), f"{column}, ours": ours and ours.value}


def setting(table: Table, study: Study, lines: list[Line]) -> str:
    """What ours is: the model, the pool, the budget, the items, and for times the hardware."""
    used = [line for line in lines if line.runs]
    if not used:
        return "Ours: no run of this study stands in this table."
    share = study.config["select"]["fraction"]
    count = study.config["select"]["count"]
    budget = f"{count} examples" if count else f"{100 * share:g} %"
    items = {c: m.n for line in used for c, m in line.ours.items() if m.n == m.n}
    counted = ", ".join(f"{column} {n:.0f}" for column, n in items.items())
    return (
        f"Ours: {model_name(study)}, {tables.pool_name(study)} ({tables.pool_size(study):,} "
        f"examples), {budget} selected unless the row says otherwise"
        + (f"; items measured on: {counted}" if counted else "")
        + (f"; timed on {_hardware(used)}." if table.measure in TIMED else ".")
    )


def _hardware(lines: list[Line]) -> str:
    """What the jobs behind some numbers ran on."""
    sources = [source for line in lines for m in line.ours.values() for source in m.sources]
    hosts = [source.provenance.get("host", {}) for source in sources]
    named = {f"{host['device']}, {host['threads']} threads" for host in hosts if "device" in host}
    return "; ".join(sorted(named)) or "hardware that was not recorded"


def against_random(study: Study, lines: list[Line]) -> list[str]:
    """For each line and task in a sentence: is the held-out loss lower than after random choice?

    The random choice of the same budget: the first random line with the same changes to
    ``select``.
    """
    chance = [line for line in lines if line.runs and line.runs[0].is_random]
    told = []
    for line in lines:
        rival = next((other for other in chance if _budget(other) == _budget(line)), None)
        if rival is None or not line.runs or line in chance:
            continue
        for task in study.tasks:
            ours = tables.evaluations_of(study, line.runs, task)
            random = tables.evaluations_of(study, rival.runs, task)
            if ours and random:
                told.append(f"{task}, {line.run}: {tables.against_chance(line.run, ours, random)}")
    return told


def _budget(line: Line) -> dict[str, Any]:
    """What a line's runs change about how much is selected."""
    changed = line.runs[0].changed if line.runs else {}
    return {key: changed[key] for key in changed if key in ("select.fraction", "select.count")}


def draw(name: str, table: Table, lines: list[Line]) -> list[Chart]:
    """The paper's figure, of its printed numbers and of ours: a drawing each where both exist."""
    if table.figure is None:
        return []
    sides: dict[str, Callable[[Line, str], float | None]] = {"paper": _printed, "ours": _measured}
    drawn = [FIGURES[table.figure](name, table, lines, side, of) for side, of in sides.items()]
    return [chart for chart in drawn if chart is not None]


Value = Callable[[Line, str], float | None]


def _printed(line: Line, column: str) -> float | None:
    number = line.paper.get(column)
    return None if isinstance(number, str) else number


def _measured(line: Line, column: str) -> float | None:
    ours = line.ours.get(column)
    return None if ours is None else ours.value


def _dots(name: str, table: Table, lines: list[Line], side: str, of: Value) -> Chart | None:
    """A dot for each line: the mean score, or of ours without scores the mean held-out loss."""
    dots = {line.setting: value for line in lines if (value := of(line, table.columns[-1]))}
    unit = "mean over tasks, %; higher is better"
    if not dots and side == "ours":
        dots = {line.setting: value for line in lines if (value := _mean_loss(line))}
        unit = "held-out loss, mean over tasks; lower is better"
    return _horizontal(f"{name}-{side}", f"{table.title.split(':')[0]}, {side}", unit, dots)


def _mean_loss(line: Line) -> float | None:
    losses = [ours.value for column, ours in line.ours.items() if column.endswith(" loss")]
    return sum(losses) / len(losses) if losses else None


def _horizontal(name: str, title: str, unit: str, dots: dict[str, float]) -> Chart | None:
    """Dots from the top down, on an axis cut to where they differ."""
    if not dots:
        return None
    low, high = min(dots.values()), max(dots.values())
    room = 0.25 * (high - low) or 0.1 * abs(high) or 1.0
    with drawing(name, title, 70 + 26 * len(dots), unit) as canvas:
        axes = canvas.axes
        colour = PAPER if name.endswith("paper") else OURS
        for level, value in enumerate(dots.values()):
            axes.plot(value, level, "o", ms=7, color=colour)
            text = f"{value:.4g}"
            axes.annotate(text, (value, level), (7, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(dots)), [short(label) for label in dots])
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(len(dots) - 0.5, -0.5)
    return canvas.chart


def _stack(name: str, table: Table, lines: list[Line], side: str, of: Value) -> Chart | None:
    """A bar for each line, of one part after the other; the last column is their sum."""
    parts = table.columns[:-1]
    shown = [line for line in lines if any(of(line, part) for part in parts)]
    if not shown:
        return None
    title = f"{table.title.split(':')[0]}, {side}"
    with drawing(f"{name}-{side}", title, 100 + 26 * len(shown), "TFLOPs") as canvas:
        axes = canvas.axes
        for level, line in enumerate(shown):
            start = 0.0
            for part, colour in zip(parts, SERIES, strict=False):
                width = of(line, part) or 0.0
                axes.barh(
                    level, width, 0.6, left=start, color=colour, label=part if level == 0 else None
                )
                start += width
        axes.set_yticks(range(len(shown)), [short(line.setting) for line in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.legend(frameon=False, ncols=len(parts), loc="upper left", bbox_to_anchor=(0, -0.12))
    return canvas.chart


def _scatter(name: str, table: Table, lines: list[Line], side: str, of: Value) -> Chart | None:
    """First column against the last, which is a cost."""
    x, y = table.columns[-1], table.columns[0]
    points = [(of(line, x), of(line, y), line.setting) for line in lines]
    return _points(f"{name}-{side}", table, side, (x, y), points, lines_between=False)


def _curve(name: str, table: Table, lines: list[Line], side: str, of: Value) -> Chart | None:
    """Last column against the first."""
    x, y = table.columns[0], table.columns[-1]
    points = [(of(line, x), of(line, y), line.setting) for line in lines]
    return _points(f"{name}-{side}", table, side, (x, y), points, lines_between=True)


def _points(
    name: str,
    table: Table,
    side: str,
    axes_of: tuple[str, str],
    points: list[tuple[float | None, float | None, str]],
    lines_between: bool,
) -> Chart | None:
    """Named points on a logarithmic axis of what they cost."""
    known = [(x, y, label) for x, y, label in points if x and y is not None]
    if not known:
        return None
    x_name, y_name = axes_of
    with drawing(name, f"{table.title.split(':')[0]}, {side}", 300, y_name) as canvas:
        axes = canvas.axes
        colour = PAPER if side == "paper" else OURS
        xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
        axes.plot(xs, ys, "o-" if lines_between else "o", ms=6, color=colour)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: scaled(value))
        axes.set_xlabel(x_name, loc="left")
        axes.margins(x=0.25, y=0.15)
        if not lines_between:
            label_points(axes, [(x, y, label, colour) for x, y, label in known])
    return canvas.chart


FIGURES = {"dots": _dots, "stack": _stack, "scatter": _scatter, "curve": _curve}
