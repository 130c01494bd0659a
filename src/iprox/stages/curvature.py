"""Stage ``curvature``: eigenbases of the second moments that the covariance shards sum up to."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from iprox.errors import ArtifactError, NumericsError
from iprox.numerics import flops
from iprox.numerics.kfac import Eigenbasis, eigenbasis
from iprox.numerics.sides import block_sides
from iprox.progress import track
from iprox.stages.curvature_store import VALUES, open_parts, summed
from iprox.store.arrays import create_store, put
from iprox.store.job import Job, Metrics

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``curvature.zarr``: what K-FAC needs, and EK-FAC's eigenvalues are measured in.

    ``inputs/<site>/<block>`` and ``output_grads/<layer>/<block>`` (side, side) float32 hold
    eigenvectors as columns; ``input_values/<site>`` (in,) and ``grad_values/<layer>`` (out,)
    float64 the eigenvalues of the mean over tokens. Of the root attributes, ``examples`` and
    ``tokens`` (of each layer) say what they are means over, ``split`` which sides were split
    into how many blocks.

    Returns:
        Counts of examples, layers and split sides, and FLOPs.

    Raises:
        ArtifactError: The shards are of different settings, or have no examples.
        NumericsError: A second moment is not finite or zero; names the layer.
    """
    parts = open_parts(job.parents["covariance"])
    about = dict(parts[0].attrs)
    limit, layers, sites = about["max_factor_dim"], about["layers"], about["sites"]
    tokens = {name: sum(p.attrs["tokens"][name] for p in parts) for name in layers}
    examples = sum(p.attrs["examples"] for p in parts)
    if not examples:
        raise ArtifactError(
            "no example of the fisher split has a supervised token",
            where=job.parents["covariance"],
            fix="raise chat.max_length, or split.fisher",
        )
    store = create_store(job.out / "curvature.zarr")
    sides: list[int] = []
    split: dict[str, int] = {}
    with track(len(layers), "layers", "eigenbases") as progress:
        for name, (out, features) in layers.items():
            own = {"inputs": features} if sites[name] == name else {}
            for kind, dim in ({"output_grads": out} | own).items():
                blocks = block_sides(dim, limit)
                sides += blocks
                if len(blocks) > 1:
                    split[f"{kind}/{name}"] = len(blocks)
                sums = [summed(parts, f"{kind}/{name}/{i}") for i in range(len(blocks))]
                _put_basis(store, kind, name, _solve(kind, name, sums, tokens[name]))
            progress.advance(1)
    if split:
        log.warning(
            "%d sides above curvature.max_factor_dim %d are split into blocks: %s",
            len(split),
            limit,
            ", ".join(f"{name} into {n}" for name, n in list(split.items())[:5]),
        )
    store.attrs.update({**about, "examples": examples, "split": split, "tokens": tokens})
    return {
        "examples": examples,
        "layers": len(layers),
        "split_sides": len(split),
        "flops": flops.eigenbases(sides),
    }


def _solve(kind: str, layer: str, sums: Sequence[Tensor], n_tokens: int) -> Eigenbasis:
    """Eigenbasis of one second moment.

    Raises:
        NumericsError: It is zero or not finite, or cannot be decomposed; names the layer.
    """
    where = f"layer {layer}, {kind.replace('_', ' ')}"
    trace = float(sum(block.trace() for block in sums))
    if not (math.isfinite(trace) and trace > 0):
        raise NumericsError(
            "a second moment is zero or not finite",
            where=where,
            value=f"trace {trace} over {n_tokens} tokens",
            allowed="a finite number above 0",
            fix="exclude this layer in proxy.layers: nothing of the loss passes through it, or its "
            "precision overflows",
        )
    try:
        return eigenbasis(sums, n_tokens)
    except NumericsError as error:
        raise NumericsError(
            error.what,
            where=where,
            value=error.value,
            allowed=error.allowed,
            fix="lower curvature.max_factor_dim",
        ) from None


def _put_basis(store: Any, kind: str, name: str, basis: Eigenbasis) -> None:
    for place, vectors in enumerate(basis.blocks):
        put(store, f"{kind}/{name}/{place}", vectors.float().numpy(), ("features", "vectors"))
    put(store, f"{VALUES[kind]}/{name}", basis.values.numpy(), ("vectors",))
