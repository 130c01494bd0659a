"""The study's folder: links from every run to its stages, the resolved study, a table of runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from iprox.plan.nodes import RESULTS, Node, Plan
from iprox.plan.papers import plan_tables
from iprox.study.load import dump_study, flatten

STUDIES = RESULTS / "studies"


def links(plan: Plan) -> dict[str, Node]:
    """Path below the study's folder -> the stage it leads to."""
    found = dict(plan.shared)
    for name, run in plan.runs.items():
        kept = {k: n for k, n in run.nodes.items() if k != "model"}
        found |= {f"{name}/{key}": node for key, node in kept.items()}
        model = run.nodes.get("model")
        for task, node in _scored_against(run.nodes).items():
            query = node.parents.get("query", node)
            if query.parents.get("model") in (model, None):  # an encoder's has none
                found[f"{name}/query-{task}"] = query
                found |= {} if query is node else {f"{name}/direction-{task}": node}
    if plan.report is not None:
        found["report"] = plan.report
    found |= {f"tables/{name}": node for name, node in plan_tables(plan)[1].items()}
    return found


def write_index(plan: Plan, root: Path = Path()) -> Path:
    """Write the study's folder; links to stages that are not made yet lead nowhere until they are.

    Links of runs that the study no longer has are removed; the stages they led to stay.

    Args:
        plan: The study's plan.
        root: The folder that holds ``results``.

    Returns:
        The folder.
    """
    folder = root / STUDIES / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {folder / name: node.folder for name, node in links(plan).items()}
    for old in _old_links(folder):
        if old not in wanted:
            old.unlink()
    for link, target in wanted.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        _symlink(link, os.path.relpath(root / target, link.parent))
    (folder / "study.yaml").write_text(dump_study(plan.study), encoding="utf-8")
    _write_runs(plan, folder / "runs.parquet")
    return folder


def runs_table(plan: Plan) -> list[dict[str, Any]]:
    """One row per run: what it is, what it changes, and the ids of its stages."""
    rows = []
    for name, run_plan in plan.runs.items():
        run = run_plan.run
        rows.append(
            {
                "study": plan.name,
                "run": name,
                "group": run.group,
                "scorer": run.config.scorer.kind,
                "proxy": run.proxy,
                "sparsity": _number(run.sparsity),
                "preset": run.config.preset,
                "changed": json.dumps(run.changed, sort_keys=True),
                "settings": json.dumps(flatten(run.config.model_dump(mode="json")), sort_keys=True),
                "stages": json.dumps({k: n.id for k, n in sorted(run_plan.nodes.items())}),
            }
        )
    return rows


def _number(sparsity: float | str | None) -> float | None:
    """A sparsity that is known; one that is looked for is in the run's sparsity artifact."""
    return None if isinstance(sparsity, str) else sparsity


def _scored_against(nodes: dict[str, Node]) -> dict[str, Node]:
    """Task -> query or direction that a run's features, ranking or fidelity rest on."""
    features = nodes.get("features")
    if features is None and "fidelity" in nodes:
        features = nodes["fidelity"].parents["proxy"]
    users = (features, nodes.get("ranking"), nodes.get("fidelity"))
    parents = [p for user in users if user is not None for p in user.parents.items()]
    return {
        role.removeprefix("proxy_").removeprefix("query/"): node
        for role, node in parents
        if role.startswith(("query/", "proxy_query/"))
    }


def _old_links(folder: Path) -> list[Path]:
    return [
        Path(p) / n
        for p, dirs, names in os.walk(folder)
        for n in (*dirs, *names)
        if (Path(p) / n).is_symlink()
    ]


def _symlink(link: Path, target: str) -> None:
    """Make or correct a link, atomically."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)


def _write_runs(plan: Plan, path: Path) -> None:
    import pandas as pd

    from iprox.store.tables import write_table

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write_table(beside, pd.DataFrame(runs_table(plan)))
    beside.replace(path)
