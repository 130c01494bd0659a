"""Errors that tell the user what is wrong, where, and what to do about it.

Every message has up to five parts: what went wrong, where (file and line, config key,
layer, example id), the offending value, what is allowed, and what to do. A user's mistake
is always one of these classes, so that the command line and the rules can print it without
a traceback; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IproxError(Exception):
    """Base of all errors that are the input's fault rather than the program's.

    Args:
        what: One sentence that says what is wrong.
        where: File and line, config key path, layer name or example id.
        value: The offending value, shown with ``repr`` and cut when long.
        allowed: What would have been accepted.
        fix: What the user can do now.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        value: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.value = value
        self.allowed = allowed
        self.fix = fix
        super().__init__(self.message())

    def message(self) -> str:
        """The whole message: a sentence, then one indented line for each part that is known."""
        parts = [
            ("where", self.where),
            ("value", None if self.value is None else shorten(repr(self.value))),
            ("allowed", self.allowed),
            ("do", self.fix),
        ]
        lines = [f"  {label}: {part}" for label, part in parts if part is not None]
        return "\n".join([self.what, *lines])


class ConfigError(IproxError):
    """A study file is wrong: an unknown key, a bad type, a value out of range."""


class DataError(IproxError):
    """A pool or task cannot be read: missing file or field, duplicate ids, no examples."""


class ModelError(IproxError):
    """A model cannot be loaded, or does not fit the request: architecture, layers, tokenizer."""


class ArtifactError(IproxError):
    """A stage folder is missing, corrupted, or was made with other settings."""


class NumericsError(IproxError):
    """A computation left the range where its result means anything: non-finite, singular."""


def shorten(text: str, limit: int = 200) -> str:
    """``text`` on one line, cut to ``limit`` characters with a note of how many were cut."""
    flat = " ".join(text.split())
    if len(flat) <= limit:
        return flat
    return f"{flat[:limit]}... ({len(flat) - limit} more characters)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``allowed`` text for a misspelt name: the closest known names first, then the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    listing = ", ".join(names)
    return f"{' or '.join(close)}? (known: {listing})" if close else listing
