"""Manifests: the digest of every file of an artifact, and the one digest of the whole.

A manifest is written last and is byte-identical for identical results: it holds no time,
host or code version (those are in ``provenance.json`` beside it). Downstream stages are
keyed by ``content``, so a stage that reran to the same bytes changes nothing after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iprox.errors import ArtifactError

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
SHARD_MANIFESTS = "shard-*.manifest.json"
SPEC = "spec.json"
ABOUT = (MANIFEST, PROVENANCE, SPEC)
"""Files that describe an artifact and are not part of its content."""


@dataclass(frozen=True)
class Entry:
    """Digest and size of one file of an artifact."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All files of an artifact, by path relative to its folder."""

    stage: str
    files: dict[str, Entry]

    @property
    def content(self) -> str:
        """One digest over all relative paths and file digests."""
        return digest_json([[name, entry.sha256] for name, entry in sorted(self.files.items())])

    def to_json(self) -> str:
        """Canonical text: equal manifests are equal bytes."""
        files = {n: {"bytes": e.size, "sha256": e.sha256} for n, e in sorted(self.files.items())}
        return dump_json({"content": self.content, "files": files, "stage": self.stage})


def dump_json(value: Any) -> str:
    """Readable JSON with sorted keys and a final newline; NaN is refused."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken of."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical form of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file, read in large blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative paths of an artifact's own files, sorted; Snakemake's marker files left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            relative = (Path(parent) / name).relative_to(folder).as_posix()
            if relative not in ABOUT and not name.startswith(".snakemake"):
                found.append(relative)
    return sorted(found)


def describe(stage: str, folder: Path, names: Iterable[str] | None = None) -> Manifest:
    """Manifest of the files in ``folder`` (all of them unless ``names`` are given)."""
    chosen = list_files(folder) if names is None else sorted(names)
    files = {
        name: Entry(digest_file(folder / name), (folder / name).stat().st_size) for name in chosen
    }
    return Manifest(stage, files)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file.

    Raises:
        ArtifactError: The file is missing, is not a manifest, or contradicts itself.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {n: Entry(e["sha256"], e["bytes"]) for n, e in raw["files"].items()}
        manifest, content = Manifest(raw["stage"], files), raw["content"]
    except FileNotFoundError:
        raise ArtifactError(
            "an artifact has no manifest: it is not finished, or not an artifact",
            where=path,
            fix="run the target that makes it again; nothing without a manifest is used",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            "a manifest cannot be read", where=path, value=str(error), fix=REMAKE
        ) from None
    if manifest.content != content:
        raise ArtifactError(
            "a manifest contradicts itself: its content digest is not that of its files",
            where=path,
            value=content,
            allowed=manifest.content,
            fix=REMAKE,
        )
    return manifest


REMAKE = "delete this artifact's folder and run Snakemake again; everything else is kept"


def problems(folder: Path, manifest: Manifest, hashes: bool = True) -> list[str]:
    """What of an artifact differs from its manifest, a line each; empty when all is well.

    Args:
        folder: The artifact's folder.
        manifest: Its manifest.
        hashes: Also read and hash every file; otherwise presence and size only.
    """
    found = []
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != entry.size:
            found.append(f"{path}: {path.stat().st_size} bytes, should be {entry.size}")
        elif hashes and digest_file(path) != entry.sha256:
            found.append(f"{path}: content does not match its sha256 {entry.sha256[:12]}...")
    return found


def check(folder: Path, manifest_path: Path | None = None) -> Manifest:
    """Verify an artifact completely before it is used.

    Returns:
        Its manifest.

    Raises:
        ArtifactError: A file is missing, has another size or other bytes.
    """
    path = manifest_path or folder / MANIFEST
    manifest = read_manifest(path)
    wrong = problems(folder, manifest)
    if wrong:
        raise ArtifactError(
            f"an artifact is corrupted: {len(wrong)} of {len(manifest.files)} files are wrong",
            where=wrong[0] if len(wrong) == 1 else "; ".join(wrong[:3]),
            fix=REMAKE,
        )
    return manifest
