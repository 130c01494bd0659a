"""Stage ``diversity``: how a run's selection lies among sketches of the pool and the queries."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from iprox.numerics.diversity import (
    nearest_distances,
    principal_directions,
    random_affinity,
    subspace_affinity,
)
from iprox.stages.feature_store import sketch_rows
from iprox.stages.sketches import query_sketches
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_table, write_table
from iprox.study.schema import FeaturesSection

log = logging.getLogger(__name__)

DIRECTIONS = 32
"""Most directions of a subspace that is compared."""

SAMPLE = 4096
"""Most selected examples that are compared; of more a seeded sample."""


def make(job: Job) -> Metrics:
    """Write ``diversity.parquet``, a row for each task.

    Columns: ``task``; ``selected``, how many; ``compared``, how many of them have a sketch and
    are compared; ``nearest``, mean distance to the nearest other one at unit length (1-NND);
    ``affinity`` of the subspace that they span with that of the task's query gradients, both cut
    to 32 directions; ``affinity_random``, that of random subspaces of the same dimensions.

    Returns:
        Examples selected and compared, over all tasks.

    Raises:
        ArtifactError: A selected example has no sketch, or the queries are of another sketch.
    """
    table = read_table(job.parents["selection"] / "selection.parquet", ["task", "example_id"])
    queries = query_sketches(job.roles("query"), job.section(FeaturesSection, "features"))
    owners = np.array([column.split("/")[0] for column in queries.columns])
    rows = []
    for task in job.params["tasks"]:
        own = table if job.params["together"] else table[table["task"] == task]
        ids = sorted(set(own["example_id"]))
        sketches = sketch_rows(job.parents["features"], _sampled(ids)).astype(np.float32)
        sketches = sketches[np.abs(sketches).sum(axis=1) > 0]
        asked = principal_directions(queries.rows[owners == task], DIRECTIONS)
        spanned = principal_directions(sketches, DIRECTIONS)
        known = len(sketches) > 1
        rows.append(
            {
                "task": task,
                "selected": len(ids),
                "compared": len(sketches),
                "nearest": float(nearest_distances(sketches).mean()) if known else np.nan,
                "affinity": subspace_affinity(spanned, asked),
                "affinity_random": random_affinity(len(spanned), len(asked), sketches.shape[1]),
            }
        )
    frame = pd.DataFrame(rows)
    write_table(job.out / "diversity.parquet", frame)
    return {"selected": int(frame["selected"].sum()), "compared": int(frame["compared"].sum())}


def _sampled(ids: list[str]) -> list[str]:
    """At most ``SAMPLE`` ids, in their order."""
    if len(ids) <= SAMPLE:
        return ids
    log.warning("%d of %d selected examples are compared", SAMPLE, len(ids))
    places = np.random.default_rng(0).choice(len(ids), SAMPLE, replace=False)
    return [ids[i] for i in sorted(places.tolist())]
