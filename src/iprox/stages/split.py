"""Stage split: the ids of one named subset of the pool."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pandas as pd

from iprox.data.pools import draw_key
from iprox.errors import ConfigError, DataError
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_table, write_table

log = logging.getLogger(__name__)

DRAWS = {
    "warmup": "warmup",
    "probe": "proxy",
    "align": "proxy",
    "fidelity": "fidelity",
    "fisher": "fisher",
    "teach": "fidelity",
}
"""Split -> the random order it is taken from. Splits of one order take its two ends."""


def make(job: Job) -> Metrics:
    """Write ``split.parquet``: ``example_id, split, position``.

    Raises:
        ConfigError: The split is larger than the pool, or does not fit beside the one it must
            be disjoint from.
    """
    params = job.params["split"]
    teaches = params["name"] == "teach"
    columns = ["example_id", "text_hash"] if teaches else ["example_id"]
    pool = read_table(job.parents["pool"] / "pool.parquet", columns)
    ids = draw_split(pool["example_id"].tolist(), params)
    dropped = 0
    if teaches:
        kept = without_texts_of(ids, heldout_of(pool["example_id"].tolist(), params), pool)
        ids, dropped = kept, len(ids) - len(kept)
    table = pd.DataFrame({"example_id": ids, "split": params["name"], "position": range(len(ids))})
    write_table(job.out / "split.parquet", table.astype({"position": "int64"}), params)
    log.info("%s: %d of %d examples", params["name"], len(ids), len(pool))
    return {"pool_examples": len(pool), "examples": len(ids), "same_text": dropped}


def heldout_of(ids: Sequence[str], params: dict[str, Any]) -> list[str]:
    """The ids of the split that ``disjoint_from`` names, at the other end of the same draw."""
    other = params["disjoint_from"]
    return draw_split(ids, {"seed": params["seed"], **other})


def without_texts_of(ids: Sequence[str], others: Sequence[str], pool: pd.DataFrame) -> list[str]:
    """The ids whose text, normalised, is that of none of the others.

    Args:
        ids: Ids of a split.
        others: Ids of another.
        pool: ``example_id, text_hash`` of all examples.

    Raises:
        DataError: None is left.
    """
    hashes = dict(zip(pool["example_id"], pool["text_hash"], strict=True))
    taken = {hashes[i] for i in others}
    kept = [i for i in ids if hashes[i] not in taken]
    if len(kept) < len(ids):
        log.warning("%d examples are left out: their text is held out too", len(ids) - len(kept))
    if not kept:
        raise DataError(
            "no example is left to teach with",
            value=f"{len(ids)} examples",
            fix="remove duplicates from the pool: their texts are all held out",
        )
    return kept


def draw_split(ids: Sequence[str], params: dict[str, Any]) -> list[str]:
    """The ids of one split, in its order.

    Warm-up, fidelity and fisher are independent draws. Probe and align are the two ends of one
    draw, so they are disjoint, and a change of one's size leaves the other as it was; so are
    fidelity and teach. A larger
    split of the same seed begins with the smaller one, and the order of ``ids`` does not matter.

    Args:
        ids: Ids of the pool.
        params: ``name``, ``size`` and ``seed``; for align and teach also ``disjoint_from`` with the
            ``name`` and ``size`` of the split at the other end.

    Raises:
        ConfigError: A size does not fit the pool.
    """
    name = params["name"]
    size = split_size(name, params["size"], len(ids))
    other = params.get("disjoint_from")
    if other is not None:
        taken = split_size(other["name"], other["size"], len(ids))
        if size + taken > len(ids):
            raise ConfigError(
                f"{other['name']} and {name} are disjoint and do not both fit into the pool",
                where=f"split.{other['name']}, split.{name}",
                value=f"{taken} + {size} = {taken + size}",
                allowed=f"together at most {len(ids)}, the size of the pool",
                fix="lower one of them, or raise pool.limit",
            )
    order = sorted(ids, key=lambda i: draw_key(params["seed"], DRAWS[name], i))
    return order[::-1][:size] if other is not None else order[:size]


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
        return max(1, math.floor(Fraction(str(size)) * n_pool))  # 0.29 of 100 is 29
    if size > n_pool:
        raise ConfigError(
            "a split asks for more examples than the pool has",
            where=f"split.{name}",
            value=size,
            allowed=f"at most {n_pool}, the size of the pool",
            fix="lower it, or raise pool.limit",
        )
    return size
