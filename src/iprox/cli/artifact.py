"""Finding artifacts on disk: from any path in or to one, to its folder, spec and ancestry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iprox.errors import ArtifactError, did_you_mean
from iprox.store.manifest import (
    MANIFEST,
    PROVENANCE,
    SHARD_MANIFESTS,
    SPEC,
    Manifest,
    read_manifest,
)

RESULTS = Path("results")
STUDIES = "studies"

STAGES = {
    "pool": "The candidate examples one may select from, in one schema.",
    "task": "A benchmark: queries that influence is measured on, and test items.",
    "target": "The language model that is fine-tuned in the end, as a Hugging Face folder.",
    "split": "Which pool examples one later stage sees.",
    "warmup": "The target after a short fine-tuning: the checkpoint influence is measured at.",
    "probe": "Layer inputs and output gradients of the warmed-up target at drawn token positions.",
    "decomposition": "Nested low-rank directions of every replaced layer, for all sparsities.",
    "sparsity": "The smallest proxy that is faithful enough, and the ones that were tried.",
    "factors": "The low-rank factors of every replaced layer at one sparsity.",
    "proxy": "The small model made from the target that scores in its place, aligned to it.",
    "checkpoint": "The target at the end of an earlier epoch of its warm-up.",
    "extraction": "The blocks of the warmed-up target that matter most, as a model.",
    "covariance": "Sums of the second moments of layer inputs and output gradients, in shards.",
    "curvature": "Eigenbases and eigenvalues of the scoring model's curvature, by layer.",
    "eigenvalues": "Sums of squared gradients in the curvature's eigenbases, in shards.",
    "direction": "Query gradients of one task times an inverse curvature.",
    "query": "Mean query gradients of one task, by layer of the scoring model.",
    "features": "Every candidate's gradient: dot products with the queries', or a sketch.",
    "query_sketches": "A sketch of the gradient of every single query of one task.",
    "backbone": "A text encoder as it was published, as a Hugging Face folder.",
    "encoder": "The text encoder after it has learnt a teacher's influence scores.",
    "embeddings": "Every candidate's text embedding.",
    "query_embeddings": "The text embedding of every query of one task.",
    "head": "A linear function of embeddings that has learnt a teacher's scores for one task.",
    "ranking": "All candidates in the order of their scores, for each task.",
    "fidelity": "How well the proxy's scores agree with the target's on one slice of the pool.",
    "selection": "The candidates that are kept, for each task or for all, and why.",
    "diversity": "How a selection lies among sketches of the pool and the queries.",
    "finetune": "The target fine-tuned on a selection, as a Hugging Face folder.",
    "evaluation": "What a model scores on one task, item by item and in all.",
    "synthetic": "What low-rank layers of a small network keep of its loss and its influence.",
    "small": "A tiny model, trained on part of the pool and on all candidates from there.",
    "retrain": "Losses of the tiny model after training on random subsets of the candidates.",
    "faithfulness": "How well the scores of every run predict retraining, with intervals.",
    "facts": "How well each method traces a tiny model's answers to its pre-training text.",
    "retrieval": "Methods that trace answers to pre-training text: quality beside cost.",
    "paper_table": "A paper's table, with the numbers of a study's runs beside the printed ones.",
    "report": "Tables, figures and a page that show the runs of a study beside each other.",
}


@dataclass(frozen=True)
class Artifact:
    """One stage folder.

    Attributes:
        folder: Its real path, links resolved.
        spec: What ``spec.json`` says; empty when the file is absent.
        provenance: What ``provenance.json`` says; empty when the file is absent.
    """

    folder: Path
    spec: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return str(self.spec.get("stage", self.folder.parent.name))

    @property
    def id(self) -> str:
        """Its identity: the name of its folder."""
        return self.folder.name

    @property
    def params(self) -> dict[str, Any]:
        """The stage's own parameters by section."""
        return dict(self.spec.get("params", {}))

    def parents(self) -> dict[str, Artifact]:
        """Role -> parent, as far as the parents' folders exist."""
        results = self.folder.parent.parent
        found = {}
        for role, parent in sorted(self.spec.get("parents", {}).items()):
            folder = results / parent["stage"] / parent["id"]
            if folder.is_dir():
                found[role] = open_artifact(folder)
        return found

    def manifests(self) -> list[Path]:
        """Its manifest files: one, or for unfinished shards one each; empty when unfinished."""
        whole = self.folder / MANIFEST
        return [whole] if whole.is_file() else sorted(self.folder.glob(SHARD_MANIFESTS))

    def manifest(self) -> Manifest | None:
        """The manifest of the whole artifact; ``None`` when it is not finished."""
        path = self.folder / MANIFEST
        return read_manifest(path) if path.is_file() else None


def open_artifact(folder: Path) -> Artifact:
    """Read what a stage folder says about itself.

    Raises:
        ArtifactError: ``spec.json`` or ``provenance.json`` is there and is not a JSON object.
    """
    real = folder.resolve()
    shards = sorted(real.glob(f"shard-*.{SPEC}"))
    spec = read_json(real / SPEC) or (read_json(shards[0]) if shards else {})
    return Artifact(real, spec, read_json(real / PROVENANCE))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        ArtifactError: The file is something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError("a file is not JSON", where=path, value=str(error)) from None
    if not isinstance(content, dict):
        raise ArtifactError("a file is not a JSON object", where=path, value=content)
    return content


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a stage folder, finished or not."""
    if not folder.is_dir():
        return False
    named = (folder / SPEC).is_file() or (folder / MANIFEST).is_file()
    return named or any(folder.glob(SHARD_MANIFESTS))


def enclosing_folder(path: Path) -> Path | None:
    """The stage folder that ``path`` is, or is in, links resolved; ``None`` when it is in none."""
    real = path.resolve()
    return next((folder for folder in (real, *real.parents) if is_artifact(folder)), None)


def artifact_folders(folder: Path) -> Iterator[Path]:
    """Every stage folder below a results folder, a stage's, a study's or a run's, each once."""
    seen: set[Path] = set()
    for candidate in _candidates(folder):
        real = candidate.resolve()
        if real not in seen:
            seen.add(real)
            yield real


def _candidates(folder: Path) -> Iterator[Path]:
    """Stage folders and links to them; hidden folders (the store, downloads) are left out."""
    for child in sorted(folder.iterdir()):
        if not child.name.startswith(".") and child.is_dir():
            if is_artifact(child):
                yield child
            elif not child.is_symlink():
                yield from _candidates(child)


def is_study(folder: Path) -> bool:
    """Whether a folder is a study's: resolved settings and a folder of links for each run."""
    return (folder / "study.yaml").is_file() or (folder / "runs.parquet").is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: links to the stages it resolves to."""
    if not folder.is_dir() or is_artifact(folder) or is_study(folder):
        return False
    return bool(links(folder))


def run_folders(study: Path) -> list[Path]:
    """The runs of a study, sorted by name."""
    folders = (f for f in sorted(study.iterdir()) if f.is_dir() and not f.is_symlink())
    return [folder for folder in folders if links(folder)]


def links(folder: Path) -> dict[str, Path]:
    """Name -> stage folder, for the links in a run's or study's folder; dangling ones included."""
    return {link.name: link.resolve() for link in sorted(folder.iterdir()) if link.is_symlink()}


def find_run(name: str) -> Path | None:
    """The folder of a run given by its path or as ``study/run``; ``None`` when it is not one."""
    for folder in (Path(name), RESULTS / STUDIES / name):
        if is_run(folder):
            return folder
    return None


def existing(path: Path) -> Path:
    """``path``, when there is something.

    Raises:
        ArtifactError: There is nothing; the message lists what is nearby.
    """
    if path.exists():
        return path
    if path.is_symlink():
        raise ArtifactError(
            "a link leads nowhere: the artifact was not made, or was removed",
            where=path,
            value=str(path.readlink()),
            fix="run Snakemake for this study again",
        )
    parent = next((p for p in path.parents if p.is_dir()), Path("."))
    missing = path.relative_to(parent).parts[0] if parent != Path(".") else path.parts[0]
    names = [p.name for p in parent.iterdir() if not p.name.startswith(".")]
    nearby = did_you_mean(missing, names) if names else "nothing: the folder is empty"
    raise ArtifactError(
        f"there is no {path}",
        where=parent.resolve(),
        value=missing,
        allowed=nearby if len(nearby) < 2000 else f"{nearby[:2000]}...",
        fix="give a folder below results/, a file in one, or results/studies/<study>",
    )
