"""The cheap ranking that says which pool examples are worth a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from iprox.plan.nodes import Node
from iprox.study.load import Run

if TYPE_CHECKING:
    from iprox.plan.runs import RunPlanner

SCORER = {"embedding": "influcoder"}
"""Name of a prefilter -> the scorer it is, where they differ."""


def prefilter_node(planner: RunPlanner) -> Node | None:
    """The ranking a run's pool is filtered by; None when all of it is scored.

    It is that of a run of the same settings whose scorer is the filter, and shared with one.
    """
    section = planner.config.prefilter
    if section.by == "none":
        return None
    kind = SCORER.get(section.by, section.by)
    config = planner.config.model_copy(
        update={
            "scorer": planner.config.scorer.model_copy(update={"kind": kind}),
            "encoder": planner.config.encoder.model_copy(update={"train": False}),
            "fidelity": planner.config.fidelity.model_copy(update={"enabled": False}),
            "until": "ranking",
        }
    )
    run: Run = replace(planner.run, config=config)
    return type(planner)(planner.plan, run).nodes()["ranking"]
