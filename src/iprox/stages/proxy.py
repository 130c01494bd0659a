"""Stage ``proxy``: the target with factors in place of weights, aligned to the target."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from iprox.data.batches import collate
from iprox.data.chat import Encoded, pad_id
from iprox.engine.align import MAX_COMPARED, align_proxy, hold_out
from iprox.engine.align_run import Alignment, LayerPoint, Point
from iprox.engine.loss import Batch
from iprox.errors import ArtifactError
from iprox.models.device import dtype_of, pick_device
from iprox.models.flops import load_of, network_of
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy, load_model, load_tokenizer, save_proxy
from iprox.models.lowrank import Passes, find_linear
from iprox.numerics import flops
from iprox.numerics.alignment import FactorPair
from iprox.numerics.ghost import widen
from iprox.stages.texts import pool_texts, split_ids
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import AlignSection, ChatSection, InfluenceSection, LayersSection

log = logging.getLogger(__name__)

CURVE = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.float64()),
        ("split", pa.string()),
        *((name, pa.float64()) for name in ("loss_ga", "kl", "objective", "fidelity")),
        *((name, pa.float64()) for name in ("proxy_loss", "target_loss", "lr", "grad_norm")),
        ("chosen", pa.bool_()),
    ]
)
LAYERS = pa.schema(
    [
        ("step", pa.int64()),
        ("layer", pa.string()),
        ("cosine_left", pa.float64()),
        ("cosine_right", pa.float64()),
    ]
)


def make(job: Job) -> Metrics:
    """Write a proxy that loads as an ordinary model, and how it was aligned.

    Besides the model folder (config, weights, tokenizer, ``proxy.json``):
    ``alignment.parquet``, a row for each optimizer step (``train``) and each candidate
    (``heldout``, step 0 being the start), and ``alignment_layers.parquet`` with the held-out
    gradient cosines of each candidate's layers. A killed alignment goes on after the last step it
    kept, to the same bytes. With both ``align.epochs`` and
    ``align.recover_epochs`` 0 nothing is trained or measured, and the one row of step 0 has no
    losses.

    Returns:
        Parameters of the proxy; steps done and asked for, the step kept, held-out fidelity of
        the start and of what was kept, counts of examples and tokens, and FLOPs.

    Raises:
        ArtifactError: The factors cannot be read.
        ConfigError: Too few examples to hold some out.
        ModelError: The factors do not fit the target.
        NumericsError: The objective is not finite before training.
    """
    align = job.section(AlignSection, "align")
    compute, folder = job.params["compute"], job.parents["warmup"]
    target = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], pick_device())
    tokenizer = load_tokenizer(folder)
    factors = load_factors(job.parents["factors"] / "factors.safetensors")
    curve, layers, metrics = [Point(chosen=True)], list[LayerPoint](), unaligned()
    if align.trains:
        run, counts = _align(job, align, target, tokenizer, factors)
        factors, curve, layers = run.chosen.factors, run.curve, run.layers
        metrics = summary(run) | counts
    chosen_step = next(point.step for point in curve if point.chosen)
    about = {"gauge": job.params["gauge"], "alignment_step": chosen_step}
    passes = job.params["passes"]
    save_proxy(job.out, target, factors, tokenizer, about, passes)
    _write(job.out / "alignment.parquet", curve, CURVE, job.params["align"])
    _write(job.out / "alignment_layers.parquet", layers, LAYERS, job.params["align"])
    return {**metrics, "parameters": n_parameters(target, factors, passes)}


def load_factors(path: Path) -> dict[str, FactorPair]:
    """Factors by layer, in float32 on the CPU.

    Raises:
        ArtifactError: The file cannot be read, or a layer has one factor only.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError("factors cannot be read", where=path, value=str(error)) from None
    names = sorted({name.rpartition(".")[0] for name in tensors})
    if set(tensors) != {f"{name}.{side}" for name in names for side in FactorPair._fields}:
        raise ArtifactError(
            "a factors file is incomplete",
            where=path,
            value=sorted(tensors)[:4],
            allowed="<layer>.left and <layer>.right of every layer",
            fix="make the factors again",
        )
    return {name: FactorPair(tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}


def n_parameters(target: nn.Module, factors: dict[str, FactorPair], passes: Passes) -> int:
    """Parameters of the proxy, tied ones counted once, factors for the backward pass too."""
    replaced = factors if passes == "both" else {}
    dense = sum(find_linear(target, name).weight.numel() for name in replaced)
    thin = sum(left.numel() + right.numel() for left, right in factors.values())
    return sum(p.numel() for p in target.parameters()) - dense + thin


def unaligned() -> Metrics:
    """Metrics of a proxy that was not aligned."""
    return {"steps": 0, "planned_steps": 0, "chosen_step": 0, "flops": 0.0}


def summary(run: Alignment) -> Metrics:
    """Metrics of an alignment; a fidelity that is undefined is left out."""
    metrics: Metrics = {
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "chosen_step": run.chosen.point.step,
        "stopped": "finished" if run.diverged_at is None else f"diverged at step {run.diverged_at}",
        "tokens": run.tokens,
        "zero_gradients": run.n_zero,
    }
    for name, candidate in (("fidelity_start", run.start), ("fidelity_best", run.chosen)):
        if candidate.point.fidelity is not None:
            metrics[name] = candidate.point.fidelity
    return metrics


def _align(
    job: Job, align: AlignSection, target: Any, tokenizer: Any, factors: dict[str, FactorPair]
) -> tuple[Alignment, Metrics]:
    """Align a proxy made of the factors; the run, and counts of its examples."""
    chat = job.section(ChatSection, "chat")
    ids = split_ids(job.parents["split"], "align")
    texts = pool_texts(job.parents["pool"], ids, tokenizer, chat)
    examples = texts.supervised_only().encoded
    train, heldout = hold_out(len(examples), align)
    learnt, held = ([examples[i] for i in places] for places in (train, heldout))
    layers = job.section(LayersSection, "layers")
    pad = pad_id(tokenizer)

    def batch(chosen: Sequence[Encoded]) -> Batch:
        return Batch(*collate(chosen, pad)).to(target.device)

    # at least float32: second-order terms and small updates are lost in bfloat16
    weight: Tensor = target.get_input_embeddings().weight
    proxy = as_proxy(target, factors, widen(weight[:0]).dtype)
    run = align_proxy(
        target,
        proxy,
        learnt,
        held,
        batch,
        align,
        layers=layers,
        balanced=job.params["gauge"] == "balanced",
        reduction=job.section(InfluenceSection, "influence").loss_reduction,
        checkpoints=job.progress,
    )
    return run, {
        "flops": _operations(run, target, proxy, learnt, held, align, layers),
        "train_examples": len(train),
        "heldout_examples": len(heldout),
        "truncated": texts.n_truncated,
        "unsupervised": texts.n_unsupervised,
    }


def _operations(
    run: Alignment,
    target: Any,
    proxy: Any,
    train: Sequence[Encoded],
    heldout: Sequence[Encoded],
    align: AlignSection,
    layers: LayersSection,
) -> float:
    """Floating-point operations of an alignment."""
    once = load_of(train)
    how = flops.Anchoring(
        hvp=align.hvp,
        exact=align.grad == "exact",
        kl=align.lambda_kl > 0,
        all_positions=align.kl_positions == "all",
    )
    dense = network_of(target, scored_linears(target, layers))
    thin = network_of(proxy, scored_linears(proxy, layers))
    aligned = run.tokens - run.recovery_tokens
    recovery = flops.recovery(dense, thin, once.times(run.recovery_tokens / once.tokens))
    return recovery + flops.alignment(
        dense,
        thin,
        once.times(aligned / once.tokens),
        load_of(heldout),
        how,
        candidates=sum(point.split == "heldout" for point in run.curve),
        compared=load_of(heldout[:MAX_COMPARED]),
        chunk=2 * align.batch,
    )


def _write(
    path: Path, rows: Sequence[Point | LayerPoint], schema: pa.Schema, settings: dict[str, Any]
) -> None:
    write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), settings)
