"""Stage ``extraction``: the blocks of the target that matter most, as a model of their own.

Layer Extraction (IProX, arXiv:2602.17835, after ShortGPT, arXiv:2403.03853): nothing is factorised
and nothing trained.
"""

from __future__ import annotations

import logging

import pandas as pd
from torch import nn

from iprox.engine.blocks import block_influence
from iprox.models.blocks import decoder_blocks, with_blocks
from iprox.models.device import dtype_of, pick_device
from iprox.models.flops import network_of
from iprox.models.load import load_model, load_tokenizer
from iprox.numerics import flops
from iprox.numerics.blocks import most_influential
from iprox.numerics.flops import Load
from iprox.numerics.ranks import blocks_kept
from iprox.progress import track
from iprox.stages.passes import Reader
from iprox.stages.target import check_saved, save_target
from iprox.stages.texts import pool_texts, split_ids
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import ChatSection, ProxySection

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write a model of the kept blocks as a Hugging Face folder, and ``blocks.parquet``.

    ``blocks.parquet`` has a row per block of the target: ``block``, its ``influence`` over all
    tokens of the probe examples, whether it is ``kept``, its number in the new model as ``place``
    (-1 for none), and the ``parameters`` of its linear layers.

    Returns:
        Numbers of blocks, of those kept, of parameters, examples and tokens, and FLOPs.

    Raises:
        ArtifactError: The split is empty, or names examples that the pool does not have.
        ConfigError: The sparsity drops no block.
        ModelError: The target's blocks cannot be found, or the new model cannot be saved.
        NumericsError: A hidden state is not finite.
    """
    sparsity = job.section(ProxySection, "extraction").share_removed
    compute, folder, device = job.params["compute"], job.parents["warmup"], pick_device()
    target = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], device)
    reader = Reader(target, load_tokenizer(folder), {}, device)
    blocks = decoder_blocks(target)
    count = blocks_kept(len(blocks), sparsity)
    ids = split_ids(job.parents["split"], "probe")
    texts = pool_texts(job.parents["pool"], ids, reader.tokenizer, job.section(ChatSection, "chat"))
    with track(len(ids), "examples", "block influence") as progress:
        influence = block_influence(
            target,
            (batch for _, batch in reader.batches(texts.encoded)),
            lambda batch: progress.advance(len(batch.lengths), tokens=int(batch.lengths.sum())),
        ).tolist()
    kept = most_influential(influence, count)
    log.info("kept %d of %d blocks: %s", count, len(blocks), ", ".join(map(str, kept)))
    model = with_blocks(target, kept)
    save_target(model, reader.tokenizer, job.out)
    check_saved(model, reader.tokenizer, job.out)
    table = pd.DataFrame(
        {
            "block": range(len(blocks)),
            "influence": influence,
            "kept": [i in kept for i in range(len(blocks))],
            "place": [kept.index(i) if i in kept else -1 for i in range(len(blocks))],
            "parameters": [_linear_weights(block) for block in blocks],
        }
    )
    write_table(job.out / "blocks.parquet", table, job.params["extraction"])
    load = Load.of(map(len, texts.encoded), 0)
    return {
        "blocks": len(blocks),
        "kept_blocks": count,
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": len(texts.encoded),
        "tokens": int(load.tokens),
        "truncated": texts.n_truncated,
        "flops": flops.forward(network_of(target), load),
    }


def _linear_weights(block: nn.Module) -> int:
    """Entries of the matrices of a block."""
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
