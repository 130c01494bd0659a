"""Stage split: which pool examples warm up, probe, align, and compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pandas as pd

from iprox.data.pools import draw_key
from iprox.errors import ConfigError
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_table, write_table
from iprox.study.schema import SplitSection

log = logging.getLogger(__name__)

SPLITS = ("warmup", "probe", "align", "fidelity")


def make(job: Job) -> Metrics:
    """Write ``split.parquet``: ``example_id, split, position``.

    Raises:
        ConfigError: A split is larger than the pool, or probe and align do not fit beside
            each other.
    """
    section = job.section(SplitSection, "split")
    pool = read_table(job.parents["pool"] / "pool.parquet", columns=["example_id"])
    splits = draw_splits(pool["example_id"].tolist(), section)
    rows = [
        {"example_id": example_id, "split": name, "position": position}
        for name, ids in splits.items()
        for position, example_id in enumerate(ids)
    ]
    table = pd.DataFrame(rows).astype({"position": "int64"})
    counts = {f"n_{name}": len(ids) for name, ids in splits.items()}
    write_table(job.out / "split.parquet", table, section.model_dump())
    log.info("of %d examples: %s", len(pool), counts)
    return {"n_examples": len(pool), **counts}


def draw_splits(ids: Sequence[str], section: SplitSection) -> dict[str, list[str]]:
    """The ids of each split, in its order.

    Warm-up and fidelity are independent draws. Probe and align are the two ends of one draw,
    so they are disjoint, and a change of one's size leaves the other as it was. A larger split
    of the same seed begins with the smaller one, and the order of ``ids`` does not matter.

    Args:
        ids: Ids of the pool.
        section: Sizes and seed.

    Raises:
        ConfigError: A size does not fit the pool.
    """
    sizes = {name: split_size(name, getattr(section, name), len(ids)) for name in SPLITS}
    if sizes["probe"] + sizes["align"] > len(ids):
        raise ConfigError(
            "probe and align are disjoint and do not both fit into the pool",
            where="split.probe, split.align",
            value=f"{sizes['probe']} + {sizes['align']} = {sizes['probe'] + sizes['align']}",
            allowed=f"together at most {len(ids)}, the size of the pool",
            fix="lower one of them, or raise pool.limit",
        )
    proxy = _shuffled(ids, section.seed, "proxy")
    return {
        "warmup": _shuffled(ids, section.seed, "warmup")[: sizes["warmup"]],
        "probe": proxy[: sizes["probe"]],
        "align": proxy[::-1][: sizes["align"]],
        "fidelity": _shuffled(ids, section.seed, "fidelity")[: sizes["fidelity"]],
    }


def split_size(name: str, size: int | float, n_pool: int) -> int:
    """Number of examples of a split.

    Args:
        name: The split, for the message.
        size: An integer counts examples; a float is a share of the pool, rounded down, at
            least one example.
        n_pool: Size of the pool.

    Raises:
        ConfigError: It is a share above 1, or more than the pool has.
    """
    if isinstance(size, float):
        if size > 1:
            raise ConfigError(
                "a share of the pool is above 1",
                where=f"split.{name}",
                value=size,
                allowed="a float up to 1.0 (a share), or an integer (a count)",
            )
        return max(1, math.floor(size * n_pool))
    if size > n_pool:
        raise ConfigError(
            "a split asks for more examples than the pool has",
            where=f"split.{name}",
            value=size,
            allowed=f"at most {n_pool}, the size of the pool",
            fix="lower it, or raise pool.limit",
        )
    return size


def _shuffled(ids: Sequence[str], seed: int, draw: str) -> list[str]:
    return sorted(ids, key=lambda i: draw_key(seed, draw, i))
