"""Stage ``factors``: the factors of every layer at one sparsity, cut from nested directions."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import zarr
from safetensors import safe_open

from iprox.errors import ConfigError
from iprox.numerics.allocation import Spectrum, allocate, uniform_budget, weighted_error
from iprox.numerics.ipsvd import Directions, Factors, truncate, truncation_error
from iprox.numerics.ranks import effective_sparsity, layer_parameters, rank_for
from iprox.progress import track
from iprox.stages.decomposition import located, save_tensors
from iprox.store.arrays import open_store
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import ProxySection

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``factors.safetensors``, ``layers.parquet`` and a copy of ``spectra.zarr``.

    ``factors.safetensors`` holds ``<layer>.left`` (out, rank) and ``<layer>.right`` (rank, in) in
    float32; layers kept dense are not in it. ``layers.parquet`` has a row per layer.

    Returns:
        Parameters of the decomposed layers after and before, the sparsity really achieved, the
        share of all layers' squared weighted norm that is lost, and numbers of layers, of those
        kept dense and of those whose rank could not be filled.

    Raises:
        ConfigError: Every layer would stay dense.
        NumericsError: A rank exceeds the directions that were kept.
    """
    proxy = resolved(job)
    source = job.parents["decomposition"]
    found, layers = cut_layers(source, proxy)
    tensors = {
        f"{name}.{side}": tensor.contiguous()
        for name, factors in found.items()
        for side, tensor in factors._asdict().items()
    }
    settings = job.params["factors"] | {"sparsity": proxy.sparsity}
    if not tensors:
        raise ConfigError(
            "every layer stays dense, so the proxy would be the target itself",
            where="proxy.sparsity, proxy.rank_multiple",
            value=(proxy.sparsity, proxy.rank_multiple),
            fix="raise the sparsity or lower the rank multiple",
        )
    save_tensors(job.out / "factors.safetensors", tensors, settings)
    write_table(job.out / "layers.parquet", layers, settings)
    # contents only: parents are read-only, and this copy must be writable until it is finished
    shutil.copytree(
        source / "spectra.zarr", job.out / "spectra.zarr", copy_function=shutil.copyfile
    )
    return _summary(layers)


def resolved(job: Job) -> ProxySection:
    """How the factors are cut; a sparsity that was looked for is the one that was found."""
    proxy = job.section(ProxySection, "factors")
    if proxy.sparsity != "auto":
        return proxy
    chosen = json.loads((job.parents["sparsity"] / "chosen.json").read_text(encoding="utf-8"))
    log.info("sparsity %g, as found", chosen["sparsity"])
    return proxy.model_copy(update={"sparsity": chosen["sparsity"]})


def cut_layers(source: Path, proxy: ProxySection) -> tuple[dict[str, Factors], pd.DataFrame]:
    """Factors of every layer that is replaced, and a row for every layer.

    Args:
        source: Folder of the decomposition.
        proxy: How the factors are cut.

    Raises:
        NumericsError: A rank exceeds the directions that were kept.
    """
    spectra = open_store(source / "spectra.zarr")
    names = list(spectra.attrs["layers"])
    known = {name: _spectrum(spectra[f"singular_values/{name}"]) for name in names}
    ranks = choose_ranks(known, proxy)
    if proxy.rank_allocation == "global":
        _warn_of_units(dict(spectra.attrs["settings"]))
    found: dict[str, Factors] = {}
    rows: list[dict[str, Any]] = []
    with (
        safe_open(source / "directions.safetensors", framework="pt") as directions,
        track(len(names), "layers", "factors") as progress,
    ):
        for name in names:
            stored = spectra[f"singular_values/{name}"]
            row, factors = _cut(name, stored, ranks[name], directions, proxy)
            row["weighted_norm"] = weighted_error(known[name], 0)
            row["weighted_error"] = weighted_error(known[name], ranks[name])
            rows.append(row)
            if factors is not None:
                found[name] = factors
            progress.advance(1)
    return found, pd.DataFrame(rows)


def choose_ranks(spectra: Mapping[str, Spectrum], proxy: ProxySection) -> dict[str, int | None]:
    """Rank of every layer, None for those kept dense.

    Args:
        spectra: Layer -> its spectrum.
        proxy: Settings.

    Raises:
        ConfigError: Sparsity or rank multiple is out of range.
    """
    rule = (proxy.share_removed, proxy.rank_multiple, proxy.rank_rounding, proxy.dense_rule)
    shapes = [(one.out_dim, one.in_dim) for one in spectra.values()]
    if proxy.rank_allocation == "uniform":
        ranks = [rank_for(out_dim, in_dim, *rule) for out_dim, in_dim in shapes]
    else:
        budget = uniform_budget(shapes, *rule)
        ranks = allocate(list(spectra.values()), budget, proxy.rank_multiple)
    return dict(zip(spectra, ranks, strict=True))


def _warn_of_units(decomposition: Mapping[str, Any]) -> None:
    """Say so when layers' errors are not in one unit, so that a common budget means little."""
    about_loss = decomposition.get("kind", "ipsvd") == "ipsvd"
    about_loss &= decomposition.get("whiten", "both") != "inputs"
    about_loss &= decomposition.get("objective", "tracin") == "tracin"
    if not about_loss:
        log.warning(
            "proxy.rank_allocation global compares errors that are not changes of the loss or of "
            "scores: only proxy.kind ipsvd with whiten both or queries and objective tracin makes "
            "them that"
        )


def _spectrum(stored: zarr.Array) -> Spectrum:
    """What a layer loses at each rank; nothing if plain SVD stands in for its weighting.

    Such a layer has inputs or gradients that are all zero: its weight changes no loss, and its
    singular values are not in the units of the others'.
    """
    about, values = dict(stored.attrs), torch.from_numpy(stored[...])
    if about["fallback"]:
        return Spectrum(about["out"], about["in"], torch.zeros_like(values))
    return Spectrum(about["out"], about["in"], values, about["floor"])


def _cut(
    name: str, spectrum: zarr.Array, rank: int | None, directions: Any, proxy: ProxySection
) -> tuple[dict[str, Any], Factors | None]:
    """One layer's row of ``layers.parquet``, and its factors unless it is kept dense."""
    about = dict(spectrum.attrs)
    out_dim, in_dim = int(about["out"]), int(about["in"])
    singular_values = torch.from_numpy(spectrum[...])
    parameters, dense = layer_parameters(out_dim, in_dim, rank), out_dim * in_dim
    row = {
        "layer": name,
        "out": out_dim,
        "in": in_dim,
        "rank": min(out_dim, in_dim) if rank is None else rank,
        "rank_effective": int(about["rank_effective"]),
        "kept_dense": rank is None,
        "truncation_error": (
            0.0 if rank is None else truncation_error(singular_values, about["floor"], rank)
        ),
        "parameters": parameters,
        "parameters_dense": dense,
        "sparsity_effective": effective_sparsity(parameters, dense),
        "kernel": about["kernel"],
        "fallback": about["fallback"] or "",
    }
    if rank is None:
        return row, None
    if row["rank_effective"] < rank:
        log.warning(
            "%s: only %d of rank %d can be filled, the rest is zero; "
            "probe more tokens or use mode exact",
            name,
            row["rank_effective"],
            rank,
        )
    nested = Directions(
        directions.get_tensor(f"{name}.left"),
        directions.get_tensor(f"{name}.right"),
        singular_values,
        row["rank_effective"],
        about["form"],
        about["floor"],
    )
    with located(name):
        return row, truncate(nested, rank, proxy.gauge)


def _summary(layers: pd.DataFrame) -> Metrics:
    """Headline numbers over all decomposed layers."""
    parameters, dense = int(layers["parameters"].sum()), int(layers["parameters_dense"].sum())
    replaced = ~layers["kept_dense"]
    norm, error = float(layers["weighted_norm"].sum()), float(layers["weighted_error"].sum())
    return {
        "layers": len(layers),
        "dense_layers": int(layers["kept_dense"].sum()),
        "rank_deficient_layers": int((layers["rank_effective"] < layers["rank"])[replaced].sum()),
        "parameters": parameters,
        "parameters_dense": dense,
        "sparsity_effective": effective_sparsity(parameters, dense),
        "error_share": error / norm if norm else 0.0,
    }
