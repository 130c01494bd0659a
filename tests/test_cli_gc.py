"""``iprox gc``: what no study needs goes, what one needs stays, and nothing goes unasked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from iprox.cli import planning
from iprox.cli.gc import find_garbage
from iprox.cli.main import app
from iprox.plan.index import write_index
from iprox.plan.nodes import Plan
from iprox.plan.plan import plan_study
from iprox.store import runner
from iprox.store.job import Job, Metrics
from iprox.store.manifest import check
from iprox.store.runner import Request, run_stage
from iprox.study.load import parse_study


def body(name: str, **select: float) -> dict[str, Any]:
    return {
        "study": name,
        "pool": {"path": "pool.jsonl"},
        "tasks": ["mmlu"],
        "runs": {"r": {"scorer": {"kind": "random"}, "select": select, "until": "selection"}},
    }


def planned(name: str, **select: float) -> Plan:
    return plan_study(parse_study(body(name, **select)))


def make(job: Job) -> Metrics:
    (job.out / "content.txt").write_text(json.dumps([job.stage, job.params], sort_keys=True))
    return {}


def finish(plan: Plan, root: Path) -> None:
    """Make a run's artifacts with a stage function that writes its own parameters."""
    for node in plan.runs["r"].nodes["selection"], *plan.runs["r"].nodes.values():
        _finish(node, root)
    write_index(plan, root)


def _finish(node: Any, root: Path) -> None:
    for parent in node.parents.values():
        _finish(parent, root)
    if not (root / node.manifest).exists():
        parents = {role: root / parent.folder for role, parent in node.parents.items()}
        store = root / "results" / ".objects"
        request = Request(node.spec, "c", parents, root / node.folder, store, root)
        (root / "pool.jsonl").write_text("{}")
        run_stage(make, request)
        log = root / "results" / "logs" / node.stage / f"{node.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()


@pytest.fixture
def two_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study, and what an older version of another study left."""
    monkeypatch.chdir(tmp_path)
    finish(planned("one", fraction=0.1), tmp_path)
    finish(planned("two", fraction=0.2), tmp_path)
    finish(planned("two", fraction=0.3), tmp_path)  # edited: nothing links to 0.2 any more
    return tmp_path


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["gc", *args])


def folders(root: Path) -> set[str]:
    return {f"{p.parent.parent.name}/{p.parent.name}" for p in root.glob("results/*/*/spec.json")}


def test_only_what_no_study_links_to_is_listed_and_nothing_is_removed(two_studies: Path) -> None:
    before = folders(two_studies)
    done = run()
    assert done.exit_code == 0
    old = planned("two", fraction=0.2).runs["r"].nodes["selection"].folder
    listed = [line for line in done.output.splitlines() if line.startswith("/")]
    assert [Path(x).name for x in listed if ".objects" not in x] == [old.name]
    assert sum(".objects" in x for x in listed) == 1
    assert "1 artifacts, 1 kept computations" in done.output
    assert "nothing was removed" in done.output
    assert folders(two_studies) == before


def test_what_is_listed_goes_and_everything_else_stays_whole(two_studies: Path) -> None:
    old = planned("two", fraction=0.2).runs["r"].nodes["selection"]
    before = folders(two_studies)
    assert run("--delete").exit_code == 0
    assert before - folders(two_studies) == {f"selection/{old.id}"}
    assert not (two_studies / "results/logs/selection" / f"{old.id}.log").exists()
    for fraction, name in ((0.1, "one"), (0.3, "two")):
        for node in planned(name, fraction=fraction).runs["r"].nodes.values():
            check(two_studies / node.folder)
    assert "0 artifacts, 0 kept computations" in run().output


def test_removed_results_are_made_again_when_asked_for(two_studies: Path) -> None:
    run("--delete")
    finish(planned("two", fraction=0.2), two_studies)
    check(two_studies / planned("two", fraction=0.2).runs["r"].nodes["selection"].folder)


def test_a_study_file_keeps_what_nothing_links_to(two_studies: Path) -> None:
    (two_studies / "old.yaml").write_text(yaml.safe_dump(body("two", fraction=0.2)))
    assert "0 artifacts" in run("--keep", "old.yaml").output


def test_a_store_that_another_checkout_uses_is_left_alone(
    two_studies: Path, tmp_path: Path
) -> None:
    old = two_studies / planned("two", fraction=0.2).runs["r"].nodes["selection"].folder
    (tmp_path / "elsewhere").hardlink_to(old / "content.txt")
    found = find_garbage(two_studies / "results", set())
    assert len(found.artifacts) == 1
    assert not found.objects


def test_leftovers_of_killed_jobs_are_found_and_freed_bytes_are_counted(two_studies: Path) -> None:
    scratch = two_studies / "results/.objects/ab/.tmp-abc-x"
    scratch.mkdir(parents=True)
    (scratch / "half").write_bytes(b"x" * 1000)
    old = two_studies / planned("two", fraction=0.2).runs["r"].nodes["selection"].folder
    found = find_garbage(two_studies / "results", set())
    assert found.scratch == [scratch]
    content = (old / "content.txt").stat().st_size
    assert found.freed >= 1000 + content
    described = sum(p.stat().st_size for p in old.glob("*.json"))
    kept = sum(p.stat().st_size for p in found.objects[0].glob("*.json"))
    assert found.freed == 1000 + content + described + kept


def test_a_changed_package_version_is_reported_and_computed_anew(
    two_studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("one", fraction=0.1)
    node = plan.runs["r"].nodes["selection"]
    (two_studies / "one.yaml").write_text(yaml.safe_dump(body("one", fraction=0.1)))
    assert "another version" not in CliRunner().invoke(app, ["plan", "one.yaml"]).output
    before = len(list(two_studies.glob("results/.objects/*/*")))
    newer = runner.versions(runner.NUMERIC_LIBRARIES) | {"torch": "99.0.0"}
    for module in (runner, planning):
        monkeypatch.setattr(module, "versions", lambda names: {n: newer.get(n, "") for n in names})
    output = CliRunner().invoke(app, ["plan", "one.yaml"]).output
    assert re.search(r"finished stages were made with another version: torch .*, now 99\.0", output)
    (two_studies / node.manifest).unlink()  # a job that runs again does not take the old result
    finish(plan, two_studies)
    assert len(list(two_studies.glob("results/.objects/*/*"))) == before + 1


def test_nothing_is_removed_under_a_running_workflow(two_studies: Path) -> None:
    locks = two_studies / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.input.lock").touch()
    before = folders(two_studies)
    done = run("--delete")
    assert done.exit_code == 1
    assert "a workflow is running" in done.output
    assert folders(two_studies) == before


def test_without_a_study_nothing_is_called_garbage(two_studies: Path) -> None:
    for link in sorted((two_studies / "results/studies").rglob("*"), reverse=True):
        link.unlink() if link.is_symlink() or link.is_file() else link.rmdir()
    done = run("--delete")
    assert done.exit_code == 1
    assert "there is no study here" in done.output
    assert folders(two_studies)
