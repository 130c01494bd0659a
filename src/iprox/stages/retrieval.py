"""Stage ``retrieval``: methods that trace answers to pre-training text, quality beside cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pandas as pd

from iprox.report.charts import CHANCE, SERIES, Chart, drawing
from iprox.report.formats import number, scaled, text_table, write_everywhere
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_table, write_table

log = logging.getLogger(__name__)

QUALITIES = {
    "mrr": "MRR",
    "mrr_cosine": "MRR, cosine",
    "recall": "recall@10",
    "agreement": "agreement",
}
"""Columns, and what the summary calls them."""


def make(job: Job) -> Metrics:
    """Write ``retrieval.{parquet,csv,md,tex,svg,png}``, ``seeds.parquet`` and ``summary.txt``.

    ``retrieval`` has a row per method: of ``mrr``, ``mrr_cosine``, ``recall`` and ``agreement`` the
    mean over seeds and, as ``_low`` and ``_high``, the lowest and highest; ``flops``; ``seeds``.

    Returns:
        Number of methods and seeds.
    """
    parts = [
        read_table(folder / "methods.parquet").assign(seed=int(seed))
        for seed, folder in job.roles("facts").items()
    ]
    seeds = pd.concat(parts, ignore_index=True)
    write_table(job.out / "seeds.parquet", seeds)
    table = over_seeds(seeds)
    write_everywhere(job.out, "retrieval", table)
    chart = draw(table)
    (job.out / "retrieval.svg").write_text(chart.svg, encoding="utf-8")
    (job.out / "retrieval.png").write_bytes(chart.png)
    text = summary(table)
    (job.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    log.info("answers traced to pre-training text:\n%s", text)
    return {"methods": len(table), "seeds": len(parts)}


def over_seeds(seeds: pd.DataFrame) -> pd.DataFrame:
    """A row per method, in the order they came in."""
    rows = []
    for method, part in seeds.groupby("method", sort=False):
        row: dict[str, object] = {"method": method}
        for quality in QUALITIES:
            row[quality] = part[quality].mean()
            row[f"{quality}_low"] = part[quality].min()
            row[f"{quality}_high"] = part[quality].max()
        rows.append(row | {"flops": part["flops"].mean(), "seeds": len(part)})
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> str:
    """The table as text, ranges over seeds in brackets."""

    def cell(row: Mapping[Any, Any], quality: str) -> str:
        low, high = row[f"{quality}_low"], row[f"{quality}_high"]
        return f"{number(row[quality], 2)} [{number(low, 2)}, {number(high, 2)}]"

    cells = [
        [row["method"], *(cell(row, quality) for quality in QUALITIES), scaled(row["flops"])]
        for row in table.to_dict("records")
    ]
    return text_table(["method", *QUALITIES.values(), "FLOPs"], cells)


def draw(table: pd.DataFrame) -> Chart:
    """Reciprocal rank against operations; bars from the lowest to the highest seed."""
    shown = table[table["flops"] > 0]
    unit = "mean reciprocal rank of a source; bar: range over seeds"
    with drawing("retrieval", "Answers traced to pre-training text", 320, unit) as canvas:
        axes = canvas.axes
        for place, row in enumerate(shown.to_dict("records")):
            colour = SERIES[place % len(SERIES)]
            axes.plot([row["flops"]] * 2, [row["mrr_low"], row["mrr_high"]], color=colour, lw=1)
            marks = {"marker": "o", "ms": 6, "ls": "", "color": colour}
            axes.plot(row["flops"], row["mrr"], label=row["method"], **marks)
        for row in table[table["flops"] == 0].to_dict("records"):
            axes.axhline(row["mrr"], color=CHANCE, lw=0.8)
            axes.annotate(
                f"{row['method']}, without a model",
                (0.99, row["mrr"]),
                (0, -3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="top",
                color=CHANCE,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: scaled(value))
        axes.set_ylim(0, 1.05)
        axes.margins(x=0.1)
        axes.legend(loc="center left", frameon=False, labelcolor="linecolor", handletextpad=0)
        axes.set_xlabel("operations for all pairs, fitting included", loc="left")
    return canvas.chart
