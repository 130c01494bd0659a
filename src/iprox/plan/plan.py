"""From a study to the stages it needs: those its runs share, those of each run, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iprox.plan.diversity import add_diversity
from iprox.plan.nodes import OF_PASSES, Node, Plan, RunPlan
from iprox.plan.runs import RunPlanner
from iprox.study.load import Study
from iprox.study.schema import SyntheticSection


def plan_study(study: Study) -> Plan:
    """Resolve a study into its stages. Pure: reads no file, imports neither torch nor Snakemake.

    Raises:
        ConfigError: A run asks for something the study cannot give.
    """
    plan = Plan(study)
    config = study.config
    pool = plan.add("pool", _pool_label(plan), {"pool": config.pool.model_dump()})
    target = plan.add(
        "target", config.target.model, {"target": config.target.model_dump(exclude=OF_PASSES)}
    )
    plan.shared = {"pool": pool, "target": target}
    for task in config.tasks:
        plan.shared[f"task-{task.name}"] = plan.add("task", task.name, {"task": task.model_dump()})
    for run in study.runs:
        plan.runs[run.name] = RunPlan(run, RunPlanner(plan, run).nodes())
    add_diversity(plan)
    if any(r.config.evaluate.enabled and r.config.until == "evaluation" for r in study.runs):
        first = next(
            r for r in study.runs if r.config.evaluate.enabled and r.config.until == "evaluation"
        )
        planner = RunPlanner(plan, first)
        for task in config.tasks:
            plan.shared[f"base/evaluation-{task.name}"] = planner.evaluation(target, task)
    plan.report = _report(plan)
    return plan


def synthetic_node() -> Node:
    """The experiment on made-up data, which belongs to no study."""
    return Node.of("synthetic", "figure-3", {"synthetic": SyntheticSection().model_dump()}, {})


def _report(plan: Plan) -> Node:
    """The report: its parents are every stage that a run links to."""
    parents = {name.replace("task-", "task/"): node for name, node in plan.shared.items()}
    for name, run_plan in plan.runs.items():
        run = run_plan.run
        shown = {k: n for k, n in run_plan.nodes.items() if k not in ("pool", "target", "model")}
        parents |= {f"{name}/{key}": node for key, node in shown.items()}
        if "fidelity" in run_plan.nodes:
            compared = run_plan.nodes["fidelity"].parents
            parents[f"{name}/target-features"] = compared["target"]
            if run.config.until == "fidelity":
                parents[f"{name}/features"] = compared["proxy"]
            elif compared["proxy"] is not run_plan.nodes["features"]:
                parents[f"{name}/slice-features"] = compared["proxy"]
    return plan.add("report", plan.name, described(plan, list(plan.runs)), parents)


def described(plan: Plan, names: list[str]) -> dict[str, Any]:
    """A study and some of its runs, as a stage that shows them is told about them."""
    config = plan.study.config
    runs = {}
    for name in names:
        run = plan.runs[name].run
        runs[name] = {
            "changed": run.changed,
            "group": run.group,
            "preset": run.config.preset,
            "proxy": run.proxy,
            "scorer": run.config.scorer.kind,
            "sparsity": run.sparsity,
            "until": run.config.until,
        }
    return {
        "config": config.model_dump(
            mode="json", exclude={"data_dir", "runs", "shards", "train_gpus"}
        ),
        "report": config.report.model_dump(),
        "runs": runs,
        "study": config.study,
        "tasks": [task.name for task in config.tasks],
    }


def _pool_label(plan: Plan) -> str:
    pool = plan.study.config.pool
    name = pool.name or (Path(pool.path).stem if pool.path else None)
    name = name or (pool.hub.name.split("/")[-1] if pool.hub else "") or "pool"
    return f"{name}-{pool.limit}" if pool.limit else name
