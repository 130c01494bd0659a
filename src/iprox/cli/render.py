"""What commands print: facts and tables, for people (rich) or for programs (JSON).

Pools hold text from anywhere. Nothing of it may act on a terminal, so every string is made inert:
control characters are spelt out and rich's markup is off.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 1000
"""Columns of a line in a pipe or file (unless COLUMNS is set): nothing is folded, so grep works."""

_JOINERS = "\u200c\u200d"
"""Zero-width joiners: part of correct spelling in several scripts, harmless on a terminal."""


@dataclass(frozen=True)
class Facts:
    """Named values under a title."""

    title: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows under column names.

    Attributes:
        title: What the rows are.
        columns: Column names.
        rows: Values, one per column.
        note: A line below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything one command prints: a headline and blocks."""

    headline: str
    blocks: list[Facts | Table] = field(default_factory=list)


def inert(text: str) -> str:
    """``text`` on one line without anything that a terminal would act on."""
    return "".join(_spelt(c) for c in " ".join(text.split()))


def inert_lines(text: str) -> str:
    """Like :func:`inert`, line breaks and leading spaces kept."""
    return "\n".join("".join(_spelt(c) for c in line) for line in text.split("\n"))


def _spelt(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()


def cut(text: str, limit: int = 80) -> str:
    """``text`` on one line, its end replaced by an ellipsis when longer than ``limit``."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def human_bytes(count: float) -> str:
    """A size in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_memory(count: float) -> str:
    """Memory in binary units."""
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1000 or unit == "GiB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
    raise AssertionError("unreachable")


def human_flops(count: float) -> str:
    """Floating-point operations with a metric prefix: ``1.2 TFLOP``."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(count) < 999.5 or unit == "E":
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    raise AssertionError("unreachable")


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return inert(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{inert(str(k))}: {shown(v)}" for k, v in value.items()) or "-"
    if isinstance(value, Iterable):
        return ", ".join(shown(item) for item in value) or "-"
    return inert(str(value))


def plain(value: Any) -> Any:
    """A value as JSON knows it: numpy scalars and arrays unpacked, NaN as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    return None if str(value) in ("<NA>", "NaT") else str(value)


def emit(page: Page, as_json: bool = False) -> None:
    """Print a page: tables for people, or one JSON object (pure ASCII) for programs."""
    if as_json:
        typer.echo(json.dumps(_as_json(page), indent=1))
        return
    console = _console()
    if console.is_terminal:
        console.print(*_renderables(page), sep="\n")
        return
    with console.capture() as printed:
        console.print(*_renderables(page), sep="\n")
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _as_json(page: Page) -> dict[str, Any]:
    body: dict[str, Any] = {"headline": page.headline}
    for block in page.blocks:
        if isinstance(block, Facts):
            body[block.title] = plain(block.values)
        else:
            body[block.title] = [
                dict(zip(block.columns, plain(r), strict=True)) for r in block.rows
            ]
    return body


def _console() -> Console:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=terminal,
        no_color=not terminal,
    )


def _renderables(page: Page) -> Iterable[RenderableType]:
    from rich.text import Text

    yield Text(inert_lines(page.headline), style="bold")
    for block in page.blocks:
        yield Text("\n" + inert(block.title), style="bold cyan")
        yield _facts(block) if isinstance(block, Facts) else _table(block)
        if isinstance(block, Table) and block.note:
            yield Text(inert(block.note), style="dim")


def _facts(facts: Facts) -> RenderableType:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in facts.values.items():
        grid.add_row(Text(f"  {inert(str(key))}", style="dim"), Text(shown(plain(value))))
    return grid if facts.values else Text("  none", style="dim")


def _table(table: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    if not table.rows:
        return Text("  none", style="dim")
    result = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    rows = [[plain(value) for value in row] for row in table.rows]
    for i, name in enumerate(table.columns):
        numbers = all(isinstance(r[i], int | float | None) for r in rows)
        result.add_column(
            Text(inert(name)), justify="right" if numbers else "left", overflow="fold"
        )
    for row in rows:
        result.add_row(*(Text(shown(value)) for value in row))
    return result
