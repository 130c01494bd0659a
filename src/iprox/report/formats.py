"""Numbers as text, and tables as files: Parquet and CSV in full, Markdown and LaTeX to be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from iprox.store.tables import write_table

MISSING = "-"
"""Stands wherever a number could not be made."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def known(value: Any) -> bool:
    """Whether there is a value: not None, not NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals; a dash when there is none."""
    if value is None or not known(value):
        return MISSING
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign, with a true minus."""
    if value is None or not known(value):
        return MISSING
    text = number(value, digits)
    return text.replace("-", "\N{MINUS SIGN}") if value < 0 else f"+{text}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """``[low, high]``, or nothing when the interval is not known."""
    if not (known(low) and known(high)):
        return ""
    return f"[{number(low, digits)}, {number(high, digits)}]".replace("-", "\N{MINUS SIGN}")


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 0..1 in percent."""
    if share is None or not known(share):
        return MISSING
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds in the unit a person would use."""
    if seconds is None or not known(seconds):
        return MISSING
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def scaled(value: float | None, unit: str = "") -> str:
    """A large count with a metric prefix: 1.3 G, 57.0 M."""
    if value is None or not known(value):
        return MISSING
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def write_everywhere(folder: Path, name: str, table: pd.DataFrame) -> None:
    """Write one table as Parquet, CSV, Markdown and LaTeX, without its index.

    Args:
        folder: Folder of the four files.
        name: File name without ending.
        table: Its rows; cells are text, numbers, truth values or missing.
    """
    write_table(folder / f"{name}.parquet", table)
    (folder / f"{name}.csv").write_text(table.to_csv(index=False, lineterminator="\n"), "utf-8")
    (folder / f"{name}.md").write_text(markdown(table), "utf-8")
    (folder / f"{name}.tex").write_text(latex(table), "utf-8")


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table; numbers to the right, cell text unable to leave its cell."""
    header = [_markdown_text(str(column)) for column in table.columns]
    rule = ["---:" if numeric(table[column]) else "---" for column in table.columns]
    rows = [[_markdown_text(cell_text(v)) for v in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def latex(table: pd.DataFrame, caption: str = "") -> str:
    """A booktabs ``tabular``, to be read in with LaTeX's ``input``; a ``table`` with a caption."""
    columns = "".join("r" if numeric(table[column]) else "l" for column in table.columns)
    header = _latex_row([str(column) for column in table.columns])
    rows = [_latex_row([cell_text(v) for v in row]) for row in table.itertuples(index=False)]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if caption:
        named = rf"\caption{{{_latex_text(caption)}}}"
        lines = [r"\begin{table}", r"\centering", named, *lines, r"\end{table}"]
    return "\n".join([*lines, ""])


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned with spaces: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            t.ljust(w) if i == 0 else t.rjust(w)
            for i, (t, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def cell_text(value: Any) -> str:
    """A cell as a person reads it: four significant digits, a dash where nothing is known."""
    if isinstance(value, str):
        return value
    if value is pd.NA or value is None or value != value:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}"


def numeric(column: pd.Series) -> bool:
    """Whether a column holds numbers (and not truth values)."""
    return bool(pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column))


def settings_text(changed: dict[str, Any]) -> str:
    """Changed keys on one line: ``proxy.sparsity=0.5, align.epochs=1``."""
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(changed.items()))


def _markdown_text(text: str) -> str:
    flat = " ".join(text.split())
    for mark, inert in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;"), ("`", "\\`")):
        flat = flat.replace(mark, inert)
    return flat


def _latex_row(cells: list[str]) -> str:
    return " & ".join(map(_latex_text, cells)) + r" \\"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
