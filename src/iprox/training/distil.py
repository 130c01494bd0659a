"""Teaching a text encoder a teacher's scores (Influcoder, arXiv:2606.13668).

A step takes a block: some queries and some candidates, all of them embedded with gradients, and
the loss between their scores and the teacher's. Batches of two kinds of texts that meet in one
matrix are not what ``Trainer`` is made for, so the loop is written out: AdamW, a linear
schedule, gradients clipped at norm 1.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iprox.errors import NumericsError
from iprox.models.device import make_deterministic
from iprox.models.encoder import Encoder
from iprox.numerics.distillation import distillation_loss, draw_block
from iprox.progress import Track, track
from iprox.training.checkpoints import (
    is_due,
    last_checkpoint,
    load_optimizer,
    load_rng,
    load_weights,
    replace_checkpoint,
    save_state,
)

if TYPE_CHECKING:
    from iprox.study.schema import EncoderSection

log = logging.getLogger(__name__)

BEST = "best.safetensors"
COURSE = "course.json"
"""A checkpoint's weights of the epoch that is kept so far, and its log and draws."""

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
    encoder: Encoder,
    lesson: Lesson,
    validate: Callable[[], float],
    settings: EncoderSection,
    checkpoints: Path | None = None,
) -> Distilled:
    """Train an encoder in place; two runs with the same arguments give the same bytes on a CPU.

    Args:
        encoder: Trained in place; in evaluation mode afterwards.
        lesson: Texts and the teacher's scores.
        validate: How well the encoder agrees with the teacher on examples that are not in the
            lesson; asked before the first epoch and after each.
        settings: Block, loss and optimizer.
        checkpoints: Folder for checkpoints between epochs; a run that finds one there goes on
            from it, to the same bytes as one that was never stopped.

    Raises:
        NumericsError: All labels are equal, or the loss or its gradient is not finite.
    """
    _check(lesson.labels)
    make_deterministic(settings.seed)
    course = _Course(encoder, lesson, settings)
    last = None if checkpoints is None else last_checkpoint(checkpoints)
    if last is None:
        course.judge(validate())
    else:
        course.restore(last)
        log.info("going on after epoch %d of %d", course.epoch, settings.epochs)
    written = time.monotonic()
    remaining = course.steps * (settings.epochs - course.epoch)
    with track(remaining, "steps", "teaching") as progress:
        while course.epoch < settings.epochs:
            course.advance(progress)
            course.judge(validate())
            log.info("epoch %d: validation %.3f", course.epoch, course.validation[-1])
            if checkpoints is not None and is_due(written):
                replace_checkpoint(checkpoints, course.epoch, course.save)
                written = time.monotonic()
    encoder.model.load_state_dict(course.best)
    table = pd.DataFrame({"epoch": range(settings.epochs + 1), "validation": course.validation})
    logged = pd.DataFrame(course.rows, columns=list(LOG_COLUMNS)).astype(LOG_COLUMNS)
    return Distilled(logged, table, course.chosen, course.tokens)


class _Course:
    """A training under way, as it is between two epochs.

    Args:
        encoder: Trained in place.
        lesson: Texts and the teacher's scores.
        settings: Block, loss and optimizer.
    """

    def __init__(self, encoder: Encoder, lesson: Lesson, settings: EncoderSection) -> None:
        self.encoder, self.lesson, self.settings = encoder, lesson, settings
        self.generator = np.random.default_rng(settings.seed)
        self.steps = steps_per_epoch(lesson.labels.shape, settings)
        self.optimizer, self.schedule = _optimizer(encoder, settings, self.steps * settings.epochs)
        self.rows: list[list[float]] = []
        self.tokens = 0
        self.validation: list[float] = []
        self.chosen = 0
        self.best: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """Epochs that are done and judged."""
        return len(self.validation) - 1

    def advance(self, progress: Track) -> None:
        """Train for an epoch."""
        self.encoder.model.train()
        lesson, settings = self.lesson, self.settings
        for queries, candidates in blocks(lesson.labels, settings, self.steps, self.generator):
            asked = [lesson.queries[i] for i in queries]
            found = [lesson.candidates[i] for i in candidates]
            labels = torch.from_numpy(lesson.labels[np.ix_(queries, candidates)])
            labels = labels.to(self.encoder.device)
            *losses, norm = _step(self.encoder, asked, found, labels, self.optimizer, settings)
            lr = float(self.schedule.get_last_lr()[0])
            self.schedule.step()
            self.rows.append([len(self.rows) + 1, self.epoch + 1, *losses, lr, norm])
            seen = sum(map(len, asked + found))
            self.tokens += seen
            progress.advance(1, tokens=seen, note=f"loss {losses[0]:.3f}")
        self.encoder.model.eval()

    def judge(self, validation: float) -> None:
        """Note an epoch's validation, and keep its weights if they are the ones to keep."""
        is_kept = (
            not self.validation
            or self.settings.select_by == "last"
            or validation > max(self.validation)
        )
        self.validation.append(validation)
        if is_kept:
            self.chosen, self.best = self.epoch, _weights(self.encoder)

    def save(self, folder: Path) -> None:
        """Write everything that the remaining epochs depend on."""
        save_state(folder, self.encoder.model, self.optimizer, self.schedule)
        save_file(self.best, folder / BEST)
        state = {
            "chosen": self.chosen,
            "generator": self.generator.bit_generator.state,
            "rows": self.rows,
            "tokens": self.tokens,
            "validation": self.validation,
        }
        (folder / COURSE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Be as :meth:`save` found it."""
        load_weights(checkpoint, self.encoder.model)
        load_optimizer(checkpoint, self.encoder.model, self.optimizer, self.schedule)
        load_rng(checkpoint)
        self.best = load_file(checkpoint / BEST)
        state = json.loads((checkpoint / COURSE).read_text(encoding="utf-8"))
        self.generator.bit_generator.state = state["generator"]
        self.rows, self.tokens = state["rows"], state["tokens"]
        self.chosen, self.validation = state["chosen"], state["validation"]


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
    queries: Sequence[list[int]],
    candidates: Sequence[list[int]],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: EncoderSection,
) -> tuple[float, float, float, float]:
    """One update; loss, its two parts, and the norm of the gradient.

    Queries and candidates are embedded apart, so that the ones are not padded to the others.

    Raises:
        NumericsError: One of them is not finite.
    """
    scores = encoder.embed(queries) @ encoder.embed(candidates).mT
    loss = distillation_loss(scores, labels, settings.alpha, settings.temperature)
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
