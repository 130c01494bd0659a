"""``iprox show``: what is in an artifact, a file, a run or a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from iprox.cli.artifact import (
    STAGES,
    Artifact,
    artifact_folders,
    enclosing_folder,
    existing,
    is_run,
    is_study,
    links,
    open_artifact,
    run_folders,
)
from iprox.cli.render import Facts, Page, Table, emit, human_bytes, human_flops, human_memory
from iprox.progress import clock
from iprox.store.manifest import ABOUT, Manifest, read_manifest

Block = Facts | Table


def show(
    path: Annotated[
        Path,
        typer.Argument(help="A stage folder or a link to one, any file in it, a run, or a study."),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows shown of each table.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in an artifact, a file, a run or a study."""
    emit(page(path, rows), as_json)


def page(path: Path, rows: int) -> Page:
    """What :func:`show` prints about a path.

    Raises:
        ArtifactError: There is nothing at the path, or nothing that can be shown.
    """
    from iprox.cli.views import file_blocks

    folder = enclosing_folder(existing(path))
    if folder is not None:
        return _artifact_page(open_artifact(folder), path.resolve().relative_to(folder), rows)
    if path.is_dir():
        if is_study(path):
            return _study_page(path)
        if is_run(path):
            return _run_page(path)
        folders = list(artifact_folders(path))
        if folders:
            return _overview_page(path, [open_artifact(f) for f in folders])
    return Page(str(path), list(file_blocks(path, rows)))


# --- one artifact ----------------------------------------------------------------------------


def _artifact_page(artifact: Artifact, inner: Path, rows: int) -> Page:
    """A whole stage folder, or one file in it."""
    from iprox.cli.views import file_blocks, path_blocks, stage_blocks

    sentence = STAGES.get(artifact.stage, "A stage that this version does not know.")
    headline = f"{artifact.stage} {artifact.id}\n{sentence}"
    if inner != Path("."):
        known = inner.name not in ABOUT
        path = artifact.folder / inner
        blocks = (
            path_blocks(artifact.stage, artifact.folder, inner, rows)
            if known
            else file_blocks(path, rows)
        )
        return Page(f"{inner} of {headline}", list(blocks))
    about: list[Block] = [_identity(artifact), _provenance(artifact), _files(artifact)]
    return Page(headline, [*about, *stage_blocks(artifact.stage, artifact.folder, rows)])


def _identity(artifact: Artifact) -> Facts:
    """Folder, state, parameters and parents."""
    from iprox.cli.views import flat

    parents = artifact.spec.get("parents", {})
    return Facts(
        "made from",
        {
            "folder": artifact.folder,
            "content": _content(artifact),
            **{f"parent {role}": f"{p['stage']}/{p['id']}" for role, p in sorted(parents.items())},
            **({} if artifact.spec else {"spec.json": "absent"}),
            **flat(artifact.params),
        },
    )


def _content(artifact: Artifact) -> str:
    manifest = artifact.manifest()
    if manifest is not None:
        return f"{manifest.content[:12]} ({len(manifest.files)} files)"
    shards = len(artifact.manifests())
    return f"not finished: {shards} shards so far" if shards else "not finished: no manifest"


def _provenance(artifact: Artifact) -> Facts:
    """Time, memory, versions and counts, as far as they are recorded."""
    from iprox.cli.views import flat

    made = dict(artifact.provenance)
    if not made:
        return Facts("provenance", {"provenance.json": "absent"})
    known: dict[str, Any] = {"cost": cost_line(made), "seconds": made.pop("seconds", None)}
    memory = made.pop("peak_memory_bytes", None)
    known["peak memory"] = None if memory is None else human_memory(memory)
    known |= dict(made.pop("metrics", {}))
    versions = made.pop("versions", {})
    known["versions"] = versions
    return Facts("provenance", known | flat(made))


def cost_line(made: Mapping[str, Any]) -> str | None:
    """Time, operations, rate and memory in one line: ``0:01:10, 1.2 TFLOP, 813 tokens/s, ...``."""
    metrics = made.get("metrics", {})
    parts = {
        "seconds": (made.get("seconds"), clock),
        "flops": (metrics.get("flops"), human_flops),
        "rate": (metrics.get("tokens_per_s"), lambda rate: f"{rate:,.0f} tokens/s"),
        "peak": (made.get("peak_memory_bytes"), lambda size: f"peak {human_memory(size)}"),
        "device": (
            made.get("peak_device_memory_bytes"),
            lambda size: f"{human_memory(size)} on the device",
        ),
    }
    said = [say(value) for value, say in parts.values() if isinstance(value, int | float)]
    return ", ".join(said) or None


def _files(artifact: Artifact) -> Table:
    """Files with their sizes; the files of a Zarr store together."""
    sizes: dict[str, list[int]] = {}
    for path in artifact.manifests():
        for name, entry in read_manifest(path).files.items():
            store, inside, _ = name.partition(".zarr/")
            sizes.setdefault(f"{store}.zarr" if inside else name, []).append(entry.size)
    rows = [[name, len(s), human_bytes(sum(s))] for name, s in sorted(sizes.items())]
    return Table("files", ["name", "files", "size"], rows)


# --- folders of many -------------------------------------------------------------------------


def _run_page(path: Path) -> Page:
    """A run: the stages it resolves to."""
    return Page(f"run {path.name} of study {path.parent.name}", [_links_table(path, "stages")])


def _study_page(path: Path) -> Page:
    """A study: its settings, its runs, what they share, and which stages are there."""
    from iprox.cli.runs import runs_table

    blocks: list[Block] = []
    if (path / "runs.parquet").is_file():
        blocks.append(runs_table([path]))
    else:
        blocks.append(Facts("runs.parquet", {"file": "absent"}))
    if links(path):
        blocks.append(_links_table(path, "shared by all runs"))
    blocks += [_links_table(run, run.name) for run in run_folders(path)]
    return Page(f"study {path.resolve().name}", blocks)


def _links_table(folder: Path, title: str) -> Table:
    """The links of one folder, where they lead and whether that is finished."""
    rows = []
    for name, target in links(folder).items():
        state, size = _state(target)
        rows.append([name, f"{target.parent.name}/{target.name}", state, size])
    return Table(title, ["name", "artifact", "state", "size"], rows)


def _state(folder: Path) -> tuple[str, str]:
    """Whether an artifact is finished, and its size."""
    manifest = open_artifact(folder).manifest() if folder.is_dir() else None
    if manifest is None:
        return ("not finished" if folder.is_dir() else "not made"), "-"
    return "finished", human_bytes(_total(manifest))


def _total(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files.values())


def _overview_page(path: Path, artifacts: list[Artifact]) -> Page:
    """Any folder with artifacts below: how many of each stage, and which when it is one stage's."""
    by_stage: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        by_stage.setdefault(artifact.stage, []).append(artifact)
    if len(by_stage) == 1:
        rows = [[a.id, *_state(a.folder)] for a in artifacts]
        return Page(str(path), [Table(next(iter(by_stage)), ["id", "state", "size"], rows)])
    table = []
    for stage in sorted(by_stage, key=lambda s: list(STAGES).index(s) if s in STAGES else 99):
        manifests = [m for a in by_stage[stage] if (m := a.manifest()) is not None]
        size = human_bytes(sum(map(_total, manifests)))
        table.append([stage, len(by_stage[stage]), len(manifests), size, STAGES.get(stage, "")])
    columns = ["stage", "artifacts", "finished", "size", "what it is"]
    return Page(str(path), [Table("stages", columns, table)])
