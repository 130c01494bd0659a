"""Stage ``report``: a study's tables, figures, page and summary, from everything it made."""

from __future__ import annotations

import logging

from iprox.progress import track
from iprox.report import learned, selected, tables
from iprox.report.artifacts import Study
from iprox.report.figures import all_figures
from iprox.report.formats import write_everywhere
from iprox.report.found import found
from iprox.report.page import render
from iprox.store.job import Job, Metrics

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``tables/``, ``figures/``, ``index.html`` and ``summary.txt``.

    Returns:
        Numbers of runs, tables, figures and examples shown, and the size of the page.

    Raises:
        ArtifactError: A parent has no owner in the study, or one of its files cannot be read.
    """
    study = Study.of_job(job)
    frames = {
        "headline": tables.headline(study),
        "runs": tables.runs(study),
        "fidelity": tables.fidelity(study),
        "fidelity_layers": tables.fidelity_layers(study),
        "heldout": tables.heldout(study),
        "paired": tables.paired(study),
        "agreement": tables.agreement(study),
        "overlap": selected.overlaps(study),
        "diversity": tables.diversity(study),
        "composition": selected.composition(study),
        "examples": selected.examples(study),
        "encoders": learned.quality(study),
        "amortisation": learned.amortisation(study),
        "found": found(study),
        "layers": tables.layers(study),
        "stages": tables.stages(study),
        "costs": tables.costs(study),
    }
    charts = all_figures(study)
    drawn = [chart for made in charts.values() for chart in made]
    (job.out / "tables").mkdir()
    (job.out / "figures").mkdir()
    with track(len(frames) + len(drawn), "files", "report") as progress:
        for name, frame in frames.items():
            write_everywhere(job.out / "tables", name, frame)
            progress.advance(1)
        for chart in drawn:
            (job.out / "figures" / f"{chart.name}.svg").write_text(chart.svg, encoding="utf-8")
            (job.out / "figures" / f"{chart.name}.png").write_bytes(chart.png)
            progress.advance(1)
    page = render(study, frames, charts)
    (job.out / "index.html").write_text(page, encoding="utf-8")
    (job.out / "summary.txt").write_text(tables.summary(study), encoding="utf-8")
    return {
        "runs": len(study.runs),
        "tables": len(frames),
        "figures": len(drawn),
        "examples": len(frames["examples"]),
        "page_bytes": len(page.encode()),
    }
