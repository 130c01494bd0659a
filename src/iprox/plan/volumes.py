"""How much text a study's stages pass: counted by earlier runs where there are any, else assumed.

What a number rests on is part of the answer: :attr:`Volumes.sources` lists it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from iprox.errors import ConfigError
from iprox.plan.history import Made
from iprox.plan.nodes import Node

KNOWN_POOLS = {"alpaca-demo": 999, "dolly": 15_011}
"""Examples of the pools this project knows, before any filter."""

TOKENS = 200
"""Tokens of an instruction example when nothing has been counted."""

CHARACTERS_PER_TOKEN = 4

SUPERVISED = 0.5
"""Share of an example's tokens with a loss when nothing has been counted."""

QUERIES = {"mmlu": 285, "bbh": 81, "tydiqa": 9, "messages": 50, "custom": 50}
"""Development examples per kind of task: those LESS uses (arXiv:2402.04333, Table 1)."""

QUERY_TOKENS = {"mmlu": 150, "bbh": 800, "tydiqa": 400, "messages": TOKENS, "custom": TOKENS}
SUBTASKS = {"mmlu": 57, "bbh": 27, "tydiqa": 9, "messages": 1, "custom": 1}
TEST_ITEMS = {"mmlu": 14_042, "bbh": 1_080, "tydiqa": 1_713, "messages": 200, "custom": 200}
TEST_TOKENS = {"mmlu": 250, "bbh": 1_200, "tydiqa": 700, "messages": TOKENS, "custom": TOKENS}
"""Of MMLU without the worked examples: they are read once for a subject."""


class Texts(NamedTuple):
    """A number of examples, their mean length in tokens, and the share of those with a loss."""

    n: int
    tokens: float
    supervised: float = SUPERVISED


@dataclass
class Volumes:
    """Numbers of examples and tokens of the stages of a plan.

    Attributes:
        history: Finished artifacts.
        pools: Pool id -> number of examples that is to be taken instead of the pool's own.
        length: Tokens per pool example that is to be taken instead of a counted or assumed one.
        sources: What the numbers asked for so far rest on, by what they are of.
    """

    history: Sequence[Made]
    pools: Mapping[str, int] = field(default_factory=dict)
    length: float | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def pool(self, pool: Node) -> int:
        """Examples of a pool.

        Raises:
            ConfigError: Nothing says how many there are.
        """
        label = f"pool {pool.id}"
        if pool.id in self.pools:
            return self._said(label, self.pools[pool.id], "as asked")
        for made in self.history:
            if made.node.stage == "pool" and made.node.id == pool.id:
                return self._said(label, int(made.metrics["n_examples"]), "counted")
        section = pool.params["pool"]
        known = KNOWN_POOLS.get(section["name"])
        sizes = [n for n in (section["limit"], known) if n is not None]
        if not sizes:
            raise ConfigError(
                "the size of the pool is not known before it is read",
                where="pool",
                value=section["path"] or section["hub"] or section["package"],
                fix="say how many examples it has: iprox cost STUDY --pool N",
            )
        return self._said(label, min(sizes), "the study's limit or the data set's size")

    def examples(self, node: Node, pool: Node) -> Texts:
        """Pool examples as a stage sees them: how many there are, and their mean length."""
        n, chat = self.pool(pool), node.params["chat"]
        label = f"tokens per pool example (max_length {chat['max_length']})"
        if self.length is not None:
            tokens = self._said(label, min(self.length, chat["max_length"]), "as asked")
            return Texts(n, tokens)
        for made in reversed(self._counted("features", node, "pool", pool)):
            counts = made.metrics
            share = counts.get("supervised", SUPERVISED * counts["tokens"]) / counts["tokens"]
            tokens = counts["tokens"] / counts["examples"]
            return Texts(n, self._said(label, tokens, f"counted in {made.node.id}"), share)
        limit = pool.params["pool"]["max_chars"]
        by_text = TOKENS if limit is None else min(TOKENS, limit / CHARACTERS_PER_TOKEN)
        return Texts(n, self._said(label, min(by_text, chat["max_length"]), "assumed"))

    def queries(self, node: Node, task: Node) -> Texts:
        """Queries of a task as a query stage sees them."""
        section, label = task.params["task"], f"queries of {task.params['task']['name']}"
        n, tokens, share = section["queries"] or QUERIES[section["kind"]], None, SUPERVISED
        source = "assumed"
        for made in self._counted("query", node, "task", task):
            counts = made.metrics
            tokens = counts["tokens"] / counts["examples"]
            share = counts.get("supervised", SUPERVISED * counts["tokens"]) / counts["tokens"]
            source = f"counted in {made.node.id}"
            if made.node.parents["task"].id == task.id:
                n = int(counts["examples"])
        tokens = _assumed(QUERY_TOKENS, section, node) if tokens is None else tokens
        self._said(label, n, f"of {tokens:.0f} tokens each, {source}")
        return Texts(n, tokens, share)

    def kind_queries(self, kind: str) -> int:
        """Development examples of a kind of task, when a study does not say how many."""
        return QUERIES[kind]

    def groups(self, query: Node) -> int:
        """Query gradients of a task: one, or one for each of its subtasks.

        Args:
            query: A query stage, or a direction made of one.
        """
        query = query.parents.get("query", query)
        if query.params["influence"]["val_agg"] != "subtask_max":
            return 1
        for made in self.history:
            if made.node.stage == "task" and made.node.id == query.parents["task"].id:
                return int(made.metrics["n_subtasks"])
        return SUBTASKS[query.parents["task"].params["task"]["kind"]]

    def tests(self, node: Node, task: Node) -> Texts:
        """Test items of a task as an evaluation sees them, choices and answers included."""
        section, label = task.params["task"], f"test items of {task.params['task']['name']}"
        asked = _test_items(section)
        n, source = asked, "assumed"
        tokens = _assumed(TEST_TOKENS if _is_tested(section) else QUERY_TOKENS, section, node)
        for made in self._counted("evaluation", node, "task", task):
            counts = made.metrics
            before = _test_items(made.node.parents["task"].params["task"])
            seen = sum(int(counts[f"{kind}_items"]) for kind in ("loss", "choice", "generate"))
            if seen and before:
                n, tokens = round(asked * seen / before), counts["tokens"] / seen
                source = f"counted in {made.node.id}"
        self._said(label, n, f"of {tokens:.0f} tokens each, {source}")
        return Texts(n, tokens, 0)

    def _counted(self, stage: str, node: Node, role: str, source: Node) -> list[Made]:
        """Finished stages that saw such texts as the same tokens, of this very source last."""
        found = [
            made
            for made in self.history
            if made.node.stage == stage and _same_text(made.node, node, role, source)
        ]
        return sorted(found, key=lambda made: made.node.parents[role].id == source.id)

    def _said(self, label: str, value: Any, source: str) -> Any:
        shown = f"{value:.0f}" if isinstance(value, float) else str(value)
        self.sources[label] = f"{shown} ({source})"
        return value


def target_of(node: Node) -> Node | None:
    """The target among a stage's ancestors; of a stage at another model, that model."""
    if node.stage == "target":
        return node
    found = (target_of(parent) for parent in node.parents.values())
    return next((target for target in found if target is not None), None)


def _assumed(by_kind: Mapping[str, int], section: Mapping[str, Any], node: Node) -> int:
    """Tokens of an item of a task when none has been counted; worked examples are half of it."""
    tokens = by_kind[section["kind"]] // (2 if section["shots"] == 0 else 1)
    return min(tokens, int(node.params["chat"]["max_length"]))


def _is_tested(section: Mapping[str, Any]) -> bool:
    return section["test"] is not None or section["test_hub"] is not None


def _test_items(section: Mapping[str, Any]) -> int:
    """Test items that a task asks for."""
    if not _is_tested(section):
        return int(section["heldout"])
    return int(section["test_limit"] or TEST_ITEMS[section["kind"]])


def _same_text(made: Node, node: Node, role: str, source: Node) -> bool:
    """Whether a finished stage saw texts of the same source as the same tokens."""
    if made.params["chat"] != node.params["chat"] or role not in made.parents:
        return False
    is_part = made.params.get("subset", {"name": "all"}) != {"name": "all"}
    if is_part or "prefilter" in made.params:
        return False
    models = [target_of(stage) for stage in (made, node)]
    names = {model.params["target"]["model"] for model in models if model is not None}
    return len(names) == 1 and _origin(made.parents[role]) == _origin(source)


def _origin(source: Node) -> dict[str, Any]:
    """What decides which texts there are, whatever the number drawn of them."""
    draws = {
        "pool": {"limit", "seed"},
        "task": {"name", "queries", "heldout", "test_limit", "seed"},
    }[source.stage]
    return {k: v for k, v in source.params[source.stage].items() if k not in draws}
