"""The stages behind ``snakemake faithfulness``: a study's runs judged on a tiny model.

They stand beside a study's own stages, of which they share the pool, and no report needs them.
"""

from __future__ import annotations

from typing import Any

from iprox.errors import ConfigError
from iprox.plan.nodes import Node, Plan
from iprox.study.load import Run

SUBSETS_PER_JOB = 32
"""Models that one job retrains."""

JUDGED = ("scorer", "proxy", "influence", "curvature")
"""Sections of a run that say how it scores."""


ESTIMATORS = ("tracin", "graddot", "kfac", "ekfac", "datainf")
"""Those that one training is enough for."""


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
    runs = {run.name: _judged(run) for run in study.study.runs}
    last_node = plan.add(
        "faithfulness", config.study, {"faithfulness": values, "runs": runs}, parents
    )
    return plan, last_node


def check_judged(study: Plan) -> None:
    """Refuse a study with a run that scores in a way the tiny model cannot follow.

    Raises:
        ConfigError: Names the first such run, its key and what can be judged.
    """
    for run in study.study.runs:
        scorer, proxy, influence = run.config.scorer, run.config.proxy, run.config.influence
        asked: dict[str, tuple[str, tuple[str, ...]]] = {
            "scorer.kind": (scorer.kind, ("gradient", "random"))
        }
        if scorer.kind == "gradient":
            asked["proxy.kind"] = (proxy.kind, ("target", "ipsvd", "svd"))
            asked["influence.estimator"] = (influence.estimator, ESTIMATORS)
            asked["prefilter.by"] = (run.config.prefilter.by, ("none",))
            asked["influence.score"] = (influence.score, ("cosine", "dot"))
            asked["influence.checkpoints"] = (influence.checkpoints, ("last",))
        if scorer.kind == "gradient" and proxy.is_factorised:
            found = "auto" if proxy.sparsity == "auto" else "a number"
            asked["proxy.sparsity"] = (found, ("a number",))
            asked["proxy.rank_allocation"] = (proxy.rank_allocation, ("uniform",))
        for key, (value, allowed) in asked.items():
            if value not in allowed:
                raise ConfigError(
                    "faithfulness cannot judge a run: its tiny model has nothing like it",
                    where=f"runs.{run.name}: {key}",
                    value=value,
                    allowed=", ".join(allowed),
                    fix="ask faithfulness of a study file without this run, such as "
                    "config/small/faithfulness.yaml",
                )


def _judged(run: Run) -> dict[str, Any]:
    """How a run scores; each random draw has a seed of its own."""
    sections = {name: getattr(run.config, name).model_dump() for name in JUDGED}
    sections["scorer"]["seed"] += run.draw
    return sections
