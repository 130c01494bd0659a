"""One measurement as a row of the table."""

from __future__ import annotations

from dataclasses import dataclass

MEASURED = ("x", "seconds", "ratio", "spread", "memory_mib", "cosine_error", "spearman")
"""Columns of numbers that a row may lack."""


@dataclass
class Row:
    """What was run, on what, and what it took.

    Attributes:
        section: Which part of the suite.
        case: What was run.
        model: Model it ran on.
        dtype: Precision of the weights.
        queries: Query gradients; 0 for plain passes.
        examples: Examples of the pool.
        tokens: Tokens of the pool.
        x: What a sweep varies.
        seconds: CPU time, median.
        ratio: To the fastest frozen pass of the same round, median.
        spread: Half the distance between the rounds' largest and smallest ratio.
        memory_mib: Peak resident memory above that of the frozen pass in the same process.
        cosine_error: Largest absolute error of a cosine.
        spearman: Lowest rank correlation of a query.
        against: What the answer is compared with.
        status: ``measured``, ``not installed``, or what went wrong.
        note: What the case does otherwise than the problem asks.
    """

    section: str
    case: str
    model: str = ""
    dtype: str = "float32"
    queries: int = 0
    examples: int = 0
    tokens: int = 0
    x: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    spread: float | None = None
    memory_mib: float | None = None
    cosine_error: float | None = None
    spearman: float | None = None
    against: str = ""
    status: str = "measured"
    note: str = ""
