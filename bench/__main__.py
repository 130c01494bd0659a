"""Run the benchmark suite: ``python -m bench [--only PART ...] [--examples N] [--rounds N]``.

Each part runs in a process of its own on one thread. Rows of parts that are run replace their
last results in ``bench/results/rows.parquet``; the figure, the tables in ``bench/README.md``
and the sentence in the project's are made from that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from bench import figure, material, report
from bench.compress import SHAPES
from bench.peers import NAMES
from bench.rows import MEASURED, Row
from iprox.store.tables import read_table, write_table

FOLDER = Path(__file__).parent
TABLE = FOLDER / "results" / "rows.parquet"
PARTS = ("scores", "bf16", "blocks", "scaling", "memory", "peers", "curvature", "making")
BFLOAT16_PEERS = ("less", "bergson")
"""Libraries that are also measured in bfloat16."""


def main() -> None:
    """Measure what was asked for; write table, figure and README."""
    args = parse()
    material.make(args.work, args.cache)
    TABLE.parent.mkdir(exist_ok=True)
    for part in args.only:  # kept part by part: a run that is stopped loses one
        write_table(TABLE, merged(TABLE, run_part(part, args), part))
    table = read_table(TABLE)
    figure.draw(table, TABLE.parent / "cost.svg")
    report.update(FOLDER / "README.md", report.TABLES, report.tables(table))
    report.update(FOLDER.parent / "README.md", report.SENTENCE, report.sentence(table))
    print(report.headline(table))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=PARTS,
        default=PARTS,
        help="parts to run; none: only draw again",
    )
    parser.add_argument("--examples", type=int, default=16, help="examples of the demo's pool")
    parser.add_argument("--rounds", type=int, default=3, help="times each case is run")
    parser.add_argument(
        "--peers",
        type=Path,
        default=FOLDER / ".venv" / "bin" / "python",
        help="Python with bench/requirements.txt installed",
    )
    parser.add_argument("--work", type=Path, default=FOLDER / ".work", help="models and texts")
    parser.add_argument("--cache", type=Path, default=Path("results/.cache"), help="downloads")
    return parser.parse_args()


def run_part(part: str, args: argparse.Namespace) -> list[Row]:
    """All rows of a part."""
    if part == "scores":
        return worker(args, sys.executable, "scores", "float32")
    if part == "bf16":
        return worker(args, sys.executable, "scores", "bfloat16")
    if part == "memory":
        whole, rounded = report.DTYPES
        cases = [("target", n, how) for how in (whole, rounded, "cut", "disk") for n in ("1", "3")]
        cases.append(("svd-0.5", "1", whole))
        rows = [worker(args, sys.executable, "memory", *case) for case in cases]
        return [row for some in rows for row in some] + peers(args, "peer_memory", "memory")
    if part == "blocks":
        return [row for dtype in report.DTYPES for row in worker(args, sys.executable, part, dtype)]
    if part == "making":
        cases = [("decomposition", model) for model in SHAPES]
        cases += [("alignment", kind) for kind in ("training", "central_diff", "double_backward")]
        return [row for case in cases for row in worker(args, sys.executable, *case)]
    if part == "curvature":
        return worker(args, sys.executable, part) + fits(args)
    if part == "peers":
        rows = peers(args, "peer", "peers", "float32")
        return rows + peers(args, "peer", "peers", "bfloat16", names=BFLOAT16_PEERS)
    return worker(args, sys.executable, part)


def fits(args: argparse.Namespace) -> list[Row]:
    """Rows of kronfluence's EK-FAC fit, or that it is not installed."""
    if args.peers.exists():
        return worker(args, str(args.peers), "peer_curvature", "kronfluence")
    return [Row("curvature", "kronfluence, both passes", "target", status="not installed")]


def peers(
    args: argparse.Namespace,
    function: str,
    section: str,
    *more: str,
    names: Sequence[str] = NAMES,
) -> list[Row]:
    """Rows of libraries; those that are not installed say so."""
    rows: list[Row] = []
    for name in names:
        if name == "less":  # needs no package
            rows += worker(args, sys.executable, function, name, *more)
        elif not args.peers.exists():
            print(f"{name}: no Python at {args.peers}; run make bench", file=sys.stderr)
            rows.append(Row(section, name, "target", status="not installed"))
        else:
            rows += worker(args, str(args.peers), function, name, *more)
    return rows


def worker(args: argparse.Namespace, python: str, *part: str) -> list[Row]:
    """Run a part in a new process; a failure becomes a row that says so."""
    print("measuring", *part, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [python, "-m", "bench.worker", *part, "--out", str(out)]
        command += ["--work", str(args.work), "--examples", str(args.examples)]
        command += ["--rounds", str(args.rounds)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode == 0:
            return [Row(**row) for row in json.loads(out.read_text(encoding="utf-8"))]
    reason = done.stderr.strip().splitlines()[-1]
    print(done.stderr, file=sys.stderr)
    status = "not installed" if "ModuleNotFoundError" in reason else f"failed: {reason}"
    sections = {"peer": "peers", "peer_memory": "memory", "peer_curvature": "curvature"}
    if part[0] in sections:
        return [Row(sections[part[0]], part[1], "target", status=status)]
    return [Row(part[0], " ".join(part), status=status)]


def environment() -> dict[str, str]:
    """One thread, no network, and this repository's code in whatever Python is used."""
    root = FOLDER.parent
    single = {f"{n}_NUM_THREADS": "1" for n in ("OMP", "MKL", "OPENBLAS")}
    path = os.pathsep.join([str(root / "src"), str(root)])
    return {**os.environ, **single, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def merged(file: Path, rows: list[Row], part: str) -> pd.DataFrame:
    """The new rows of a part, and what the file has of the others."""
    table = pd.DataFrame([asdict(row) for row in rows])
    table = table.astype(dict.fromkeys(MEASURED, "float64"))
    table["part"] = part
    table["date"] = datetime.date.today().isoformat()
    table["cores"] = os.cpu_count()
    if not file.exists():
        return table
    old = read_table(file)
    both = pd.concat([old[old["part"] != part], table], ignore_index=True)
    return both.sort_values("part", key=lambda p: p.map(PARTS.index), kind="stable")


if __name__ == "__main__":
    main()
