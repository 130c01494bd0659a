"""From a study to the stages it needs, each with an identity that its folder is named after.

A stage's identity is a digest of its name, its own parameters and its parents' identities.
Equal identities are one job: runs of a sweep share everything upstream of what they change,
old results stay beside new ones, and going back to an old value finds its old folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iprox.errors import ConfigError, did_you_mean
from iprox.store.manifest import MANIFEST, digest_json
from iprox.study.estimators import ESTIMATORS
from iprox.study.load import Run, Study
from iprox.study.schema import TaskSection

RESULTS = Path("results")
ID_DIGITS = 10

MAX_FISHER_SHARDS = 8
"""Most jobs a curvature pass is cut into, whatever ``shards`` says."""

SKETCH_SIZES = {
    "countsketch": ("dim",),
    "logra": ("rank",),
    "random": ("dim", "distribution"),
}
"""Keys of the section ``features`` that a kind of sketch uses besides those of all kinds."""


@dataclass(frozen=True)
class Node:
    """One stage of a plan.

    Attributes:
        stage: Name of the stage: the rule that makes it and the folder it is in.
        id: Readable label and digest, unique for stage, parameters and ancestry.
        params: The stage's own parameters by section.
        parents: Role -> parent.
        shards: Number of jobs it is cut into (features), not part of the identity.
    """

    stage: str
    id: str
    params: dict[str, Any]
    parents: dict[str, Node] = field(default_factory=dict)
    shards: int = 1

    @property
    def folder(self) -> Path:
        """Where its files are, relative to the working folder."""
        return RESULTS / self.stage / self.id

    @property
    def manifest(self) -> Path:
        """The file that says it is finished."""
        return self.folder / MANIFEST

    @property
    def spec(self) -> dict[str, Any]:
        """What ``spec.json`` says: everything that went into the identity."""
        parents = {r: {"id": n.id, "stage": n.stage} for r, n in sorted(self.parents.items())}
        return {"id": self.id, "params": self.params, "parents": parents, "stage": self.stage}


@dataclass(frozen=True)
class RunPlan:
    """A run and the stages it resolves to, by the name their links have in the study's folder."""

    run: Run
    nodes: dict[str, Node]


@dataclass
class Plan:
    """All stages of a study."""

    study: Study
    nodes: dict[tuple[str, str], Node] = field(default_factory=dict)
    runs: dict[str, RunPlan] = field(default_factory=dict)
    shared: dict[str, Node] = field(default_factory=dict)
    report: Node | None = None

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.config.study

    @property
    def digest(self) -> str:
        """Changes when a run, a stage or a link does."""
        runs = {n: {k: v.id for k, v in r.nodes.items()} for n, r in self.runs.items()}
        report = None if self.report is None else self.report.id
        return digest_json({"report": report, "runs": runs})[:ID_DIGITS]

    def node(self, stage: str, id: str) -> Node:
        """The stage with that identity.

        Raises:
            ConfigError: The study has no such stage; the message lists what it has.
        """
        try:
            return self.nodes[stage, id]
        except KeyError:
            have = [i for s, i in self.nodes if s == stage]
            raise ConfigError(
                f"this study has no {stage} with that id",
                where=f"results/{stage}/{id}",
                value=id,
                allowed=did_you_mean(id, have) or f"no {stage} at all",
                fix="iprox plan CONFIG lists all ids of a study",
            ) from None

    def add(
        self,
        stage: str,
        label: str,
        params: dict[str, Any],
        parents: dict[str, Node] | None = None,
        shards: int = 1,
    ) -> Node:
        """Add a stage, or return the equal one that is there already."""
        parents = parents or {}
        ancestry = {role: parent.id for role, parent in parents.items()}
        digest = digest_json({"params": params, "parents": ancestry, "stage": stage})
        id = f"{_clean(label)}-{digest[:ID_DIGITS]}"
        return self.nodes.setdefault((stage, id), Node(stage, id, params, parents, shards))

    def in_order(self) -> Iterator[Node]:
        """All stages, parents before children."""
        done: set[tuple[str, str]] = set()

        def visit(node: Node) -> Iterator[Node]:
            if (node.stage, node.id) in done:
                return
            done.add((node.stage, node.id))
            for parent in node.parents.values():
                yield from visit(parent)
            yield node

        for node in list(self.nodes.values()):
            yield from visit(node)


def plan_study(study: Study) -> Plan:
    """Resolve a study into its stages. Pure: reads no file, imports neither torch nor Snakemake.

    Raises:
        ConfigError: A run asks for something the study cannot give.
    """
    plan = Plan(study)
    config = study.config
    pool = plan.add("pool", _pool_label(plan), {"pool": config.pool.model_dump()})
    target = plan.add(
        "target", config.target.model, {"target": config.target.model_dump(exclude={"attention"})}
    )
    plan.shared = {"pool": pool, "target": target}
    for task in config.tasks:
        plan.shared[f"task-{task.name}"] = plan.add("task", task.name, {"task": task.model_dump()})
    for run in study.runs:
        plan.runs[run.name] = RunPlan(run, _RunPlanner(plan, run).nodes())
    if any(r.config.evaluate.enabled and r.config.until == "evaluation" for r in study.runs):
        first = next(
            r for r in study.runs if r.config.evaluate.enabled and r.config.until == "evaluation"
        )
        planner = _RunPlanner(plan, first)
        for task in config.tasks:
            plan.shared[f"base/evaluation-{task.name}"] = planner.evaluation(target, task)
    plan.report = _report(plan)
    return plan


class _RunPlanner:
    """Adds the stages of one run to a plan, from the pool to the evaluations."""

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run, self.config = plan, run, run.config
        self.tasks = plan.study.config.tasks
        self.pool, self.target = plan.shared["pool"], plan.shared["target"]
        target = plan.study.config.target
        self.compute = {"attention": target.attention, "dtype": target.dtype}
        self.chat = self.config.chat.model_dump()

    def nodes(self) -> dict[str, Node]:
        """All stages of the run by link name."""
        random = self.config.scorer.kind == "random"
        nodes = {"pool": self.pool} if random else self._scoring_model()
        until = self.config.until
        if not random:
            nodes |= self._fidelity(nodes)
        if until == "fidelity":
            return nodes
        nodes |= self._random_ranking() if random else self._gradient_ranking(nodes)
        if until == "ranking":
            return nodes
        nodes["selection"] = self.plan.add(
            "selection",
            f"{_readable(nodes['ranking'])}-{self.config.select.fraction:g}",
            {"select": self.config.select.model_dump()},
            {"pool": self.pool, "ranking": nodes["ranking"]},
        )
        if until == "selection":
            return nodes
        return nodes | self._outcome(nodes["selection"], per_task=not random)

    def split(self, name: str) -> Node:
        """The stage that draws one named subset of the pool."""
        sizes = self.config.split
        params: dict[str, Any] = {"name": name, "size": getattr(sizes, name), "seed": sizes.seed}
        if name == "align":
            params["disjoint_from"] = {"name": "probe", "size": sizes.probe}
        return self.plan.add("split", name, {"split": params}, {"pool": self.pool})

    def warmup(self) -> Node:
        """The warmed-up target."""
        split = self.split("warmup")
        params = {
            "chat": self.chat,
            "compute": self.compute,
            "warmup": self.config.warmup.model_dump(),
        }
        parents = {"pool": self.pool, "split": split, "target": self.target}
        return self.plan.add("warmup", self.plan.study.config.target.model, params, parents)

    def _scoring_model(self) -> dict[str, Node]:
        """The model that scores: the warmed-up target, or a proxy made from it."""
        proxy, warmup = self.config.proxy, self.warmup()
        layers = proxy.layers.model_dump()
        nodes = {"pool": self.pool, "target": self.target, "warmup": warmup, "model": warmup}
        if proxy.kind == "target":
            return nodes
        made_of = {"warmup": warmup}
        if proxy.kind == "ipsvd":
            nodes["probe"] = made_of["probe"] = self.plan.add(
                "probe",
                f"{proxy.kind}-{self.config.split.probe}",
                {
                    "chat": self.chat,
                    "compute": self.compute,
                    "influence": {"loss_reduction": self.config.influence.loss_reduction},
                    "layers": layers,
                    "probe": self._probe_params(),
                },
                {"pool": self.pool, "split": self.split("probe"), "warmup": warmup},
            )
        solver = proxy.model_dump(include={"kind", "dense_rule"})
        if proxy.kind == "ipsvd":
            solver |= proxy.model_dump(include={"mode", "damping_mode", "damping", "objective"})
        nodes["decomposition"] = self.plan.add(
            "decomposition",
            proxy.kind if proxy.kind == "svd" else f"{proxy.kind}-{proxy.mode}",
            {"decomposition": solver, "layers": layers},
            made_of,
        )
        cut = {"sparsity", "rank_multiple", "rank_rounding", "dense_rule", "gauge"}
        nodes["factors"] = self.plan.add(
            "factors",
            f"{proxy.kind}-{proxy.sparsity:g}",
            {"factors": proxy.model_dump(include=cut)},
            {"decomposition": nodes["decomposition"]},
        )
        parents = {"factors": nodes["factors"], "warmup": warmup}
        align: dict[str, Any] = {"epochs": 0.0, "recover_epochs": 0.0}
        if self.config.align.trains:
            parents |= {"pool": self.pool, "split": self.split("align")}
            align = self.config.align.model_dump()
        nodes["proxy"] = nodes["model"] = self.plan.add(
            "proxy",
            f"{proxy.kind}-{proxy.sparsity:g}",
            {
                "align": align,
                "chat": self.chat,
                "compute": self.compute,
                "gauge": proxy.gauge,
                "influence": {"loss_reduction": self.config.influence.loss_reduction},
                "layers": layers,
            },
            parents,
        )
        return nodes

    def _probe_params(self) -> dict[str, Any]:
        """The probe's parameters; the paper's rule for N needs what the ranks depend on."""
        params = self.config.probe.model_dump()
        if self.config.probe.tokens == "rank":
            cut = {"sparsity", "rank_multiple", "rank_rounding", "dense_rule"}
            params["rank_rule"] = self.config.proxy.model_dump(include=cut)
        return params

    def queries(self, model: Node) -> dict[str, Node]:
        """What the pool is scored against at a scoring model: a node per task, by role.

        Query gradients themselves, or what the run's estimator makes of them.
        """
        return {
            f"query/{task.name}": self.direction(self.query(model, task), model, task)
            for task in self.tasks
        }

    def query(self, model: Node, task: TaskSection) -> Node:
        """Query gradients of a task at a scoring model, the same for all estimators."""
        params = self._passing() | {
            "influence": self.config.influence.model_dump(exclude={"score"})
            | {"estimator": "tracin"},
        }
        parents = {"model": model, "task": self.plan.shared[f"task-{task.name}"]}
        return self.plan.add("query", f"{task.name}-{_label(model)}", params, parents)

    def direction(self, query: Node, model: Node, task: TaskSection) -> Node:
        """Query gradients as the run's estimator changes them; themselves if it does not."""
        estimator = self.config.influence.estimator
        reads = ESTIMATORS[estimator]
        if not reads:
            return query
        if self.config.curvature.damping_mode == "factored" and reads != ("curvature",):
            raise ConfigError(
                "factored damping is for curvature that is a product of two factors",
                where=f"runs.{self.run.name}: influence.estimator, curvature.damping_mode",
                value=f"{estimator} with factored",
                allowed="kfac with factored; any estimator with relative or absolute",
            )
        made = self.curvature(model) | {"model": model, "pool": self.pool}
        if "split" in reads:
            made["split"] = self.split("fisher")
        params: dict[str, Any] = {
            "curvature": self.config.curvature.model_dump(include={"damping", "damping_mode"}),
            "estimator": {"kind": estimator},
        }
        if "model" in reads:
            params |= self._passing() | self._loss()
        parents = {"query": query} | {role: made[role] for role in reads}
        label = f"{task.name}-{_label(model)}-{estimator}"
        return self.plan.add("direction", label, params, parents)

    def curvature(self, model: Node) -> dict[str, Node]:
        """The stages of a scoring model's curvature that the run's estimator reads."""
        reads = ESTIMATORS[self.config.influence.estimator]
        if "curvature" not in reads:
            return {}
        fit = self.config.curvature.model_dump(include={"labels", "max_factor_dim", "seed"})
        if fit["labels"] == "empirical":
            del fit["seed"]
        params = self._passing() | self._loss() | {"curvature": fit}
        passed = {"model": model, "pool": self.pool, "split": self.split("fisher")}
        label = f"{_label(model)}-{self.config.split.fisher:g}"
        shards = self._fisher_shards()
        covariance = self.plan.add("covariance", label, params, passed, shards)
        nodes = {
            "covariance": covariance,
            "curvature": self.plan.add("curvature", label, {}, {"covariance": covariance}),
        }
        if "eigenvalues" in reads:
            parents = passed | {"curvature": nodes["curvature"]}
            nodes["eigenvalues"] = self.plan.add("eigenvalues", label, params, parents, shards)
        return nodes

    def _fisher_shards(self) -> int:
        """Jobs of a curvature pass: each writes sums of the curvature's size, so they are few."""
        return min(self.plan.study.config.shards, MAX_FISHER_SHARDS)

    def _passing(self) -> dict[str, Any]:
        """Parameters of every stage that passes texts through a scoring model."""
        layers = self.config.proxy.layers.model_dump()
        return {"chat": self.chat, "compute": self.compute, "layers": layers}

    def _loss(self) -> dict[str, Any]:
        """Parameters of the loss whose gradients are taken."""
        return {"influence": {"loss_reduction": self.config.influence.loss_reduction}}

    def features(self, model: Node, subset: str, exact: bool = False) -> Node:
        """Dots and norms, or sketches, of pool examples at a scoring model.

        Sketches do not depend on the tasks, so a new task leaves them as they are.

        Args:
            model: The scoring model.
            subset: ``all`` or the name of a split.
            exact: Exact features, whatever the run asks for.
        """
        sketch = {} if exact else self.sketch()
        parents = {"model": model, "pool": self.pool}
        parents |= {} if sketch else self.queries(model)
        if subset != "all":
            parents["split"] = self.split(subset)
        params: dict[str, Any] = self._passing() | self._loss() | {"subset": {"name": subset}}
        if sketch:
            params["features"] = sketch | {"check": self.config.features.check}
        shards = self.plan.study.config.shards if subset == "all" else 1
        parts = [_label(model), sketch.get("kind"), None if subset == "all" else subset]
        return self.plan.add("features", "-".join(filter(None, parts)), params, parents, shards)

    def sketch(self) -> dict[str, Any]:
        """Settings of the run's sketch, those that its kind uses; empty for exact features."""
        section = self.config.features
        if section.kind == "exact":
            return {}
        return section.model_dump(include={"kind", "dtype", "seed", *SKETCH_SIZES[section.kind]})

    def _fidelity(self, nodes: dict[str, Node]) -> dict[str, Node]:
        """Comparison with the target's exact scores on the fidelity slice.

        Nothing is compared when the run's own scores are the target's exact ones.
        """
        if not self.config.fidelity.enabled:
            return {}
        subset = "all" if self._slice_is_pool() else "fidelity"
        if self.config.proxy.kind == "target" and not self.sketch():
            return {}
        params: dict[str, Any] = {
            "fidelity": self.config.fidelity.model_dump(),
            "influence": self.config.influence.model_dump(),
        }
        ours = self.features(nodes["model"], subset)
        parents = {"proxy": ours, "target": self.features(nodes["warmup"], subset, exact=True)}
        label = _label(nodes["model"])
        if self.sketch():
            params["features"] = self.sketch()
            parents |= {f"proxy_{role}": q for role, q in self.queries(nodes["model"]).items()}
            label = f"{label}-{self.config.features.kind}"
        return {"fidelity": self.plan.add("fidelity", label, params, parents)}

    def _slice_is_pool(self) -> bool:
        """Whether the fidelity slice is known to be the whole pool, so that its pass is shared."""
        size, limit = self.config.split.fidelity, self.plan.study.config.pool.limit
        if isinstance(size, float):
            return size == 1.0
        return limit is not None and size >= limit

    def _gradient_ranking(self, nodes: dict[str, Node]) -> dict[str, Node]:
        """Features of the pool, and the ranking, which sketches the queries if it needs to."""
        features = self.features(nodes["model"], "all")
        curvature = self.curvature(nodes["model"])
        params: dict[str, Any] = {
            "influence": self.config.influence.model_dump(),
            "scorer": {"kind": "gradient"},
            "tasks": [task.name for task in self.tasks],
        }
        parents = {"features": features}
        if self.sketch():
            params["features"] = self.sketch()
            parents |= self.queries(nodes["model"])
        ranking = self.plan.add("ranking", _readable(features), params, parents)
        return {**curvature, "features": features, "ranking": ranking}

    def _random_ranking(self) -> dict[str, Node]:
        scorer = self.config.scorer
        params: dict[str, Any] = {
            "scorer": {"kind": "random", "seed": scorer.seed + self.run.draw},
            "tasks": [task.name for task in self.tasks],
        }
        return {
            "ranking": self.plan.add(
                "ranking", f"random-{params['scorer']['seed']}", params, {"pool": self.pool}
            )
        }

    def _outcome(self, selection: Node, per_task: bool) -> dict[str, Node]:
        """Fine-tuning on the selection of each task, and the evaluation of what comes out.

        A random order is the same for every task, so one model serves all of them.
        """
        nodes: dict[str, Node] = {}
        if not self.config.finetune.enabled:
            return nodes
        for task in self.tasks:
            subset = task.name if per_task else "all"
            model = self.finetune(selection, subset)
            nodes[f"finetune-{subset}"] = model
            if self.config.evaluate.enabled:
                nodes[f"evaluation-{task.name}"] = self.evaluation(model, task)
        return nodes

    def finetune(self, selection: Node, subset: str) -> Node:
        """The target fine-tuned on one task's selection."""
        settings = self.config.finetune
        start = self.target if settings.init == "base" else self.warmup()
        params = {
            "chat": self.chat,
            "compute": self.compute,
            "finetune": settings.model_dump(exclude={"enabled", "init"}),
            "subset": {"task": subset},
        }
        return self.plan.add(
            "finetune",
            f"{_readable(selection)}-{subset}",
            params,
            {"model": start, "selection": selection},
        )

    def evaluation(self, model: Node, task: TaskSection) -> Node:
        """What a model can do on a task."""
        params = {
            "chat": self.chat,
            "compute": self.compute,
            "evaluate": self.config.evaluate.model_dump(exclude={"enabled"}),
        }
        parents = {"model": model, "task": self.plan.shared[f"task-{task.name}"]}
        return self.plan.add("evaluation", f"{_readable(model)}-{task.name}", params, parents)


def _report(plan: Plan) -> Node:
    """The report: its parents are every stage that a run links to."""
    config = plan.study.config
    parents = {name.replace("task-", "task/"): node for name, node in plan.shared.items()}
    runs = {}
    for name, run_plan in plan.runs.items():
        run = run_plan.run
        gradient = run.config.scorer.kind == "gradient"
        factorised = gradient and run.config.proxy.kind != "target"
        runs[name] = {
            "changed": run.changed,
            "group": run.group,
            "preset": run.config.preset,
            "proxy": run.config.proxy.kind if gradient else None,
            "scorer": run.config.scorer.kind,
            "sparsity": run.config.proxy.sparsity if factorised else None,
            "until": run.config.until,
        }
        shown = {k: n for k, n in run_plan.nodes.items() if k not in ("pool", "target", "model")}
        parents |= {f"{name}/{key}": node for key, node in shown.items()}
        if run.config.until == "fidelity" and "fidelity" in run_plan.nodes:
            parents[f"{name}/features"] = run_plan.nodes["fidelity"].parents["proxy"]
    params = {
        "config": config.model_dump(mode="json", exclude={"data_dir", "runs", "shards"}),
        "report": config.report.model_dump(),
        "runs": runs,
        "study": config.study,
        "tasks": [task.name for task in config.tasks],
    }
    return plan.add("report", config.study, params, parents)


def _pool_label(plan: Plan) -> str:
    pool = plan.study.config.pool
    name = pool.name or (Path(pool.path).stem if pool.path else None)
    name = name or (pool.hub.name.split("/")[-1] if pool.hub else "") or "pool"
    return f"{name}-{pool.limit}" if pool.limit else name


def _readable(node: Node) -> str:
    """The readable part of an id."""
    return node.id.rsplit("-", 1)[0]


def _label(model: Node) -> str:
    """What a scoring model is called in the ids of what is computed at it."""
    return _readable(model) if model.stage == "proxy" else "target"


def _clean(label: str) -> str:
    """A label that is safe as a folder name and in a Snakemake wildcard."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:48].rstrip("-.")
    return text or "x"
