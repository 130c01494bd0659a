"""The report's figures: each function draws one question's answer from the study's numbers."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from iprox.report import tables
from iprox.report.artifacts import Artifact, Run, Study
from iprox.report.charts import (
    INK,
    PAPER,
    SERIES,
    SOFT,
    Chart,
    colours,
    drawing,
    label_ends,
    label_points,
    short,
)
from iprox.report.formats import known
from iprox.report.selected import overlaps

NEGATIVE, POSITIVE = SERIES[1], SERIES[0]
ROW = 24
"""Height in points of one run's row in a dot plot or a stack of histograms."""


def all_figures(study: Study) -> dict[str, list[Chart]]:
    """Every figure by the section of the page it stands in; a section without data has none."""
    return {
        "fidelity": fidelity_against_cost(study),
        "fidelity_layers": layer_fidelity(study),
        "scores": [c for task in study.tasks if (c := score_distributions(study, task))],
        "agreement": [c for task in study.tasks if (c := agreement(study, task))],
        "overlaps": [c for task in study.tasks if (c := overlap(study, task))],
        "heldout": heldout(study),
        "training": training(study),
        "alignment": alignment(study),
        "layers": layers(study),
    }


def fidelity_against_cost(study: Study) -> list[Chart]:
    """Mean Spearman against operations, against scoring time, and against parameters kept."""
    measured = {
        run.name: found
        for run in study.drawn_once
        if (found := tables.fidelity_value(run, tables.MEAN, "spearman")) and known(found["value"])
    }
    table = tables.runs(study).set_index("run")
    costs = {
        "flops": (
            "Fidelity against cost",
            table["flops_ratio"].copy(),
            "FLOPs of scoring, relative to the target",
        ),
        "seconds": (
            "Fidelity against scoring time",
            table["seconds_per_1000"],
            "seconds per 1,000 examples scored",
        ),
        "parameters": (
            "Fidelity against size",
            100 * (1 - table["sparsity_effective"]),
            "parameters kept in the replaced layers, %",
        ),
    }
    if study.target_run is not None:
        costs["parameters"][1][study.target_run.name] = 100.0
        costs["flops"][1][study.target_run.name] = 1.0
    charts = []
    for name, (title, cost, label) in costs.items():
        shown = [run for run in measured if known(cost[run])]
        if shown:
            charts.append(
                _scatter(
                    study,
                    f"fidelity-{name}",
                    title,
                    cost,
                    label,
                    {r: measured[r] for r in shown},
                    front=name == "flops",
                )
            )
    return charts


def _scatter(
    study: Study,
    name: str,
    title: str,
    cost: pd.Series,
    label: str,
    measured: dict[str, dict[str, float]],
    front: bool,
) -> Chart:
    """Runs as points with intervals, the target as the reference at one.

    With ``front``, also a guess from lengths, which costs nothing, and a line through those that
    nothing cheaper equals.
    """
    palette, group = colours(study), {run.name: run.group for run in study.runs}
    points = [
        (float(cost[run]), found["value"], run, palette[group[run]])
        for run, found in measured.items()
    ]
    with drawing(name, title, 290, "mean Spearman with the target, 95 % interval") as canvas:
        axes, lines = canvas.axes, list[tuple[float, float, float, float]]()
        span = max(x for x, *_ in points) or 1.0
        for i, (found, (x, y, _, colour)) in enumerate(zip(measured.values(), points, strict=True)):
            if known(found["low"]) and known(found["high"]):
                # of intervals at one place the earlier are wider, so that all can be seen
                above = sum(abs(x - other) < 0.01 * span for other, *_ in points[i + 1 :])
                axes.plot([x, x], [found["low"], found["high"]], color=colour, lw=1.6 + 2.6 * above)
                lines.append((x, found["low"], x, found["high"]))
            axes.plot([x], [y], "o", color=colour, ms=7, mec=PAPER, mew=1, zorder=3)
        reference = study.target_run
        if reference is not None and known(cost[reference.name]):
            x = float(cost[reference.name])
            axes.plot([x], [1], "o", mfc=PAPER, mec=INK, mew=1.4, ms=7)
            points.append((x, 1.0, f"{reference.name} (reference)", INK))
        if front:
            points += [(0.0, y, LENGTH_ONLY, SOFT) for y in _length_guesses(study, list(measured))]
            lines += _draw_front(axes, points)
        axes.axhline(1, color=SOFT, lw=0.8, dashes=(3, 3))
        low = min([f["low"] for f in measured.values() if known(f["low"])] + [p[1] for p in points])
        bottom = min(low - 0.06, 0.9 * low)
        axes.set_ylim(bottom, 1 + 0.14 * (1 - bottom))
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 1 + 1e-9])
        _cost_axis(axes, [p[0] for p in points])
        axes.set_xlabel(label, loc="left")
        left, right = axes.get_xlim()
        label_points(axes, points, lines=[(left, 1, right, 1), *lines])
    return canvas.chart


LENGTH_ONLY = "lengths only"


def _length_guesses(study: Study, runs: list[str]) -> list[float]:
    """What a guess from lengths reaches, once for all runs that are compared with one target."""
    guesses = [
        found["value"]
        for run in study.runs
        if run.name in runs
        and (found := tables.fidelity_value(run, tables.MEAN, "length_spearman"))
        and known(found["value"])
    ]
    return list({round(guess, 6): guess for guess in guesses}.values())


def _draw_front(
    axes: Any, points: list[tuple[float, float, str, str]]
) -> list[tuple[float, float, float, float]]:
    """A staircase along the points that no point of the same or a lower cost equals; its lines."""
    for x, y, name, _ in points:
        if name == LENGTH_ONLY:
            axes.plot([x], [y], "s", color=SOFT, ms=6, mec=PAPER, mew=1, zorder=3, clip_on=False)
    best = pareto_front([(x, y) for x, y, *_ in points])
    axes.step(*zip(*best, strict=True), where="post", color=SOFT, lw=1, alpha=0.6, zorder=1)
    steps = list(pairwise(best))
    level = [(x0, y0, x1, y0) for (x0, y0), (x1, _) in steps]
    return level + [(x1, y0, x1, y1) for (_, y0), (x1, y1) in steps]


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, value) those that no other equals in value at no higher cost, by cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _cost_axis(axes: Any, values: list[float]) -> None:
    """A cost axis: from zero, or logarithmic when costs differ by more than twenty times."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 20:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * 1.6)
    else:
        axes.set_xlim(0, high * 1.12 if high > 0 else 1)


def score_distributions(study: Study, task: str) -> Chart | None:
    """Histogram of each gradient run's scores for one task, with the score it selects from.

    Scores of different proxies need not share a scale: when their spreads differ more than
    twenty times, each run's scores are shown in its own standard deviations.
    """
    scores = {
        run.name: values
        for run in study.drawn_once
        if not run.is_random and (values := _scores(run, task)) is not None
    }
    if not scores:
        return None
    spreads = [max(float(values.std()), 1e-30) for values in scores.values()]
    standardised = max(spreads) / min(spreads) > 20
    if standardised:
        scores = {n: (v - v.mean()) / max(float(v.std()), 1e-30) for n, v in scores.items()}
    pooled = np.concatenate(list(scores.values()))
    low, high = np.quantile(pooled, [0.002, 0.998])
    margin = 0.04 * (high - low) or 1.0
    edges = np.linspace(low - margin, high + margin, 49)
    palette, by_name = colours(study), {run.name: run for run in study.runs}
    with drawing(f"scores-{task}", f"Scores for {task}", 84 + 40 * len(scores)) as canvas:
        axes = canvas.axes
        for level, (name, values) in enumerate(reversed(scores.items())):
            run = by_name[name]
            _ridge(axes, values, edges, level, palette[run.group])
            axes.annotate(
                short(name),
                (0, level),
                (-6, 5),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color=palette[run.group],
                fontsize=10.5,
            )
            cut = _selected_from(run, task)
            if cut is not None and not standardised:
                axes.plot([cut, cut], [level, level + 0.8], color=INK, lw=1)
                axes.annotate(
                    "selected",
                    (cut, level + 0.8),
                    (3, -9),
                    textcoords="offset points",
                    fontsize=9,
                    color=SOFT,
                )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.05, len(scores))
        axes.set_xlim(edges[0], edges[-1])
        unit = "score in standard deviations of the run" if standardised else "score"
        axes.set_xlabel(unit, loc="left")
        axes.locator_params(axis="x", nbins=6)
    return canvas.chart


def _scores(run: Run, task: str) -> np.ndarray | None:
    """Scores of one run for one task, without the examples that have none (-inf)."""
    if "ranking" not in run.artifacts:
        return None
    ranking = run.artifacts["ranking"].table("ranking.parquet")
    scores = ranking.loc[ranking["task"] == task, "score"].to_numpy(dtype=float)
    scorable = scores[np.isfinite(scores)]
    return scorable if len(scorable) else None


def _selected_from(run: Run, task: str) -> float | None:
    """Lowest score this run selected for one task."""
    if "selection" not in run.artifacts:
        return None
    selection = run.artifacts["selection"].table("selection.parquet")
    chosen = selection.loc[selection["task"] == task, "score"]
    return float(chosen.min()) if len(chosen) and np.isfinite(chosen.min()) else None


def _ridge(axes: Any, values: np.ndarray, edges: np.ndarray, level: int, colour: str) -> None:
    """One histogram standing on ``level``, its highest bar 0.8 high."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    heights = level + 0.8 * counts / max(counts.max(), 1)
    x, y = np.repeat(edges, 2)[1:-1], np.repeat(heights, 2)
    axes.fill_between(x, level, y, color=colour, alpha=0.35, lw=0)
    axes.plot(x, y, color=colour, lw=1)


def agreement(study: Study, task: str) -> Chart | None:
    """Spearman correlations between the scores of all runs for one task, as a triangle."""
    table = tables.agreement(study)
    part = table.loc[table["task"] == task, ["run_a", "run_b", "spearman"]]
    return _triangle(study, f"agreement-{task}", f"Agreement on {task}", part)


def overlap(study: Study, task: str) -> Chart | None:
    """Parts of the selections that any two runs share for one task, as a triangle."""
    table = overlaps(study)
    part = table.loc[table["task"] == task, ["run_a", "run_b", "overlap"]]
    return _triangle(study, f"overlap-{task}", f"Selected alike for {task}", part)


def _triangle(study: Study, name: str, title: str, pairs: pd.DataFrame) -> Chart | None:
    """A heat map of one number for every pair of runs: run, run, number."""
    names = list(dict.fromkeys(pairs["run_a"]))
    if len(names) < 2:
        return None
    cell = min(58, max(20, (WIDE_ENOUGH - 6.5 * max(len(short(n)) for n in names)) / len(names)))
    with drawing(name, title, 80 + cell * len(names)) as canvas:
        axes = canvas.axes
        for first, second, value in pairs.to_numpy():
            _heat_cell(
                axes, names.index(first), names.index(second), float(value), len(names) <= 10
            )
        _heat_axes(axes, names, colours(study), {run.name: run.group for run in study.runs})
    return canvas.chart


WIDE_ENOUGH = 340
"""Points a heat map and its row names have to share."""


def _heat_cell(axes: Any, column: int, row: int, value: float, written: bool) -> None:
    """One cell: blue for agreement, orange for its opposite, deeper for more of it."""
    from matplotlib.patches import Rectangle

    colour, alpha = _heat_colour(value)
    cell = Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fc=colour, alpha=alpha, lw=0)
    axes.add_patch(cell)
    if written:
        text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}") if known(value) else "-"
        axes.text(column, row, text, ha="center", va="center", fontsize=10.5)


def _heat_colour(value: float) -> tuple[str, float]:
    """Colour and opacity of a correlation."""
    strength = 0.0 if not known(value) else min(abs(value), 1.0)
    return POSITIVE if known(value) and value >= 0 else NEGATIVE, 0.04 + 0.56 * strength


def _heat_axes(axes: Any, names: list[str], palette: dict[str, str], group: dict[str, str]) -> None:
    positions = range(len(names))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    shown = [short(name) for name in names]
    longest = max(map(len, shown))
    slanted = 6.2 * longest * len(shown) > WIDE_ENOUGH - 6.5 * longest
    axes.set_yticks(positions, shown)
    axes.set_xticks(
        positions, shown, rotation=35 if slanted else 0, ha="right" if slanted else "center"
    )
    for tick, name in zip(
        [*axes.get_yticklabels(), *axes.get_xticklabels()], names * 2, strict=True
    ):
        tick.set_color(palette[group[name]])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def heldout(study: Study) -> list[Chart]:
    """Each metric of each task after fine-tuning: base, every run, and the mean of random draws.

    Means over subtasks are in the tables only.
    """
    table = tables.heldout(study)
    shown = table[~table["metric"].str.endswith(tables.MACRO)] if len(table) else table
    charts = []
    for (task, metric), part in shown.groupby(["task", "metric"], sort=False):
        if part["value"].notna().any():
            charts.append(_dot_plot(study, str(task), str(metric), part))
    order = {task: i for i, task in enumerate(study.tasks)}
    return sorted(
        charts,
        key=lambda chart: (
            not chart.name.endswith("-loss"),
            order.get(chart.title.split(": ")[0], 0),
        ),
    )


def _dot_plot(study: Study, task: str, metric: str, part: pd.DataFrame) -> Chart:
    """Groups as rows: a dot with its interval; of several draws their mean and each draw.

    Intervals are those of the change to base on the same items, around the run's own value;
    without a base they are the run's own.
    """
    groups = [g for g in ["base", *study.groups] if (part["group"] == g).any()]
    palette = colours(study)
    title = f"{task}: {metric.replace('_', ' ')}"
    unit = _dot_plot_unit(metric, part)
    with drawing(f"heldout-{task}-{metric}", title, 80 + ROW * len(groups), unit) as canvas:
        axes = canvas.axes
        for level, group in enumerate(groups):
            members = part[part["group"] == group]
            if len(members) == 1:
                _single(axes, members.iloc[0], level, palette[group])
            else:
                _draws(axes, members["value"], level, palette[group])
        draws = part["group"].value_counts()
        names = [f"{short(g)} ({draws[g]} draws)" if draws[g] > 1 else short(g) for g in groups]
        axes.set_yticks(range(len(groups)), names)
        for tick, group in zip(axes.get_yticklabels(), groups, strict=True):
            tick.set_color(palette[group])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.locator_params(axis="x", nbins=7)
        if groups[0] == "base":
            base = float(part.loc[part["group"] == "base", "value"].iloc[0])
            axes.axvline(base, color=SOFT, lw=0.8, dashes=(3, 3))
    return canvas.chart


def _dot_plot_unit(metric: str, part: pd.DataFrame) -> str:
    """What is better, on how many items, and what the lines are."""
    better = "lower" if metric in tables.LOWER_IS_BETTER else "higher"
    n = part["n"].max()
    count = f", {n:,.0f} items" if known(n) else ""
    of_what = "change to base" if part["delta"].notna().any() else "value"
    return f"{better} is better{count}; line: 95 % interval of the {of_what}"


def _single(axes: Any, row: pd.Series, level: int, colour: str) -> None:
    """One model: its value, and its interval (the paired one where there is a base)."""
    low, high = row["low"], row["high"]
    if known(row["delta"]):
        base = row["value"] - row["delta"]
        low, high = base + row["delta_low"], base + row["delta_high"]
    if known(low) and known(high) and row["group"] != "base":
        axes.plot([low, high], [level, level], color=colour, lw=1.8)
    axes.plot([row["value"]], [level], "o", color=colour, ms=7, mec=PAPER, mew=1)


def _draws(axes: Any, values: pd.Series, level: int, colour: str) -> None:
    """Several draws: a stroke for each, a diamond at their mean."""
    axes.plot(values, [level] * len(values), "|", color=colour, ms=11, mew=1.6)
    axes.plot([values.mean()], [level], "D", color=colour, ms=6, mec=PAPER, mew=1)


def training(study: Study) -> list[Chart]:
    """Loss over the steps of the warm-up, and of fine-tuning for each task."""
    charts = []
    warmups = _distinct(study, {run.name: run.artifacts.get("warmup") for run in study.runs})
    charts.append(_curves(study, "training-warmup", "Warm-up", warmups))
    for task in study.tasks:
        tuned = {run.name: run.of("finetune", [task]).get(task) for run in study.runs}
        logs = _distinct(study, tuned)
        charts.append(_curves(study, f"training-{task}", f"Fine-tuning for {task}", logs))
    return [chart for chart in charts if chart is not None]


def _distinct(study: Study, trained: dict[str, Artifact | None]) -> list[tuple[Run, pd.DataFrame]]:
    """Training logs of a stage by run, each log once, under the first run that has it."""
    found = {a.id: (run, a) for run in reversed(study.runs) if (a := trained[run.name])}
    ordered = sorted(found.values(), key=lambda pair: study.runs.index(pair[0]))
    logs = [(run, artifact.table("log.parquet")) for run, artifact in ordered]
    return [(run, log) for run, log in logs if len(log)]


def _curves(
    study: Study, name: str, title: str, logs: list[tuple[Run, pd.DataFrame]]
) -> Chart | None:
    """Training loss by step; draws of chance thin, all others named at their end."""
    if not logs:
        return None
    palette = colours(study)
    with drawing(name, title, 250, "training loss (token mean)") as canvas:
        ends: dict[str, tuple[float, float, str, str]] = {}
        for run, log in logs:
            colour, thin = palette[run.group], run.is_random
            values = _smoothed(log["loss"])
            if len(values) < len(log["loss"]) or len(log) > 40:
                canvas.axes.plot(log["step"], log["loss"], color=colour, lw=0.6, alpha=0.25)
            canvas.axes.plot(
                log["step"],
                values,
                color=colour,
                lw=1 if thin else 1.8,
                marker="o" if len(log) < 3 else None,
                ms=4,
                clip_on=len(log) >= 3,
            )
            last = (float(log["step"].iloc[-1]), float(values.iloc[-1]))
            ends.setdefault(run.group, (*last, run.group, colour))
        right = max(float(log["step"].max()) for _, log in logs)
        left = min(float(log["step"].min()) for _, log in logs)
        canvas.axes.set_xlim(left if left < right else left - 1, right)
        canvas.axes.set_xlabel("optimizer step", loc="left")
        _curve_ticks(canvas.axes)
        if len(logs) > 1 or name != "training-warmup":
            label_ends(canvas.axes, list(ends.values()))
    return canvas.chart


def _smoothed(losses: pd.Series) -> pd.Series:
    """A centred moving mean over a twentieth of a long curve; short curves as they are."""
    width = len(losses) // 20
    return losses if width < 2 else losses.rolling(width, center=True, min_periods=1).mean()


def _curve_ticks(axes: Any, upwards: bool = True) -> None:
    """Whole steps to the right; upwards numbers as they are, without a common factor."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if upwards:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))


ALIGNMENT = {
    "fidelity": "agreement of example gradients, held out",
    "objective": "objective, held out",
    "loss_ga": "gradient distance, held out",
    "kl": "divergence of logits, held out",
}
"""Held-out curves of the alignment that are drawn."""


def alignment(study: Study) -> list[Chart]:
    """Held-out measures over the steps of the alignment; a ring marks the step that was kept."""
    proxies = {a.id: (run, a) for run in reversed(study.runs) if (a := run.artifacts.get("proxy"))}
    logs = [(run, a.table("alignment.parquet")) for run, a in reversed(proxies.values())]
    charts = []
    for column, unit in ALIGNMENT.items():
        shown = [(run, held) for run, log in logs if len(held := _held_out(log, column)) > 1]
        if shown:
            charts.append(_alignment_curves(study, column, unit, shown))
    return charts


def _held_out(log: pd.DataFrame, column: str) -> pd.DataFrame:
    """Held-out rows of an alignment log that carry a value in ``column``."""
    rows = log[(log["split"] != "train") & log[column].notna()]
    return rows.sort_values("step")


def _alignment_curves(
    study: Study, column: str, unit: str, logs: list[tuple[Run, pd.DataFrame]]
) -> Chart:
    palette = colours(study)
    title = {
        "fidelity": "Fidelity",
        "objective": "Objective",
        "loss_ga": "Gradient distance",
        "kl": "Anchor",
    }
    with drawing(f"alignment-{column}", f"{title[column]} during alignment", 250, unit) as canvas:
        axes, ends = canvas.axes, []
        for run, log in logs:
            colour = palette[run.group]
            axes.plot(log["step"], log[column], color=colour, marker=".", ms=5)
            kept = log[log["chosen"].astype(bool)]
            axes.plot(
                kept["step"], kept[column], "o", mfc=PAPER, mec=colour, mew=1.6, ms=8, clip_on=False
            )
            ends.append(
                (float(log["step"].iloc[-1]), float(log[column].iloc[-1]), run.name, colour)
            )
        right = max(float(log["step"].max()) for _, log in logs)
        axes.set_xlim(0, right or 1)
        axes.set_xlabel("alignment step (0: the start); ring: the step kept", loc="left")
        _curve_ticks(axes)
        label_ends(axes, ends)
    return canvas.chart


def layer_fidelity(study: Study) -> list[Chart]:
    """How much of each layer's influence a proxy keeps, a heat map for each distinct proxy."""
    table = tables.fidelity_layers(study)
    table = table[table["task"] == tables.MEAN]
    return [
        _layer_map(str(run), part)
        for run, part in table.groupby("run", sort=False)
        if part["spearman"].notna().any()
    ]


def _layer_map(run: str, part: pd.DataFrame) -> Chart:
    """Kinds of layers as rows, blocks as columns."""
    part = by_depth(part)
    kinds = list(dict.fromkeys(part["kind"]))
    first, last = int(part["depth"].min()), int(part["depth"].max())
    unit = "Spearman of each layer's influence, mean over tasks"
    title = f"Influence kept by {short(run)}"
    with drawing(f"fidelity-layers-{run}", title, 96 + 20 * len(kinds), unit) as canvas:
        axes = canvas.axes
        for kind, depth, value in part[["kind", "depth", "spearman"]].to_numpy():
            _heat_cell(axes, int(depth), kinds.index(kind), float(value), last - first < 8)
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _curve_ticks(axes, upwards=False)
        low, high = part["spearman"].min(), part["spearman"].max()
        meaning = f"block; blue: kept, orange: reversed ({_signed(low)} to {_signed(high)})"
        axes.set_xlabel(meaning, loc="left")
    return canvas.chart


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def by_depth(table: pd.DataFrame) -> pd.DataFrame:
    """Layers with their ``kind``, the last part of the name, and ``depth``, their block."""
    numbers = [re.search(r"\.(\d+)\.", name) for name in table["layer"]]
    return table.assign(
        kind=[name.rsplit(".", 1)[-1] for name in table["layer"]],
        depth=[int(hit.group(1)) if hit else i for i, hit in enumerate(numbers)],
    )


def layers(study: Study) -> list[Chart]:
    """Truncation error of every layer over depth, a chart for each distinct proxy."""
    table = tables.layers(study)
    if table.empty:
        return []
    return [
        _layer_chart(str(run), by_depth(part)) for run, part in table.groupby("run", sort=False)
    ]


def _layer_chart(run: str, part: pd.DataFrame) -> Chart:
    with drawing(
        f"layers-{run}", f"Layers of {short(run)}", 270, "truncation error; hollow: kept dense"
    ) as canvas:
        axes, ends = canvas.axes, []
        for i, (kind, rows) in enumerate(part.groupby("kind", sort=False)):
            rows, colour = rows.sort_values("depth"), SERIES[i % len(SERIES)]
            axes.plot(
                rows["depth"], rows["truncation_error"], color=colour, lw=1.4, marker=".", ms=5
            )
            dense = rows[rows["kept_dense"].astype(bool)]
            axes.plot(dense["depth"], dense["truncation_error"], "o", mfc=PAPER, mec=colour, ms=5)
            last = rows.iloc[-1]
            name = _layer_label(str(kind), rows)
            ends.append((float(last["depth"]), float(last["truncation_error"]), name, colour))
        left, right = float(part["depth"].min()), float(part["depth"].max())
        axes.set_xlim(left, right if right > left else left + 1)
        axes.set_xlabel("block", loc="left")
        _curve_ticks(axes)
        label_ends(axes, ends, size=9.5)
    return canvas.chart


def _layer_label(kind: str, rows: pd.DataFrame) -> str:
    """``q, rank 64`` for ``q_proj``; ``k, dense`` where nothing was factorised."""
    name = kind.removesuffix("_proj")
    if rows["kept_dense"].all():
        return f"{name}, dense"
    ranks = sorted(set(rows.loc[~rows["kept_dense"].astype(bool), "rank"]))
    return (
        f"{name}, rank {ranks[0]}" if len(ranks) == 1 else f"{name}, rank {ranks[0]} to {ranks[-1]}"
    )
