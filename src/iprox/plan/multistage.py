"""The stages of a second training: a fine-tuned model, and its curvature on what it learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from iprox.errors import ConfigError
from iprox.plan.nodes import OF_PASSES, Node
from iprox.study.schema import FinetunedSection, WarmupSection

if TYPE_CHECKING:
    from iprox.plan.runs import RunPlanner


def finetuned_model(planner: RunPlanner) -> Node:
    """The model at which tasks are measured: one that is given, or the target trained further.

    Raises:
        ConfigError: The study does not say what it was fine-tuned on, or the run scores in a way
            that has no fine-tuned counterpart.
    """
    section = _checked(planner)
    if section.model is not None:
        like = planner.plan.study.config.target.model_dump(exclude=OF_PASSES)
        changes = {"model": section.model, "revision": section.revision, "trust_remote_code": False}
        params = {"target": like | changes, "measured": {"tasks": True}}  # may be a classifier
        return planner.plan.add("target", section.model, params)
    training = WarmupSection(
        epochs=section.epochs, lr=section.lr, batch=section.batch, seed=section.seed
    )
    params = {
        "chat": planner.chat,
        "compute": planner.compute,
        "warmup": training.model_dump(),
    }
    parents = _texts(planner, "warmup", section.examples) | {"target": planner.warmup()}
    return planner.plan.add("warmup", "finetuned", params, parents)


def finetuned_stages(planner: RunPlanner) -> dict[str, Node]:
    """The fine-tuned model and its curvature, by the roles that the estimator reads."""
    model = finetuned_model(planner)
    made = planner.curvature(model, _texts(planner, "fisher", _checked(planner).fisher))
    return {"finetuned": model} | {f"finetuned_{stage}": node for stage, node in made.items()}


def _texts(planner: RunPlanner, name: str, size: float) -> dict[str, Node]:
    """The pool of the second training and a split of it."""
    section = _checked(planner)
    assert section.pool is not None
    chosen: Any = section.pool
    label = f"finetuned-{chosen.name or 'pool'}"
    pool = planner.plan.add("pool", label, {"pool": chosen.model_dump()})
    params = {"split": {"name": name, "size": size, "seed": section.seed}}
    return {"pool": pool, "split": planner.plan.add("split", name, params, {"pool": pool})}


def _checked(planner: RunPlanner) -> FinetunedSection:
    """The section ``finetuned``, once the run is known to make sense with it."""
    section, config = planner.plan.study.config.finetuned, planner.config
    given = section.model is not None
    wrong: dict[str, tuple[Any, str, bool]] = {
        "finetuned.pool": (None, "a pool: the examples of the fine-tuning", section.pool is None),
        "proxy.kind": (config.proxy.kind, "target", config.proxy.kind != "target"),
        "influence.checkpoints": (
            config.influence.checkpoints,
            "last",
            config.influence.checkpoints != "last",
        ),
        "curvature.proximity": (
            "auto",
            "a number: the learning rates of a given model are not known",
            given and config.curvature.proximity == "auto",
        ),
    }
    for key, (value, allowed, is_wrong) in wrong.items():
        if is_wrong:
            raise ConfigError(
                "estimator multistage cannot work with this setting",
                where=f"runs.{planner.run.name}: {key}",
                value=value,
                allowed=allowed,
            )
    return section
