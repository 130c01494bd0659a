"""What earlier runs left behind: finished artifacts with their identity, counts, time and size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iprox.errors import ArtifactError
from iprox.plan.nodes import RESULTS, Node
from iprox.store.manifest import MANIFEST, PROVENANCE, SHARD_MANIFESTS, SPEC


@dataclass(frozen=True)
class Made:
    """A finished artifact.

    Attributes:
        node: Its stage, parameters and ancestry, as its folder says.
        provenance: How it came about.
        size: Bytes of all its files.
    """

    node: Node
    provenance: dict[str, Any]
    size: int

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage counted."""
        return dict(self.provenance.get("metrics", {}))

    @property
    def seconds(self) -> float:
        """How long the stage took."""
        return float(self.provenance["seconds"])

    @property
    def device(self) -> str:
        """``cpu`` or the name of the GPU it was made on."""
        return str(self.provenance.get("host", {}).get("device", "cpu"))

    @property
    def on_gpu(self) -> bool:
        """Whether it was made on a GPU."""
        return self.device != "cpu"

    @property
    def finished(self) -> str:
        """When it was finished, in UTC; texts of this form sort by time."""
        return str(self.provenance.get("finished", ""))

    @property
    def peak_memory(self) -> int:
        """Bytes of the GPU's memory at most, or without one of the process's."""
        host = self.provenance.get("peak_memory_bytes", 0)
        return int(self.provenance.get("peak_device_memory_bytes", host))


def read_history(root: Path = Path()) -> list[Made]:
    """All finished artifacts below ``root/results`` whose ancestors are there too, by id.

    Raises:
        ArtifactError: A file that describes one is not JSON.
    """
    specs: dict[tuple[str, str], Node | None] = {}
    return [
        Made(node, _json(folder / PROVENANCE), _size(folder))
        for folder in sorted(_folders(root / RESULTS))
        if (node := _node(root, folder.parent.name, folder.name, specs)) is not None
    ]


def _folders(results: Path) -> Iterator[Path]:
    for path in results.glob(f"[!.]*/*/{MANIFEST}"):
        if (path.parent / PROVENANCE).is_file():
            yield path.parent


def _node(
    root: Path, stage: str, id: str, known: dict[tuple[str, str], Node | None]
) -> Node | None:
    """The stage of a folder as its ``spec.json`` says; None when an ancestor's is gone."""
    if (stage, id) not in known:
        known[stage, id] = None
        path = root / RESULTS / stage / id / SPEC
        if path.is_file():
            spec = _json(path)
            parents = {
                role: _node(root, parent["stage"], parent["id"], known)
                for role, parent in spec["parents"].items()
            }
            found = {role: parent for role, parent in parents.items() if parent is not None}
            if len(found) == len(parents):
                shards = len(list(path.parent.glob(SHARD_MANIFESTS))) or 1
                known[stage, id] = Node(stage, id, spec["params"], found, shards)
    return known[stage, id]


def _size(folder: Path) -> int:
    return sum(entry["bytes"] for entry in _json(folder / MANIFEST)["files"].values())


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError("a file is not JSON", where=path, value=str(error)) from None
