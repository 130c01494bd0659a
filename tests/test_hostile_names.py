"""Names and texts that try to leave ``results/``, to run in a shell, or to act on a page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from iprox.cli.planning import load_plan
from iprox.errors import ConfigError, DataError
from iprox.plan.index import links, write_index
from iprox.plan.plan import plan_study
from iprox.plan.preflight import check_inputs
from iprox.study.load import parse_study

ROOT = Path(__file__).parents[1]

HOSTILE = {
    "climbing": "../../outside",
    "absolute": "/outside",
    "space": "a b",
    "quotes": "a'b\"c",
    "command": "$(touch owned)",
    "backticks": "`touch owned`",
    "separator": "a; touch owned",
    "tag": "<script>alert(1)</script>",
    "wildcard": "{id}",
    "format": "{{x}} %s {0}",
    "emoji": "\N{PILE OF POO}",
    "long": "x" * 300,
    "right-to-left": "a\u202eb",
    "line break": "a\nb",
    "NUL": "a\0b",
    "option": "--forceall",
    "dots": "..",
    "escape": "a\x1b[31mb",
}
ID = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{10}")  # the workflow's own constraint on ids


def study(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "study": "s",
        "pool": {"path": "pool.jsonl"},
        "tasks": ["mmlu"],
        "runs": {"a": {}},
    }
    return base | changes


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["study", "run", "task"])
def test_names_of_the_study_s_own_are_refused(place: str, text: str) -> None:
    changes: dict[str, Any] = {
        "study": {"study": text},
        "run": {"runs": {text: {}}},
        "task": {"tasks": [{"name": text, "kind": "mmlu"}]},
    }[place]
    with pytest.raises(ConfigError, match="not a name"):
        parse_study(study(**changes))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_names_from_elsewhere_cannot_leave_results(text: str, tmp_path: Path) -> None:
    raw = study(
        target={"model": text},
        pool={"path": text},
        runs={
            "grid": {"proxy": {"layers": {"include": [text]}}},
            "other": {"proxy": {"kind": "model", "model": text}},
            "hub": {"proxy": {"kind": "model", "model": [text, f"{text}2"]}},
        },
    )
    plan = plan_study(parse_study(raw))
    for node in plan.nodes.values():
        assert ID.fullmatch(node.id)
        assert node.folder.parts == ("results", node.stage, node.id)
        assert len(node.id) <= 64
    write_index(plan, tmp_path)
    inside = (tmp_path / "results").resolve()
    for name in links(plan):
        assert (inside / "studies" / "s" / name).resolve().is_relative_to(inside)
    assert {p.name for p in tmp_path.iterdir()} == {"results"}


@pytest.mark.parametrize("name", ["wildcard", "tag", "right-to-left", "line break", "NUL", "long"])
@pytest.mark.parametrize("key", ["pool", "target"])
def test_files_that_snakemake_would_misread_are_refused(
    key: str, name: str, tmp_path: Path
) -> None:
    section = {"pool": {"path": HOSTILE[name]}, "target": {"model": HOSTILE[name]}}[key]
    plan = plan_study(parse_study(study(**{key: section})))
    (tmp_path / "pool.jsonl").write_text("{}")
    with pytest.raises(DataError, match="a path has"):
        check_inputs(plan, tmp_path)


@pytest.mark.workflow
def test_files_of_any_name_and_texts_of_any_kind_go_through_the_workflow(tmp_path: Path) -> None:
    name = "$(touch owned); `touch owned` 'a' \"b\" %s \N{PILE OF POO} --all.jsonl"
    with (tmp_path / name).open("w", encoding="utf-8") as file:
        for i, text in enumerate(HOSTILE.values()):
            row = {"instruction": f"{text} {i}", "output": text, "category": text}
            file.write(json.dumps(row) + "\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(pool={"path": name})))
    plan = load_plan([tmp_path / "study.yaml"], str(tmp_path))
    manifest = str(plan.shared["pool"].manifest)
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-c1"]
    subprocess.run(
        [*command, "--configfile", "study.yaml", "--", manifest],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    pool = pd.read_parquet((tmp_path / manifest).with_name("pool.parquet"))
    answers = {messages[-1]["content"] for messages in pool["messages"]}
    assert answers == set(HOSTILE.values())
    assert {p.name for p in tmp_path.iterdir()} == {name, "study.yaml", "results", ".snakemake"}
