"""A rule's log file, with short progress lines on the terminal as well."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iprox.errors import IproxError
from iprox.progress import lines_only

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
"""What names of environment variables have that hold secrets."""

LEAST_SECRET = 8
"""Shorter values are not masked: they stand in ordinary words."""

URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
MASK = "***"


def masked(text: str) -> str:
    """``text`` without the values of secret environment variables and the logins of addresses."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, MASK)
    return URL_LOGIN.sub(MASK, text)


class Masking(logging.Formatter):
    """A formatter whose records, tracebacks included, show no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text."""
        return masked(super().format(record))


@contextmanager
def log_to(path: str | Path, label: str = "") -> Iterator[None]:
    """Send this process's log to a file, and what users wait for to the terminal.

    An :class:`IproxError` is logged as its message and ends the process with exit code 1;
    any other exception is logged with its traceback and goes on.

    Args:
        path: Log file; its folder is made.
        label: What this job is, shown before each line on the terminal.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(file, mode="w", encoding="utf-8")
    to_file.setFormatter(Masking("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(Masking(f"  {label}: %(message)s" if label else "%(message)s"))
    to_terminal.addFilter(lambda record: record.name.startswith("iprox"))
    lines_only()
    root = logging.getLogger()
    root.handlers[:] = [to_file, to_terminal]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except IproxError as error:
        logging.getLogger("iprox").error("%s", error)
        raise SystemExit(1) from None
    except Exception:
        to_terminal.setLevel(logging.CRITICAL)
        logging.getLogger("iprox").exception("a bug, or a fault of the machine")
        raise
    finally:
        to_file.flush()
