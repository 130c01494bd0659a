"""The stages behind ``snakemake m1 m2``: answers traced to pre-training text, on made-up facts."""

from __future__ import annotations

from iprox.plan.nodes import Node, Plan
from iprox.study.schema import FactsSection


def plan_facts(study: Plan) -> tuple[Plan, Node]:
    """A stage for each seed and the one that compares them; they depend on nothing of the study."""
    plan, section = Plan(study.study), FactsSection()
    values = section.model_dump()
    parents = {
        f"facts/{seed}": plan.add("facts", f"seed-{seed}", {"facts": values, "seed": seed})
        for seed in range(section.seeds)
    }
    return plan, plan.add("retrieval", "made-up-facts", {}, parents)
