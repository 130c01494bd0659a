"""Memory and time of a diverse selection from a large pool: ``python -m bench.selection``.

Made-up features and scores are written in the files of a study, and the stage ``selection`` is run
on them. By default it chooses 5 % of a million examples by facility location on 256 numbers each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from iprox.stages import selection
from iprox.stages.ranking import SCHEMA, rank
from iprox.store.arrays import create_store, put
from iprox.store.job import Job
from iprox.store.tables import write_groups, write_table

SHARD = 125_000
CLUSTERS = 1000


def write_parents(folder: Path, n: int, dim: int) -> dict[str, Path]:
    """A pool, its features in clusters, and a ranking of it, as the stages write them."""
    draw = np.random.default_rng(0)
    parents = {name: folder / name for name in ("pool", "features", "ranking")}
    for path in parents.values():
        path.mkdir()
    ids = pa.array([f"example-{i:08d}" for i in range(n)], pa.large_string())
    message = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    table = {"example_id": ids, "source": ["made"] * n, "category": [""] * n}
    write_table(parents["pool"] / "pool.parquet", pa.table({**table, "messages": [message] * n}))
    centres = draw.normal(size=(CLUSTERS, dim)).astype(np.float32)
    for number, start in enumerate(range(0, n, SHARD)):
        size = min(SHARD, n - start)
        rows = centres[draw.integers(0, CLUSTERS, size)]
        rows += draw.normal(size=(size, dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        store = create_store(parents["features"] / f"shard-{number:05d}.zarr", {})
        put(store, "sketch", rows.astype(np.float16), ("examples", "dim"))
        part = ids.slice(start, size).to_numpy(zero_copy_only=False).astype(str)
        put(store, "example_id", part, ("examples",))
    scores = {"task": draw.normal(size=n).astype(np.float32)}
    write_groups(parents["ranking"] / "ranking.parquet", SCHEMA, rank(scores, ids), {})
    return parents


def measure(parents: dict[str, Path], out: Path, select: dict[str, object]) -> dict[str, object]:
    """Run the stage; its seconds, and the process's peak memory before and after."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, cpu = time.perf_counter(), time.process_time()
    metrics = selection.make(Job("selection", {"select": select}, parents, out))
    return {
        **select,
        **metrics,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gib_before": round(before, 2),
    }


def main() -> None:
    """Write the parents in one process, choose in another, print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--method", default="facility_location")
    parser.add_argument("--shortlist", type=float, default=20.0, help="20 times 5 %% is the pool")
    arguments = parser.parse_args()
    select: dict[str, object] = {
        "fraction": arguments.fraction,
        "method": arguments.method,
        "shortlist": arguments.shortlist,
    }
    with tempfile.TemporaryDirectory() as scratch:
        parents_of = {name: Path(scratch) / name for name in ("pool", "features", "ranking")}
        writer = multiprocessing.get_context("spawn").Process(
            target=write_parents, args=(Path(scratch), arguments.examples, arguments.dim)
        )
        writer.start()
        writer.join()
        out = Path(scratch) / "out"
        out.mkdir()
        print(json.dumps(measure(parents_of, out, select)))


if __name__ == "__main__":
    main()
