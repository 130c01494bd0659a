"""What root may do hides mistakes: the workflow as an ordinary user, whom file modes stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from iprox.cli.planning import load_plan

ROOT = Path(__file__).parents[1]


def ordinary(command: list[str]) -> list[str]:
    """A command without the right to write to files that are read-only."""
    if os.geteuid() != 0:
        return command
    drop = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *command]


@pytest.mark.workflow
def test_an_edited_input_is_read_again_by_an_ordinary_user(tmp_path: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root without setpriv cannot become an ordinary user")
    study = {"study": "s", "pool": {"path": "pool.jsonl"}, "tasks": ["mmlu"], "runs": {"a": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    pool = tmp_path / "pool.jsonl"
    pool.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    manifest = load_plan([tmp_path / "study.yaml"], str(tmp_path)).shared["pool"].manifest
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-c1"]
    command += ["--configfile", "study.yaml", "--", str(manifest)]
    contents = []
    for line in ("", json.dumps({"instruction": "c", "output": "d"}) + "\n"):
        with pool.open("a") as file:
            file.write(line)
        done = subprocess.run(ordinary(command), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        contents.append(json.loads((tmp_path / manifest).read_text())["content"])
    assert contents[0] != contents[1]
