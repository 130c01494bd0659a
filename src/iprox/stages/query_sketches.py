"""Stage ``query_sketches``: a sketch of the gradient of every single query of a task."""

from __future__ import annotations

import numpy as np

from iprox.engine.sketching import Sketcher
from iprox.errors import NumericsError
from iprox.stages.passes import open_reader
from iprox.stages.query_rows import write_rows
from iprox.stages.sketches import attributes, sketch_of, sketch_texts, unit_rows
from iprox.stages.texts import query_texts
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, FeaturesSection, InfluenceSection


def make(job: Job) -> Metrics:
    """Write ``rows.zarr``: the sketch of each query's gradient at unit length.

    Queries without a supervised token are left out, and counted.

    Returns:
        Counts of queries and tokens.

    Raises:
        DataError: No query has a supervised token.
        NumericsError: A gradient is zero or not finite; names the query.
    """
    section = job.section(FeaturesSection, "features")
    reduction = job.section(InfluenceSection, "influence").loss_reduction
    reader = open_reader(job, "model")
    every = query_texts(job.parents["task"], reader.tokenizer, job.section(ChatSection, "chat"))
    texts = every.supervised_only()
    sketch = sketch_of(job, reader, section, trained="model")
    sketcher = Sketcher(reader.model, reader.layers, sketch, reduction)
    found = sketch_texts(reader, sketcher, texts.encoded)
    rows, norms = unit_rows(found.rows, "float32")
    if not (norms > 0).all():
        raise NumericsError(
            "the gradient of a query is zero and has no direction",
            where=f"query {texts.ids[int(np.argmin(norms))]}",
            fix="remove it from the task",
        )
    about = attributes(sketch, section.dtype, reduction)
    write_rows(job.out, rows, texts.ids, texts.subtasks, about)
    return {**every.counts()}
