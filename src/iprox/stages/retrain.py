"""Stage ``retrain``: the tiny model trained on random subsets, and its loss on every query."""

from __future__ import annotations

import copy

import numpy as np
import pyarrow as pa

from iprox.numerics.datamodels import draw_subsets
from iprox.progress import track
from iprox.stages.small import losses_of, read_role, read_small, train
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import FaithfulnessSection


def make(job: Job) -> Metrics:
    """Write ``losses.parquet``: a row for each subset of this job.

    ``subset`` is its number, ``kept`` says of every candidate whether it was trained on, and
    ``losses`` is the loss of every query afterwards.

    Returns:
        Number of models trained.
    """
    section = job.section(FaithfulnessSection, "faithfulness")
    seed, first, last = (int(job.params[key]) for key in ("seed", "first", "last"))
    model, tokenizer = read_small(job.parents["small"], "start")
    candidates, queries = (
        read_role(job, job.parents["small"], role, tokenizer, section)
        for role in ("candidate", "query")
    )
    masks = draw_subsets(len(candidates), section.subsets, section.fraction, seed)[first:last]
    _, settings = section.trainings(seed)
    start = copy.deepcopy(model.state_dict())
    losses: list[np.ndarray] = []
    with track(len(masks), "models", "retrain") as progress:
        for mask in masks:
            model.load_state_dict(start)
            kept = [e for e, keep in zip(candidates, mask, strict=True) if keep]
            train(model, tokenizer, kept, settings)
            losses.append(losses_of(model, tokenizer, queries))
            progress.advance(1, note=f"loss {losses[-1].mean():.3f}")
    table = pa.table(
        {
            "subset": pa.array(range(first, last)),
            "kept": pa.array(masks.tolist(), pa.list_(pa.bool_())),
            "losses": pa.array([row.tolist() for row in losses], pa.list_(pa.float64())),
        }
    )
    write_table(job.out / "losses.parquet", table, {"seed": seed})
    return {"models": len(masks)}
