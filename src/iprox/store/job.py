"""What a stage function is given: its parameters, its parents' folders, and where to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

SectionT = TypeVar("SectionT", bound=BaseModel)

Metrics = dict[str, int | float | str]
"""What a stage reports about its run: counts, tokens, FLOPs. Goes to ``provenance.json``."""


@dataclass(frozen=True)
class Job:
    """One execution of a stage.

    Attributes:
        stage: The stage's name.
        params: Its own parameters as planned: section name -> mapping.
        parents: Role -> folder of the parent artifact, already verified.
        out: Empty folder to write into. What is there when the stage function returns becomes
            the artifact.
        rows: Features shards only: first and one-past-last row of the pool.
        data_dir: Folder that paths in the study are relative to.
        cache_dir: Folder for downloaded packages.
        progress: Folder that outlives a killed job and is given to its next attempt, for a stage
            that can go on where it stopped; None where nothing is kept. Removed at the end.
        gpus: GPUs it may use; a training is spread over them.
        strict: Whether a key that ``params`` lacks cannot be read, as in the workflow, where it
            would be a key that the plan forgot; otherwise its default is taken.
    """

    stage: str
    params: dict[str, Any]
    parents: dict[str, Path]
    out: Path
    rows: tuple[int, int] | None = None
    data_dir: Path = field(default_factory=Path)
    cache_dir: Path = field(default_factory=lambda: Path("results/.cache"))
    strict: bool = False
    progress: Path | None = None
    gpus: int = 1

    def section(self, cls: type[SectionT], name: str) -> SectionT:
        """The parameters of one section as its typed object.

        Raises:
            AttributeError: Later, when a key is read that a strict job's ``params`` lack.
        """
        section = cls.model_validate(self.params[name])
        if self.strict:
            for key in cls.model_fields.keys() - section.model_fields_set:
                del section.__dict__[key]
        return section

    def roles(self, prefix: str) -> dict[str, Path]:
        """Parents whose role starts with ``prefix/``, by the rest of it: one per task, say."""
        start = f"{prefix}/"
        return {r[len(start) :]: p for r, p in sorted(self.parents.items()) if r.startswith(start)}
