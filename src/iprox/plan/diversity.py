"""Where the selections of a study lie in feature space, all by the same features."""

from __future__ import annotations

from iprox.plan.nodes import Node, Plan


def add_diversity(plan: Plan) -> None:
    """Compare every run's selection by the first run's sketches, if a run has any."""
    ground = next((n for r in plan.runs.values() if (n := _ground(r.nodes))), None)
    if ground is None:
        return
    for run_plan in plan.runs.values():
        selection = run_plan.nodes.get("selection")
        if selection is not None:
            run_plan.nodes["diversity"] = _diversity(plan, selection, ground)


def _ground(nodes: dict[str, Node]) -> Node | None:
    """A ranking by sketches of the whole pool, with the queries they are compared with."""
    ranking = nodes.get("ranking")
    sketched = ranking is not None and "features" in ranking.params
    return ranking if sketched else None


def _diversity(plan: Plan, selection: Node, ground: Node) -> Node:
    parents = {r: n for r, n in ground.parents.items() if r.startswith(("query/", "features"))}
    params = {
        "features": ground.params["features"],
        "tasks": ground.params["tasks"],
        "together": selection.params["select"]["tasks"] != "each",
    }
    return plan.add("diversity", selection.label, params, {**parents, "selection": selection})
