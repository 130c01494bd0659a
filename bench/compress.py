"""Making a proxy: IPSVD of single layers beside the obvious computation, and alignment's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import material
from bench.rows import Row
from bench.timing import peak_bytes
from iprox.data.batches import collate
from iprox.data.chat import Encoded
from iprox.engine.align import align_proxy
from iprox.engine.loss import Batch, example_losses
from iprox.models.load import load_model
from iprox.numerics.ipsvd import DampedRoot, Directions, decompose
from iprox.study.schema import AlignSection, LayersSection

SHAPES = {
    "SmolLM2-135M": ((192, 576), (576, 576), (1536, 576), (576, 1536)),
    "Llama-3.2-3B": ((1024, 3072), (3072, 3072), (8192, 3072), (3072, 8192)),
}
"""Model -> shapes (out, in) of its block linears."""

ROWS = {"SmolLM2-135M": 1024, "Llama-3.2-3B": 2048}
"""Token positions of the probe, for each model."""

SPARSITY = 0.5
DAMPING = 0.1
OBVIOUS = "dense roots and full SVD"
BATCH = 4
"""Texts of a training or alignment step."""


def layers(model: str) -> list[Row]:
    """One layer of each of a model's shapes: the exact solution, the paper's, the obvious one."""
    return [row for shape in SHAPES[model] for row in _solutions(model, shape)]


def _solutions(model: str, shape: tuple[int, int]) -> list[Row]:
    """Time and weighted error of each way to the factors of one layer."""
    weight, inputs, grads = _layer(shape, ROWS[model])
    rank = int((1 - SPARSITY) * shape[0] * shape[1] / sum(shape))
    reference, (optimum, roots) = _seconds(lambda: _obvious(weight, inputs, grads, rank))
    found = {OBVIOUS: (reference, 1.0)}
    for case, mode in (("exact", "exact"), ("the paper's", "paper")):
        seconds, factors = _seconds(partial(_ours, weight, inputs, grads, mode, rank))
        found[case] = (seconds, _error(weight, factors, roots, rank) / optimum)
    return [
        Row(
            "decomposition",
            case,
            f"{model} {shape[0]} x {shape[1]}",
            "float64",
            tokens=ROWS[model],
            seconds=seconds,
            ratio=seconds / reference,
            x=error,
        )
        for case, (seconds, error) in found.items()
    ]


def step_memory(work: Path, kind: str) -> Row:
    """Peak memory of one step on the target, in a process of its own: training, or alignment.

    Args:
        work: Folder of models and texts.
        kind: ``training`` or a way to a Hessian-vector product of ``align.hvp``.
    """
    texts, pad_id = material.read_texts(work)
    texts, before = texts[: 2 * BATCH], peak_bytes()
    target = load_model(work / "target")

    def batch(examples: Any) -> Batch:
        return Batch(*collate(examples, pad_id))

    if kind == "training":
        _train(target, batch(texts[:BATCH]))
    else:
        _align(target, load_model(work / "svd-0.5"), texts, batch, kind)
    peak = (peak_bytes() - before) / 2**20
    return Row("alignment", kind, "target", examples=BATCH, memory_mib=peak)


def _train(model: Any, batch: Batch) -> None:
    """One step of AdamW on all weights."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters())
    example_losses(model, batch).sum().backward()
    optimizer.step()


def _align(
    target: Any,
    proxy: Any,
    texts: list[Encoded],
    batch: Callable[[Any], Batch],
    hvp: Any,
) -> None:
    """One step of alignment, and the held-out evaluations before and after it."""
    settings = AlignSection(epochs=1.0, batch=BATCH, hvp=hvp)
    align_proxy(
        target, proxy, texts[:BATCH], texts[BATCH:], batch, settings, layers=LayersSection()
    )


def _layer(shape: tuple[int, int], n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight, and probe rows whose second moments decay as a power law."""
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        scale = torch.arange(1, width + 1) ** -0.5
        mixed = torch.randn(width, width, generator=generator) / width**0.5
        return (torch.randn(n_rows, width, generator=generator) * scale) @ mixed

    return torch.randn(*shape, generator=generator), rows(shape[1]), rows(shape[0])


def _ours(weight: Tensor, inputs: Tensor, grads: Tensor, mode: Any, rank: int) -> Directions:
    """From stored probe rows to nested directions of ranks up to ``rank``."""
    roots = [DampedRoot.from_rows(rows, DAMPING, "relative") for rows in (inputs, grads)]
    return decompose(weight, *roots, mode=mode, max_rank=rank)


def _obvious(
    weight: Tensor, inputs: Tensor, grads: Tensor, rank: int
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Symmetric roots of both dense moments, and the SVD of the weighted weight, in float64.

    Returns:
        The smallest weighted error of the rank, and both roots.
    """
    root_x, root_d = (_root(rows) for rows in (inputs, grads))
    _, singular, _ = torch.linalg.svd(root_d @ weight.double() @ root_x, full_matrices=False)
    return float(singular[rank:].norm()), (root_x, root_d)


def _root(rows: Tensor) -> Tensor:
    """(C + lambda I)^(1/2) of the rows' second moment, (width, width)."""
    moment = rows.double().T @ rows.double() / len(rows)
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0) + DAMPING * moment.diagonal().mean()
    return (vectors * values.sqrt()) @ vectors.T


def _error(weight: Tensor, found: Directions, roots: tuple[Tensor, Tensor], rank: int) -> float:
    """Weighted error of what was found."""
    root_x, root_d = roots
    difference = weight.double() - found.left[:, :rank] @ found.right[:rank]
    return float((root_d @ difference @ root_x).norm())


def _seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result
