"""Teaching a text encoder a teacher's scores (Influcoder, arXiv:2606.13668).

A step takes a block: some queries and some candidates, all of them embedded with gradients, and
the loss between their scores and the teacher's. Batches of two kinds of texts that meet in one
matrix are not what ``Trainer`` is made for, so the loop is written out: AdamW, a linear
schedule, gradients clipped at norm 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from iprox.errors import NumericsError
from iprox.models.device import make_deterministic
from iprox.models.encoder import Encoder
from iprox.numerics.distillation import distillation_loss, draw_block
from iprox.progress import track

if TYPE_CHECKING:
    from iprox.study.schema import EncoderSection

log = logging.getLogger(__name__)

GRADIENT_CLIP = 1.0
"""Norm at which the gradient of a step is clipped, as in Influcoder's code."""

LOG_COLUMNS = {
    "step": "int64",
    "epoch": "int64",
    "loss": "float64",
    "pearson": "float64",
    "kl": "float64",
    "lr": "float64",
    "grad_norm": "float64",
}


@dataclass(frozen=True)
class Lesson:
    """What is to be learnt.

    Attributes:
        queries: Token ids of the queries.
        candidates: Token ids of the candidates.
        labels: The teacher's scores, (queries, candidates) float32.
    """

    queries: Sequence[list[int]]
    candidates: Sequence[list[int]]
    labels: np.ndarray


@dataclass(frozen=True)
class Distilled:
    """What a training run did.

    Attributes:
        log: A row for each step.
        epochs: ``epoch, validation``; epoch 0 is the untrained encoder.
        chosen: The epoch whose weights the encoder has now.
        tokens: Tokens passed forward and backward.
    """

    log: pd.DataFrame
    epochs: pd.DataFrame
    chosen: int
    tokens: int


def distil(
    encoder: Encoder, lesson: Lesson, validate: Callable[[], float], settings: EncoderSection
) -> Distilled:
    """Train an encoder in place; two runs with the same arguments give the same bytes on a CPU.

    Args:
        encoder: Trained in place; in evaluation mode afterwards.
        lesson: Texts and the teacher's scores.
        validate: How well the encoder agrees with the teacher on examples that are not in the
            lesson; asked before the first epoch and after each.
        settings: Block, loss and optimizer.

    Raises:
        NumericsError: All labels are equal, or the loss or its gradient is not finite.
    """
    _check(lesson.labels)
    make_deterministic(settings.seed)
    generator = np.random.default_rng(settings.seed)
    steps = steps_per_epoch(lesson.labels.shape, settings)
    optimizer, schedule = _optimizer(encoder, settings, steps * settings.epochs)
    validation = [validate()]
    best, kept, chosen = validation[0], _weights(encoder), 0
    rows: list[tuple[float, ...]] = []
    tokens = 0
    with track(steps * settings.epochs, "steps", "teaching") as progress:
        for epoch in range(1, settings.epochs + 1):
            encoder.model.train()
            for queries, candidates in blocks(lesson.labels, settings, steps, generator):
                texts = [lesson.queries[i] for i in queries]
                texts += [lesson.candidates[i] for i in candidates]
                labels = torch.from_numpy(lesson.labels[np.ix_(queries, candidates)])
                row = _step(encoder, texts, labels.to(encoder.device), optimizer, settings)
                lr = float(schedule.get_last_lr()[0])
                schedule.step()
                rows.append((len(rows) + 1, epoch, *row[:3], lr, row[3]))
                seen = sum(map(len, texts))
                tokens += seen
                progress.advance(1, tokens=seen, note=f"loss {row[0]:.3f}")
            encoder.model.eval()
            validation.append(validate())
            log.info("epoch %d: validation %.3f", epoch, validation[-1])
            if settings.select_by == "last" or validation[-1] > best:
                best, kept, chosen = validation[-1], _weights(encoder), epoch
    encoder.model.load_state_dict(kept)
    table = pd.DataFrame({"epoch": range(len(validation)), "validation": validation})
    logged = pd.DataFrame(rows, columns=list(LOG_COLUMNS)).astype(LOG_COLUMNS)
    return Distilled(logged, table, chosen, tokens)


def steps_per_epoch(shape: tuple[int, ...], settings: EncoderSection) -> int:
    """Blocks in which every query and every candidate has been seen."""
    n_queries, n_candidates = shape
    return max(
        math.ceil(n_queries / settings.queries), math.ceil(n_candidates / settings.candidates)
    )


def blocks(
    labels: np.ndarray, settings: EncoderSection, steps: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of the queries and candidates of each block of an epoch."""
    n_queries, n_candidates = labels.shape
    queries = passes(n_queries, settings.queries, steps, generator)
    fresh = passes(n_candidates, settings.candidates, steps, generator)
    for rows, columns in zip(list(queries), list(fresh), strict=True):
        yield rows, draw_block(labels, rows, columns, settings.hard_ratio, generator)


def passes(n: int, size: int, steps: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """``steps`` draws of ``size`` out of ``n`` places, none twice in one, through all in turn."""
    waiting = np.zeros(0, dtype=int)
    for _ in range(steps):
        if len(waiting) < min(size, n):
            order = generator.permutation(n)
            # who still waits comes last in the new turn, so that no draw has it twice
            again = np.isin(order, waiting)
            waiting = np.concatenate([waiting, order[~again], order[again]])
        yield waiting[:size]
        waiting = waiting[size:]


def _step(
    encoder: Encoder,
    texts: Sequence[list[int]],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: EncoderSection,
) -> tuple[float, float, float, float]:
    """One update; loss, its two parts, and the norm of the gradient.

    Raises:
        NumericsError: One of them is not finite.
    """
    rows = encoder.embed(texts)
    queries, candidates = rows[: len(labels)], rows[len(labels) :]
    loss = distillation_loss(queries @ candidates.mT, labels, settings.alpha, settings.temperature)
    loss.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), GRADIENT_CLIP)
    if not (torch.isfinite(loss.total) and torch.isfinite(norm)):
        raise NumericsError(
            "teaching diverged",
            value={"loss": loss.total.detach().item(), "grad_norm": norm.item()},
            allowed="finite numbers",
            fix="lower encoder.lr",
        )
    optimizer.step()
    optimizer.zero_grad()
    total, pearson, kl = (part.detach().item() for part in loss)
    return total, pearson, kl, norm.item()


def _optimizer(
    encoder: Encoder, settings: EncoderSection, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    from transformers import get_linear_schedule_with_warmup

    encoder.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        encoder.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    rising = round(settings.lr_warmup * steps)
    return optimizer, get_linear_schedule_with_warmup(optimizer, rising, steps)


def _weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def _check(labels: np.ndarray) -> None:
    """Refuse labels that tell no example from another.

    Raises:
        NumericsError: They are all equal.
    """
    if labels.size == 0 or labels.min() == labels.max():
        raise NumericsError(
            "the teacher's scores are all equal: there is nothing to learn",
            where="encoder",
            value=f"{labels.shape[0]} queries, {labels.shape[1]} candidates",
            fix="look at the teacher's features; raise features.dim or split.teach",
        )
