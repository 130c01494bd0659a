"""Stage ``decomposition``: nested low-rank directions of every selected layer, for all sparsities.

Layers are decomposed one at a time, those that share an input after each other, so that memory
holds one input and one output gradient besides the result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zarr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iprox.errors import ArtifactError, NumericsError
from iprox.models.device import pick_device
from iprox.models.layers import linear_names_from_shapes
from iprox.numerics import flops
from iprox.numerics.ipsvd import DampedRoot, Directions, decompose, plain_svd
from iprox.numerics.ranks import max_useful_rank
from iprox.progress import track
from iprox.store.arrays import create_store, open_store, put
from iprox.store.job import Job, Metrics
from iprox.store.manifest import dump_json
from iprox.study.schema import LayersSection, ProxySection

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``directions.safetensors`` and ``spectra.zarr``.

    ``directions.safetensors`` holds ``<layer>.left`` (out, k) and ``<layer>.right`` (k, in) in
    float32; the first r columns and rows are the solution of rank r. k is the largest rank at which
    the layer would be replaced at all. ``spectra.zarr`` holds ``singular_values/<layer>`` with the
    layer's shape, damping, ranks and error floor as attributes.

    Returns:
        Numbers of layers, of layers that fell back to plain SVD, and of probe tokens; FLOPs.

    Raises:
        ArtifactError: The probe has a layer that the weights lack, or shapes differ.
        ModelError: Kind svd: the layer patterns match nothing.
        NumericsError: A probe row or weight is not finite, or damping 0 meets a singular moment.
    """
    proxy = job.section(ProxySection, "decomposition")
    weights = CheckpointWeights(job.parents["warmup"])
    tensors: dict[str, Tensor] = {}
    fallbacks, tokens, operations = 0, 0, 0.0
    if proxy.kind == "svd":
        names = linear_names_from_shapes(weights.shapes(), job.section(LayersSection, "layers"))
        layers = _plain_layers(weights, names, proxy)
    else:
        probe = open_store(job.parents["probe"] / "probe.zarr")
        names, tokens = list(probe.attrs["layers"]), int(probe.attrs["tokens"])
        layers = _probed_layers(weights, probe, proxy)
    about_all = {"settings": job.params["decomposition"], "layers": names}
    spectra = create_store(job.out / "spectra.zarr", about_all)
    with track(len(names), "layers", "decomposition") as progress:
        for name, directions, about in layers:
            tensors[f"{name}.left"] = directions.left.float().cpu().contiguous()
            tensors[f"{name}.right"] = directions.right.float().cpu().contiguous()
            _put_spectrum(spectra, name, directions, about)
            operations += _operations(directions, proxy, tokens)
            if directions.fallback:
                fallbacks += 1
                log.warning("%s: plain SVD, because its %s", name, directions.fallback)
            progress.advance(1)
    settings = {"orientation": "weight (out, in) = left @ right", **job.params["decomposition"]}
    save_tensors(job.out / "directions.safetensors", tensors, settings)
    return {
        "layers": len(names),
        "fallback_layers": fallbacks,
        "tokens": tokens,
        "flops": operations,
    }


def _operations(directions: Directions, proxy: ProxySection, tokens: int) -> float:
    """Floating-point operations of one layer's solution, as :mod:`iprox.numerics.flops` has it."""
    (out_dim, kept), in_dim = directions.left.shape, directions.right.shape[1]
    if proxy.kind == "svd" or directions.fallback:
        return flops.plain_svd(out_dim, in_dim, kept)
    solve = flops.ipsvd_exact if proxy.mode == "exact" else flops.ipsvd_paper
    return solve(out_dim, in_dim, tokens, kept)


@dataclass(frozen=True)
class CheckpointWeights:
    """Weights of a Hugging Face folder, read tensor by tensor without building the model."""

    folder: Path

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [self.folder / name for name in sorted(set(shards))]
        return [self.folder / "model.safetensors"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor.

        Raises:
            ArtifactError: The folder has no safetensors weights, or lacks a shard.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path in self._files():
            with _open_weights(path) as handle:
                found |= {n: tuple(handle.get_slice(n).get_shape()) for n in handle.keys()}
        return found

    def read(self, name: str) -> Tensor:
        """One tensor by name.

        Raises:
            ArtifactError: No file of the folder has it.
        """
        for path in self._files():
            with _open_weights(path) as handle:
                if name in handle.keys():
                    tensor: Tensor = handle.get_tensor(name)
                    return tensor
        raise ArtifactError("a tensor is missing", where=self.folder, value=name)


def save_tensors(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write safetensors with equal bytes for equal content.

    Safetensors orders metadata at random, so all settings go into one entry, as JSON.
    """
    save_file(tensors, path, metadata={"iprox": dump_json(settings)})


def read_settings(path: Path) -> dict[str, Any]:
    """Settings stored by :func:`save_tensors`."""
    with _open_weights(path) as handle:
        return dict(json.loads(handle.metadata()["iprox"]))


Layer = tuple[str, Directions, dict[str, Any]]
"""A layer's name, its directions, and what else its spectrum's attributes say."""


def _plain_layers(
    weights: CheckpointWeights, names: list[str], proxy: ProxySection
) -> Iterator[Layer]:
    """Plain SVD of each layer's weight."""
    device = _linear_algebra_device()
    for name in names:
        weight = weights.read(f"{name}.weight").to(device)
        with located(name):
            directions = plain_svd(weight, _kept(weight, proxy))
        yield name, directions, {"kernel": f"svd/{directions.form}"}


def _probed_layers(
    weights: CheckpointWeights, probe: zarr.Group, proxy: ProxySection
) -> Iterator[Layer]:
    """IPSVD of each probed layer; the root of an input is shared by the layers it feeds."""
    device = _linear_algebra_device()
    shapes = weights.shapes()
    for site, names in _by_site(probe).items():
        with located(f"{names[0]} (inputs)"):
            input_root = _root(probe[f"inputs/{site}"], proxy, device)
        for name in names:
            weight = _weight_of(name, weights, shapes, probe).to(device)
            with located(f"{name} (output gradients)"):
                if proxy.whiten == "inputs":
                    grad_root = DampedRoot.identity(len(weight), weight)
                else:
                    grad_root = _root(probe[f"output_grads/{name}"], proxy, device)
            with located(name):
                directions = decompose(
                    weight,
                    input_root,
                    grad_root,
                    mode=proxy.mode,
                    objective=proxy.objective,
                    max_rank=_kept(weight, proxy),
                )
            yield name, directions, _about(proxy, directions, input_root, grad_root)


def _by_site(probe: zarr.Group) -> dict[str, list[str]]:
    """Layers of a probe, those with a common input together."""
    sites: dict[str, list[str]] = {}
    for name, layer in dict(probe.attrs["layers"]).items():
        sites.setdefault(layer["site"], []).append(name)
    return sites


def _root(rows: zarr.Array, proxy: ProxySection, device: torch.device) -> DampedRoot:
    """Damped moment of one array of the probe."""
    return DampedRoot.from_rows(
        torch.from_numpy(rows[...]).to(device), proxy.damping, proxy.damping_mode
    )


def _weight_of(
    name: str, weights: CheckpointWeights, shapes: dict[str, tuple[int, ...]], probe: zarr.Group
) -> Tensor:
    """Weight of a probed layer (out, in), checked against the shape the probe saw."""
    layer, tensor = probe.attrs["layers"][name], f"{name}.weight"
    expected = (layer["out"], layer["in"])
    if shapes.get(tensor) != expected:
        raise ArtifactError(
            "a probed layer is not among the weights, or has another shape there",
            where=f"{weights.folder}: {tensor}",
            value=shapes.get(tensor, "missing"),
            allowed=expected,
            fix="delete the folders of this probe and warm-up and run again",
        )
    return weights.read(tensor)


def _kept(weight: Tensor, proxy: ProxySection) -> int:
    """Number of directions worth keeping of a weight."""
    out_dim, in_dim = weight.shape
    return max(1, max_useful_rank(out_dim, in_dim, proxy.dense_rule))


def _about(
    proxy: ProxySection, directions: Directions, input_root: DampedRoot, grad_root: DampedRoot
) -> dict[str, Any]:
    """How a layer was solved; a side's rank is null when its eigenpairs were not needed."""
    return {
        "kernel": f"{proxy.mode}/{directions.form}",
        **{
            f"{side}_{key}": value
            for side, root in (("input", input_root), ("grad", grad_root))
            for key, value in (("lam", root.lam), ("rank", root.known_rank), ("gram", root.gram))
        },
    }


def _put_spectrum(
    spectra: zarr.Group, name: str, directions: Directions, about: dict[str, Any]
) -> None:
    """Singular values of one layer, with what they mean as attributes."""
    attrs = {
        "out": directions.left.shape[0],
        "in": directions.right.shape[1],
        "rank_effective": directions.rank_effective,
        "total_norm": directions.total_norm,
        "floor": directions.floor,
        "form": directions.form,
        "fallback": directions.fallback,
        **about,
    }
    values = directions.singular_values.cpu().numpy()
    put(spectra, f"singular_values/{name}", values, ("component",), attrs)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say in numerical errors which layer they are about, and raise them again."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(
            error.what, where=where, value=error.value, allowed=error.allowed, fix=error.fix
        ) from None


def _open_weights(path: Path) -> Any:
    """Open a safetensors file, on the CPU.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError("weights cannot be read", where=path, value=str(error)) from None


def _linear_algebra_device() -> torch.device:
    """CUDA when there is one: other accelerators have no float64."""
    device = pick_device()
    return device if device.type == "cuda" else torch.device("cpu")
