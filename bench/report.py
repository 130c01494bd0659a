"""The measured rows as Markdown, written between markers of the READMEs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

TABLES = (
    "<!-- results: written by `python -m bench`; do not edit below -->",
    "<!-- end of results -->",
)
SENTENCE = ("<!-- cost: written by `python -m bench` -->", "<!-- end of cost -->")
"""What generated text stands between in this folder's README, and in the project's."""

DTYPES = ("float32", "bfloat16")

Column = tuple[str, Callable[[pd.Series], str]]


def update(readme: Path, markers: tuple[str, str], content: str) -> None:
    """Replace what stands between two markers."""
    begin, end = markers
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


def tables(table: pd.DataFrame) -> str:
    """Everything that was measured, as Markdown."""
    return "\n" + "\n\n".join(results(table)) + "\n"


def sentence(table: pd.DataFrame) -> str:
    """The cost of scoring with one query, in float32, in one sentence."""
    rows = table[(table["dtype"] == "float32") & (table["queries"] == 1)]

    def cost(section: str, case: str, model: str) -> str:
        chosen = rows[
            (rows["section"] == section) & (rows["case"] == case) & (rows["model"] == model)
        ]
        return ratio(chosen.iloc[0]) if len(chosen) else "not measured"

    others = {name: cost("peers", name, "target") for name in ("less", "bergson", "kronfluence")}
    return (
        f"  {cost('scores', 'ours', 'target')} on the target, "
        f"{cost('scores', 'ours', 'svd-0.5')} on a proxy with half\n"
        f"  the linear parameters, {cost('scores', 'ours', 'svd-0.7')} with 30 % of them. The same "
        f"inner products on the target by other means: a\n"
        f"  loop of backward passes {others['less']}, bergson {others['bergson']}, "
        f"kronfluence {others['kronfluence']}."
    )


def results(table: pd.DataFrame) -> list[str]:
    """Paragraphs and tables of all parts that have rows."""
    blocks = [origin(table)]
    for title, rows, columns in layout(table):
        if len(rows):
            blocks += [f"### {title}", markdown(rows, columns)]
    tail = table[table["section"] == "tail"]
    if len(tail):
        blocks += ["### Long-tailed against equal lengths", tail_sentence(tail)]
    return blocks


def origin(table: pd.DataFrame) -> str:
    """When and on what."""
    dates = sorted(set(table["date"]))
    cores = sorted(set(table["cores"]))
    texts = table[table["section"] == "scores"]
    pool = ""
    if len(texts):
        pool = f" The pool: {texts['examples'].iloc[0]} texts, {texts['tokens'].iloc[0]:,} tokens."
    machine = " and ".join(f"{c} cores" for c in cores)
    return f"Measured {' and '.join(dates)} on {machine}, no GPU, one thread.{pool}"


def layout(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, Sequence[Column]]]:
    """Titles, rows and columns of the tables."""

    def part(section: str) -> pd.DataFrame:
        return table[table["section"] == section]

    scored: list[Column] = [
        ("case", lambda r: r["case"]),
        ("model", lambda r: r["model"]),
        ("queries", lambda r: str(r["queries"] or "")),
        ("x frozen", ratio),
        ("±", lambda r: number(r["spread"], 2)),
        ("max cosine error", lambda r: scientific(r["cosine_error"])),
        ("Spearman", lambda r: number(r["spearman"], 4)),
    ]
    memory: list[Column] = [
        ("case", lambda r: r["case"]),
        ("model", lambda r: r["model"]),
        ("queries", lambda r: str(r["queries"] or "")),
        ("MiB above frozen", lambda r: number(r["memory_mib"], 0, r["status"])),
    ]
    found: list[tuple[str, pd.DataFrame, Sequence[Column]]] = []
    for section, title, columns in (
        ("scores", "Plain passes and ours", scored),
        ("peers", "Libraries", scored),
        ("blocks", "Four blocks of Llama-3.2-3B's shapes", scored[:5]),
    ):
        rows = part(section)
        found += [(f"{title}, {d}", rows[rows["dtype"] == d], columns) for d in DTYPES]
    found.append(("Peak memory, float32", part("memory"), memory))
    fit: list[Column] = [
        ("case", lambda r: r["case"]),
        ("x two frozen passes", ratio),
        ("±", lambda r: number(r["spread"], 2)),
        ("CPU seconds", lambda r: number(r["seconds"], 1, r["status"])),
    ]
    found.append(("EK-FAC on as many texts, float32", part("curvature"), fit))
    directions = [scored[0], *scored[2:5]]
    found.append(
        ("Scores of what EK-FAC makes of a query, float32", part("directions"), directions)
    )
    making: list[Column] = [
        ("shape (out x in)", lambda r: r["model"]),
        ("solution", lambda r: r["case"]),
        ("CPU seconds", lambda r: number(r["seconds"], 2, r["status"])),
        ("x dense roots and full SVD", ratio),
        ("error over the smallest", lambda r: number(r["x"], 3)),
    ]
    found.append(("IPSVD of one layer, float64", part("decomposition"), making))
    steps: list[Column] = [
        ("one step", lambda r: r["case"]),
        ("peak MiB", lambda r: number(r["memory_mib"], 0, r["status"])),
    ]
    found.append(("Memory of an alignment step, float32", part("alignment"), steps))
    for section in ("pool size", "length", "tasks", "rank"):
        columns: list[Column] = [
            ("sparsity" if section == "rank" else section, lambda r: f"{r['x']:g}"),
            ("tokens", lambda r: f"{r['tokens']:,}"),
            ("x frozen", ratio),
            ("±", lambda r: number(r["spread"], 2)),
            ("ms a token", lambda r: number(1000 * r["seconds"] / r["tokens"], 2)),
        ]
        found.append((f"Cost against {section}, ours, float32", part(section), columns))
    return found


def markdown(rows: pd.DataFrame, columns: Sequence[Column]) -> str:
    """A Markdown table."""
    lines = [
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for _, row in rows.iterrows():
        lines.append("| " + " | ".join(show(row) for _, show in columns) + " |")
    return "\n".join(lines)


def ratio(row: pd.Series) -> str:
    """The ratio to the frozen pass, or why there is none."""
    return number(row["ratio"], 2, row["status"])


def number(value: float | None, digits: int, missing: str = "") -> str:
    """A number, or what to say without one."""
    if value is None or math.isnan(value):
        return "" if missing == "measured" else missing
    return f"{value:,.{digits}f}"


def scientific(value: float | None) -> str:
    """A small number."""
    return "" if value is None or math.isnan(value) else f"{value:.0e}"


def tail_sentence(rows: pd.DataFrame) -> str:
    """Throughput of the long-tailed pool relative to the one of equal lengths."""
    tail = rows[rows["case"] == "long tail"].iloc[0]
    return (
        f"{tail['examples']} examples, {tail['tokens']:,} tokens each: throughput on the "
        f"long-tailed pool is {1 / tail['ratio']:.2f} of that on equal lengths."
    )


def headline(table: pd.DataFrame) -> str:
    """A line for each case with a ratio, for the terminal."""
    lines = []
    for _, r in table.iterrows():
        if r["section"] in ("scores", "peers", "blocks", "curvature", "directions"):
            what = f"{r['case']} ({r['model']}, {r['queries']} queries, {r['dtype']})"
            lines.append(f"{what:70} {ratio(r):>8}")
    return "\n".join(lines)
