"""What can rank the pool, each by name."""

from __future__ import annotations

from typing import NamedTuple


class Scorer(NamedTuple):
    """What a scorer depends on, and so what identifies its ranking.

    Attributes:
        reads: What it reads besides the pool, by the names of ``PARENTS`` in
            :mod:`iprox.plan.scorers`.
        keys: Keys of the section ``scorer`` that it uses besides ``kind``.
    """

    reads: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def is_by_task(self) -> bool:
        """Whether tasks are ranked differently; else one order serves all of them."""
        return bool({"features", "tasks"} & set(self.reads))


GRADIENT = "gradient"

SCORERS: dict[str, Scorer] = {
    GRADIENT: Scorer(("features",)),
    "random": Scorer(keys=("seed",)),
    "length": Scorer(keys=("prefer",)),
    "tfidf": Scorer(("tasks",), ("text", "over_queries")),
    "bm25": Scorer(("tasks",), ("text", "over_queries")),
    "influcoder": Scorer(("features",)),
    "regression": Scorer(("features",)),
    "less": Scorer(("features",)),
    "dsir": Scorer(("tasks",), ("text", "buckets", "resample", "seed")),
    "repsim": Scorer(("tasks", "warmup"), ("pooling", "over_queries")),
    "perplexity": Scorer(("warmup",), ("prefer",)),
    "ifd": Scorer(("warmup",), ("prefer",)),
}
"""Every scorer but ``gradient``, which is what the other sections of a run describe, is the
function ``score`` of ``iprox.scorers.<name>``. Those that read ``features`` are planned by what
their runs describe, not by this table."""
