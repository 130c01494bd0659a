"""Stage ``synthetic``: what low-rank layers keep of a small network's loss and influence."""

from __future__ import annotations

import pandas as pd

from iprox.numerics.synthetic import Setting, curve
from iprox.progress import track
from iprox.report.charts import SERIES, Chart, drawing, label_ends
from iprox.report.formats import write_everywhere
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import SyntheticSection

METRICS = ("influence_retention", "loss_retention")
NAMES = {"ipsvd": "IPSVD", "svd": "SVD"}


def make(job: Job) -> Metrics:
    """Write ``seeds.parquet``, ``retention.{parquet,csv,md,tex}`` and ``retention.{svg,png}``.

    ``seeds.parquet`` has a row per decomposition, sparsity and seed; ``retention`` has mean,
    lowest and highest over the seeds: ``kind, sparsity, metric, mean, low, high, seeds``.

    Returns:
        Number of networks trained and of compressed ones measured.
    """
    section = job.section(SyntheticSection, "synthetic")
    table = measure(section, Setting())
    write_table(job.out / "seeds.parquet", table, job.params["synthetic"])
    means = over_seeds(table)
    write_everywhere(job.out, "retention", means)
    chart = draw(means)
    (job.out / "retention.svg").write_text(chart.svg, encoding="utf-8")
    (job.out / "retention.png").write_bytes(chart.png)
    return {"networks": section.seeds, "compressed": len(table)}


def measure(section: SyntheticSection, setting: Setting) -> pd.DataFrame:
    """Loss and influence retention: kind, sparsity, seed and one column per metric."""
    rows = []
    with track(section.seeds, "networks", "synthetic") as progress:
        for seed in range(section.seeds):
            for kind, sparsity, kept in curve(setting, tuple(section.sparsities), seed):
                rows.append([kind, sparsity, seed, kept.influence, kept.loss])
            progress.advance(1)
    return pd.DataFrame(rows, columns=["kind", "sparsity", "seed", *METRICS])


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, lowest and highest value over seeds."""
    long = table.melt(["kind", "sparsity", "seed"], list(METRICS), "metric")
    groups = long.groupby(["metric", "kind", "sparsity"])["value"]
    means = groups.agg(mean="mean", low="min", high="max", seeds="size").reset_index()
    return means[["kind", "sparsity", "metric", "mean", "low", "high", "seeds"]]


def draw(means: pd.DataFrame) -> Chart:
    """Both retentions against sparsity; bands from the lowest to the highest seed."""
    title, unit = "Low-rank layers in a small network", "retention; band: range over seeds"
    with drawing("retention", title, 300, unit) as canvas:
        axes, ends = canvas.axes, []
        for (kind, metric), part in means.groupby(["kind", "metric"], sort=True):
            colour = SERIES[list(NAMES).index(str(kind))]
            about_loss = metric == "loss_retention"
            axes.fill_between(
                part["sparsity"], part["low"], part["high"], color=colour, alpha=0.15, lw=0
            )
            axes.plot(
                part["sparsity"],
                part["mean"],
                color=colour,
                dashes=(4, 2) if about_loss else (None, None),
                marker="o",
                ms=4,
                clip_on=False,
            )
            name = f"{NAMES[str(kind)]}, {str(metric).removesuffix('_retention')}"
            last = part.iloc[-1]
            ends.append((float(last["sparsity"]), float(last["mean"]), name, colour))
        axes.set_xlim(0, float(means["sparsity"].max()))
        axes.set_ylim(min(0.0, float(means["low"].min())), 1)
        axes.set_xlabel("share of each layer's parameters removed", loc="left")
        label_ends(axes, ends)
    return canvas.chart
