"""``iprox gc``: what in ``results/`` no study needs, and its removal.

Needed is what a study below ``results/studies`` links to, and all its ancestors. A kept
computation in the content store is needed while any artifact has its files, also one of another
checkout that shares the store: hard links are counted.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from iprox.cli.artifact import (
    RESULTS,
    STUDIES,
    Artifact,
    artifact_folders,
    existing,
    is_artifact,
    open_artifact,
)
from iprox.cli.render import emit, human_bytes, inert
from iprox.errors import ArtifactError
from iprox.store.manifest import ABOUT, MANIFEST

STORE = ".objects"
SCRATCH = ".tmp-*"
"""What a killed job leaves in the store."""

Inode = tuple[int, int]


@dataclass
class Garbage:
    """What no study needs.

    Attributes:
        artifacts: Stage folders.
        objects: Folders of the content store.
        scratch: Folders of killed jobs.
        freed: Bytes that their removal gives back.
        kept: Number of stage folders that stay.
    """

    artifacts: list[Path] = field(default_factory=list)
    objects: list[Path] = field(default_factory=list)
    scratch: list[Path] = field(default_factory=list)
    freed: int = 0
    kept: int = 0


def gc(
    results: Annotated[Path, typer.Argument(help="The results folder.")] = RESULTS,
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="A study file whose artifacts stay, linked or not; may be repeated."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List artifacts that no study needs; remove them with --delete."""
    found = find_garbage(existing(results), needed_by(keep or []))
    if delete:
        remove(existing(results), found)
    if as_json:
        _print_json(found, delete)
        return
    for path in (*found.artifacts, *found.objects, *found.scratch):
        typer.echo(inert(str(path)))
    verb = "removed" if delete else "to remove"
    typer.echo(
        f"{verb}: {len(found.artifacts)} artifacts, {len(found.objects)} kept computations, "
        f"{len(found.scratch)} leftovers of killed jobs, {human_bytes(found.freed)}; "
        f"{found.kept} artifacts stay"
    )
    if not delete and (found.artifacts or found.objects or found.scratch):
        typer.echo("nothing was removed: iprox gc --delete does it")


def _print_json(found: Garbage, deleted: bool) -> None:
    from iprox.cli.render import Facts, Page

    facts = {
        "artifacts": list(map(str, found.artifacts)),
        "objects": list(map(str, found.objects)),
        "scratch": list(map(str, found.scratch)),
        "freed": found.freed,
        "kept": found.kept,
        "removed": deleted,
    }
    emit(Page("gc", [Facts("result", facts)]), as_json=True)


def needed_by(studies: Iterable[Path]) -> set[tuple[str, str]]:
    """(stage, id) of everything that study files plan.

    Raises:
        ConfigError: A file breaks the schema.
    """
    from iprox.plan.plan import plan_study
    from iprox.study.load import load_study

    return {key for path in studies for key in plan_study(load_study([path])).nodes}


def find_garbage(results: Path, planned: set[tuple[str, str]]) -> Garbage:
    """What in a results folder no study needs.

    Args:
        results: The folder.
        planned: (stage, id) of artifacts that stay although no study links to them.

    Raises:
        ArtifactError: It has no study, so that nothing would be needed.
    """
    results = results.resolve()
    studies = results / STUDIES
    linked = list(artifact_folders(studies)) if studies.is_dir() else []
    everything = list(_stage_folders(results))
    named = [f for f in everything if (f.parent.name, f.name) in planned]
    if not linked and not named:
        raise ArtifactError(
            "there is no study here, so everything would be removed",
            where=studies,
            fix="name the study whose artifacts stay: iprox gc --keep STUDY.yaml; or remove the "
            "folder itself",
        )
    needed = _with_ancestors([*linked, *named])
    found = Garbage(kept=sum(folder in needed for folder in everything))
    found.artifacts = [folder for folder in everything if folder not in needed]
    leaving = Counter(
        inode for folder in found.artifacts for inode, _ in map(_inode, _data_files(folder))
    )
    found.objects = [o for o in _objects(results) if not _is_used(o, leaving)]
    found.scratch = sorted((results / STORE).glob(f"*/{SCRATCH}"))
    gone = [*found.artifacts, *found.objects, *found.scratch]
    found.freed = _freed(path for folder in gone for path in _all_files(folder))
    return found


def remove(results: Path, garbage: Garbage) -> None:
    """Remove what was found; an interrupted removal leaves nothing that looks finished.

    Raises:
        ArtifactError: The workflow is running here.
    """
    locks = results.resolve().parent / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):
        raise ArtifactError(
            "a workflow is running in this folder, or was killed",
            where=locks,
            fix="wait for it; if none runs: snakemake --unlock",
        )
    for folder in garbage.artifacts:
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
        for beside in ("logs", "benchmarks"):
            about = results / beside / folder.parent.name
            shutil.rmtree(about / folder.name, ignore_errors=True)
            for path in (f"{folder.name}.log", f"{folder.name}.tsv"):
                (about / path).unlink(missing_ok=True)
    for folder in (*garbage.objects, *garbage.scratch):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _stage_folders(results: Path) -> Iterator[Path]:
    """Every stage folder of a results folder: ``<stage>/<id>``."""
    for stage in sorted(results.iterdir()):
        if stage.is_dir() and not stage.name.startswith(".") and stage.name != STUDIES:
            yield from (f.resolve() for f in sorted(stage.iterdir()) if is_artifact(f))


def _with_ancestors(folders: Iterable[Path]) -> set[Path]:
    needed: set[Path] = set()
    todo: list[Artifact] = [open_artifact(folder) for folder in folders]
    while todo:
        artifact = todo.pop()
        if artifact.folder not in needed:
            needed.add(artifact.folder)
            todo += artifact.parents().values()
    return needed


def _objects(results: Path) -> Iterator[Path]:
    """Finished computations of the content store."""
    for path in sorted((results / STORE).glob("*/*")):
        if path.is_dir() and not path.name.startswith("."):
            yield path


def _is_used(kept: Path, leaving: Counter[Inode]) -> bool:
    """Whether a file of a kept computation is also in an artifact that stays."""
    for path in _data_files(kept):
        inode, links = _inode(path)
        if links - leaving[inode] > 1:
            return True
    return False


def _data_files(folder: Path) -> Iterator[Path]:
    return (path for path in _all_files(folder) if path.name not in ABOUT)


def _all_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if not path.is_symlink():
                yield path


def _inode(path: Path) -> tuple[Inode, int]:
    about = path.stat()
    return (about.st_dev, about.st_ino), about.st_nlink


def _freed(paths: Iterable[Path]) -> int:
    """Bytes of files all of whose hard links are among the paths."""
    size: dict[Inode, int] = {}
    links: dict[Inode, int] = {}
    seen: Counter[Inode] = Counter()
    for path in paths:
        about = path.stat()
        inode = (about.st_dev, about.st_ino)
        size[inode], links[inode] = about.st_size, about.st_nlink
        seen[inode] += 1
    return sum(size[inode] for inode, n in seen.items() if n >= links[inode])
