"""A rule's log file, with short progress lines on the terminal as well."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from iprox.errors import ArtifactError, IproxError
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

    An :class:`IproxError` is logged as its message and ends the process with exit code 1, and so
    is a file that this user may not read or write; any other exception is logged with its
    traceback and goes on.

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
        with _rights_explained():
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


@contextmanager
def _rights_explained() -> Iterator[None]:
    """Turn the lack of a right to a file into a message with its place and owner."""
    try:
        yield
    except PermissionError as error:
        path = Path(os.fsdecode(error.filename or "."))
        raise ArtifactError(
            "a file or folder may not be read or written by this user",
            where=path.absolute(),
            value=_owner(path),
            fix="ask its owner for the right; results that several users share belong to a group "
            "of theirs: chgrp -R GROUP FOLDER; chmod -R g+rwX FOLDER; "
            "find FOLDER -type d -exec chmod g+s {} +",
        ) from error


def _owner(path: Path) -> str:
    """Owner, group and mode of a file, or of the nearest folder that can be asked."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            about = place.stat()
            return f"{place}: {stat.filemode(about.st_mode)}, owner {about.st_uid}:{about.st_gid}"
    return "owner unknown"
