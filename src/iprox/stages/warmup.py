"""Stage ``warmup``: a short fine-tuning of the target, where influence is then measured."""

from __future__ import annotations

from iprox.models.load import load_tokenizer
from iprox.stages.texts import pool_texts, split_ids
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, WarmupSection
from iprox.training.sft import train_folder, trainable, usage

SPLIT = "warmup"


def make(job: Job) -> Metrics:
    """Write the warmed-up target as a Hugging Face folder, and ``log.parquet``.

    When the job has a section ``epochs``, the weights at the end of earlier epochs are written
    too, for the stage ``checkpoint``, with the weight of each epoch as ``epochs.parquet``; with a
    section ``moments``, Adam's moments as ``moments.safetensors`` beside the weights of the end
    and of every epoch that is kept.

    It learns from the examples of the ``warmup`` split (LESS, arXiv:2402.04333).

    Returns:
        Steps, tokens, FLOPs, first and last loss; numbers of examples used, dropped because
        their response is cut away, and truncated.

    Raises:
        ArtifactError: The split is empty, or names examples that the pool does not have.
        DataError: No example of the split has anything to learn.
        NumericsError: Training diverged.
    """
    chat, tokenizer = job.section(ChatSection, "chat"), load_tokenizer(job.parents["target"])
    ids = split_ids(job.parents["split"], SPLIT)
    encoded = pool_texts(job.parents["pool"], ids, tokenizer, chat).encoded
    examples = trainable(encoded)
    metrics = train_folder(
        job.parents["target"],
        job.out,
        examples,
        job.section(WarmupSection, "warmup"),
        dtype=job.params["compute"]["dtype"],
        attention=job.params["compute"]["attention"],
        processes=job.gpus,
        label="warm-up",
        keep_epochs="epochs" in job.params,
        keep_moments="moments" in job.params,
        # Weights of earlier epochs lie in the folder that a killed job loses.
        progress=None if "epochs" in job.params else job.progress,
    )
    return {**metrics, **usage(encoded, examples)}
