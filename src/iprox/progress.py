"""Progress of long loops: a bar on a terminal, a line at intervals in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_EVERY_S = 15.0

_bars = True


def lines_only() -> None:
    """Draw no bars in this process: several jobs share a terminal, and bars would mix."""
    global _bars
    _bars = False


class Track:
    """Counts units of work and shows rate and time left.

    Use as a context manager and call :meth:`advance` after each batch.

    Args:
        total: Units of work in all.
        unit: Name of a unit, plural: ``examples``, ``tokens``, ``steps``.
        label: What is being done.
    """

    def __init__(self, total: int, unit: str, label: str) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.tokens = 0, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(
            total=total, unit=f" {unit}", desc=label, disable=not (_bars and sys.stderr.isatty())
        )

    def __enter__(self) -> Track:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if kind is None:
            log.info(self.line())

    @property
    def seconds(self) -> float:
        """Seconds since the loop began."""
        return time.monotonic() - self._start

    def advance(self, units: int, tokens: int = 0, note: str = "") -> None:
        """Count work done.

        Args:
            units: Units finished since the last call.
            tokens: Tokens among them, for the rate.
            note: A short figure to show beside the bar, for example the loss.
        """
        self.done += units
        self.tokens += tokens
        self._bar.update(units)
        if note:
            self._bar.set_postfix_str(note)
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            log.info("%s%s", self.line(), f", {note}" if note else "")

    def line(self) -> str:
        """One line for a log: done of total, rate, seconds left."""
        seconds = max(self.seconds, 1e-9)
        left = (self.total - self.done) * seconds / self.done if self.done else float("nan")
        rate = f", {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        return f"{self.label}: {self.done}/{self.total} {self.unit}{rate}, {left:.0f} s left"


def track(total: int, unit: str, label: str) -> Track:
    """Progress of a loop over ``total`` units; see :class:`Track`."""
    return Track(total, unit, label)
