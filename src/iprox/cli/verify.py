"""``iprox verify``: are the artifacts on disk what their manifests say?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from iprox.cli.artifact import (
    RESULTS,
    Artifact,
    artifact_folders,
    enclosing_folder,
    existing,
    open_artifact,
)
from iprox.cli.render import Facts, Page, emit, human_bytes, inert
from iprox.errors import ArtifactError
from iprox.store.manifest import SPEC, Entry, digest_file, digest_json, list_files, read_manifest

_SHARD_ABOUT = re.compile(r"shard-\d+\.(manifest|provenance|spec)\.json")


@dataclass(frozen=True)
class Wanted:
    """One file that a manifest promises."""

    path: Path
    entry: Entry


@dataclass
class Findings:
    """What a verification found: problems make it fail, warnings do not."""

    artifacts: int = 0
    files: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verify(
    path: Annotated[
        Path, typer.Argument(help="An artifact, a study or run, or a folder with many of them.")
    ] = RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare artifacts with their manifests, file by file."""
    findings = check_artifacts(_chosen(path))
    if as_json:
        emit(Page("verify", [Facts("result", asdict(findings))]), as_json=True)
    else:
        for warning in findings.warnings:
            typer.echo(f"warning: {inert(warning)}", err=True)
        for problem in findings.problems:
            typer.echo(inert(problem))
        n = len(findings.problems)
        found = f"{n} problem{'s' * (n > 1)}" if n else "all as their manifests say"
        counted = f"{findings.artifacts} artifacts, {findings.files} files"
        typer.echo(f"{counted}, {human_bytes(findings.size)}, {found}")
    if findings.problems:
        raise typer.Exit(1)


def check_artifacts(folders: Iterable[Path]) -> Findings:
    """Verify artifacts, the files of all of them in parallel."""
    from iprox.progress import track

    findings = Findings()
    wanted: list[Wanted] = []
    for folder in folders:
        findings.artifacts += 1
        try:
            wanted += _promised(open_artifact(folder), findings)
        except ArtifactError as error:
            findings.problems.append(f"{error.where}: {error.what}")
    wanted.sort(key=lambda w: -w.entry.size)  # the longest first, so that no core waits at the end
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        track(len(wanted), "files", "verify") as progress,
    ):
        for item, problem in zip(wanted, threads.map(_problem, wanted), strict=True):
            findings.files += 1
            findings.size += item.entry.size
            if problem:
                findings.problems.append(f"{item.path}: {problem}")
            progress.advance(1)
    findings.problems.sort()
    return findings


def _chosen(path: Path) -> list[Path]:
    """Folders of the artifacts that a path stands for.

    Raises:
        ArtifactError: There is nothing at the path, or no artifact.
    """
    one = enclosing_folder(existing(path))
    if one is not None:
        return [one]
    found = list(artifact_folders(path)) if path.is_dir() else []
    if not found:
        raise ArtifactError(
            "there is no artifact to verify",
            where=path,
            allowed="results/, results/<stage>/<id>, or results/studies/<study>",
        )
    return found


def _promised(artifact: Artifact, findings: Findings) -> Iterator[Wanted]:
    """Files that the manifests of one artifact list; what else is odd goes to the findings."""
    if not artifact.manifests():
        findings.warnings.append(f"{artifact.folder}: no manifest: not finished, nothing to check")
        return
    findings.problems += _spec_problems(artifact)
    known: set[str] = set()
    for path in artifact.manifests():
        try:
            files = read_manifest(path).files
        except ArtifactError as error:
            findings.problems.append(f"{path}: {error.what}")
            continue
        known |= files.keys()
        for name, entry in sorted(files.items()):
            yield Wanted(artifact.folder / name, entry)
    if known:
        extra = (n for n in list_files(artifact.folder) if n not in known)
        findings.warnings += [
            f"{artifact.folder / name}: in no manifest: not made by the workflow"
            for name in extra
            if not _SHARD_ABOUT.fullmatch(name)
        ]


def _spec_problems(artifact: Artifact) -> list[str]:
    """Whether ``spec.json`` is the one that the folder is named after."""
    path, spec = artifact.folder / SPEC, artifact.spec
    if not spec:
        return [f"{path}: missing, so the folder does not say what it was made with"]
    try:
        parents = {role: parent["id"] for role, parent in spec["parents"].items()}
        identity = {"params": spec["params"], "parents": parents, "stage": spec["stage"]}
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{path}: not a stage's spec: {error!r}"]
    digits = artifact.id.rsplit("-", 1)[-1]
    if spec.get("id") != artifact.id or not digest_json(identity).startswith(digits):
        return [f"{path}: does not belong to a folder of this name: it was changed or copied here"]
    return []


def _problem(wanted: Wanted) -> str:
    """What is wrong with one file; empty when it is as promised."""
    path, entry = wanted.path, wanted.entry
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes, should be {entry.size}"
    try:
        digest = digest_file(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest != entry.sha256:
        return f"content does not match its sha256 {entry.sha256[:12]}..."
    return ""
