"""The real workflow with scorers that need no gradients, and selections beyond the best."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_workflow import snakemake, study, write_inputs

pytestmark = pytest.mark.workflow


def test_scorers_and_selections_end_in_one_report(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    target = {"proxy": {"kind": "target"}, "features": {"kind": "countsketch", "dim": 64}}
    runs = {
        "coverage": {**target, "select": {"method": "facility_location"}},
        "states": {"scorer": {"kind": "repsim"}},
        "ifd": {"scorer": {"kind": "ifd"}, "select": {"count": 2}},
        "turns": {
            "scorer": {"kind": "bm25"},
            "select": {"tasks": "round_robin", "duplicates": "near"},
        },
    }
    config = study(runs=runs, until="selection", fidelity={"enabled": False})
    output = snakemake(tmp_path, config)
    assert "Traceback" not in output
    links = tmp_path / "results" / "studies" / "tiny"
    for run in runs:
        lines = (links / run / "selection" / "selected.jsonl").read_text().splitlines()
        assert len(lines) == (2 if run == "ifd" else 4)
        assert all(message["content"] for message in json.loads(lines[0])["messages"])
        diversity = pd.read_parquet(links / run / "diversity" / "diversity.parquet")
        assert diversity["compared"].tolist() == [len(lines)]
        assert diversity["affinity"].between(0, 1).all()
    page = (links / "report" / "index.html").read_text()
    assert "Selected alike for own" in page
    assert "Diversity and nearness to the task" in page
