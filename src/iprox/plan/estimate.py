"""What a planned stage takes: operations, memory and disk, from shapes and token counts.

Operations are exact for given token counts; memory is a sum of the parts that grow with the
model or the data, and good to a few tenths. Nothing is loaded, no tensor library imported.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

from iprox.numerics import flops
from iprox.numerics.flops import Load, Network
from iprox.numerics.ranks import (
    Architecture,
    block_shapes,
    blocks_kept,
    max_useful_rank,
    model_size,
    rank_for,
)
from iprox.plan.encoders import encoder_need
from iprox.plan.nodes import Node
from iprox.plan.scorers import passes_model
from iprox.plan.selection import is_per_task, n_selected
from iprox.plan.volumes import Texts, Volumes

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}

BATCH_TOKENS = {"cpu": 512, "gpu": 8192}
"""Tokens of a batch that is scored."""

MICRO_BATCH_TOKENS = {"cpu": 1024, "gpu": 16384}
"""Tokens of one forward pass in training."""

EVALUATION_TOKENS = {"cpu": 1024, "gpu": 8192}
"""Tokens of a batch whose likelihoods are asked for."""

PROCESS = 450_000_000
"""Bytes of a process that has loaded torch and transformers; main memory only."""

SMALL_PROCESS = 250_000_000
"""Bytes of a process that has not loaded transformers."""

MAX_COMPARED = 24
MIN_HELDOUT = 4
"""Held-out examples of an alignment: whose gradients are compared at most, held out at least."""

MAX_DIRECTIONS = 4
"""Most directions that a probe moves the weights in."""

FACTOR_COPIES = 11
"""Tensors of the factors' size in an alignment: gradients, both Adam moments, the start, the
best and the current candidate, and the parts of the gradient."""

SHARD_BYTES = 6500
"""Bytes of a scoring shard besides what it holds of each example."""

AUTO_SPARSITY = 0.5
"""Sparsity that is counted with where it is looked for."""

SEARCHED = 4
"""Proxies that a search over nine sparsities scores at most."""

ENCODERS = ("backbone", "encoder", "embeddings", "query_embeddings")
"""Stages of text encoders."""

LAYER_DOTS_BYTES = 64 * 2**20
"""Inner products are kept layer by layer up to this size."""

SCORED_TEXT = 6000
"""Bytes per pool example of a ranking by texts: messages, words and counts of n-grams."""

COMPARED = 4096
"""Selected examples whose features are compared at most."""

QUERY_BYTES = 1_000_000_000
"""Memory for query gradients while they are sketched."""

PART_EXAMPLES = 8192
"""Most examples whose similarities a selection holds at once."""

LONGEST = 2.0
"""The longest example of a batch, in units of the mean length."""


@dataclass(frozen=True)
class Need:
    """What one stage takes.

    Attributes:
        flops: Floating-point operations; 0 for stages that pass nothing through a model.
        memory: Peak bytes: of the GPU's memory, or on a CPU of the process's.
        disk: Bytes of its files.
        tokens: Tokens passed through a model.
    """

    flops: float = 0.0
    memory: float = SMALL_PROCESS
    disk: float = 0.0
    tokens: float = 0.0


class Estimator:
    """Works out the need of stages whose ancestors lead to one target.

    Args:
        arch: Sizes of the target.
        volumes: Numbers of examples and tokens.
        on_gpu: Whether models are on a GPU.
        train_gpus: GPUs that weights, gradients and Adam's moments are sharded over in training.
    """

    def __init__(
        self, arch: Architecture, volumes: Volumes, on_gpu: bool = False, train_gpus: int = 1
    ) -> None:
        self.arch, self.volumes = arch, volumes
        self.train_gpus = train_gpus if on_gpu else 1
        self.device = "gpu" if on_gpu else "cpu"
        self.process = 0 if on_gpu else PROCESS

    def need(self, node: Node) -> Need:
        """The need of one stage."""
        by_stage: Mapping[str, Callable[[Node], Need]] = {
            "target": self._target,
            "warmup": self._warmup,
            "checkpoint": self._checkpoint,
            "probe": self._probe,
            "decomposition": self._decomposition,
            "factors": self._factors,
            "proxy": self._proxy,
            "extraction": self._extraction,
            "sparsity": self._search,
            "query": self._query,
            "covariance": self._covariance,
            "curvature": self._curvature,
            "eigenvalues": self._eigenvalues,
            "direction": self._direction,
            "features": self._features,
            "query_sketches": self._query_sketches,
            **dict.fromkeys(ENCODERS, partial(encoder_need, self)),
            "ranking": self._ranking,
            "selection": self._selection,
            "diversity": self._diversity,
            "finetune": self._finetune,
            "evaluation": self._evaluation,
        }
        estimate = by_stage.get(node.stage)
        return Need() if estimate is None else estimate(node)

    # --- models ------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> int:
        """Parameters of the target."""
        return model_size(self.arch).total

    def network(self, model: Node, layers: Mapping[str, Any] | None = None) -> Network:
        """Matrix products of a planned model.

        Args:
            model: A target, warmup, finetune, extraction or proxy stage. Ranks that are chosen
                when the spectra are known are taken to be those of equal sparsities.
            layers: Patterns of the layers that are scored; all when absent.
        """

        def scored(name: str) -> bool:
            return layers is None or _selected(f"model.{name}", layers)

        if model.stage == "extraction":
            kept = blocks_kept(self.arch.blocks, model.params["extraction"]["sparsity"])
            return Network.plan(replace(self.arch, blocks=kept), scored=scored)
        if model.stage != "proxy":
            return Network.plan(self.arch, scored=scored)
        cut = model.parents["factors"].params["factors"]
        chosen = model.params["layers"] if layers is None else layers
        return self._factorised(cut, chosen, layers, model.params["passes"] == "backward")

    def _factorised(
        self,
        cut: Mapping[str, Any],
        chosen: Mapping[str, Any],
        layers: Mapping[str, Any] | None,
        backward_only: bool = False,
    ) -> Network:
        """Matrix products of a proxy.

        Args:
            cut: How its factors are cut.
            chosen: Patterns of the layers that are replaced.
            layers: Patterns of the layers that are scored; all when absent.
            backward_only: Whether the factors serve the backward pass alone.
        """

        def scored(name: str) -> bool:
            return layers is None or _selected(f"model.{name}", layers)

        def rank(name: str, out_dim: int, in_dim: int) -> int | None:
            if not _selected(f"model.{name}", chosen):
                return None
            return rank_for(
                out_dim,
                in_dim,
                _sparsity(cut),
                cut["rank_multiple"],
                cut["rank_rounding"],
                cut["dense_rule"],
            )

        return Network.plan(self.arch, rank, scored, backward_only)

    def model_parameters(self, net: Network) -> int:
        """Parameters of a model with these matrices."""
        size = model_size(self.arch)
        return size.total - size.linears + net.stored_weights

    def activations(self, net: Network, tokens: float, element: int) -> float:
        """Bytes that a pass keeps for its backward pass.

        Per token and block: eight vectors of the hidden width (the residual stream, both norms
        and their inputs), queries, keys and values twice, four of the feed-forward width; and of
        a factorised layer what is between its factors.
        """
        arch = self.arch
        width = 8 * arch.hidden + 4 * arch.ff
        width += 2 * (arch.heads + 2 * arch.kv_heads) * arch.head_dim
        inner = sum(
            n * x.out_dim for x, n in net.linears.items() if x.factor and x.out_dim < x.in_dim
        )
        return element * tokens * (arch.blocks * width + inner)

    def logits(self, positions: float) -> float:
        """Bytes of logits in float32, their softmax and its gradient."""
        return 3 * 4 * positions * self.arch.vocab

    def _batch(self, budget: Mapping[str, int], texts: Texts) -> float:
        """Tokens of a full batch, padding included; less when there are fewer texts."""
        whole = LONGEST * texts.tokens * texts.n
        return max(min(budget[self.device], whole), LONGEST * texts.tokens)

    # --- texts -------------------------------------------------------------------------------

    def split_texts(self, node: Node, role: str = "split") -> Texts:
        """Examples of the split that a stage reads."""
        pool = node.parents["pool"]
        texts = self.volumes.examples(node, pool)
        return texts._replace(n=_share(node.parents[role].params["split"]["size"], texts.n))

    # --- stages ------------------------------------------------------------------------------

    def _target(self, node: Node) -> Need:
        weights = self.parameters * BYTES[node.params["target"]["dtype"]]
        return Need(memory=self.process + 2.5 * weights, disk=weights)

    def _warmup(self, node: Node) -> Need:
        section = node.params["warmup"]
        need = self._training(node, self.split_texts(node), section)
        copies = math.ceil(section["epochs"]) - 1 if "epochs" in node.params else 0
        kept = 4 * self.parameters * copies + self._moments(node) * (copies + 1)
        return replace(need, disk=need.disk + kept)

    def _checkpoint(self, node: Node) -> Need:
        weights = self.parameters * BYTES[node.params["compute"]["dtype"]]
        moments = self._moments(node.parents["warmup"])
        return Need(memory=PROCESS + 4 * self.parameters + weights, disk=weights + moments)

    def _moments(self, warmup: Node) -> float:
        """Bytes that a warm-up keeps beside weights: Adam's two moments, and LoRA's updates."""
        if "moments" not in warmup.params:
            return 0
        section = warmup.params["warmup"]
        return 4 * self._trained(section) * (3 if section["lora_rank"] else 2)

    def _trained(self, section: Mapping[str, Any]) -> int:
        """Parameters that a training changes: all, those that are not frozen, or LoRA's updates."""
        if section["lora_rank"]:
            linears = Network.plan(self.arch).linears.items()
            return section["lora_rank"] * sum(n * (one.out_dim + one.in_dim) for one, n in linears)
        frozen = model_size(self.arch).embeddings if section["freeze_embed_head"] else 0
        return self.parameters - frozen

    def _finetune(self, node: Node) -> Need:
        pool = node.parents["selection"].parents["pool"]
        texts = self.volumes.examples(node, pool)
        n = n_selected(node.parents["selection"], texts.n)
        if node.params["subset"]["task"] == "all":
            selection = node.parents["selection"]
            tasks = selection.parents["ranking"].params["tasks"]
            n = min(texts.n, n * len(tasks)) if is_per_task(selection) else n
        return self._training(node, texts._replace(n=n), node.params["finetune"])

    def _training(self, node: Node, texts: Texts, section: Mapping[str, Any]) -> Need:
        """Full fine-tuning in float32 with AdamW; the result in the study's precision.

        Memory is that of one of the GPUs.
        """
        net = Network.plan(self.arch)
        load = _load(texts).times(section["epochs"])
        trained = self._trained(section)
        batch = texts._replace(n=min(texts.n, section["batch"]))
        micro = self._batch(MICRO_BATCH_TOKENS, batch) / self.train_gpus
        micro = max(micro, LONGEST * batch.tokens)
        element = BYTES[node.params["compute"]["dtype"]]
        state = 4 * (self.parameters + 3 * trained)
        return Need(
            flops=flops.lora_training(net, load, trained)
            if section["lora_rank"]
            else flops.training(net, load, head_trained=not section["freeze_embed_head"]),
            memory=self.process
            + state / self.train_gpus
            + self.activations(net, micro, element)
            + self.logits(micro),
            disk=self.parameters * element,
            tokens=load.tokens,
        )

    def _pass_memory(self, net: Network, texts: Texts, element: int) -> float:
        """A frozen model and one batch."""
        tokens = self._batch(BATCH_TOKENS, texts)
        return (
            self.process
            + element * self.model_parameters(net)
            + self.activations(net, tokens, element)
            + self.logits(tokens * texts.supervised)
        )

    def _probe(self, node: Node) -> Need:
        net = self.network(node.parents["warmup"], node.params["layers"])
        texts, element = self.split_texts(node), BYTES[node.params["compute"]["dtype"]]
        rows = self.probe_rows(node)
        n_queries = sum(role.startswith("query/") for role in node.parents)
        directions = min(n_queries, MAX_DIRECTIONS)
        width = sum(
            n * (linear.out_dim + (max(1, directions) * linear.in_dim if linear.own_input else 0))
            for linear, n in net.linears.items()
            if linear.scored
        )
        recorded = 4.0 * rows * width
        host = 0 if self.device == "gpu" else recorded  # rows are kept in main memory
        one_direction = element * net.scored_weights if directions else 0.0
        return Need(
            flops=flops.probe(net, _load(texts), directions),
            memory=self._pass_memory(net, texts, element) + host + one_direction,
            disk=recorded,
            tokens=texts.n * texts.tokens,
        )

    def probe_rows(self, node: Node) -> int:
        """Token positions of a probe; by the paper's rule the largest rank, rounded up to 128."""
        section = node.params["probe"]
        tokens = section["tokens"]
        if tokens == "rank":
            rule = section["rank_rule"]
            ranks = [
                rank_for(out, in_, rule["sparsity"], *_rounding(rule)) or 0
                for out, in_ in block_shapes(self.arch).values()
            ]
            tokens = min(max(-(-max(ranks) // 128) * 128, 512), 2048)
        texts = self.split_texts(node)
        return int(min(tokens, texts.n * texts.tokens))

    def _decomposition(self, node: Node) -> Need:
        section = node.params["decomposition"]
        probe = node.parents.get("probe")
        rows = 0 if probe is None else self.probe_rows(probe)
        total, kept_weights, largest = 0.0, 0, 0
        for out_dim, in_dim in self._selected_shapes(node.params["layers"]):
            kept = max(1, max_useful_rank(out_dim, in_dim, section["dense_rule"]))
            kept_weights += kept * (out_dim + in_dim)
            largest = max(largest, out_dim * in_dim, max(out_dim, in_dim) ** 2)
            if section["kind"] == "svd":
                total += flops.plain_svd(out_dim, in_dim, kept)
            else:
                paper = section["mode"] == "paper"
                solve = flops.ipsvd_paper if paper else flops.ipsvd_exact
                total += solve(out_dim, in_dim, rows, kept)
        memory = 4 * kept_weights + 6 * 8 * largest
        return Need(flops=total, memory=SMALL_PROCESS + memory, disk=4 * kept_weights)

    def _factors(self, node: Node) -> Need:
        decomposition = node.parents["decomposition"]
        section, weights, directions = node.params["factors"], 0, 0
        for out_dim, in_dim in self._selected_shapes(decomposition.params["layers"]):
            rank = rank_for(out_dim, in_dim, _sparsity(section), *_rounding(section)) or 0
            weights += rank * (out_dim + in_dim)
            kept = max_useful_rank(out_dim, in_dim, section["dense_rule"])
            directions += kept * (out_dim + in_dim)
        return Need(memory=SMALL_PROCESS + 4 * (weights + directions), disk=4 * weights)

    def _selected_shapes(self, layers: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [
            shape
            for block in range(self.arch.blocks)
            for kind, shape in block_shapes(self.arch).items()
            if _selected(f"model.layers.{block}.{kind}", layers)
        ]

    def _proxy(self, node: Node) -> Need:
        section, element = node.params["align"], BYTES[node.params["compute"]["dtype"]]
        net = self.network(node, node.params["layers"])
        target = self.network(node.parents["warmup"], node.params["layers"])
        weights = element * self.model_parameters(net)
        dense = element * self.parameters
        if section["epochs"] == 0 and section["recover_epochs"] == 0:
            memory = SMALL_PROCESS + dense + 4 * net.factor_weights
            return Need(memory=memory, disk=weights)
        texts = self.split_texts(node)
        steps = _Steps(texts.n, section)
        batch = texts._replace(n=section["batch"])
        tokens = LONGEST * batch.n * batch.tokens
        observed = sum(n * (x.out_dim + x.in_dim) for x, n in target.linears.items() if x.scored)
        passes = self.activations(net, tokens, 4) * (3 if _is_second_order(section) else 1)
        supervised = tokens if section["kl_positions"] == "all" else tokens * texts.supervised
        return Need(
            flops=flops.recovery(target, net, _load(texts._replace(n=1)).times(steps.recovered))
            + flops.alignment(
                target,
                net,
                _load(texts._replace(n=1)).times(steps.aligned),
                _load(texts._replace(n=steps.heldout)),
                _anchoring(section),
                candidates=steps.candidates,
                compared=_load(texts._replace(n=min(steps.heldout, MAX_COMPARED))),
                chunk=2 * section["batch"],
            ),
            memory=self.process
            + dense
            + 4 * self.model_parameters(net)
            + 4 * FACTOR_COPIES * net.factor_weights
            + element * tokens * observed
            + passes
            + self.logits(supervised),
            disk=weights,
            tokens=steps.seen * texts.tokens,
        )

    def _extraction(self, node: Node) -> Need:
        """A forward pass of the whole target over the probe examples."""
        target, net = self.network(node.parents["warmup"]), self.network(node)
        texts, element = self.split_texts(node), BYTES[node.params["compute"]["dtype"]]
        weights = element * self.model_parameters(net)
        load = _load(texts._replace(supervised=0))
        widest = 4 * self.arch.ff + 8 * self.arch.hidden
        return Need(
            flops=flops.forward(target, load),
            # the new model, and once more when it is read again to compare
            memory=self.process
            + element * (self.parameters + widest * self._batch(BATCH_TOKENS, texts))
            + 2 * weights,
            disk=weights,
            tokens=load.tokens,
        )

    def _query(self, node: Node) -> Need:
        net = self.network(node.parents["model"], node.params["layers"])
        texts = self.volumes.queries(node, node.parents["task"])
        unit = node.params["influence"]["val_agg"] == "mean_unit"
        stored = 4.0 * net.scored_weights
        element = BYTES[node.params["compute"]["dtype"]]
        return Need(
            flops=flops.query(net, _load(texts), unit),
            memory=self._pass_memory(net, texts, element) + stored,
            disk=stored * self.volumes.groups(node),
            tokens=texts.n * texts.tokens,
        )

    def _covariance(self, node: Node) -> Need:
        net = self.network(node.parents["model"], node.params["layers"])
        limit = node.params["curvature"]["max_factor_dim"]
        texts, element = self.split_texts(node), BYTES[node.params["compute"]["dtype"]]
        sums = 4.0 * sum(side**2 for side in flops.factor_blocks(net, limit))
        return Need(
            flops=flops.covariance(net, _load(texts), limit=limit),
            memory=self._pass_memory(net, texts, element) + sums,
            disk=sums * node.shards,
            tokens=texts.n * texts.tokens,
        )

    def _curvature(self, node: Node) -> Need:
        passed = node.parents["covariance"]
        net = self.network(passed.parents["model"], passed.params["layers"])
        sides = list(flops.factor_blocks(net, passed.params["curvature"]["max_factor_dim"]))
        return Need(
            flops=flops.eigenbases(sides),
            memory=PROCESS + 6 * 8 * max(sides) ** 2,
            disk=4.0 * sum(side**2 for side in sides),
        )

    def _eigenvalues(self, node: Node) -> Need:
        net = self.network(node.parents["model"], node.params["layers"])
        limit = node.params["curvature"]["max_factor_dim"]
        texts, element = self.split_texts(node), BYTES[node.params["compute"]["dtype"]]
        bases = 4.0 * sum(side**2 for side in flops.factor_blocks(net, limit))
        sums = 4.0 * net.scored_weights
        return Need(
            flops=flops.eigenvalues(net, _load(texts), limit=limit),
            memory=self._pass_memory(net, texts, element) + bases + sums,
            disk=sums * node.shards,
            tokens=texts.n * texts.tokens,
        )

    def _direction(self, node: Node) -> Need:
        query = node.parents["query"]
        net = self.network(query.parents["model"], query.params["layers"])
        groups = self.volumes.groups(query)
        stored = 4.0 * net.scored_weights * groups
        if "model" not in node.parents:
            largest = max(max(x.out_dim, x.in_dim) for x in net.linears)
            memory = SMALL_PROCESS + 6 * 4 * largest**2
            return Need(flops=flops.solve(net, groups), memory=memory, disk=stored)
        texts, element = self.split_texts(node), BYTES[node.params["compute"]["dtype"]]
        return Need(
            flops=flops.datainf(net, _load(texts), groups),
            memory=self._pass_memory(net, texts, element) + 2 * stored,
            disk=stored,
            tokens=2 * texts.n * texts.tokens,
        )

    def _features(self, node: Node) -> Need:
        net = self.network(node.parents["model"], node.params["layers"])
        pool = node.parents["pool"]
        texts = self.volumes.examples(node, pool)
        if "split" in node.parents:
            size = node.parents["split"].params["split"]["size"]
            texts = texts._replace(n=_share(size, texts.n))
        if "prefilter" in node.params:
            tasks = len(node.parents["prefilter"].params["tasks"])
            kept = min(1.0, tasks * node.params["prefilter"]["keep"])
            texts = texts._replace(n=_share(kept, texts.n))
        n_queries = sum(map(self.volumes.groups, _queries_of(node)))
        element = BYTES[node.params["compute"]["dtype"]]
        usual = {"query_rank": 0, "query_dtype": "float32", "query_home": "memory"}
        reduction = usual | node.params["influence"]
        rank, held = reduction["query_rank"], BYTES[reduction["query_dtype"]]
        entries = net.query_entries(rank)
        if reduction["query_home"] == "disk" and not rank:  # a layer at a time
            entries = max((one.weights for one in net.linears if one.scored), default=0)
        matrices = float(held * n_queries * entries)
        half = "curvature" in node.parents
        if half:
            fitted = node.parents["curvature"].parents["covariance"].params["curvature"]
            sides = flops.factor_blocks(net, fitted["max_factor_dim"])
            matrices += 4.0 * (sum(side**2 for side in sides) + net.scored_weights)
        return Need(
            flops=flops.features(net, _load(texts), n_queries, query_rank=rank, whitened=half),
            memory=self._pass_memory(net, texts, element) + matrices,
            disk=texts.n * (8 * n_queries + 60)
            + self._layer_dots(node, texts.n * n_queries)
            + SHARD_BYTES * node.shards,
            tokens=texts.n * texts.tokens,
        )

    def _query_sketches(self, node: Node) -> Need:
        net = self.network(node.parents["model"], node.params["layers"])
        texts = self.volumes.queries(node, node.parents["task"])
        element = BYTES[node.params["compute"]["dtype"]]
        dim = node.params["features"].get("dim", 0)
        return Need(
            flops=flops.features(net, _load(texts), 0),
            memory=self._pass_memory(net, texts, element),
            disk=texts.n * 4 * dim,
            tokens=texts.n * texts.tokens,
        )

    def _search(self, node: Node) -> Need:
        """Scoring the slice with some proxies in turn, beside the target they are made of."""
        target, pool = node.parents["target"], node.parents["pool"]
        layers, backward_only = node.params["layers"], node.params["passes"] == "backward"
        net = self._factorised(node.params["factors"], layers, layers, backward_only)
        texts, tasks = self.volumes.examples(target, pool), _tasks(node)
        if "split" in target.parents:
            texts = texts._replace(
                n=_share(target.parents["split"].params["split"]["size"], texts.n)
            )
        queries = [self.volumes.queries(node, task) for task in tasks]
        groups = sum(self.volumes.groups(query) for query in _queries_of(target))
        unit = node.params["influence"]["val_agg"] == "mean_unit"
        rank = node.params["influence"]["query_rank"]
        # a proxy of the backward pass alone is asked what the target is, once for all
        asked_of = self.network(target.parents["model"], layers) if backward_only else net
        asked = 1 if backward_only else SEARCHED
        work = SEARCHED * flops.features(net, _load(texts), groups, query_rank=rank)
        work += asked * sum(flops.query(asked_of, _load(of_task), unit) for of_task in queries)
        element = BYTES[node.params["compute"]["dtype"]]
        tokens = SEARCHED * texts.n * texts.tokens + asked * sum(q.n * q.tokens for q in queries)
        return Need(
            flops=work,
            memory=self._pass_memory(net, texts, element)
            + element * self.parameters
            + 4 * (groups + 1) * net.scored_weights,
            tokens=tokens,
        )

    def _layer_dots(self, node: Node, products: float) -> float:
        """Bytes of inner products kept layer by layer: of a slice, or of a small pool."""
        size = 4 * products * len(self._selected_shapes(node.params["layers"]))
        return size if size <= LAYER_DOTS_BYTES and "features" not in node.params else 0

    def _ranking(self, node: Node) -> Need:
        pool = next(n for n in _ancestors(node) if n.stage == "pool")
        examples = self.volumes.pool(pool)
        words = SCORED_TEXT if "pool" in node.parents else 0
        need = Need(
            memory=SMALL_PROCESS + words * examples,
            disk=24 * len(node.params["tasks"]) * examples,
        )
        if not passes_model(node):
            return need
        kind, element = node.params["scorer"]["kind"], BYTES[node.params["compute"]["dtype"]]
        net, texts = self.network(node.parents["warmup"]), self.volumes.examples(node, pool)
        load = _load(texts).times(2 if kind == "ifd" else 1)  # with the prompt and without
        return replace(
            need,
            flops=flops.forward(net, load, logits=0 if kind == "repsim" else None),
            memory=self._pass_memory(net, texts, element),
            tokens=load.tokens,
        )

    def _selection(self, node: Node) -> Need:
        """Features of the shortlist, and similarities of the part that is chosen from."""
        if "features" not in node.parents:
            return Need()
        section, examples = node.params["select"], self.volumes.pool(node.parents["pool"])
        listed = min(examples, section.get("shortlist", 2) * n_selected(node, examples))
        part = min(listed, PART_EXAMPLES)
        numbers = listed * self._sketch_dim(node.parents["features"]) + 2 * part**2
        return Need(memory=SMALL_PROCESS + 4 * numbers)

    def _sketch_dim(self, features: Node) -> int:
        """Numbers that are kept of an example's gradient."""
        section = features.params.get("features", {})
        layers = len(block_shapes(self.arch)) * self.arch.blocks
        return int(section.get("dim", layers * section.get("rank", 1) ** 2))

    def _diversity(self, node: Node) -> Need:
        """The sketches that are compared, four times in float64, and a layer of query gradients."""
        selection = node.parents["selection"]
        examples = self.volumes.pool(selection.parents["pool"])
        compared = min(COMPARED, n_selected(selection, examples) * len(node.params["tasks"]))
        numbers = compared * self._sketch_dim(node.parents["features"])
        return Need(memory=SMALL_PROCESS + QUERY_BYTES + 4 * 8 * numbers)

    def _evaluation(self, node: Node) -> Need:
        net = Network.plan(self.arch)
        texts = self.volumes.tests(node, node.parents["task"])
        element = BYTES[node.params["compute"]["dtype"]]
        positions = self._batch(EVALUATION_TOKENS, texts)
        return Need(
            flops=flops.forward(net, _load(texts), texts.n),
            memory=self.process + element * self.parameters + self.logits(positions),
            disk=200 * texts.n,
            tokens=texts.n * texts.tokens,
        )


class _Steps:
    """How many examples an alignment holds out, sees, and how often it judges."""

    def __init__(self, n_examples: int, section: Mapping[str, Any]) -> None:
        share = math.ceil(section["heldout"] * n_examples)
        self.heldout = min(max(MIN_HELDOUT, share), n_examples - 1)
        train = n_examples - self.heldout
        self.candidates = 1
        self.recovered = self._phase(train, section["recover_epochs"], section["recover_batch"])
        self.candidates += self._judged(section["evaluate_every"])
        self.aligned = self._phase(train, section["epochs"], section["batch"])
        self.candidates += self._judged(section["evaluate_every"])
        self.seen = self.recovered + self.aligned

    def _phase(self, train: int, epochs: float, batch: int) -> float:
        """Examples seen in one phase of the training."""
        self._per_epoch = math.ceil(train / batch)
        self._total = max(1, round(epochs * self._per_epoch)) if epochs > 0 else 0
        return self._total * train / self._per_epoch

    def _judged(self, every: int) -> int:
        """Candidates measured in the phase looked at last."""
        every = every or self._per_epoch
        return self._total // every + (self._total % every > 0)


TRAININGS = {"warmup", "finetune"}
"""Stages whose jobs may have several GPUs."""


def needs_model(node: Node) -> bool:
    """Whether a stage passes texts through a model."""
    if node.stage == "direction":
        return "model" in node.parents
    if node.stage == "ranking":
        return passes_model(node)
    return node.stage in {
        "warmup",
        "probe",
        "extraction",
        "proxy",
        "query",
        "covariance",
        "eigenvalues",
        "features",
        "query_sketches",
        "encoder",
        "embeddings",
        "query_embeddings",
        "sparsity",
        "finetune",
        "evaluation",
    }


def _load(texts: Texts) -> Load:
    return Load.even(texts.n, texts.tokens, texts.supervised)


def _share(size: float, n_pool: int) -> int:
    """Examples of a split: a count, or a share of the pool; never more than there are."""
    if isinstance(size, int):
        return min(size, n_pool)
    return max(1, math.floor(Fraction(str(size)) * n_pool))


def _selected(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a layer is among those a study's patterns choose."""

    def matches(patterns: list[str]) -> bool:
        return any(
            fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns
        )

    return matches(layers["include"]) and not matches(layers["exclude"])


def _sparsity(section: Mapping[str, Any]) -> float:
    """The sparsity of some factors; one that is yet to be found is taken to be in the middle."""
    sparsity = section["sparsity"]
    return AUTO_SPARSITY if sparsity == "auto" else float(sparsity)


def _rounding(section: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return section["rank_multiple"], section["rank_rounding"], section["dense_rule"]


def _anchoring(section: Mapping[str, Any]) -> flops.Anchoring:
    return flops.Anchoring(
        hvp=section["hvp"],
        exact=section["grad"] == "exact",
        kl=section["lambda_kl"] > 0,
        all_positions=section["kl_positions"] == "all",
    )


def _is_second_order(section: Mapping[str, Any]) -> bool:
    return bool(section["hvp"] != "central_diff")


def _queries_of(features: Node) -> list[Node]:
    """The query gradients that a scoring pass compares with."""
    return [parent for role, parent in features.parents.items() if role.startswith("query/")]


def _tasks(node: Node) -> list[Node]:
    return [parent for role, parent in node.parents.items() if role.startswith("task/")]


def _ancestors(node: Node) -> list[Node]:
    found = [node]
    for parent in node.parents.values():
        found += _ancestors(parent)
    return found
