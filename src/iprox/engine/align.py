"""Gradient alignment: training a proxy's factors until its gradients point as the target's do.

IProX, arXiv:2602.17835, section 4.2. Only the factors train. Before gradients are aligned, the
proxy may be trained to predict as the target does (:mod:`iprox.engine.recovery`): a model that
predicts something else has other gradients. Training can also harm a proxy that starts well, so
the step to keep is chosen on held-out examples, the start among the candidates: by default the
step at which the gradients of examples lie to each other in the proxy most as they do in the
target, because that is what scores are made of.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from iprox.engine.align_run import (
    Alignment,
    Candidate,
    LayerPoint,
    Point,
    load_alignment,
    save_alignment,
)
from iprox.engine.capture import watch
from iprox.engine.geometry import gradient_gram
from iprox.engine.loss import Batch, example_losses, input_embeddings
from iprox.engine.objective import Factorised, Objective, TargetView, evaluate, gradient
from iprox.engine.recovery import imitate
from iprox.errors import ConfigError, NumericsError
from iprox.models.layers import scored_linears
from iprox.models.lowrank import find_linear
from iprox.numerics.alignment import FactorPair, gram_agreement
from iprox.numerics.ipsvd import balance
from iprox.progress import Track, track
from iprox.study.schema import AlignSection, LayersSection
from iprox.training.checkpoints import is_due, last_checkpoint, load_optimizer, replace_checkpoint

log = logging.getLogger(__name__)

ExampleT = TypeVar("ExampleT")

MIN_HELDOUT = 4
"""Fewest held-out examples: four have six pairs to put in order, three only three."""

MAX_COMPARED = 24
"""Most held-out examples whose gradients are compared pair by pair."""


def hold_out(n_examples: int, align: AlignSection) -> tuple[list[int], list[int]]:
    """Places of the examples to train on and of those held out, by the config's share and seed.

    Raises:
        ConfigError: Too few examples for both.
    """
    n_heldout = max(MIN_HELDOUT, math.ceil(align.heldout * n_examples))
    if n_examples - n_heldout < 1:
        raise ConfigError(
            "too few examples to align on and to choose a step by",
            where="split.align, align.heldout",
            value=f"{n_examples} examples, {n_heldout} of them held out",
            allowed=f"at least {MIN_HELDOUT} held out and 1 left to train on",
            fix="raise split.align, lower align.heldout, or skip alignment with align.epochs: 0",
        )
    order = np.random.default_rng(align.seed).permutation(n_examples).tolist()
    return sorted(order[n_heldout:]), order[:n_heldout]


def align_proxy(
    target: Any,
    proxy: Any,
    train: Sequence[ExampleT],
    heldout: Sequence[ExampleT],
    collate: Callable[[Sequence[ExampleT]], Batch],
    align: AlignSection,
    *,
    layers: LayersSection,
    balanced: bool = True,
    reduction: str = "token_mean",
    checkpoints: Path | None = None,
) -> Alignment:
    """Train the factors of a proxy and choose the step to keep.

    First its predictions are recovered (``align.recover_epochs``), then, from the best step so
    far, its gradients are aligned (``align.epochs``).

    With ``align.rebalance``, a proxy that comes in the balanced gauge is brought back to it
    for each held-out evaluation, because the gauge is part of what scores see, and for good at
    each epoch's end. The optimizer then starts its averages afresh: its second moments belong
    to single entries, in a basis that is no longer there.

    Training stops at a loss or gradient that is not finite; what was best until then is kept.

    Args:
        target: The dense model, frozen.
        proxy: The proxy, in float32 or better; afterwards it holds the factors of ``chosen``.
        train: Examples to train on, each with a supervised token.
        heldout: Examples to choose by, likewise.
        collate: Makes a batch on the models' device.
        align: Settings.
        layers: Which layers' gradients make up scores, those kept dense among them.
        balanced: Whether the proxy comes in the balanced gauge.
        reduction: Loss of an example, where examples are compared.
        checkpoints: Folder for checkpoints; a run that finds one there goes on from it, to the
            same bytes as one that was never stopped. None to write none.

    Raises:
        NumericsError: The objective is not finite before training; the message names the layer.
    """
    factorised = Factorised(proxy, align)
    rebalance = balanced and align.rebalance
    judge = _Judge(target, factorised, heldout, collate, layers, rebalance, reduction)
    recovery = _Schedule(len(train), align, recovers=True)
    schedule = _Schedule(len(train), align, before=recovery)
    trained = _Trained(judge, factorised, train, collate)
    course = _Course(trained, recovery.total + schedule.total, rebalance, checkpoints)
    run = course.run
    with track(run.planned_steps - run.steps, "steps", "alignment") as progress:
        for phase, step_of in ((recovery, _recovery_step), (schedule, _gradient_step)):
            if run.diverged_at is None and run.steps < phase.steps_before + phase.total:
                course.train(phase, step_of, progress)
    if run.diverged_at is not None:
        log.warning(
            "alignment diverged at step %d of %d; kept step %d. A lower align.lr or "
            "align.recover_lr may help",
            run.diverged_at,
            run.planned_steps,
            run.chosen.point.step,
        )
    factorised.put(run.chosen.factors)
    return run


def rebalanced(factors: Mapping[str, FactorPair]) -> dict[str, FactorPair]:
    """The same products in the balanced gauge."""
    return {name: FactorPair(*balance(*pair)) for name, pair in factors.items()}


def mean_objective(found: Sequence[Objective], sizes: Sequence[int]) -> Objective:
    """Mean over batches, weighted by their numbers of examples; zero gradients left out."""
    weights = np.array(sizes) / sum(sizes)
    losses = {
        name: float(weights @ [getattr(one, name) for one in found])
        for name in ("loss_ga", "kl", "objective", "proxy_loss", "target_loss")
    }
    cosines = torch.stack([one.cosines for one in found]).nanmean(0)
    return Objective(**losses, cosines=cosines, n_zero=sum(one.n_zero for one in found))


def first_not_finite(model: Any, layers: Mapping[str, nn.Linear], batch: Batch) -> str | None:
    """The layer where a pass first leaves the finite numbers; None if no layer does.

    Args:
        model: A causal LM.
        layers: Its linear layers, in model order.
        batch: Examples to pass through it.
    """
    names: list[str] = []

    def check(name: str, tensor: Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            names.append(name)

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: check(name, output))
        for name, layer in layers.items()
    ]
    embeds = input_embeddings(model, batch)
    try:
        with watch(layers, lambda name, _, output_grads: check(name, output_grads)):
            losses = example_losses(model, batch, embeds=embeds)
            torch.autograd.backward(losses.sum(), inputs=[embeds])
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else None


class _Schedule:
    """Which examples each step of a phase sees, at what learning rate, and when it is judged.

    Args:
        n_examples: Examples to train on.
        align: Settings.
        recovers: Whether the phase is the recovery.
        before: The phase before, whose steps and epochs are counted on.
    """

    def __init__(
        self,
        n_examples: int,
        align: AlignSection,
        *,
        recovers: bool = False,
        before: _Schedule | None = None,
    ) -> None:
        self.n_examples, self.align, self.recovers = n_examples, align, recovers
        self.batch = align.recover_batch if recovers else align.batch
        self.peak = align.recover_lr if recovers else align.lr
        epochs = align.recover_epochs if recovers else align.epochs
        self.per_epoch = math.ceil(n_examples / self.batch)
        self.total = max(1, round(epochs * self.per_epoch)) if epochs > 0 else 0
        self.warmup = math.ceil(align.lr_warmup * self.total)
        self.steps_before = before.total if before else 0
        self.epochs_before = before.total / before.per_epoch if before else 0.0

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """Each step, from 1, and the places of its examples; a new order each epoch."""
        stream = 2 if self.recovers else 1  # another one than hold_out's
        rng = np.random.default_rng((self.align.seed, stream))
        order: list[int] = []
        for step in range(1, self.total + 1):
            place = (step - 1) % self.per_epoch
            if place == 0:
                order = rng.permutation(self.n_examples).tolist()
            yield step, order[place * self.batch : (place + 1) * self.batch]

    def lr(self, step: int) -> float:
        """Learning rate after a linear rise: constant, or in the recovery down a half cosine.

        The factors are far from where the recovery takes them, so it starts with long steps and
        needs short ones at its end.
        """
        rise = min(1.0, step / max(1, self.warmup))
        if not self.recovers:
            return self.peak * rise
        fall = (1 + math.cos(math.pi * (step - 1) / self.total)) / 2
        return self.peak * min(rise, fall)

    def epoch(self, step: int) -> float:
        """Passes over the examples after a step."""
        return self.epochs_before + step / self.per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is an epoch's last."""
        return step % self.per_epoch == 0

    def is_judged(self, step: int) -> bool:
        """Whether the proxy is measured on the held-out examples after a step."""
        every = self.align.evaluate_every or self.per_epoch
        return step % every == 0 or step == self.total


class _Judge(Generic[ExampleT]):
    """Measures candidates on the held-out examples; the target's geometry is measured once."""

    def __init__(
        self,
        target: Any,
        proxy: Factorised,
        examples: Sequence[ExampleT],
        collate: Callable[[Sequence[ExampleT]], Batch],
        layers: LayersSection,
        rebalance: bool,
        reduction: str,
    ) -> None:
        self.target, self.proxy, self.rebalance = target, proxy, rebalance
        self.examples, self.collate, self.reduction = examples, collate, reduction
        self.target_layers = scored_linears(target, layers)
        self.proxy_layers = scored_linears(proxy.model, layers)
        self.dense = {name: find_linear(target, name) for name in proxy.layers}
        self.target_gram = torch.empty(0)

    def start(self) -> Candidate:
        """The proxy before training, exactly as it came.

        Raises:
            NumericsError: The objective is not finite.
        """
        found = self._objective()
        if not found.is_finite:
            raise self._broken(found)
        self.target_gram = self._gram(self.target, self.target_layers)
        return self._candidate(found, 0, 0.0)

    def __call__(self, step: int, epoch: float) -> Candidate | None:
        """The proxy as it stands, in the gauge it would be kept in; None if it has diverged."""
        before = self.proxy.copy()
        if not _are_finite(before):
            return None
        if self.rebalance:
            self.proxy.put(rebalanced(before))
        found = self._objective()
        candidate = self._candidate(found, step, epoch) if found.is_finite else None
        self.proxy.put(before)
        return candidate

    def _candidate(self, found: Objective, step: int, epoch: float) -> Candidate:
        gram = self._gram(self.proxy.model, self.proxy_layers)
        fidelity = _or_none(gram_agreement(gram, self.target_gram))
        point = replace(_point(found, step, epoch, "heldout"), fidelity=fidelity)
        layers = [
            LayerPoint(step, name, _or_none(left), _or_none(right))
            for name, (left, right) in zip(self.proxy.layers, found.cosines.tolist(), strict=True)
        ]
        return Candidate(self.proxy.copy(), point, layers)

    def _objective(self) -> Objective:
        found, sizes = [], []
        size = self.proxy.align.batch
        for first in range(0, len(self.examples), size):
            batch = self.collate(self.examples[first : first + size])
            found.append(self._batch_objective(batch))
            sizes.append(len(batch.lengths))
        return mean_objective(found, sizes)

    def _batch_objective(self, batch: Batch) -> Objective:
        """The objective on one batch."""
        view = TargetView(self.target, self.dense, batch, self.proxy.align)
        return evaluate(self.proxy, batch, view)

    def _gram(self, model: Any, layers: Mapping[str, nn.Linear]) -> Tensor:
        compared, chunk = self.examples[:MAX_COMPARED], 2 * self.proxy.align.batch
        return gradient_gram(model, layers, compared, self.collate, chunk, self.reduction)

    def _broken(self, found: Objective) -> NumericsError:
        batch = self.collate(self.examples)
        where = "outside the decoder's linear layers"
        for side, model, layers in (
            ("target", self.target, self.target_layers),
            ("proxy", self.proxy.model, self.proxy_layers),
        ):
            layer = first_not_finite(model, layers, batch)
            if layer is not None:
                where = f"{side}, {layer}"
                break
        return NumericsError(
            "the alignment objective is not finite before training",
            where=where,
            value={"loss_ga": found.loss_ga, "kl": found.kl, "proxy_loss": found.proxy_loss},
            allowed="finite numbers",
            fix="look for weights or a precision that overflow; float32 is the safe one",
        )


class _Trained(NamedTuple):
    """What both phases train: a proxy, beside its target, on examples."""

    judge: _Judge[Any]
    proxy: Factorised
    examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]


class _Step(NamedTuple):
    """What an optimizer step saw before it moved the factors; not finite: it did not."""

    point: Point
    gradients: list[Tensor]
    is_finite: bool
    note: str
    n_zero: int = 0


class _Course:
    """An alignment under way; from its last checkpoint, where there is one.

    Args:
        trained: What is trained.
        planned_steps: Optimizer steps of both phases.
        rebalance: Whether factors are brought back to the balanced gauge at each epoch's end.
        checkpoints: Folder for checkpoints; None to write none.
    """

    def __init__(
        self, trained: _Trained, planned_steps: int, rebalance: bool, checkpoints: Path | None
    ) -> None:
        self.trained, self.rebalance, self.checkpoints = trained, rebalance, checkpoints
        self.last = None if checkpoints is None else last_checkpoint(checkpoints)
        judge, proxy = trained.judge, trained.proxy
        if self.last is None:
            start = judge.start()
            self.run = Alignment(start, start, planned_steps)
            self.run.add_candidate(start, proxy.align.select_by)
        else:
            self.run, judge.target_gram = load_alignment(
                self.last, proxy.copy(), planned_steps, proxy.model
            )
            log.info("going on after step %d of %d", self.run.steps, planned_steps)
        self.written = time.monotonic()

    def train(
        self, phase: _Schedule, step_of: Callable[[_Trained, Batch], _Step], progress: Track
    ) -> None:
        """Train through what is left of a phase, adding its steps and candidates to the run."""
        run, proxy = self.run, self.trained.proxy
        optimizer = _optimizer(proxy)
        done = run.steps - phase.steps_before
        if done == 0:
            proxy.put(run.chosen.factors)
        else:
            assert self.last is not None
            load_optimizer(self.last, proxy.model, optimizer)
        for step, places in phase.batches():
            if step <= done:
                continue
            if not self._step(phase, step, places, step_of, optimizer, progress):
                run.diverged_at = phase.steps_before + step
                return
            if self.rebalance and phase.ends_epoch(step) and not phase.recovers:
                factors = proxy.copy()
                if not _are_finite(factors):
                    run.diverged_at = run.steps
                    return
                proxy.put(rebalanced(factors))
                optimizer = _optimizer(proxy)
            self._keep(optimizer)

    def _step(
        self,
        phase: _Schedule,
        step: int,
        places: Sequence[int],
        step_of: Callable[[_Trained, Batch], _Step],
        optimizer: torch.optim.Optimizer,
        progress: Track,
    ) -> bool:
        """Take a step and judge it where that is due; False if something was not finite."""
        run, trained = self.run, self.trained
        batch = trained.collate([trained.examples[i] for i in places])
        number, epoch, lr = phase.steps_before + step, phase.epoch(step), phase.lr(step)
        found = step_of(trained, batch)
        norm = _move(trained.proxy, optimizer, found, lr)
        if not (found.is_finite and math.isfinite(norm)):
            return False
        found.gradients.clear()  # not to be held through the next step
        tokens = int(batch.lengths.sum())
        point = replace(found.point, step=number, epoch=epoch, lr=lr, grad_norm=norm)
        run.add_step(point, tokens, found.n_zero)
        run.recovery_tokens += tokens if phase.recovers else 0
        progress.advance(1, tokens, found.note, examples=len(places))
        if phase.is_judged(step):
            candidate = trained.judge(number, epoch)
            if candidate is None:
                return False
            run.add_candidate(candidate, trained.proxy.align.select_by)
        return True

    def _keep(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint if the last one is old enough."""
        if self.checkpoints is None or not is_due(self.written):
            return
        judge, proxy = self.trained.judge, self.trained.proxy

        def write(folder: Path) -> None:
            save_alignment(folder, self.run, proxy.model, optimizer, judge.target_gram)

        replace_checkpoint(self.checkpoints, self.run.steps, write)
        self.written = time.monotonic()


def _recovery_step(trained: _Trained, batch: Batch) -> _Step:
    """Divergence of the proxy's predictions on a batch, and its gradient."""
    judge, proxy = trained.judge, trained.proxy
    found = imitate(judge.target, proxy.model, proxy.parameters, batch, proxy.align.tau)
    point = Point(split="train", kl=found.divergence)
    return _Step(
        point, found.gradients, found.is_finite, f"recovery divergence {found.divergence:.3f}"
    )


def _gradient_step(trained: _Trained, batch: Batch) -> _Step:
    """The alignment objective on a batch, and its gradient."""
    judge, proxy = trained.judge, trained.proxy
    view = TargetView(judge.target, judge.dense, batch, proxy.align)
    found, gradients = gradient(proxy, batch, view)
    return _Step(
        _point(found, 0, 0.0, "train"),
        gradients,
        found.is_finite,
        f"alignment loss {found.loss_ga:.3f}",
        found.n_zero,
    )


def _move(proxy: Factorised, optimizer: torch.optim.Optimizer, found: _Step, lr: float) -> float:
    """One optimizer step, left out when its gradient is not finite.

    Returns:
        Norm of the gradient before clipping.
    """
    for parameter, one in zip(proxy.parameters, found.gradients, strict=True):
        parameter.grad = one
    norm = float(nn.utils.clip_grad_norm_(proxy.parameters, proxy.align.clip))
    if math.isfinite(norm) and found.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


def _optimizer(proxy: Factorised) -> torch.optim.AdamW:
    align = proxy.align
    return torch.optim.AdamW(proxy.parameters, lr=align.lr, weight_decay=align.weight_decay)


def _point(found: Objective, step: int, epoch: float, split: Literal["train", "heldout"]) -> Point:
    return Point(
        step=step,
        epoch=epoch,
        split=split,
        loss_ga=found.loss_ga,
        kl=found.kl,
        objective=found.objective,
        proxy_loss=found.proxy_loss,
        target_loss=found.target_loss,
    )


def _are_finite(factors: Mapping[str, FactorPair]) -> bool:
    return all(bool(t.isfinite().all()) for pair in factors.values() for t in pair)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
