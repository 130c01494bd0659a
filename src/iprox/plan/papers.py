"""The stages behind ``snakemake t2`` and the like: a paper's table beside a study's own runs.

They stand beside a study's own stages and make none: a table needs those of the runs that stand in
it, and no others. Runs are found by their settings, so any study can fill any table.
"""

from __future__ import annotations

import math
import re
from functools import reduce
from typing import Any

from iprox.papers.tables import Paper, Row, Setting, Table, papers
from iprox.plan.nodes import Node, Plan
from iprox.plan.plan import described
from iprox.study.load import Run
from iprox.study.schema import RunConfig

INDIFFERENT = {"preset", "until"}
"""Keys that a run may change and still stand in a row that does not name them."""

INDIFFERENT_SECTIONS = {"fidelity", "evaluate"}
"""Sections of which the same holds: they say what is measured of a run."""

MAKING = ("probe", "decomposition", "sparsity", "factors", "proxy", "extraction", "proxy-warmup")
LEARNING = ("encoder", "features", "heldout", "ranking", "teach", "target-features", "sketches-")

STEPS: dict[str, tuple[str, ...]] = {
    "outcome": ("evaluation-",),
    "diversity": ("diversity",),
    "minutes": (*MAKING, "features", "query-"),
    "teraflops": (*MAKING, "features", "query-"),
    "agreement": LEARNING,
    "training_size": LEARNING,
    "amortisation": LEARNING,
    "storage": LEARNING,
}
"""Measure -> beginnings of the links of a run that it reads."""

COMPARED = ("agreement", "training_size")
"""Measures of how a ranking agrees with the target's."""


def plan_tables(study: Plan) -> tuple[Plan, dict[str, Node]]:
    """A stage for every table of the papers, by the name it is asked for with."""
    plan = Plan(study.study)
    tables = {
        name: _table_node(plan, study, name, paper) for paper in papers() for name in paper.tables
    }
    return plan, tables


def _table_node(plan: Plan, study: Plan, name: str, paper: Paper) -> Node:
    """A table with the runs that stand in each of its rows, and what is read of them."""
    table = paper.tables[name]
    ours = [_runs_of(row, table, paper, study) for row in table.rows]
    used = sorted({run for runs in ours for run in runs})
    parents = {"pool": study.shared["pool"]}
    if table.measure == "outcome" and used:
        shared = study.shared.items()
        parents |= {role: node for role, node in shared if role.startswith("base/")}
    if table.measure in COMPARED and used:
        used, parents = _with_target(used, parents, study)
    for run in used:
        parents |= {f"{run}/{key}": node for key, node in _steps(study, run, table.measure)}
    params = described(study, used) | {
        "ours": ours,
        "paper": paper.paper,
        "table": table.model_dump(mode="json"),
        "name": name,
    }
    return plan.add("paper_table", f"{name}-{study.name}", params, parents)


def _with_target(
    used: list[str], parents: dict[str, Node], study: Plan
) -> tuple[list[str], dict[str, Node]]:
    """The same and what scorers are compared with: the target's ranking, and where to compare."""
    exact = [name for name, plan in study.runs.items() if _is_exact(plan.run)]
    for name in used:
        fidelity = study.runs[name].nodes.get("fidelity")
        if fidelity is not None and "split" in fidelity.parents:
            parents = {"split": fidelity.parents["split"], **parents}
    return sorted({*used, *exact[:1]}), parents


def _is_exact(run: Run) -> bool:
    """Whether a run ranks the pool by the target's own gradients, whole."""
    config = run.config
    kinds = (config.scorer.kind, config.proxy.kind, config.features.kind)
    return kinds == ("gradient", "target", "exact") and config.until != "fidelity"


def _runs_of(row: Row, table: Table, paper: Paper, study: Plan) -> list[str]:
    """Runs of a study that stand in a row and go as far as its table needs."""
    if row.runs is None or row.model != _model_beside(table, paper, study):
        return []
    if row.pool is not None and row.pool not in study.shared["pool"].label.lower():
        return []
    return [
        name
        for name, run_plan in study.runs.items()
        if _stands_in(run_plan.run, row.runs, study.study.config)
        and any(True for _ in _steps(study, name, table.measure))
    ]


def _model_beside(table: Table, paper: Paper, study: Plan) -> str:
    """The paper's model that ours stands beside: itself, or the first for one the paper has not."""
    ours = study.study.config.target.model
    same = [name for name, model in paper.models.items() if model == ours]
    return same[0] if same else table.rows[0].model


def _stands_in(run: Run, asked: dict[str, Setting], common: RunConfig) -> bool:
    """Whether a run has the settings of a row, and changes nothing else."""
    if not all(_agrees(run.config, key, value, common) for key, value in asked.items()):
        return False
    return all(
        _value(run.config, key) == _value(common, key)
        for key in (".".join(key.split(".")[:2]) for key in run.changed)
        if key not in asked and not _is_indifferent(run, key)
    )


def _is_indifferent(run: Run, key: str) -> bool:
    """Whether a key that a run changes says nothing about how it scores and trains."""
    is_draw = run.config.scorer.kind == "random" and key in ("scorer.draws", "scorer.seed")
    return is_draw or key in INDIFFERENT or key.split(".")[0] in INDIFFERENT_SECTIONS


def _agrees(config: RunConfig, key: str, asked: Setting, common: RunConfig) -> bool:
    """Whether a setting is as asked: any value, a multiple of the study's own, or this value."""
    if asked == "any":
        return True
    value = _value(config, key)
    if isinstance(asked, str) and (times := re.fullmatch(r"([\d.]+)x", asked)):
        own = _value(common, key) * float(times[1])
        return bool(value == (math.floor(own + 0.5) if isinstance(value, int) else own))
    return bool(value == asked)


def _value(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def _steps(study: Plan, run: str, measure: str) -> list[tuple[str, Node]]:
    """Links of a run that a measure reads."""
    nodes = study.runs[run].nodes
    links = {**nodes, **_unlinked(nodes)}
    return [(key, node) for key, node in links.items() if key.startswith(STEPS[measure])]


def _unlinked(nodes: dict[str, Node]) -> dict[str, Node]:
    """Stages of a run that stand behind its links: its queries, and the target's own scores."""
    found: dict[str, Node] = {}
    if "features" in nodes:
        parents = nodes["features"].parents.items()
        found |= {r.replace("/", "-"): n for r, n in parents if r.startswith("query/")}
    if "fidelity" in nodes:
        found["target-features"] = nodes["fidelity"].parents["target"]
    return found
