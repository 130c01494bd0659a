"""Files outside ``results/`` that stages read: where they are, and what is in them.

A path in a study is relative to the data folder and may not leave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iprox.errors import DataError
from iprox.store.manifest import digest_file

MAX_PART = 255
"""Bytes of a file's name that common file systems take."""

PATH_KEYS = {
    "pool": ("path",),
    "task": ("path", "prompts", "test", "yaml"),
    "target": ("model",),
    "encoder": ("model",),
}
"""Which keys of which section may name a file or folder."""

MODEL_KEYS = ("target.model", "encoder.model")
"""Keys that name a model, which need not be a folder."""


def raw_paths(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, path as written) of every file that a stage's parameters name."""
    for section, keys in PATH_KEYS.items():
        for key in keys:
            value = params.get(section, {}).get(key)
            if isinstance(value, str):
                yield f"{section}.{key}", value


def check_path(path: str, key: str = "") -> None:
    """Refuse a path that the file system or the workflow engine cannot take as it is.

    Raises:
        DataError: It has characters that are not printed, or that Snakemake reads as its own, or
            a part that is too long.
    """
    odd = sorted({c for c in path if c in "<>{}" or not c.isprintable()})
    if odd:
        raise DataError(
            "a path has characters that the workflow cannot handle",
            where=key or None,
            value=path,
            allowed="printable characters except < > { }",
            fix=f"rename the file or folder without {', '.join(map(repr, odd))}",
        )
    if any(len(part.encode()) > MAX_PART for part in Path(path).parts):
        raise DataError(
            "a path has a part that is too long",
            where=key or None,
            value=path,
            allowed=f"parts of at most {MAX_PART} bytes",
        )


def locate(path: str, data_dir: Path, key: str = "") -> Path:
    """The file or folder that a study's path means.

    Raises:
        DataError: The path is absolute or leaves the data folder, or nothing is there.
    """
    check_path(path, key)
    root = data_dir.resolve()
    found = (root / path).resolve()
    if Path(path).is_absolute() or ".." in Path(path).parts or not found.is_relative_to(root):
        raise DataError(
            "a path leaves the data folder",
            where=key or None,
            value=path,
            allowed="a path inside the data folder, without ..",
            fix="set data_dir to a folder that holds the file, and give the path relative to it",
        )
    if not found.exists():
        raise DataError(
            "no such file or folder",
            where=key or None,
            value=path,
            allowed=f"a path below {root}",
            fix="correct the path, or name its folder: --config data_dir=FOLDER",
        )
    return found


def raw_input_files(params: Mapping[str, Any], data_dir: Path) -> list[Path]:
    """Existing local files that a stage's parameters name, folders expanded; for the scheduler."""
    files: list[Path] = []
    for key, path in raw_paths(params):
        check_path(path, key)
        if key in MODEL_KEYS and not (data_dir / path).is_dir():
            continue  # a registered or hub name, resolved by the stage that loads it
        found = locate(path, data_dir, key)
        files += sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
    for file in files:
        check_path(str(file))
    return files


def raw_input_digests(params: Mapping[str, Any], data_dir: Path) -> dict[str, str]:
    """Path relative to the data folder -> digest, of the same files."""
    root = data_dir.resolve()
    files = raw_input_files(params, data_dir)
    return {p.relative_to(root).as_posix(): digest_file(p) for p in files}
