"""Stage pool: the candidate pool as one table."""

from __future__ import annotations

from iprox.data.pools import build_pool, pool_table
from iprox.data.sources import resolve
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import PoolSection


def make(job: Job) -> Metrics:
    """Write ``pool.parquet``: ``example_id, source, category, messages, text_hash``.

    Rows are sorted by ``example_id``. The file's metadata says where the examples come from,
    their shape, and how many were left out for which reason.

    Raises:
        DataError: The source is missing or a record of it cannot be used.
    """
    section = job.section(PoolSection, "pool")
    source = resolve(section, job.data_dir, job.cache_dir)
    pool = build_pool(source, section)
    facts = {"source": source.origin, "format": pool.format, "licence": source.licence}
    write_table(job.out / "pool.parquet", pool_table(pool), {**facts, **pool.counts})
    return {**facts, **pool.counts}
