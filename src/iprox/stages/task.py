"""Stage task: a benchmark's queries and test items."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from iprox.data.contamination import TEXT_SCHEMA, in_test, pair_table
from iprox.data.tasks import build_task, item_table, query_table
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import TaskSection


def make(job: Job) -> Metrics:
    """Write ``queries.parquet``, ``test.parquet``, ``texts.parquet`` and ``contaminated.parquet``.

    Queries: ``example_id, subtask, messages, prefix, eos``. Test items also have ``kind``
    (loss, choice, generate), ``choices``, ``answer`` and ``answers``; without a test file and
    without held-out examples the table is empty. Both files' metadata give source and counts.
    ``texts`` has the normalised hash of every example's text, ``contaminated`` the development
    examples that are also test items.

    Raises:
        ConfigError: A key is missing or does not go with the task's kind.
        DataError: A file or record cannot be used.
    """
    task = build_task(job.section(TaskSection, "task"), job.data_dir)
    write_table(job.out / "queries.parquet", query_table(task), task.facts)
    write_table(job.out / "test.parquet", item_table(task), task.facts)
    texts = pa.Table.from_pylist([asdict(text) for text in task.texts], schema=TEXT_SCHEMA)
    write_table(job.out / "texts.parquet", texts)
    pairs = in_test(task.texts)
    write_table(job.out / "contaminated.parquet", pair_table(pairs))
    return {**task.facts, "n_contaminated": len({example_id for example_id, _, _ in pairs})}
