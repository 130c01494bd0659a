"""Supervised fine-tuning through ``transformers.Trainer``.

One optimizer step sees ``batch`` sequences, in as many micro-batches as memory asks for, and
minimises the mean of ``-log p(token | tokens before)`` over *all* supervised tokens of the
step: the micro-batches only change rounding. AdamW (0.9, 0.999, 1e-8) with a linear schedule,
and gradients clipped at norm 1, as in LESS (arXiv:2402.04333).
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iprox.data.batches import collate
from iprox.data.chat import Encoded, pad_id
from iprox.engine.loss import Batch, attention_mask
from iprox.errors import ConfigError, DataError, NumericsError, shorten
from iprox.models.device import dtype_of, make_deterministic, pick_device
from iprox.models.flops import load_of, network_of
from iprox.models.load import load_model, load_tokenizer
from iprox.models.moments import save_adapters, save_moments
from iprox.numerics import flops
from iprox.progress import Track, track
from iprox.store.tables import write_table
from iprox.study.schema import FinetuneSection, WarmupSection
from iprox.training import lora, spread
from iprox.training.checkpoints import last_checkpoint, read_history, resumable_trainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

log = logging.getLogger(__name__)

GRADIENT_CLIP = 1.0
"""Norm at which the gradient of a step is clipped; ``Trainer``'s own, which LESS keeps."""

TOKENS_PER_MICRO_BATCH = {"cpu": 1024, "cuda": 16384}
"""Padded tokens of one forward pass, of all processes together: what fits, not what is computed."""

LOG_COLUMNS = {
    "step": "int64",
    "epoch": "float64",
    "loss": "float64",
    "lr": "float64",
    "grad_norm": "float64",
}


@dataclass(frozen=True)
class Training:
    """What a training run did.

    Attributes:
        log: A row for each optimizer step: step, epoch, loss (token mean), lr, grad_norm.
        tokens: Tokens seen, epochs counted, without padding.
        parameters: Parameters trained.
        flops: Operations of all passes.
        gathered: The trained weights where several processes had parts of them, on the first of
            these processes.
    """

    log: pd.DataFrame
    tokens: int
    parameters: int
    flops: float
    gathered: dict[str, Tensor] | None = None

    def metrics(self) -> dict[str, int | float]:
        """Figures for provenance."""
        return {
            "steps": len(self.log),
            "tokens": self.tokens,
            "parameters": self.parameters,
            "flops": self.flops,
            "loss_first": float(self.log["loss"].iloc[0]),
            "loss_last": float(self.log["loss"].iloc[-1]),
        }


def trainable(encoded: Sequence[Encoded]) -> list[Encoded]:
    """The examples that have a supervised token; the others are logged.

    A response that begins beyond ``chat.max_length`` leaves nothing to learn.
    """
    kept = [e for e in encoded if e.supervised]
    if len(kept) < len(encoded):
        dropped = [e.example_id for e in encoded if not e.supervised]
        log.warning(
            "dropped %d of %d examples whose response is cut away: %s",
            len(dropped),
            len(encoded),
            shorten(", ".join(dropped)),
        )
    return kept


def usage(encoded: Sequence[Encoded], used: Sequence[Encoded]) -> dict[str, int]:
    """How many examples were trained on, dropped and truncated, for provenance."""
    return {
        "examples": len(used),
        "examples_dropped": len(encoded) - len(used),
        "examples_truncated": sum(e.n_truncated > 0 for e in used),
    }


def train_folder(
    source: Path,
    out: Path,
    examples: Sequence[Encoded],
    settings: WarmupSection | FinetuneSection,
    *,
    dtype: str,
    attention: str,
    label: str,
    keep_epochs: bool = False,
    keep_moments: bool = False,
    progress: Path | None = None,
    processes: int = 1,
) -> dict[str, int | float]:
    """Fine-tune a saved model and save the result, with ``log.parquet`` beside it.

    Training is in float32; ``bfloat16`` adds autocast to the passes and rounds the saved
    weights, which no later stage reads at a higher precision. No epochs: the model as it is.

    Args:
        source: Hugging Face folder to start from.
        out: Folder to write to.
        examples: What it learns from.
        settings: Epochs, learning rate, batch and the rest.
        dtype: float32 or bfloat16.
        attention: Attention kernel.
        label: What the progress display says.
        keep_epochs: Also write the float32 weights at the end of every epoch but the last, as
            :func:`epoch_folder`, and the epochs' learning rates as ``epochs.parquet``.
        keep_moments: Also write Adam's moments after the last step, and with every epoch kept;
            and the low-rank updates, if there are any.
        progress: Folder for checkpoints, which a killed run goes on from; one process alone
            writes them.
        processes: Processes, of a GPU each, that the training is spread over.

    Returns:
        Metrics of the run: steps, tokens, FLOPs, losses.

    Raises:
        ConfigError: Several processes cannot do what is asked.
        DataError: There are no examples.
        NumericsError: Training diverged.
    """
    if processes > 1 and settings.epochs > 0:
        _check_spread(settings, processes, keep_epochs or keep_moments)
        about = {"source": str(source), "out": str(out), "label": label}
        precision = {"dtype": dtype, "attention": attention}
        return spread.train_spread(processes, examples, settings, **about, **precision)
    # Where it is sharded, a whole model need not fit on one GPU.
    device = pick_device() if spread.count() == 1 else torch.device("cpu")
    model = load_model(source, torch.float32, attention, device)
    tokenizer = load_tokenizer(source)

    scale = settings.lora_alpha / settings.lora_rank if settings.lora_rank else 0.0

    def keep_state(folder: Path, optimizer: Any) -> None:
        save_moments(folder, model, optimizer)
        if settings.lora_rank:
            save_adapters(folder, lora.adapters(model), settings.lora_rank, scale)

    def keep_epoch(folder: Path, optimizer: Any) -> None:
        weights = lora.merged_weights(model, scale) if settings.lora_rank else None
        model.save_pretrained(folder, state_dict=weights)
        if keep_moments:
            keep_state(folder, optimizer)

    rows = pd.DataFrame(columns=list(LOG_COLUMNS))
    metrics: dict[str, int | float] = {"steps": 0, "tokens": 0, "flops": 0.0}
    if settings.epochs > 0:
        make_deterministic(settings.seed)
        training = fine_tune(
            model,
            examples,
            settings,
            pad_token_id=pad_id(tokenizer),
            bf16=dtype == "bfloat16",
            label=label,
            checkpoints=progress,
            at_epoch_end=(lambda n, optimizer: keep_epoch(epoch_folder(out, n), optimizer))
            if keep_epochs
            else None,
            at_end=(lambda optimizer: keep_state(out, optimizer)) if keep_moments else None,
        )
        rows, metrics = training.log, training.metrics()
        if not spread.is_first():
            return metrics
        if training.gathered is not None:
            model = load_model(source, torch.float32, attention, device)
            model.load_state_dict(training.gathered)
    save(model, tokenizer, out, dtype_of(dtype))
    write_table(out / "log.parquet", rows.astype(LOG_COLUMNS), settings.model_dump())
    if keep_epochs:
        write_table(out / "epochs.parquet", epoch_weights(rows), settings.model_dump())
    return metrics


def epoch_folder(trained: Path, epoch: int) -> Path:
    """Where the weights at the end of an epoch, counted from 1, are in a training's folder."""
    return trained / "epochs" / f"{epoch:02d}"


def epoch_weights(log: pd.DataFrame) -> pd.DataFrame:
    """The weight of each epoch's checkpoint in TracIn's sum (arXiv:2002.08484, section 3).

    Args:
        log: A row for each step, with ``epoch`` after it and the ``lr`` of it.

    Returns:
        ``epoch`` (from 1), its ``steps``, mean ``lr``, and ``weight``: these, summing to 1.
    """
    epochs = np.ceil(log["epoch"] - 1e-6).astype("int64").rename("epoch")
    table = log.groupby(epochs)["lr"].agg(steps="size", lr="mean").reset_index()
    return table.assign(weight=table["lr"] / table["lr"].sum())


def fine_tune(
    model: Any,
    examples: Sequence[Encoded],
    settings: WarmupSection | FinetuneSection,
    *,
    pad_token_id: int,
    bf16: bool = False,
    micro_batch: int | None = None,
    label: str = "fine-tuning",
    at_epoch_end: Callable[[int, Any], object] | None = None,
    at_end: Callable[[Any], object] | None = None,
    checkpoints: Path | None = None,
) -> Training:
    """Train a causal LM in place on tokenised examples.

    Two runs with the same arguments give the same bytes on a CPU. Started by torchrun, every
    process takes its share of each batch.

    Args:
        model: A ``PreTrainedModel``; its weights are the master copy, so float32 or better. Not
            of use afterwards where several processes had parts of it.
        examples: What it learns from; each needs a supervised token.
        settings: Epochs (fractions allowed), learning rate, batch and the rest.
        pad_token_id: Fills short sequences of a micro-batch.
        bf16: Run the passes in bfloat16 autocast.
        micro_batch: Sequences in one forward pass, a divisor of the batch; by a token budget
            when absent.
        label: What the progress display says.
        at_epoch_end: Called at the end of every epoch but the last with its number, from 1, and
            the optimizer.
        at_end: Called after the last step with the optimizer.
        checkpoints: Folder for checkpoints; a run that finds one there goes on from it, to the
            same bytes as one that was never stopped. Written by single processes only.

    Raises:
        DataError: There are no examples, or one has nothing to learn.
        NumericsError: The loss or its gradient is not finite.
    """
    from transformers.trainer_callback import PrinterCallback

    _check(examples)
    use_cache = model.config.use_cache
    network = network_of(model)
    trained = _to_train(model, settings)
    is_lora = trained is not model
    parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    micro = micro_batch or micro_batch_size(examples, settings.batch)
    steps = math.ceil(settings.epochs * math.ceil(len(examples) / settings.batch))
    with tempfile.TemporaryDirectory() as scratch, track(steps, "steps", label) as progress:
        collator = _Collator(pad_token_id)
        recorder = _recorder(progress, collator)
        callbacks = [recorder]
        if at_epoch_end is not None:
            callbacks.append(_epoch_ends(math.ceil(settings.epochs), at_epoch_end))
        if spread.count() > 1:
            checkpoints = None  # their optimizer states are in parts
        trainer = resumable_trainer(
            checkpoints,
            model=trained,
            args=_arguments(settings, steps, micro, bf16, Path(scratch), spread.sharding(trained)),
            train_dataset=examples,
            data_collator=collator,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        last = None if checkpoints is None else last_checkpoint(checkpoints)
        if last is not None:
            recorder.restore(last)
            log.info("going on from step %d of %d", len(recorder.rows), steps)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if at_end is not None:
            at_end(trainer.optimizer)
        gathered = spread.gathered(trainer) if spread.count() > 1 else None
    if is_lora:
        lora.merge(trained)
    model.config.use_cache = use_cache  # Trainer turns it off, and it would be saved so
    model.requires_grad_(False).eval()
    load = load_of(examples).times(settings.epochs)
    if is_lora:
        spent = flops.lora_training(network, load, parameters)
    else:
        spent = flops.training(network, load, not settings.freeze_embed_head)
    return Training(
        log=pd.DataFrame(recorder.rows, columns=list(LOG_COLUMNS)),
        tokens=round(load.tokens),
        parameters=parameters,
        flops=spent,
        gathered=gathered,
    )


def _to_train(model: Any, settings: WarmupSection | FinetuneSection) -> Any:
    """The model with the weights to train set free, or in a wrapper with LoRA's updates."""
    if settings.lora_rank:
        return lora.attach(model, settings.lora_rank, settings.lora_alpha, settings.seed)
    model.requires_grad_(True)
    for module in embeddings(model) if settings.freeze_embed_head else []:
        module.requires_grad_(False)
    return model


def embeddings(model: Any) -> list[nn.Module]:
    """The token embedding and the head of a causal LM (one weight when tied)."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in found if module is not None]


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder: config, safetensors and tokenizer.

    ``Trainer.save_model`` is not used because it adds a pickle of its arguments.

    Args:
        model: The trained model; converted to ``dtype`` in place.
        tokenizer: Saved beside it.
        folder: Where to write.
        dtype: Precision of the saved weights.
    """
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def micro_batch_size(examples: Sequence[Encoded], batch: int) -> int:
    """Sequences in one forward pass: the largest divisor of this process's batch that fits."""
    longest = max(len(e) for e in examples)
    processes = spread.count()
    fit = max(1, TOKENS_PER_MICRO_BATCH[pick_device().type] // (longest * processes))
    local = _local_batch(batch, processes)
    return max(d for d in range(1, local + 1) if local % d == 0 and d <= fit)


def _check_spread(
    settings: WarmupSection | FinetuneSection, processes: int, keeps_more: bool
) -> None:
    """Refuse what needs the whole model, or the whole optimizer, in one process.

    Raises:
        ConfigError: LoRA, or weights or moments beside the final weights, are asked for; or a
            batch cannot be shared.
    """
    _local_batch(settings.batch, processes)
    if keeps_more or settings.lora_rank:
        raise ConfigError(
            "a training that is spread over GPUs gives its final weights alone",
            where="train_gpus",
            allowed="1 where lora_rank, influence.checkpoints: epochs or a scorer less is",
        )


def _check(examples: Sequence[Encoded]) -> None:
    if not examples:
        raise DataError("there is nothing to train on", value="0 examples")
    empty = [e.example_id for e in examples if not e.supervised]
    if empty:
        raise DataError(
            "training examples without a supervised token",
            where=f"{len(empty)} of {len(examples)} examples: {', '.join(empty[:5])}",
            fix="drop them, or raise chat.max_length",
        )


def _local_batch(batch: int, processes: int) -> int:
    """A process's share of a batch.

    Raises:
        ConfigError: The processes cannot share it evenly.
    """
    if batch % processes:
        raise ConfigError(
            "a batch cannot be shared evenly between the processes",
            where="batch",
            value=batch,
            allowed=f"a multiple of {processes}",
        )
    return batch // processes


def _lr_warmup(settings: WarmupSection | FinetuneSection, steps: int) -> float:
    """Share of steps with a rising learning rate; none when there is only one step.

    The first step of a rise has a learning rate of zero: a single step would change nothing.
    """
    return settings.lr_warmup if steps > 1 else 0.0


def _arguments(
    settings: WarmupSection | FinetuneSection,
    steps: int,
    micro: int,
    bf16: bool,
    scratch: Path,
    sharding: dict[str, Any],
) -> TrainingArguments:
    from transformers import TrainingArguments

    cuda = pick_device().type == "cuda"
    args = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=_local_batch(settings.batch, spread.count()) // micro,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        lr_scheduler_type="linear",
        warmup_steps=_lr_warmup(settings, steps),  # below 1 it is a share of all steps
        max_grad_norm=GRADIENT_CLIP,
        bf16=bf16,
        use_cpu=not cuda,
        seed=settings.seed,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would hide a loss that is not a number
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        **sharding,
    )
    if args.n_gpu > 1:
        # One process with several GPUs in sight would silently become nn.DataParallel, whose
        # batches are larger than asked for.
        args._n_gpu = 1
    return args


class _Collator:
    """Pads examples to the tensors a model takes, and counts what it was given.

    Attributes:
        tokens: Tokens since they were last counted.
        examples: Examples, likewise.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.tokens = self.examples = 0

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        batch = Batch(*collate(examples, self.pad_token_id))
        self.tokens += int(batch.lengths.sum())
        self.examples += len(examples)
        mask = attention_mask(batch)
        inputs = {"input_ids": batch.input_ids, "labels": batch.labels}
        return inputs if mask is None else inputs | {"attention_mask": mask}

    def take(self) -> dict[str, int]:
        """Tokens and examples since the last call."""
        counts = {"tokens": self.tokens, "examples": self.examples}
        self.tokens = self.examples = 0
        return counts


def _recorder(progress: Track, collator: _Collator) -> Any:
    """A ``TrainerCallback`` that keeps a row per step, shows progress, and stops at a NaN."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[tuple[int, float, float, float, float]] = []

        def restore(self, checkpoint: Path) -> None:
            """Take over the rows of the steps before a checkpoint."""
            self.rows = read_history(checkpoint)
            progress.advance(len(self.rows))

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any
        ) -> None:
            if "loss" not in logs:
                return  # the summary at the end
            loss, norm = float(logs["loss"]), float(logs["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NumericsError(
                    "training diverged",
                    where=f"step {state.global_step}, epoch {state.epoch:.2f}",
                    value={"loss": loss, "grad_norm": norm},
                    allowed="finite numbers",
                    fix="lower the learning rate, or train in float32",
                )
            self.rows.append(
                (state.global_step, float(state.epoch), loss, float(logs["learning_rate"]), norm)
            )
            progress.advance(1, note=f"loss {loss:.3f}", **collator.take())

    return Recorder()


def _epoch_ends(epochs: int, call: Callable[[int, Any], object]) -> Any:
    """A ``TrainerCallback`` that calls at the end of every epoch but the last."""
    from transformers import TrainerCallback

    class EpochEnds(TrainerCallback):
        def on_epoch_end(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
        ) -> None:
            epoch = round(state.epoch)
            if epoch < epochs and state.is_world_process_zero:
                call(epoch, optimizer)

    return EpochEnds()
