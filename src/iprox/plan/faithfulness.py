"""The stages behind ``snakemake faithfulness``: a study's runs judged on a tiny model.

They stand beside a study's own stages, of which they share the pool, and no report needs them.
"""

from __future__ import annotations

from typing import Any

from iprox.plan.nodes import Node, Plan

SUBSETS_PER_JOB = 32
"""Models that one job retrains."""

JUDGED = ("scorer", "proxy", "influence", "curvature")
"""Sections of a run that say how it scores."""


def plan_faithfulness(study: Plan) -> tuple[Plan, Node]:
    """The stages that judge the runs of a planned study, and the last of them."""
    plan, config = Plan(study.study), study.study.config
    pool, section = study.shared["pool"], config.faithfulness
    values = section.model_dump()
    parents = {"pool": pool}
    for seed in range(section.seeds):
        small = plan.add(
            "small", f"seed-{seed}", {"faithfulness": values, "seed": seed}, {"pool": pool}
        )
        parents[f"small/{seed}"] = small
        for first in range(0, section.subsets, SUBSETS_PER_JOB):
            last = min(first + SUBSETS_PER_JOB, section.subsets)
            params: dict[str, Any] = {"faithfulness": values, "seed": seed}
            parents[f"retrain/{seed}/{first:05d}"] = plan.add(
                "retrain",
                f"seed-{seed}-{first}-{last}",
                params | {"first": first, "last": last},
                {"pool": pool, "small": small},
            )
    runs = {
        run.name: {name: getattr(run.config, name).model_dump() for name in JUDGED}
        for run in study.study.runs
    }
    last_node = plan.add(
        "faithfulness", config.study, {"faithfulness": values, "runs": runs}, parents
    )
    return plan, last_node
