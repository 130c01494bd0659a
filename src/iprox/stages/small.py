"""Stage ``small``: a tiny language model, trained on one part of the pool and then on another.

It stands for the target where attribution is checked by retraining: ``start`` for the model that
fine-tuning begins with, ``full`` for the one fine-tuned on every candidate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from iprox.data.batches import collate
from iprox.data.chat import Encoded, pad_id
from iprox.engine.attribution import Examples
from iprox.engine.loss import Batch, example_losses
from iprox.errors import DataError
from iprox.models.device import make_deterministic, pick_device
from iprox.models.load import load_model, load_tokenizer
from iprox.models.small import small_model, small_tokenizer
from iprox.stages.texts import pool_texts
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow, read_table, write_table
from iprox.study.schema import ChatSection, FaithfulnessSection, FinetuneSection
from iprox.training.sft import fine_tune, save

BATCH = 32
"""Examples of a batch that is not trained on. Results do not depend on it."""


def make(job: Job) -> Metrics:
    """Write ``examples.parquet`` and the models ``start`` and ``full``, with their tokenizer.

    ``examples.parquet`` has a row per example that is used: ``example_id, role, position``, the
    role being ``candidate``, ``query`` or ``pretrain``. The tokenizer is learned from the texts
    of the last alone.

    Returns:
        Counts of examples and parameters, and both models' mean loss on the queries.

    Raises:
        DataError: The pool is too small.
    """
    section = job.section(FaithfulnessSection, "faithfulness")
    seed = int(job.params["seed"])
    pool = job.parents["pool"]
    roles = draw_roles(pool, section, seed)
    write_table(job.out / "examples.parquet", roles, {"seed": seed})
    tokenizer = small_tokenizer(_texts(pool, _ids(roles, "pretrain")), section.vocabulary)
    texts = {
        role: _encoded(pool, roles, role, tokenizer, section)
        for role in ("candidate", "query", "pretrain")
    }
    model = small_model(
        tokenizer,
        width=section.width,
        blocks=section.blocks,
        heads=section.heads,
        max_length=section.max_length,
        seed=seed,
    ).to(pick_device())
    first, second = section.trainings(seed)
    make_deterministic(seed)
    fine_tune(model, texts["pretrain"], first, pad_token_id=pad_id(tokenizer), label="start")
    save(model, tokenizer, job.out / "start", torch.float32)
    losses = {"query_loss_start": float(losses_of(model, tokenizer, texts["query"]).mean())}
    train(model, tokenizer, texts["candidate"], second)
    save(model, tokenizer, job.out / "full", torch.float32)
    losses["query_loss_full"] = float(losses_of(model, tokenizer, texts["query"]).mean())
    return {
        **{f"examples_{role}": len(encoded) for role, encoded in texts.items()},
        **losses,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def draw_roles(pool: Path, section: FaithfulnessSection, seed: int) -> pd.DataFrame:
    """What each example of the pool is used for, in a random order.

    Raises:
        DataError: Nothing would be left for the first training.
    """
    ids = sorted(read_arrow(pool / "pool.parquet", ["example_id"])["example_id"].to_pylist())
    counts = {"candidate": section.candidates, "query": section.queries}
    counts["pretrain"] = len(ids) - sum(counts.values())
    if counts["pretrain"] < 1:
        raise DataError(
            "the pool is too small for the tiny model's training",
            value=f"{len(ids)} examples",
            allowed=f"more than {section.candidates} candidates and {section.queries} queries",
            fix="raise pool.limit, or lower faithfulness.candidates",
        )
    order = np.random.default_rng(seed).permutation(len(ids))
    roles = [role for role, count in counts.items() for _ in range(count)]
    positions = [place for count in counts.values() for place in range(count)]
    shuffled = [ids[i] for i in order]
    return pd.DataFrame({"example_id": shuffled, "role": roles, "position": positions})


def read_small(folder: Path, name: str) -> tuple[Any, Any]:
    """Model ``start`` or ``full`` of this stage, frozen, and its tokenizer."""
    model = load_model(folder / name, device=pick_device())
    return model, load_tokenizer(folder / name)


def read_role(
    job: Job, folder: Path, role: str, tokenizer: Any, section: FaithfulnessSection
) -> list[Encoded]:
    """Encoded examples of one role, in their order."""
    roles = read_table(folder / "examples.parquet")
    return _encoded(job.parents["pool"], roles, role, tokenizer, section)


def train(model: Any, tokenizer: Any, texts: list[Encoded], settings: FinetuneSection) -> None:
    """The second training, in place; the order of examples depends on the seed alone."""
    make_deterministic(settings.seed)
    fine_tune(model, texts, settings, pad_token_id=pad_id(tokenizer))


def in_batches(texts: list[Encoded], tokenizer: Any) -> Examples:
    """Examples as the engine takes them, in their order."""
    parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    batches = [Batch(*collate(part, pad_id(tokenizer))).to(pick_device()) for part in parts]
    return Examples(batches, [[e.example_id for e in part] for part in parts])


def losses_of(model: Any, tokenizer: Any, texts: list[Encoded]) -> np.ndarray:
    """Loss of every example, a mean over its supervised tokens, (examples,)."""
    with torch.no_grad():
        batches = in_batches(texts, tokenizer).batches
        losses = torch.cat([example_losses(model, batch, "token_mean") for batch in batches])
    return losses.double().cpu().numpy()


def _ids(roles: pd.DataFrame, role: str) -> list[str]:
    chosen = roles[roles["role"] == role].sort_values("position")
    return [str(i) for i in chosen["example_id"]]


def _texts(pool: Path, ids: list[str]) -> list[str]:
    """Texts of some examples, turn by turn."""
    rows = read_arrow(pool / "pool.parquet", ["example_id", "messages"]).to_pylist()
    turns = {row["example_id"]: row["messages"] for row in rows}
    return [str(turn["content"]) for i in ids for turn in turns[i]]


def _encoded(
    pool: Path, roles: pd.DataFrame, role: str, tokenizer: Any, section: FaithfulnessSection
) -> list[Encoded]:
    """Examples of a role with a loss; those whose response is cut away whole are left out."""
    chat = ChatSection(max_length=section.max_length)
    return pool_texts(pool, _ids(roles, role), tokenizer, chat).supervised_only().encoded
