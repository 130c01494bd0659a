"""Checkpoints of a training that is killed, and ``transformers.Trainer`` going on from them.

The Trainer's own checkpoints hold pickles. These hold the same in safetensors and JSON: weights,
both moments of AdamW, the schedule's step, the state of torch's random numbers and the log. The
order of examples follows from the seed and the step. The loops that teach encoders and align
proxies keep their states with the same functions.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SECONDS = 300.0
"""Time between checkpoints: what a kill costs at most, and what writing them costs at least."""

PREFIX = "step-"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
SCHEDULE = "schedule.json"
RNG = "rng"
"""Key of the random-number state beside the optimizer's tensors."""

Row = tuple[int, float, float, float, float]
"""step, epoch, loss, learning rate, gradient norm"""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder; None when it has none."""
    return max(folder.glob(f"{PREFIX}*"), default=None)


def read_history(checkpoint: Path) -> list[Row]:
    """Rows of the training log up to a checkpoint."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return [
        (e["step"], float(e["epoch"]), e["loss"], e["learning_rate"], e["grad_norm"])
        for e in state["log_history"]
        if "loss" in e
    ]


def resumable_trainer(folder: Path | None, **arguments: Any) -> Any:
    """A ``Trainer`` that writes checkpoints into a folder and can go on from one.

    Args:
        folder: Where they go; None to write none.
        **arguments: The Trainer's own.
    """
    from transformers import Trainer, TrainerCallback

    class ResumableTrainer(Trainer):
        def write_checkpoint(self) -> None:
            """Keep the present state in place of the last one."""
            assert folder is not None

            def write(into: Path) -> None:
                save_state(into, self.model, self.optimizer, self.lr_scheduler)
                self.state.save_to_json(str(into / STATE))

            replace_checkpoint(folder, self.state.global_step, write)

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            load_weights(Path(checkpoint), self.model)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                load_optimizer(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                load_rng(Path(checkpoint))

    class Keeper(TrainerCallback):
        def __init__(self) -> None:
            self.last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.due = state.global_step < state.max_steps
            self.due &= is_due(self.last)

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # After the log of the step, so that the checkpoint holds it.
            if getattr(self, "due", False):
                trainer.write_checkpoint()
                self.last, self.due = time.monotonic(), False

    trainer = ResumableTrainer(**arguments)
    if folder is not None:
        trainer.add_callback(Keeper())
    return trainer


def is_due(written: float) -> bool:
    """Whether the last checkpoint, written at this time of the monotonic clock, is old enough."""
    return time.monotonic() - written >= SECONDS


def replace_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Put a checkpoint in place of the last one; a kill at any moment leaves one that is whole.

    Args:
        folder: Where checkpoints are.
        step: What has been done so far: it names the checkpoint.
        write: Writes the files into the folder it is given.
    """
    done = folder / f"{PREFIX}{step:08d}"
    partial = folder / f".{done.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for older in folder.glob(f"{PREFIX}*"):
        if older.name >= done.name:
            shutil.rmtree(older)
    partial.rename(done)
    for older in folder.glob(f"{PREFIX}*"):
        if older != done:
            shutil.rmtree(older)


def save_state(folder: Path, model: Any, optimizer: Any, schedule: Any = None) -> None:
    """Write trained weights, AdamW's tensors, the schedule and torch's random-number state.

    Args:
        folder: Where they go.
        model: Its parameters that require gradients are written.
        optimizer: Of these parameters.
        schedule: Of its learning rate; None where that follows from the step.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_file({n: p.detach().contiguous() for n, p in parameters.items()}, folder / WEIGHTS)
    moments = _moments(optimizer, {p: n for n, p in parameters.items()})
    save_file(moments | {RNG: torch.get_rng_state()}, folder / OPTIMIZER)
    if schedule is not None:
        state = json.dumps(schedule.state_dict(), default=lambda _: None)
        (folder / SCHEDULE).write_text(state, encoding="utf-8")


def load_weights(checkpoint: Path, model: Any) -> None:
    """Put a checkpoint's trained weights into a model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(checkpoint / WEIGHTS).items():
            parameters[name].copy_(value)


def load_optimizer(checkpoint: Path, model: Any, optimizer: Any, schedule: Any = None) -> None:
    """Put a checkpoint's moments, step and learning rate into an optimizer and its schedule.

    Args:
        checkpoint: Written by :func:`save_state`.
        model: Whose parameters the optimizer trains.
        optimizer: A new one.
        schedule: A new one, where the checkpoint has one.
    """
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    state = _wrapped(optimizer).state
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        if key != RNG:
            name, part = key.rsplit("/", 1)
            parameter = parameters[name]
            state[parameter][part] = value.to(parameter.device)
    if schedule is None:
        return
    kept = json.loads((checkpoint / SCHEDULE).read_text(encoding="utf-8"))
    kept.pop("lr_lambdas", None)
    schedule.__dict__.update(kept)
    for group, lr in zip(_wrapped(optimizer).param_groups, kept["_last_lr"], strict=True):
        group["lr"] = lr


def load_rng(checkpoint: Path) -> None:
    """Go on with a checkpoint's stream of torch's random numbers."""
    torch.set_rng_state(load_file(checkpoint / OPTIMIZER)[RNG])


def _wrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _moments(optimizer: Any, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """AdamW's tensors by ``<parameter>/<part>``: step, exp_avg, exp_avg_sq."""
    return {
        f"{names[parameter]}/{part}": value.detach().contiguous()
        for parameter, state in _wrapped(optimizer).state.items()
        for part, value in state.items()
    }
