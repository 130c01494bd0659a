"""The selection of a run: what it depends on, and how many examples it keeps."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from iprox.errors import ConfigError
from iprox.plan.nodes import Node
from iprox.plan.scorers import task_parents
from iprox.study.schema import SelectSection
from iprox.study.scorers import SCORERS

if TYPE_CHECKING:
    from iprox.plan.runs import RunPlanner

IN_ORDER = ("top", "threshold")
"""Methods that take examples in the order of their ranking."""


def selection_node(planner: RunPlanner, ranking: Node) -> Node:
    """The selection from a ranking.

    Raises:
        ConfigError: Keys that do not go together, or nothing to compare examples by.
    """
    section = planner.config.select
    _check(section, f"runs.{planner.run.name}")
    parents = {"pool": planner.pool, "ranking": ranking, **task_parents(planner)}
    if section.method != "top":
        parents["features"] = _features(ranking, section.method, f"runs.{planner.run.name}")
    size = f"{section.fraction:g}" if section.count is None else f"{section.count}"
    how = [part for part in (section.method, section.tasks) if part not in ("top", "each")]
    label = "-".join([ranking.label, size, *how])
    return planner.plan.add("selection", label, {"select": _settings(section)}, parents)


def is_per_task(selection: Node) -> bool:
    """Whether tasks have selections of their own, each of which a model is trained on.

    A ranking that is the same for every task, as a random one is, needs one model for all.
    """
    together = selection.params["select"]["tasks"] != "each"
    kind = selection.parents["ranking"].params["scorer"]["kind"]
    return SCORERS[kind].is_by_task and not together


def n_selected(selection: Node, examples: int) -> int:
    """Examples kept of a pool, for each task or for all together."""
    section = selection.params["select"]
    if section["count"] is not None:
        return min(examples, int(section["count"]))
    return max(1, math.floor(Fraction(str(section["fraction"])) * examples))


def _settings(section: SelectSection) -> dict[str, Any]:
    """The keys that decide what is chosen."""
    keys = {"fraction", "count", "tasks", "method", "duplicates", "quotas", "allow_contaminated"}
    if section.tasks == "union":
        keys |= {"calibrate"}
    if section.method == "threshold":
        keys |= {"max_similarity"}
    if section.method not in IN_ORDER:
        keys |= {"shortlist", "seed"}
    if section.method in ("facility_location", "dpp"):
        keys |= {"quality_weight"}
    if section.duplicates == "near":
        keys |= {"duplicate_overlap"}
    if section.quotas:
        keys |= {"quota_by"}
    return section.model_dump(include=keys)


def _check(section: SelectSection, run: str) -> None:
    """Refuse keys that do not go together."""
    if section.quotas and section.method not in IN_ORDER:
        raise ConfigError(
            "quotas need a method that takes examples in order",
            where=f"{run}: select.quotas, select.method",
            value=section.method,
            allowed=", ".join(IN_ORDER),
        )
    if section.tasks == "round_robin" and section.method != "top":
        raise ConfigError(
            "tasks that choose in turn take the best that is left",
            where=f"{run}: select.tasks, select.method",
            value=f"round_robin with {section.method}",
            allowed="round_robin with top; any method with each or union",
        )


def _features(ranking: Node, method: str, run: str) -> Node:
    """Stored features of a ranking's examples.

    Raises:
        ConfigError: It keeps none that examples can be compared by.
    """
    features = ranking.parents.get("features")
    if features is None or (features.stage == "features" and "features" not in features.params):
        raise ConfigError(
            f"select.method {method} compares examples, and this run stores nothing to compare",
            where=f"{run}: select.method",
            fix="set features.kind to a sketch (scorer.kind gradient), take a scorer that stores "
            "embeddings, or select.method: top",
        )
    return features
