"""The stages of one run of a study, from the pool to the evaluations.

Each method adds a stage, or some, and says which parameters it depends on: those and no others.
"""

from __future__ import annotations

import math
from typing import Any

from iprox.errors import ConfigError
from iprox.plan.learned import LEARNED, LESS, learned_nodes
from iprox.plan.multistage import finetuned_model, finetuned_stages
from iprox.plan.nodes import OF_PASSES, Node, Plan, links_at
from iprox.plan.prefilter import prefilter_node
from iprox.plan.scorers import scorer_nodes
from iprox.plan.selection import is_per_task, selection_node
from iprox.study.estimators import ESTIMATORS
from iprox.study.load import Run
from iprox.study.schema import ProxySection, TaskSection
from iprox.study.scorers import GRADIENT

QUERY_KEYS = {"loss_reduction", "val_agg"}
"""Keys of the section ``influence`` that query gradients depend on."""

EXACT = {"query_dtype": "float32", "query_rank": 0}
"""Values of the keys of ``influence`` that reduce query gradients, by which nothing is lost."""

MAX_FISHER_SHARDS = 8
"""Most jobs a curvature pass is cut into, whatever ``shards`` says."""

SKETCH_SIZES = {
    "countsketch": ("dim",),
    "lora": ("dim", "rank"),
    "logra": ("rank",),
    "random": ("dim", "distribution"),
}
"""Keys of the section ``features`` that a kind of sketch uses besides those of all kinds."""

DISJOINT = {"align": "probe", "teach": "fidelity"}
"""Split -> the one it shares no example with."""

RANK_RULE = ("sparsity", "rank_multiple", "rank_rounding", "dense_rule")
"""Keys of the section ``proxy`` that give a layer its rank from its shape alone."""

WEIGHTING = {"mode", "damping_mode", "damping", "whiten", "objective"}
"""Keys of the section ``proxy`` that say how a decomposition weights errors."""

CUT = {*RANK_RULE, "rank_allocation", "gauge"}
"""Keys of the section ``proxy`` that the factors depend on, besides the decomposition."""


class RunPlanner:
    """Adds the stages of one run to a plan, from the pool to the evaluations.

    Args:
        plan: What stages are added to.
        run: The run.
        epoch: Of the warm-up, from 1: what is done at its end is done at the end of this epoch
            instead. The last when absent.
    """

    def __init__(self, plan: Plan, run: Run, epoch: int | None = None) -> None:
        self.plan, self.run, self.config, self.epoch = plan, run, run.config, epoch
        self.tasks = plan.study.config.tasks
        self.pool, self.target = plan.shared["pool"], plan.shared["target"]
        target = plan.study.config.target
        self.compute = {"attention": target.attention, "dtype": target.dtype}
        self.chat = self.config.chat.model_dump()

    def nodes(self) -> dict[str, Node]:
        """All stages of the run by link name."""
        kind, until = self.config.scorer.kind, self.config.until
        nodes = {"pool": self.pool}
        if kind in LEARNED:
            nodes = learned_nodes(self)
        elif kind == GRADIENT:
            nodes = self.scoring_model()
            nodes |= self._fidelity(nodes)
        if until == "fidelity":
            return nodes
        if kind == GRADIENT:
            nodes |= self._gradient_ranking(nodes)
        elif kind not in LEARNED:
            nodes |= scorer_nodes(self)
        if until == "ranking":
            return nodes
        nodes["selection"] = selection_node(self, nodes["ranking"])
        if until == "selection":
            return nodes
        return nodes | self._outcome(nodes["selection"], per_task=is_per_task(nodes["selection"]))

    def split(self, name: str) -> Node:
        """The stage that draws one named subset of the pool."""
        sizes = self.config.split
        params: dict[str, Any] = {"name": name, "size": getattr(sizes, name), "seed": sizes.seed}
        if name in DISJOINT:
            other = DISJOINT[name]
            params["disjoint_from"] = {"name": other, "size": getattr(sizes, other)}
        return self.plan.add("split", name, {"split": params}, {"pool": self.pool})

    def warmup(self, model: Node | None = None) -> Node:
        """The warmed-up target, or another model warmed up as the target is, at the epoch."""
        target = model or self.target
        split = self.split("warmup")
        params = {
            "chat": self.chat,
            "compute": self.compute,
            "warmup": self.config.warmup.model_dump(),
        }
        if self._earlier_epochs():
            params["epochs"] = {"kept": True}
        if any(run.config.scorer.kind == LESS for run in self.plan.study.runs):
            params["moments"] = {"kept": True}  # for all runs, so that they share the warm-up
        parents = {"pool": self.pool, "split": split, "target": target}
        label = target.params["target"]["model"]
        warmup = self.plan.add("warmup", label, params, parents)
        if self.epoch is None:
            return warmup
        return self.plan.add(
            "checkpoint",
            f"{label}-epoch-{self.epoch}",
            {"checkpoint": {"epoch": self.epoch}, "compute": self.compute},
            {"warmup": warmup},
        )

    def _earlier_epochs(self) -> range:
        """Epochs of the warm-up before its last whose checkpoints influence is summed over."""
        influence, epochs = self.config.influence, self.config.warmup.epochs
        return range(1, math.ceil(epochs) if influence.checkpoints == "epochs" else 1)

    def earlier(self) -> list[tuple[int, RunPlanner]]:
        """Epochs before the last that influence is summed over, with the run as it is there."""
        return [(n, RunPlanner(self.plan, self.run, n)) for n in self._earlier_epochs()]

    def scoring_model(self) -> dict[str, Node]:
        """The model that scores, as ``model``, and what it is made of."""
        kind, warmup = self.config.proxy.kind, self.warmup()
        nodes = {"pool": self.pool, "target": self.target, "warmup": warmup, "model": warmup}
        if kind == "layers":
            nodes["extraction"] = nodes["model"] = self._extraction()
        elif kind == "model":
            nodes["proxy-target"], nodes["proxy-warmup"] = self._other_model()
            nodes["model"] = nodes["proxy-warmup"]
        elif self.config.proxy.is_factorised:
            nodes |= self._factorised()
            nodes["model"] = nodes["proxy"]
        return nodes

    def _extraction(self) -> Node:
        """A model of some of the warmed-up target's blocks."""
        sparsity = self.config.proxy.sparsity
        return self.plan.add(
            "extraction",
            f"layers-{sparsity:g}",
            {
                "chat": self.chat,
                "compute": self.compute,
                "extraction": {"kind": "layers", "sparsity": sparsity},
            },
            {"pool": self.pool, "split": self.split("probe"), "warmup": self.warmup()},
        )

    def _other_model(self) -> tuple[Node, Node]:
        """A model that is not made from the target, and its warm-up on the same examples."""
        proxy, like = self.config.proxy, self.plan.study.config.target
        assert proxy.model is not None
        section = like.model_dump(exclude=OF_PASSES) | {
            "model": proxy.model,
            "revision": proxy.revision,
            "trust_remote_code": False,
        }
        other = self.plan.add("target", proxy.model, {"target": section})
        return other, self.warmup(other)

    def _factorised(self) -> dict[str, Node]:
        """The warmed-up target with factors in place of weights, and the steps to it."""
        proxy, warmup = self.config.proxy, self.warmup()
        layers = proxy.layers.model_dump()
        nodes: dict[str, Node] = {}
        made_of = {"warmup": warmup}
        if proxy.kind == "ipsvd":
            nodes["probe"] = made_of["probe"] = self._probe()
        solver = proxy.model_dump(include={"kind", "dense_rule"})
        if proxy.kind == "ipsvd":
            solver |= proxy.model_dump(include=WEIGHTING)
        nodes["decomposition"] = self.plan.add(
            "decomposition",
            proxy.kind if proxy.kind == "svd" else "-".join([*_weighting(proxy), proxy.mode]),
            {"decomposition": solver, "layers": layers},
            made_of,
        )
        cut_from = {"decomposition": nodes["decomposition"]}
        if proxy.sparsity == "auto":
            nodes["sparsity"] = cut_from["sparsity"] = self._sparsity(nodes)
        label = "-".join([*_builder(proxy), f"{proxy.sparsity}"])
        built = label if proxy.passes == "both" else f"{label}-{proxy.passes}"
        cut = {"factors": proxy.model_dump(include=CUT)}
        nodes["factors"] = self.plan.add("factors", label, cut, cut_from)
        parents = {"factors": nodes["factors"], "warmup": warmup}
        align: dict[str, Any] = {"epochs": 0.0, "recover_epochs": 0.0}
        if self.config.align.trains and proxy.passes == "both":
            parents |= {"pool": self.pool, "split": self.split("align")}
            align = self.config.align.model_dump()
        nodes["proxy"] = self.plan.add(
            "proxy",
            built,
            {
                "align": align,
                "chat": self.chat,
                "compute": self.compute,
                "gauge": proxy.gauge,
                "influence": {"loss_reduction": self.config.influence.loss_reduction},
                "layers": layers,
                "passes": proxy.passes,
            },
            parents,
        )
        return nodes

    def _probe(self) -> Node:
        """What errors of factors are weighted by, seen at the warmed-up target.

        Raises:
            ConfigError: Errors are to be those of scores, of factors that change more than scores.
        """
        proxy, warmup = self.config.proxy, self.warmup()
        params = self._loss() | {
            "chat": self.chat,
            "compute": self.compute,
            "layers": proxy.layers.model_dump(),
            "probe": self._probe_params(),
        }
        parents = {"pool": self.pool, "split": self.split("probe"), "warmup": warmup}
        label = f"{proxy.kind}-{self.config.split.probe}"
        if proxy.whiten == "queries":
            if proxy.passes != "backward":
                raise ConfigError(
                    "errors can be those of scores only where the forward pass is the target's own",
                    where=f"runs.{self.run.name}: proxy.whiten, proxy.passes",
                    value=f"queries with {proxy.passes}",
                    allowed="queries with backward; both or inputs with either",
                    fix="set proxy.passes: backward, or leave out proxy.whiten",
                )
            parents |= self.queries(warmup)
            label = f"{label}-queries"
        return self.plan.add("probe", label, params, parents)

    def _sparsity(self, nodes: dict[str, Node]) -> Node:
        """The stage that looks for the smallest proxy that is faithful enough.

        Raises:
            ConfigError: Neither a floor nor a ceiling says what is enough, or scores are by half.
        """
        proxy, floor = self.config.proxy, self.config.fidelity.floor
        if self.config.influence.score == "half":
            raise ConfigError(
                "sparsity auto compares scores without curvature, and half has none without",
                where=f"runs.{self.run.name}: influence.score, proxy.sparsity",
                value="half with auto",
                fix="give proxy.sparsity a number",
            )
        if floor is None and proxy.max_cost is None:
            raise ConfigError(
                "sparsity auto needs to know what is enough",
                where=f"runs.{self.run.name}: fidelity.floor, proxy.max_cost",
                fix="set a floor of fidelity, a ceiling of cost, or both",
            )
        subset = "all" if self.slice_is_pool() else "fidelity"
        params = {
            "chat": self.chat,
            "compute": self.compute,
            "factors": proxy.model_dump(include=CUT),
            "influence": self.config.influence.model_dump(),
            "layers": proxy.layers.model_dump(),
            "passes": proxy.passes,
            "search": {
                "bootstrap": self.config.fidelity.bootstrap,
                "floor": floor,
                "max_cost": proxy.max_cost,
                "seed": self.config.fidelity.seed,
            },
        }
        parents = {
            "decomposition": nodes["decomposition"],
            "pool": self.pool,
            "target": self.features(self.warmup(), subset, exact=True),
            "warmup": self.warmup(),
        }
        parents |= {
            f"task/{task.name}": self.plan.shared[f"task-{task.name}"] for task in self.tasks
        }
        enough = proxy.max_cost if floor is None else floor
        label = proxy.kind if proxy.passes == "both" else f"{proxy.kind}-{proxy.passes}"
        return self.plan.add("sparsity", f"{label}-{enough}", params, parents)

    def _probe_params(self) -> dict[str, Any]:
        """The probe's parameters; the paper's rule for N needs what the ranks depend on."""
        params = self.config.probe.model_dump()
        if self.config.probe.tokens == "rank":
            if self.config.proxy.sparsity == "auto":
                raise ConfigError(
                    "the number of probe tokens cannot follow a rank that is looked for later",
                    where=f"runs.{self.run.name}: probe.tokens, proxy.sparsity",
                    value="probe.tokens rank with proxy.sparsity auto",
                    fix="give probe.tokens a number, or proxy.sparsity",
                )
            params["rank_rule"] = self.config.proxy.model_dump(include=set(RANK_RULE))
        return params

    def queries(self, model: Node) -> dict[str, Node]:
        """What the pool is scored against at a scoring model: a node per task, by role.

        Query gradients themselves, or what the run's estimator makes of them.
        """
        asked = self.asked(model)
        at = finetuned_model(self) if self.is_multistage else asked
        return {
            f"query/{task.name}": self.direction(self.query(at, task), asked, task)
            for task in self.tasks
        }

    @property
    def is_multistage(self) -> bool:
        """Whether tasks are measured at a model that was fine-tuned after the one that scores."""
        return self.config.influence.estimator == "multistage"

    def asked(self, model: Node) -> Node:
        """The model whose query gradients, and curvature, serve a scoring model.

        Itself; but a proxy of the backward pass alone has the target's layers, and the target's
        query gradients are exact and shared.
        """
        is_backward = model.stage == "proxy" and model.params["passes"] == "backward"
        return model.parents["warmup"] if is_backward else model

    def query(self, model: Node, task: TaskSection) -> Node:
        """Query gradients of a task at a scoring model, the same for all estimators."""
        params = self.passing() | {
            "influence": self.config.influence.model_dump(include=QUERY_KEYS)
            | {"estimator": "tracin"},
        }
        parents = {"model": model, "task": self.plan.shared[f"task-{task.name}"]}
        return self.plan.add("query", f"{task.name}-{self.label(model)}", params, parents)

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
        keys = {"damping", "damping_mode"}
        if "split" in reads:
            made["split"] = self.split("fisher")
        if self.is_multistage:
            made |= finetuned_stages(self)
            keys |= {"proximity"}
        params: dict[str, Any] = {
            "curvature": self.config.curvature.model_dump(include=keys),
            "estimator": {"kind": estimator},
        }
        if "model" in reads:
            params |= self.passing() | self._loss()
        parents = {"query": query} | {role: made[role] for role in reads}
        label = f"{task.name}-{self.label(model)}-{estimator}"
        return self.plan.add("direction", label, params, parents)

    def curvature(self, model: Node, texts: dict[str, Node] | None = None) -> dict[str, Node]:
        """The stages of a model's curvature that the run's estimator reads.

        Args:
            model: The model.
            texts: Pool and split that it is fitted on; the pool's fisher split when absent.
        """
        reads = ESTIMATORS[self.config.influence.estimator]
        if "curvature" not in reads:
            return {}
        fit = self.config.curvature.model_dump(include={"labels", "max_factor_dim", "seed"})
        if fit["labels"] == "empirical":
            fit["seed"] = 0  # nothing is drawn
        params = self.passing() | self._loss() | {"curvature": fit}
        texts = texts or {"pool": self.pool, "split": self.split("fisher")}
        passed = {"model": model, **texts}
        label = f"{self.label(model)}-{texts['split'].params['split']['size']:g}"
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

    def passing(self) -> dict[str, Any]:
        """Parameters of every stage that passes texts through a scoring model."""
        layers = self.config.proxy.layers.model_dump()
        compiled = {"compile": True} if self.plan.study.config.target.compile else {}
        return {"chat": self.chat, "compute": self.compute | compiled, "layers": layers}

    def _loss(self) -> dict[str, Any]:
        """Parameters of the loss whose gradients are taken."""
        return {"influence": {"loss_reduction": self.config.influence.loss_reduction}}

    def features(
        self,
        model: Node,
        subset: str,
        exact: bool = False,
        moments: Node | None = None,
        prefilter: Node | None = None,
    ) -> Node:
        """Dots and norms, or sketches, of pool examples at a scoring model.

        Sketches do not depend on the tasks, so a new task leaves them as they are.

        Args:
            model: The scoring model.
            subset: ``all`` or the name of a split.
            exact: Exact features, whatever the run asks for.
            moments: Sketch the steps that Adam makes of gradients, with the moments that this
                training kept.
            prefilter: A ranking of which only the first examples are passed; absent: all are.
        """
        sketch = {} if exact else self.sketch()
        parents = {"model": model, "pool": self.pool}
        parents |= {} if sketch else self.queries(model)
        if subset != "all":
            parents["split"] = self.split(subset)
        influence = self.config.influence.model_dump(include={"loss_reduction", "on_nonfinite"})
        if not sketch:
            influence |= EXACT if exact else self._reduction()
            influence |= self.config.influence.model_dump(include={"query_home"})
        if prefilter is not None:
            parents["prefilter"] = prefilter
        half = self._half(model, bool(sketch))
        parents |= half
        params: dict[str, Any] = self.passing() | {
            "influence": influence,
            "subset": {"name": subset},
        }
        if prefilter is not None:
            params["prefilter"] = self.config.prefilter.model_dump(include={"keep"})
        if half:
            damping = self.config.curvature.model_dump(include={"damping", "damping_mode"})
            params["curvature"] = damping
        if sketch:
            check = 0 if moments else self.config.features.check  # of gradients' cosines
            params["features"] = sketch | {"check": check}
        if moments:
            params |= {"directions": {"kind": "adam"}, **self.adapters()}
            parents["moments"] = moments
        shards = self.plan.study.config.shards if subset == "all" else 1
        parts = [
            self.label(model),
            "adam" if moments else None,
            sketch.get("kind"),
            None if subset == "all" else subset,
            None if prefilter is None else f"{self.config.prefilter.by}-filtered",
        ]
        return self.plan.add("features", "-".join(filter(None, parts)), params, parents, shards)

    def _half(self, model: Node, is_sketched: bool) -> dict[str, Node]:
        """The curvature that norms are taken by, of a run that scores by half of it.

        Raises:
            ConfigError: The run keeps sketches, whose norms are Euclidean.
        """
        if self.config.influence.score != "half":
            return {}
        if is_sketched:
            raise ConfigError(
                "a sketch has no norm by the curvature",
                where=f"runs.{self.run.name}: influence.score, features.kind",
                value=f"half with {self.config.features.kind}",
                fix="set features.kind: exact, or influence.score: cosine",
            )
        fitted = self.curvature(self.asked(model))
        return {role: fitted[role] for role in ESTIMATORS[self.config.influence.estimator]}

    def adapters(self) -> dict[str, Any]:
        """Parameters by which gradients are those of the warm-up's LoRA, if it has one."""
        rank = self.config.warmup.lora_rank
        return {"adapters": {"rank": rank}} if rank else {}

    def _reduction(self) -> dict[str, Any]:
        """How far query gradients are reduced before examples are scored against them."""
        return self.config.influence.model_dump(include=set(EXACT))

    def _is_exact(self) -> bool:
        """Whether scores are those of the scoring model's whole gradients."""
        return not self.sketch() and self._reduction() == EXACT

    def label(self, model: Node) -> str:
        """What a scoring model is called in the ids of what is computed at it."""
        return "target" if model.parents.get("target") is self.target else model.label

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
        subset = "all" if self.slice_is_pool() else "fidelity"
        if self.config.proxy.kind == "target" and self._is_exact():
            return {}
        params: dict[str, Any] = {
            "fidelity": self.config.fidelity.model_dump(exclude={"floor"}),
            "influence": self.config.influence.model_dump(),
        }
        ours = self.features(nodes["model"], subset)
        parents = {"proxy": ours, "target": self.features(nodes["warmup"], subset, exact=True)}
        for stage in ("probe", "proxy", "extraction"):
            if stage in nodes and "split" in nodes[stage].parents:
                made_of = nodes[stage].parents["split"]
                parents[f"made_of/{made_of.params['split']['name']}"] = made_of
        label = self.label(nodes["model"])
        if self.sketch():
            params["features"] = self.sketch()
            parents |= {f"proxy_{role}": q for role, q in self.queries(nodes["model"]).items()}
            label = f"{label}-{self.config.features.kind}"
        return {"fidelity": self.plan.add("fidelity", label, params, parents)}

    def slice_is_pool(self) -> bool:
        """Whether the fidelity slice is known to be the whole pool, so that its pass is shared."""
        size, limit = self.config.split.fidelity, self.plan.study.config.pool.limit
        if isinstance(size, float):
            return size == 1.0
        return limit is not None and size >= limit

    def _gradient_ranking(self, nodes: dict[str, Node]) -> dict[str, Node]:
        """Features of the pool, and the ranking, which sketches the queries if it needs to."""
        nodes = nodes | self._scored(nodes["model"])
        params: dict[str, Any] = {
            "influence": self.config.influence.model_dump(),
            "scorer": {"kind": "gradient"},
            "tasks": [task.name for task in self.tasks],
        }
        parents = self._ranked(nodes)
        if self.sketch():
            params["features"] = self.sketch()
        for epoch, then in self.earlier():
            made = then.scoring_model()
            made |= then._scored(made["model"])
            at = then._ranked(made).items()
            parents |= {f"checkpoint/{epoch}/{role}": node for role, node in at}
            nodes |= links_at(epoch, made)
        label = nodes["features"].label
        if self.earlier():
            parents["warmup"] = nodes["warmup"]
            label = f"{label}-epochs"
        return nodes | {"ranking": self.plan.add("ranking", label, params, parents)}

    def _scored(self, model: Node) -> dict[str, Node]:
        """The scoring pass over the pool, and the curvature that its queries were changed by."""
        nodes = self.curvature(self.asked(model))
        if self.is_multistage:
            nodes["finetuned"] = finetuned_model(self)
        kept = prefilter_node(RunPlanner(self.plan, self.run))  # the same at every epoch
        if kept is not None:
            nodes["prefilter"] = kept
        return {**nodes, "features": self.features(model, "all", prefilter=kept)}

    def _ranked(self, nodes: dict[str, Node]) -> dict[str, Node]:
        """What a ranking reads of one checkpoint: features, and queries if they are sketches."""
        queries = self.queries(nodes["model"]) if self.sketch() else {}
        return {"features": nodes["features"], **queries}

    def _outcome(self, selection: Node, per_task: bool) -> dict[str, Node]:
        """Fine-tuning on the selection of each task, and the evaluation of what comes out.

        An order that is the same for every task, as a random one is, needs one model for all.
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
            f"{selection.label}-{subset}",
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
        return self.plan.add("evaluation", f"{model.label}-{task.name}", params, parents)


def _builder(proxy: ProxySection) -> list[str]:
    """What a factorised proxy is called in ids: its kind, and what it does unlike others of it."""
    ranks = [] if proxy.rank_allocation == "uniform" else [proxy.rank_allocation]
    return _weighting(proxy) + ranks


def _weighting(proxy: ProxySection) -> list[str]:
    """How a factorised proxy weights errors, as ids say it."""
    alone = proxy.kind == "ipsvd" and proxy.whiten != "both"
    return [proxy.kind, proxy.whiten] if alone else [proxy.kind]
