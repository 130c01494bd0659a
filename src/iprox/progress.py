"""Progress of long loops: a bar on a terminal, a line at intervals in a log, rates at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 15.0

_bars = True


def lines_only() -> None:
    """Draw no bars in this process: several jobs share a terminal, and bars would mix."""
    global _bars
    _bars = False


EXAMPLE_UNITS = ("examples", "queries", "requests", "sequences")
"""Units that are examples: their count is the number of examples passed."""

_loops: list[Track] | None = None


@contextmanager
def loops() -> Iterator[list[Track]]:
    """Within this context, every loop that ends is added to the list that is given."""
    global _loops
    before, _loops = _loops, []
    try:
        yield _loops
    finally:
        _loops = before


def throughput(ended: list[Track]) -> dict[str, float]:
    """Rates of the loops that passed tokens through a model, for provenance; empty without any.

    Returns:
        ``tokens_per_s``, ``examples_per_s`` (where examples were counted) and ``loop_s``, the
        seconds they are over: without start-up, loading and saving.
    """
    passes = [loop for loop in ended if loop.tokens]
    seconds = sum(loop.seconds for loop in passes)
    if not seconds:
        return {}
    counts = {
        "tokens_per_s": sum(loop.tokens for loop in passes),
        "examples_per_s": sum(loop.examples for loop in passes),
    }
    rates = {name: round(count / seconds, 3) for name, count in counts.items() if count}
    return {**rates, "loop_s": round(seconds, 3)}


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as ``h:mm:ss``; a dash when they are not known."""
    if not seconds < float("inf"):  # NaN too
        return "-"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class Track:
    """Counts units of work and shows rate and time left.

    Use as a context manager and call :meth:`advance` after each batch.

    Args:
        total: Units of work in all; 0 when that is not known.
        unit: Name of a unit, plural: ``examples``, ``tokens``, ``steps``, ``bytes``.
        label: What is being done.
    """

    def __init__(self, total: int, unit: str, label: str) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.tokens, self.examples = 0, 0, 0
        self._start = self._last = time.monotonic()
        self._end: float | None = None
        self._bar = tqdm(
            total=total or None,
            unit="B" if unit == "bytes" else f" {unit}",
            unit_scale=unit == "bytes",
            desc=label,
            disable=not (_bars and sys.stderr.isatty()),
        )

    def __enter__(self) -> Track:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end = time.monotonic()
        self._bar.close()
        if kind is None:
            log.info(self.line())
            if _loops is not None:
                _loops.append(self)

    @property
    def seconds(self) -> float:
        """Seconds since the loop began, or that it took."""
        return (time.monotonic() if self._end is None else self._end) - self._start

    def advance(self, units: int, tokens: int = 0, note: str = "", examples: int = 0) -> None:
        """Count work done.

        Args:
            units: Units finished since the last call.
            tokens: Tokens among them, for the rate.
            note: A short figure to show beside the bar, for example the loss.
            examples: Examples among them, where a unit is something else.
        """
        self.done += units
        self.tokens += tokens
        self.examples += units if self.unit in EXAMPLE_UNITS else examples
        self._bar.update(units)
        beside = ", ".join(part for part in (self._rate(), note) if part)
        if beside:
            self._bar.set_postfix_str(beside, refresh=False)
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            log.info("%s%s", self.line(), f", {note}" if note else "")

    def line(self) -> str:
        """One line for a log: done of total, rate, and the time left or, at the end, taken."""
        rate = self._rate()
        parts = [f"{self.label}: {self._amount()}", *([rate] if rate else [])]
        if self._end is not None:
            return ", ".join([*parts, f"took {clock(self.seconds)}"])
        known = self.done and self.total
        left = (self.total - self.done) * self.seconds / self.done if known else float("nan")
        return ", ".join([*parts, f"{clock(left)} left"])

    def _amount(self) -> str:
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1, self.unit)
        done, total = (f"{n / scale:.{1 if scale > 1 else 0}f}" for n in (self.done, self.total))
        return f"{done}/{total} {unit}" if self.total else f"{done} {unit}"

    def _rate(self) -> str:
        return f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""


def track(total: int, unit: str, label: str) -> Track:
    """Progress of a loop over ``total`` units; see :class:`Track`."""
    return Track(total, unit, label)
