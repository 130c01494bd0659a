"""Stage ``paper_table``: a paper's table with the study's own numbers beside the printed ones."""

from __future__ import annotations

import logging

from iprox.papers.tables import Table
from iprox.report import papers
from iprox.report.artifacts import Study
from iprox.report.formats import cell_text, latex, markdown, text_table, write_everywhere
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``table.{parquet,csv,md,tex}``, ``cells.parquet``, ``summary.txt`` and any figures.

    ``table`` has a line for each row of the paper, and for each run of ours that stands in it;
    ``cells.parquet`` a row for each number, ours with its interval, its items, and the artifacts
    it was read from.

    Returns:
        Numbers of lines, of lines with ours, and of numbers of ours.

    Raises:
        ArtifactError: A file of a run cannot be read.
    """
    study = Study.of_job(job)
    table = Table.model_validate(job.params["table"])
    lines = papers.lines_of(table, job.params["ours"], study)
    cells, shown = papers.cells(lines), papers.wide(table, lines)
    about = [f"{table.title} ({job.params['paper']}).", papers.setting(table, study, lines)]
    write_everywhere(job.out, "table", shown)
    write_table(job.out / "cells.parquet", cells)
    caption = " ".join(about)
    (job.out / "table.md").write_text(f"{caption}\n\n{markdown(shown)}", encoding="utf-8")
    (job.out / "table.tex").write_text(latex(shown, caption), encoding="utf-8")
    for chart in papers.draw(job.params["name"], table, lines):
        (job.out / f"{chart.name}.svg").write_text(chart.svg, encoding="utf-8")
        (job.out / f"{chart.name}.png").write_bytes(chart.png)
    text = text_table(
        [str(column) for column in shown.columns],
        [[cell_text(value) for value in row] for row in shown.itertuples(index=False)],
    )
    told = "\n".join(papers.against_random(study, lines))
    parts = [*about, text, *filter(None, [told])]
    (job.out / "summary.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    log.info("%s", "\n\n".join(parts))
    return {
        "lines": len(lines),
        "lines_of_ours": sum(bool(line.ours) for line in lines),
        "numbers_of_ours": int(cells["ours"].notna().sum()),
    }
