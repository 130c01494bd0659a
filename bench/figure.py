"""One figure of what scoring costs."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

mpl.use("Agg")

OURS, OTHERS = "#0072B2", "#999999"
SWEEPS = {
    "pool size": "examples",
    "length": "tokens per example",
    "tasks": "query gradients",
    "rank": "sparsity of a proxy",
}


def draw(table: pd.DataFrame, file: Path) -> None:
    """Bars of the cost of one query, and below the sweeps that were run, as SVG."""
    sweeps = [section for section in SWEEPS if (table["section"] == section).any()]
    figure = plt.figure(figsize=(8, 7 if sweeps else 5), layout="constrained")
    if sweeps:
        above, below = figure.subfigures(2, 1, height_ratios=[3, 1.2])
        panels = below.subplots(1, len(sweeps), squeeze=False)[0]
        for axes, section in zip(panels, sweeps, strict=True):
            _sweep(table[table["section"] == section], axes, SWEEPS[section])
        panels[0].set_ylabel("ours / frozen pass")
        _bars(table, above.subplots())
    else:
        _bars(table, figure.subplots())
    with mpl.rc_context({"svg.hashsalt": "iprox"}):
        plt.savefig(file, metadata={"Date": None})
    plt.close()


def _bars(table: pd.DataFrame, axes: plt.Axes) -> None:
    """Ratios of everything that was run in float32 with at most one query."""
    rows = table[
        table["section"].isin(["scores", "peers"])
        & (table["dtype"] == "float32")
        & (table["queries"] <= 1)
        & table["ratio"].notna()
    ].sort_values("ratio", ascending=False)
    names = [f"{r['case']} ({r['model']})" for _, r in rows.iterrows()]
    colours = [OURS if case == "ours" else OTHERS for case in rows["case"]]
    bars = axes.barh(names, rows["ratio"], xerr=rows["spread"], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("CPU time / fastest forward and backward pass with frozen weights")
    axes.spines[["top", "right"]].set_visible(False)


def _sweep(rows: pd.DataFrame, axes: plt.Axes, label: str) -> None:
    """One sweep of ours."""
    axes.errorbar(rows["x"], rows["ratio"], yerr=rows["spread"], marker="o", color=OURS)
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
