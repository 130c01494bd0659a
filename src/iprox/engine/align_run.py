"""What an alignment has done so far: its learning curve, the proxy it would keep, its checkpoints.

A checkpoint holds all that the remaining steps depend on: the factors as they stand and those that
are kept, AdamW's moments, the curve, and the target's gradient geometry on the held-out examples.
Which examples a step sees follows from the seed and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iprox.numerics.alignment import FactorPair
from iprox.training.checkpoints import load_weights, save_state

KEPT = "kept.safetensors"
"""Factors of the candidate that is kept so far, and the target's geometry."""

RUN = "alignment.json"
GRAM = "target_gram"


@dataclass(frozen=True)
class Point:
    """A row of the learning curve.

    Attributes:
        step: Optimizer steps done; a train row shows the losses before its own step.
        epoch: Passes over the training examples by then.
        split: ``train``, a step's own batch, or ``heldout``, the mean over held-out batches.
        loss_ga: Gradient alignment loss; absent in train rows of the recovery.
        kl: Divergence of the proxy's predictions from the target's; in train rows of the
            recovery over all tokens, else where the anchor holds.
        objective: loss_ga + lambda_kl * kl.
        fidelity: Agreement of the examples' gradient geometry; held-out rows only.
        proxy_loss: Token-mean language modelling loss of the proxy.
        target_loss: The same of the target.
        lr: Learning rate of the step; train rows only.
        grad_norm: Norm of the gradient before clipping; train rows only.
        chosen: Whether the proxy that is kept is the one of this row.
    """

    step: int = 0
    epoch: float = 0.0
    split: Literal["train", "heldout"] = "heldout"
    loss_ga: float | None = None
    kl: float | None = None
    objective: float | None = None
    fidelity: float | None = None
    proxy_loss: float | None = None
    target_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class LayerPoint:
    """Held-out gradient agreement of one layer's factors; None where a gradient is zero."""

    step: int
    layer: str
    cosine_left: float | None
    cosine_right: float | None


class Candidate(NamedTuple):
    """The proxy after some step, and what the held-out examples say of it."""

    factors: dict[str, FactorPair]
    point: Point
    layers: list[LayerPoint]


@dataclass
class Alignment:
    """What an alignment did.

    Attributes:
        start: The proxy as it came.
        chosen: The proxy that is kept.
        planned_steps: Optimizer steps asked for.
        steps: Optimizer steps done.
        diverged_at: Step at which a loss or gradient was not finite; None if there is none.
        tokens: Tokens trained on, repeats counted, without padding.
        recovery_tokens: Those of them that the recovery trained on.
        n_zero: Gradient distances left out in training because a gradient was zero.
        points: Steps and candidates in the order they were made.
        layers: Held-out gradient agreement of each candidate's layers.
    """

    start: Candidate
    chosen: Candidate
    planned_steps: int
    steps: int = 0
    diverged_at: int | None = None
    tokens: int = 0
    recovery_tokens: int = 0
    n_zero: int = 0
    points: list[Point] = field(default_factory=list)
    layers: list[LayerPoint] = field(default_factory=list)

    @property
    def curve(self) -> list[Point]:
        """The points, with the one that is kept marked."""
        return [replace(point, chosen=point is self.chosen.point) for point in self.points]

    def add_step(self, point: Point, tokens: int, n_zero: int) -> None:
        """Count an optimizer step."""
        self.steps = point.step
        self.tokens += tokens
        self.n_zero += n_zero
        self.points.append(point)

    def add_candidate(self, candidate: Candidate, select_by: str) -> None:
        """Record a candidate, and keep it if it beats the one kept so far."""
        self.points.append(candidate.point)
        self.layers += candidate.layers
        if _beats(candidate.point, self.chosen.point, select_by):
            self.chosen = candidate


def save_alignment(
    folder: Path, run: Alignment, proxy: Any, optimizer: torch.optim.Optimizer, gram: Tensor
) -> None:
    """Write a checkpoint.

    Args:
        folder: An empty one.
        run: What has been done.
        proxy: The model whose factors train.
        optimizer: Of these factors.
        gram: The target's geometry on the held-out examples.
    """
    save_state(folder, proxy, optimizer)
    kept = {
        f"{name}.{side}": tensor.contiguous()
        for name, pair in run.chosen.factors.items()
        for side, tensor in pair._asdict().items()
    }
    save_file(kept | {GRAM: gram}, folder / KEPT)
    state = {
        "chosen": next(i for i, point in enumerate(run.points) if point is run.chosen.point),
        "points": [asdict(point) for point in run.points],
        "layers": [asdict(layer) for layer in run.layers],
        "n_zero": run.n_zero,
        "recovery_tokens": run.recovery_tokens,
        "steps": run.steps,
        "tokens": run.tokens,
    }
    (folder / RUN).write_text(json.dumps(state), encoding="utf-8")


def load_alignment(
    checkpoint: Path, start: Mapping[str, FactorPair], planned_steps: int, proxy: Any
) -> tuple[Alignment, Tensor]:
    """Put a checkpoint's factors into a proxy, and be where it was written.

    Args:
        checkpoint: Written by :func:`save_alignment`.
        start: The factors that the alignment began with.
        planned_steps: Optimizer steps asked for.
        proxy: The model whose factors train.

    Returns:
        What had been done, and the target's geometry on the held-out examples.
    """
    load_weights(checkpoint, proxy)
    state = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    points = [Point(**point) for point in state.pop("points")]
    layers = [LayerPoint(**layer) for layer in state.pop("layers")]
    kept = load_file(checkpoint / KEPT, device=str(next(iter(start.values())).left.device))
    factors = {n: FactorPair(kept[f"{n}.left"], kept[f"{n}.right"]) for n in start}

    def candidate(place: int, factors: Mapping[str, FactorPair]) -> Candidate:
        own = [layer for layer in layers if layer.step == points[place].step]
        return Candidate(dict(factors), points[place], own)

    ends = candidate(0, start), candidate(state.pop("chosen"), factors)
    return Alignment(*ends, planned_steps, points=points, layers=layers, **state), kept[GRAM]


def _beats(new: Point, best: Point, select_by: str) -> bool:
    """Whether a candidate is kept instead of the best so far; on a tie the earlier one stays."""
    if select_by == "last":
        return True
    if select_by == "objective":
        assert new.objective is not None
        assert best.objective is not None
        return new.objective < best.objective
    if new.fidelity is None:
        return False
    return best.fidelity is None or new.fidelity > best.fidelity
