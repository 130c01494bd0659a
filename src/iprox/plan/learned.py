"""Runs whose scorer learns from the influence that a teacher measures.

The teacher is what the run's own sections describe: the target or a proxy of it, with sketched
gradients. It labels the ``teach`` split; what learns from it scores the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from iprox.errors import ConfigError
from iprox.plan.nodes import Node, links_at

if TYPE_CHECKING:
    from iprox.plan.runs import RunPlanner

SEEN = {"max_length", "max_cut"}
"""Keys of the section ``encoder`` that decide what it sees of a text."""

LESS = "less"
"""The scorer that reads the moments of the warm-up's optimizer."""

COORDINATEWISE = ("countsketch", "random")
"""Sketches that take gradients, and so any function of them, coordinate by coordinate."""

NOT_TAUGHT = {"model", "revision", "train"}
"""Keys of the section ``encoder`` that its training does not depend on."""


def learned_nodes(planner: RunPlanner) -> dict[str, Node]:
    """The stages of a run by link name, up to its ranking or, if it ends there, its fidelity.

    Raises:
        ConfigError: The teacher's gradients are not sketched, or its slice is the whole pool.
    """
    make = LEARNED[planner.config.scorer.kind]
    nodes = make(planner)
    shown = {"pool": planner.pool, **_without_queries(nodes)}
    if planner.config.fidelity.enabled:
        shown["fidelity"] = _fidelity(planner, nodes)
    if planner.config.until == "fidelity":
        return shown
    earlier = {epoch: make(then) for epoch, then in planner.earlier()}
    for epoch, made in earlier.items():
        shown |= links_at(epoch, _without_queries(made))
    return shown | {"ranking": _ranking(planner, nodes, earlier)}


def _without_queries(nodes: dict[str, Node]) -> dict[str, Node]:
    """Nodes that a run shows: a task's queries are inputs of others."""
    return {role: node for role, node in nodes.items() if not role.startswith("query/")}


def _backbone(planner: RunPlanner) -> Node:
    """The encoder as it was published."""
    published = planner.config.encoder.model_dump(include={"model", "revision"})
    return planner.plan.add("backbone", published["model"].split("/")[-1], {"encoder": published})


def _embeddings(planner: RunPlanner, encoder: Node) -> Node:
    """Every example's text embedding."""
    return planner.plan.add(
        "embeddings",
        encoder.label,
        {"encoder": planner.config.encoder.model_dump(include=SEEN)},
        {"encoder": encoder, "pool": planner.pool},
        planner.plan.study.config.shards,
    )


def _regression(planner: RunPlanner) -> dict[str, Node]:
    """A linear function of a published encoder's embeddings for each task."""
    _check_lesson(planner)
    nodes = {"backbone": _backbone(planner), **planner.scoring_model()}
    nodes["teach"] = planner.features(nodes["model"], "teach")
    nodes["heldout"] = planner.features(nodes["model"], "fidelity")
    embeddings = _embeddings(planner, nodes["backbone"])
    parents = {"embeddings": embeddings, "teach": nodes["teach"], "heldout": nodes["heldout"]}
    params: dict[str, Any] = {
        "influence": planner.config.influence.model_dump(include={"score", "val_agg"}),
        "scorer": planner.config.scorer.model_dump(include={"fit", "seed"}),
    }
    if planner.sketch():
        params["features"] = planner.sketch()
        parents |= planner.queries(nodes["model"])
    for task in planner.tasks:
        label = f"{task.name}-{planner.label(nodes['model'])}-{params['scorer']['fit']}"
        nodes[f"query/{task.name}"] = planner.plan.add(
            "head", label, params | {"task": {"name": task.name}}, parents
        )
    return nodes | {"features": embeddings}


def _less(planner: RunPlanner) -> dict[str, Node]:
    """Adam directions of the pool's examples and gradients of single queries, both sketched.

    Raises:
        ConfigError: There are no moments, or the sketch cannot take directions.
    """
    kind, proxy = planner.config.features.kind, planner.config.proxy
    where = f"runs.{planner.run.name}"
    if kind not in COORDINATEWISE:
        raise ConfigError(
            "Adam's directions need a sketch that takes gradients coordinate by coordinate",
            where=f"{where}: features.kind",
            value=kind,
            allowed=", ".join(COORDINATEWISE),
            fix="set features: {kind: countsketch}, or random as LESS has it, which costs far more",
        )
    is_backward = proxy.is_factorised and proxy.passes == "backward"
    has_moments = is_backward or proxy.kind in ("target", "model")
    if not has_moments or planner.config.warmup.epochs == 0:
        raise ConfigError(
            "Adam's moments are those of weights that were warmed up",
            where=f"{where}: proxy.kind, proxy.passes, warmup.epochs",
            value=f"{proxy.kind}, {proxy.passes}, {planner.config.warmup.epochs:g}",
            allowed="proxy.kind target or model, or ipsvd or svd with proxy.passes backward, which "
            "keeps the target's weights; and epochs above 0",
        )
    nodes = planner.scoring_model()
    trained = nodes.get("proxy-warmup", nodes["warmup"])
    nodes["features"] = planner.features(nodes["model"], "all", moments=trained)
    sketches = query_sketches(planner, nodes["model"], planner.adapters())
    return nodes | {f"query/{task}": node for task, node in sketches.items()}


def _influcoder(planner: RunPlanner) -> dict[str, Node]:
    """An encoder taught by the run's scoring model, or used as it is, and its embeddings."""
    section = planner.config.encoder
    nodes = {"backbone": _backbone(planner)}
    encoder = nodes["backbone"]
    if section.train:
        nodes |= _taught(planner, encoder)
        encoder = nodes["encoder"]
    seen = section.model_dump(include=SEEN)
    nodes["features"] = _embeddings(planner, encoder)
    for task in planner.tasks:
        nodes[f"query/{task.name}"] = planner.plan.add(
            "query_embeddings",
            f"{task.name}-{encoder.label}",
            {"encoder": seen | {"instruction": section.instruction}},
            {"encoder": encoder, "task": planner.plan.shared[f"task-{task.name}"]},
        )
    return nodes


def _taught(planner: RunPlanner, backbone: Node) -> dict[str, Node]:
    """The teacher, what it says of its split and of the fidelity slice, and the taught encoder."""
    _check_teacher(planner)
    nodes = planner.scoring_model()
    nodes["teach"] = planner.features(nodes["model"], "teach")
    nodes["heldout"] = planner.features(nodes["model"], "fidelity")
    sketches = query_sketches(planner, nodes["model"])
    parents = {role: nodes[role] for role in ("teach", "heldout")}
    parents |= {"backbone": backbone, "pool": planner.pool}
    parents |= {f"sketches/{task}": node for task, node in sketches.items()}
    nodes |= {f"sketches-{task}": node for task, node in sketches.items()}
    parents |= {f"task/{t.name}": planner.plan.shared[f"task-{t.name}"] for t in planner.tasks}
    params = {"encoder": planner.config.encoder.model_dump(exclude=NOT_TAUGHT)}
    label = f"{backbone.label}-{planner.label(nodes['model'])}"
    nodes["encoder"] = planner.plan.add("encoder", label, params, parents)
    return nodes


def query_sketches(
    planner: RunPlanner, model: Node, adapters: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Node]:
    """Sketches of single queries' gradients at a scoring model, by task.

    Args:
        planner: The run.
        model: The scoring model.
        adapters: Parameters by which they are gradients of low-rank updates, if any.
    """
    sketch = planner.sketch()
    reduction = planner.config.influence.model_dump(include={"loss_reduction"})
    params = planner.passing() | {"features": sketch, "influence": reduction, **adapters}
    asked = planner.asked(model)
    return {
        task.name: planner.plan.add(
            "query_sketches",
            f"{task.name}-{planner.label(asked)}-{sketch['kind']}",
            params,
            {"model": asked, "task": planner.plan.shared[f"task-{task.name}"]},
        )
        for task in planner.tasks
    }


def _ranking(
    planner: RunPlanner, nodes: dict[str, Node], earlier: dict[int, dict[str, Node]]
) -> Node:
    """Every example's score, from its row and those of the queries, over all checkpoints.

    Args:
        planner: The run.
        nodes: What it adds at the end of the warm-up.
        earlier: Epoch -> what it adds at the end of that epoch.
    """
    params: dict[str, Any] = {
        "influence": _averaged(planner, include={"val_agg"}),
        "scorer": {"kind": planner.config.scorer.kind},
        "tasks": [task.name for task in planner.tasks],
    }
    parents = {"pool": planner.pool, **_compared(nodes)}
    for epoch, made in earlier.items():
        parents |= {f"checkpoint/{epoch}/{role}": node for role, node in _compared(made).items()}
    label = nodes["features"].label
    if earlier:
        parents["warmup"] = nodes["warmup"]
        label = f"{label}-epochs"
    return planner.plan.add("ranking", label, params, parents)


def _compared(nodes: dict[str, Node]) -> dict[str, Node]:
    """The rows of the pool and of the queries."""
    queries = {role: node for role, node in nodes.items() if role.startswith("query/")}
    return {"features": nodes["features"], **queries}


def _fidelity(planner: RunPlanner, nodes: dict[str, Node]) -> Node:
    """Agreement with the target's exact scores, and with the teacher's own, on the slice."""
    split = planner.split("fidelity")
    parents = {"proxy": nodes["features"], "split": split}
    parents["target"] = planner.features(planner.warmup(), "fidelity", exact=True)
    parents |= {f"proxy_{r}": node for r, node in nodes.items() if r.startswith("query/")}
    if "encoder" in nodes:
        parents["teacher"] = nodes["heldout"]
        sketches = query_sketches(planner, nodes["model"])
        parents |= {f"teacher_query/{task}": node for task, node in sketches.items()}
    params = {
        "fidelity": planner.config.fidelity.model_dump(exclude={"floor"}),
        "influence": _averaged(planner),
    }
    return planner.plan.add("fidelity", nodes["features"].label, params, parents)


def _averaged(planner: RunPlanner, include: set[str] | None = None) -> dict[str, Any]:
    """The section ``influence``, averaged as the scorer has it: LESS by subtask, by definition."""
    section = planner.config.influence.model_dump(include=include)
    is_less = planner.config.scorer.kind == LESS
    return section | ({"val_agg": "subtask_max"} if is_less else {})


def _check_teacher(planner: RunPlanner) -> None:
    """Refuse a teacher that cannot label single pairs, or that leaves nothing to hold out.

    Raises:
        ConfigError: Says which.
    """
    if not planner.sketch():
        raise ConfigError(
            "a teacher labels pairs of examples and queries by sketches of their gradients",
            where=f"runs.{planner.run.name}: features.kind",
            value="exact",
            allowed="countsketch, lora, logra, random",
            fix="set features: {kind: lora}",
        )
    _check_lesson(planner)


def _check_lesson(planner: RunPlanner) -> None:
    """Refuse a fidelity slice from which nothing is left to teach with, or several teachers.

    Raises:
        ConfigError: It is the whole pool, or influence is summed over checkpoints.
    """
    if planner.slice_is_pool():
        raise ConfigError(
            "what learns is judged on the fidelity slice, which leaves no example to teach with",
            where=f"runs.{planner.run.name}: split.fidelity",
            value=planner.config.split.fidelity,
            fix="make it smaller: split.teach and split.fidelity share no example",
        )
    if planner.earlier():
        raise ConfigError(
            "what learns has one teacher, at the end of the warm-up",
            where=f"runs.{planner.run.name}: influence.checkpoints",
            value=planner.config.influence.checkpoints,
            allowed="last",
        )


LEARNED: dict[str, Callable[[RunPlanner], dict[str, Node]]] = {
    "influcoder": _influcoder,
    "regression": _regression,
    LESS: _less,
}
"""Scorer -> what it adds: ``features``, with a row for every pool example, and ``query/<task>``,
with the rows they are compared with."""
