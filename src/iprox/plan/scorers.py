"""The ranking of a run that does not score by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from iprox.plan.nodes import Node
from iprox.study.scorers import SCORERS

if TYPE_CHECKING:
    from iprox.plan.runs import RunPlanner


def task_parents(planner: RunPlanner) -> dict[str, Node]:
    """The examples of every task."""
    return {f"task/{t.name}": planner.plan.shared[f"task-{t.name}"] for t in planner.tasks}


PARENTS: dict[str, Callable[[RunPlanner], dict[str, Node]]] = {
    "tasks": task_parents,
    "warmup": lambda planner: {"warmup": planner.warmup()},
}
"""What a scorer may read besides the pool: name -> stages, by the roles a job finds them under."""


def passes_model(ranking: Node) -> bool:
    """Whether a ranking passes texts through a model, rather than reading scores of a pass."""
    return "warmup" in SCORERS[ranking.params["scorer"]["kind"]].reads


def scorer_nodes(planner: RunPlanner) -> dict[str, Node]:
    """The ranking, and the stages above it that a run is known by, by link name."""
    section = planner.config.scorer
    scorer = SCORERS[section.kind]
    settings = {"kind": section.kind, **section.model_dump(include=set(scorer.keys))}
    label = section.kind
    if section.kind == "random":
        settings["seed"] += planner.run.draw
        label = f"random-{settings['seed']}"
    parents = {"pool": planner.pool}
    for name in scorer.reads:
        parents |= PARENTS[name](planner)
    params: dict[str, Any] = {
        "scorer": settings,
        "tasks": [task.name for task in planner.tasks],
    }
    if "warmup" in scorer.reads:
        params |= {"chat": planner.chat, "compute": planner.compute}
    shown = {role: node for role, node in parents.items() if not role.startswith("task/")}
    return {**shown, "ranking": planner.plan.add("ranking", label, params, parents)}
