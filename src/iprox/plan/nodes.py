"""The stages of a study, each with an identity that its folder is named after.

A stage's identity is a digest of its name, its own parameters and its parents' identities.
Equal identities are one job: runs of a sweep share everything upstream of what they change,
old results stay beside new ones, and going back to an old value finds its old folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iprox.errors import ConfigError, did_you_mean
from iprox.store.manifest import MANIFEST, digest_json
from iprox.study.load import Run, Study

RESULTS = Path("results")

SAME_AT_EVERY_EPOCH = {"pool", "target", "model", "proxy-target"}
"""Links of a scoring model that are shown once, however many checkpoints it is made at."""
ID_DIGITS = 10

OF_PASSES = {"attention", "compile"}
"""Keys of the section ``target`` that passes depend on, and the model's files do not."""


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

    @classmethod
    def of(
        cls,
        stage: str,
        label: str,
        params: dict[str, Any],
        parents: dict[str, Node],
        shards: int = 1,
    ) -> Node:
        """The stage with these parameters and parents, its identity worked out."""
        ancestry = {role: parent.id for role, parent in parents.items()}
        digest = digest_json({"params": params, "parents": ancestry, "stage": stage})
        return cls(stage, f"{_clean(label)}-{digest[:ID_DIGITS]}", params, parents, shards)

    @property
    def label(self) -> str:
        """The readable part of its id."""
        return self.id.rsplit("-", 1)[0]

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
        node = Node.of(stage, label, params, parents or {}, shards)
        return self.nodes.setdefault((stage, node.id), node)

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


def links_at(epoch: int, made: Mapping[str, Node]) -> dict[str, Node]:
    """Links of what is made at an earlier epoch, without what is the same at all of them."""
    own = {role: node for role, node in made.items() if role not in SAME_AT_EVERY_EPOCH}
    return {f"{role}-epoch-{epoch}": node for role, node in own.items()}


def _clean(label: str) -> str:
    """A label that is safe as a folder name and in a Snakemake wildcard."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:48].rstrip("-.")
    return text or "x"
