"""Reading what the curvature stages left: sums in shards, eigenbases, eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iprox.engine.curvature import WhitenedNorms
from iprox.errors import ArtifactError
from iprox.numerics.ghost import widen
from iprox.numerics.kfac import Damping, Eigenbasis, LayerCurvature
from iprox.stages.passes import Reader, fingerprint
from iprox.stages.queries import check_origin
from iprox.store.arrays import open_store
from iprox.store.job import Job
from iprox.study.schema import CurvatureSection

VALUES = {"inputs": "input_values", "output_grads": "grad_values"}
"""Group of the eigenvectors of one kind of second moment -> group of its eigenvalues."""

AGREE = ("labels", "layers", "loss_reduction", "max_factor_dim", "model", "sites")
"""Root attributes that all parts of one curvature have in common."""


def open_parts(folder: Path) -> list[Any]:
    """The shards of a curvature pass, in order.

    Raises:
        ArtifactError: There are none, or they were made with different settings.
    """
    paths = sorted(folder.glob("shard-*.zarr"))
    if not paths:
        raise ArtifactError("a curvature pass has no shards", where=folder, fix="make it again")
    parts = [open_store(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        check_alike(path, part.attrs, parts[0].attrs)
    return parts


def check_alike(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse parts of a curvature that do not belong together.

    Raises:
        ArtifactError: Names the first setting that differs.
    """
    for key in AGREE:
        if found[key] != expected[key]:
            raise ArtifactError(
                f"parts of a curvature were made with another {key}",
                where=where,
                value=found[key],
                allowed=expected[key],
                fix="delete these artifacts' folders and run Snakemake again",
            )


def summed(parts: Sequence[Any], name: str) -> Tensor:
    """Sum of an array over shards, in their order, float64."""
    total = torch.from_numpy(parts[0][name][...]).double()
    for part in parts[1:]:
        total += torch.from_numpy(part[name][...])
    return total


@dataclass(frozen=True)
class CurvatureStore:
    """An open curvature, read layer by layer.

    Attributes:
        path: The store.
        bases: Its open root group.
        squares: Shards of squared gradients, for EK-FAC.
    """

    path: Path
    bases: Any
    squares: Sequence[Any] = ()

    @property
    def sites(self) -> dict[str, str]:
        """Layer -> the first layer that reads its input."""
        return dict(self.bases.attrs["sites"])

    def basis(
        self, kind: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Eigenbasis:
        """Eigenbasis of one second moment.

        Args:
            kind: ``inputs`` or ``output_grads``.
            name: The site, or the layer.
            device: Where to.
            dtype: Precision to compute in; vectors are stored in float32.
        """
        group = self.bases[f"{kind}/{name}"]
        blocks = [group[str(place)][...] for place in range(len(list(group.array_keys())))]
        values = torch.from_numpy(self.bases[f"{VALUES[kind]}/{name}"][...])
        vectors = [torch.from_numpy(block).to(device, dtype) for block in blocks]
        return Eigenbasis(vectors, values.to(device, dtype))

    def layer(
        self, name: str, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> LayerCurvature:
        """Curvature of one layer, with corrected eigenvalues when there are any."""
        grads = self.basis("output_grads", name, device, dtype)
        inputs = self.basis("inputs", self.sites[name], device, dtype)
        attrs = self.bases.attrs
        per_example = attrs["tokens"][name] / attrs["examples"]
        corrected = None
        if self.squares:
            examples = sum(part.attrs["examples"] for part in self.squares)
            corrected = (summed(self.squares, f"sums/{name}") / examples).to(device, dtype)
        return LayerCurvature(name, grads, inputs, per_example, corrected)


def whitened_norms(job: Job, reader: Reader, reduction: str) -> WhitenedNorms:
    """Norms by the curvature among a job's parents, with the job's damping, all layers in memory.

    Raises:
        ArtifactError: The curvature is of another model, of other layers or of another loss.
        NumericsError: It cannot be inverted.
    """
    section = job.section(CurvatureSection, "curvature")
    store = open_curvature(job.parents["curvature"], job.parents.get("eigenvalues"))
    layers = {n: [m.out_features, m.in_features] for n, m in reader.layers.items()}
    about = {"layers": layers, "loss_reduction": reduction, "model": fingerprint(reader.layers)}
    check_origin(about, store.bases.attrs, store.path)
    curvatures = {
        name: store.layer(name, reader.device, widen(layer.weight[:0]).dtype)
        for name, layer in reader.layers.items()
    }
    return WhitenedNorms(curvatures, store.sites, Damping(section.damping, section.damping_mode))


def open_curvature(folder: Path, squares: Path | None = None) -> CurvatureStore:
    """Open a curvature, and EK-FAC's squared gradients.

    Args:
        folder: Folder of the ``curvature`` artifact.
        squares: Folder of the ``eigenvalues`` artifact.

    Raises:
        ArtifactError: They were not made with each other.
    """
    path = folder / "curvature.zarr"
    bases = open_store(path)
    parts: list[Any] = []
    if squares is not None:
        parts = open_parts(squares)
        check_alike(squares, parts[0].attrs, bases.attrs)
    return CurvatureStore(path, bases, parts)
