"""Tables of scorers that learn: how well they agree with their teacher, and what that saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from iprox.report.artifacts import Artifact, Run, Study

QUALITY = [
    "run",
    "queries",
    "encoder",
    "task",
    "metric",
    "value",
    "low",
    "high",
    "n_queries",
    "n_candidates",
]

COSTS = [
    "run",
    "labelled",
    "labelling_seconds",
    "training_seconds",
    "seconds_per_1000",
    "exact_seconds_per_1000",
    "speedup",
    "break_even",
    "bytes_per_example",
    "teacher_bytes_per_example",
]


def quality(study: Study) -> pd.DataFrame:
    """Agreement of every trained encoder with its teacher, on examples it has not seen.

    The columns are those of the stage's ``quality.parquet``, ``run`` first.
    """
    found = [
        run.artifacts["encoder"].table("quality.parquet").assign(run=run.name)[QUALITY]
        for run in study.runs
        if "encoder" in run.artifacts
    ]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=QUALITY)


def amortisation(study: Study) -> pd.DataFrame:
    """What every scorer that embeds texts costs once and for each example, and what it stores.

    ``labelled`` examples and the seconds of labelling them and their queries, and of training;
    seconds for 1,000 examples by the encoder and by the target's exact scores (both of the
    loops alone, without loading a model), and the ratio, ``speedup``; ``break_even``, the number
    of examples from which on the encoder is the cheaper; bytes of an example's embedding, and of
    the teacher's sketch of it.
    """
    rows = [costs(run) for run in study.runs if _embeds(run)]
    return pd.DataFrame(rows, columns=COSTS)


def _embeds(run: Run) -> bool:
    features = run.artifacts.get("features")
    return features is not None and features.stage == "embeddings"


def costs(run: Run) -> dict[str, Any]:
    """The row of :func:`amortisation` of one run."""
    artifacts = run.artifacts
    queries = [a for name, a in artifacts.items() if name.startswith("sketches-")]
    labelling = _seconds([artifacts.get("teach"), *queries] if "teach" in artifacts else [])
    training = _seconds([artifacts["encoder"]] if "encoder" in artifacts else [])
    each, exact = (per_1000(artifacts.get(n)) for n in ("features", "target-features"))
    saved = (exact - each) / 1000
    teach = artifacts.get("teach")
    return {
        "run": run.name,
        "labelled": np.nan if teach is None else teach.metric("examples"),
        "labelling_seconds": labelling,
        "training_seconds": training,
        "seconds_per_1000": each,
        "exact_seconds_per_1000": exact,
        "speedup": exact / each,
        "break_even": (labelling + training) / saved if saved > 0 else np.nan,
        "bytes_per_example": row_bytes(artifacts["features"]),
        "teacher_bytes_per_example": np.nan if teach is None else row_bytes(teach),
    }


def per_1000(artifact: Artifact | None) -> float:
    """Seconds of a pass for 1,000 examples, without loading the model; NaN if not recorded."""
    rate = artifact.metric("examples_per_s") if artifact else None
    return 1000 / rate if rate else np.nan


def row_bytes(artifact: Artifact) -> float:
    """Bytes kept of an example as a sketch or an embedding; NaN for exact inner products."""
    from iprox.store.arrays import open_store

    shards = sorted(artifact.folder.glob("shard-*.zarr"))
    if not shards or "sketch" not in (store := open_store(shards[0])):
        return np.nan
    rows = store["sketch"]
    return float(rows.shape[1] * rows.dtype.itemsize)


def _seconds(artifacts: Iterable[Artifact | None]) -> float:
    """Seconds of some jobs; NaN when one was not recorded."""
    return float(sum((a.seconds if a and a.seconds is not None else np.nan) for a in artifacts))
