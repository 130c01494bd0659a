"""A study's finished artifacts as the report reads them: runs, stages, why one is absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from iprox.errors import ArtifactError
from iprox.store.job import Job
from iprox.store.manifest import MANIFEST, PROVENANCE, SPEC, read_manifest
from iprox.store.tables import read_table
from iprox.study.schema import ReportSection
from iprox.study.scorers import GRADIENT

BASE = "base"
"""Role prefix of the evaluations of the untouched target."""

SHARED = ("pool", "split", "target")
"""Roles that all runs have in common."""

COMPARED = ("slice-features", "target-features")
"""Scoring passes that a run's fidelity compares: what measuring costs, not what scoring does."""

STOPS = {"fidelity": 0, "ranking": 1, "selection": 2, "evaluation": 3}
"""How far each value of a run's ``until`` goes; artifacts of a later step are not made."""


@dataclass(frozen=True)
class Artifact:
    """One finished stage folder.

    Attributes:
        folder: Where it is.
        stage: Name of the stage.
        id: Its id in the plan.
        content: Digest of its content.
        params: Its own parameters.
        provenance: How it was made: seconds, memory, versions, metrics. Fields may be absent.
    """

    folder: Path
    stage: str
    id: str
    content: str
    params: dict[str, Any]
    provenance: dict[str, Any]
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read what a stage folder says about itself.

        Raises:
            ArtifactError: A description file is missing or cannot be read.
        """
        spec = _read_json(folder / SPEC)
        content = read_manifest(folder / MANIFEST).content
        provenance = _read_json(folder / PROVENANCE)
        return cls(folder, spec["stage"], spec["id"], content, spec["params"], provenance)

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds of the job that made it, None if not recorded."""
        return self._number(self.provenance.get("seconds"))

    @property
    def peak_memory_bytes(self) -> float | None:
        """Largest memory of the job that made it, None if not recorded."""
        return self._number(self.provenance.get("peak_memory_bytes"))

    def metric(self, name: str) -> float | None:
        """A count the stage reported about its run, None if it did not."""
        return self._number(self.provenance.get("metrics", {}).get(name))

    def table(self, name: str) -> pd.DataFrame:
        """One of its Parquet files (read once, do not change in place)."""
        if name not in self._tables:
            self._tables[name] = read_table(self.folder / name)
        return self._tables[name]

    def json(self, name: str) -> dict[str, Any]:
        """One of its JSON files."""
        return _read_json(self.folder / name)

    @staticmethod
    def _number(value: Any) -> float | None:
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Run:
    """One way of scoring the pool, and what it left.

    Attributes:
        name: The run's name.
        group: Runs that differ only by a random draw share a group.
        scorer: ``gradient``, ``random``, or another of :mod:`iprox.study.scorers`.
        proxy: ``target``, ``ipsvd``, ``svd``, ``layers``, ``model``, or None for a run without a
            proxy.
        sparsity: Share of the target the run asked to remove, or that was found for it; None if
            it removes nothing.
        preset: Preset the study started from.
        changed: Keys the run changes, with their values.
        until: Last step the run goes to.
        artifacts: Its stage folders by name: ``ranking``, ``finetune-mmlu``, ...
    """

    name: str
    group: str
    scorer: str
    proxy: str | None
    sparsity: float | None
    preset: str
    changed: dict[str, Any]
    until: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @property
    def is_random(self) -> bool:
        """Whether the run ranks by chance."""
        return self.scorer == "random"

    @property
    def sketch(self) -> str | None:
        """Kind of the sketches the run compares in place of gradients, None if it does not."""
        features = self.artifacts.get("features")
        section = features.params.get("features") if features else None
        return section["kind"] if section else None

    @property
    def is_target(self) -> bool:
        """Whether the run scores exactly with the target itself: the reference of all others."""
        return self.scorer == GRADIENT and self.proxy == "target" and self.sketch is None

    def of(self, kind: str, tasks: list[str]) -> dict[str, Artifact]:
        """The run's artifacts of one kind, by task; one made for all tasks counts for each."""
        found = {task: self.artifacts.get(f"{kind}-{task}") for task in tasks}
        for_all = self.artifacts.get(f"{kind}-all")
        return {task: a for task, got in found.items() if (a := got or for_all) is not None}

    @property
    def _order(self) -> str:
        """The run's ranking in words."""
        return "a random order" if self.is_random else f"an order by {self.scorer}"

    def why_missing(self, name: str) -> str:
        """Why this run has no artifact ``name``: what a reader sees in place of a number."""
        kind = name.split("-")[0]
        if kind in ("factors", "proxy", "fidelity") and self.scorer != GRADIENT:
            return f"{self._order} has no proxy to measure"
        if kind in ("factors", "proxy") and self.proxy == "target":
            return "the target scores with its own weights: nothing is factorised"
        if kind in ("factors", "proxy") and self.proxy == "layers":
            return "whole blocks are left out: nothing is factorised"
        if kind in ("factors", "proxy") and self.proxy == "model":
            return "another model scores: it is not made from the target"
        if kind == "fidelity" and self.is_target:
            return "this run is the reference that proxies are compared with"
        if kind == "features" and self.scorer != GRADIENT:
            return f"{self._order} needs no scoring by gradients"
        needs = {"features": 1, "ranking": 1, "selection": 2, "finetune": 3, "evaluation": 3}
        if needs.get(kind, 0) > STOPS[self.until]:
            return f"the run goes until {self.until} only"
        return f"the study did not make {kind} for this run (see its enabled keys)"


@dataclass(frozen=True)
class Study:
    """Everything the report shows.

    Attributes:
        name: The study's name.
        tasks: Its tasks in the order of the study file.
        runs: Its runs in the order of the study file.
        shared: Pool, split and target.
        task_data: The task artifacts by task.
        base: Evaluations of the untouched target by task.
        settings: What the report should show.
        config: The resolved study.
    """

    name: str
    tasks: list[str]
    runs: list[Run]
    shared: dict[str, Artifact]
    task_data: dict[str, Artifact]
    base: dict[str, Artifact]
    settings: ReportSection
    config: dict[str, Any]

    @classmethod
    def of_job(cls, job: Job) -> Study:
        """The study that a report job was given.

        Raises:
            ArtifactError: A parent has a role that belongs to nothing in the study.
        """
        names: dict[str, dict[str, Any]] = job.params["runs"]
        parents = {role: Artifact.read(folder) for role, folder in sorted(job.parents.items())}
        by_owner: dict[str, dict[str, Artifact]] = {}
        for role, artifact in parents.items():
            owner, _, name = role.partition("/")
            if owner not in {*names, *SHARED, "task", BASE}:
                raise ArtifactError(
                    "the report was given a folder that no run owns",
                    where=artifact.folder,
                    value=role,
                    allowed=f"roles of {', '.join(names)}; {', '.join(SHARED)}; task/, {BASE}/",
                )
            by_owner.setdefault(owner, {})[name] = artifact
        tasks: list[str] = job.params["tasks"]
        return cls(
            name=job.params["study"],
            tasks=tasks,
            runs=[_run(name, about, by_owner.get(name, {})) for name, about in names.items()],
            shared={role: parents[role] for role in SHARED if role in parents},
            task_data=by_owner.get("task", {}),
            base=_by_task(by_owner.get(BASE, {}), tasks),
            settings=job.section(ReportSection, "report"),
            config=job.params["config"],
        )

    @property
    def target_run(self) -> Run | None:
        """The run that scores with the target itself, if the study has one."""
        return next((run for run in self.runs if run.is_target), None)

    @property
    def groups(self) -> dict[str, list[Run]]:
        """Runs by group, groups in the order of the study file."""
        grouped: dict[str, list[Run]] = {}
        for run in self.runs:
            grouped.setdefault(run.group, []).append(run)
        return grouped

    @property
    def drawn_once(self) -> list[Run]:
        """One run of each group: what a picture shows where further draws would only repeat it."""
        return [runs[0] for runs in self.groups.values()]

    def artifacts(self) -> Iterator[tuple[str, str, Artifact]]:
        """All artifacts as (owner, name, artifact); owner is a run, ``base``, or ``study``."""
        for role, artifact in self.shared.items():
            yield "study", role, artifact
        for task, artifact in self.task_data.items():
            yield "study", f"task-{task}", artifact
        for task, artifact in self.base.items():
            yield BASE, f"evaluation-{task}", artifact
        for run in self.runs:
            for name, artifact in run.artifacts.items():
                yield run.name, name, artifact


def _run(name: str, about: dict[str, Any], artifacts: dict[str, Artifact]) -> Run:
    """A run from its entry in the report's parameters."""
    return Run(
        name=name,
        group=about["group"],
        scorer=about["scorer"],
        proxy=about["proxy"],
        sparsity=_sparsity(about["sparsity"], artifacts.get("sparsity")),
        preset=about["preset"],
        changed=about["changed"],
        until=about["until"],
        artifacts=artifacts,
    )


def _sparsity(asked: float | str | None, found: Artifact | None) -> float | None:
    """The sparsity a run asked for, or had looked for."""
    if isinstance(asked, str):
        return None if found is None else float(found.json("chosen.json")["sparsity"])
    return asked


def _by_task(artifacts: dict[str, Artifact], tasks: list[str]) -> dict[str, Artifact]:
    """Evaluations of the base model by task."""
    return {
        task: artifacts[f"evaluation-{task}"] for task in tasks if f"evaluation-{task}" in artifacts
    }


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: The file is missing or is not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtifactError("a stage folder is incomplete", where=path, value=str(error)) from None
