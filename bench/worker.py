"""Run one part of the suite in this process: ``python -m bench.worker PART ... --out FILE``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bench import sections
from iprox.models.device import set_threads


def main() -> None:
    """Measure and write rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", help="function of bench.sections")
    parser.add_argument("arguments", nargs="*", help="its further arguments")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    set_threads(1)
    setting = sections.Setting(args.work, args.examples, args.rounds)
    values = [int(a) if a.isdigit() else a for a in args.arguments]
    rows = getattr(sections, args.part)(setting, *values)
    args.out.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
