"""Stage ``finetune``: the target trained on a selection."""

from __future__ import annotations

from iprox.data.chat import encode
from iprox.models.load import load_tokenizer
from iprox.stages.selection import read_selected
from iprox.store.job import Job, Metrics
from iprox.study.schema import ChatSection, FinetuneSection
from iprox.training.sft import train_folder, trainable, usage


def make(job: Job) -> Metrics:
    """Write the fine-tuned model as a Hugging Face folder, and ``log.parquet``.

    It starts from the parent ``model`` and learns from the examples selected for one task, or
    for ``all`` of them. A killed job goes on from its last checkpoint, to the same bytes.

    Returns:
        Steps, tokens, FLOPs, first and last loss; numbers of examples used, dropped because
        their response is cut away, and truncated.

    Raises:
        ArtifactError: The selection has no such task.
        DataError: The selection is empty, or none of it has anything to learn.
        NumericsError: Training diverged.
    """
    chat, tokenizer = job.section(ChatSection, "chat"), load_tokenizer(job.parents["model"])
    subset = job.params["subset"]["task"]
    encoded = [
        encode(
            record["messages"],
            tokenizer,
            chat.template,
            chat.max_length,
            example_id=record["example_id"],
        )
        for record in read_selected(job.parents["selection"], subset)
    ]
    examples = trainable(encoded)
    metrics = train_folder(
        job.parents["model"],
        job.out,
        examples,
        job.section(FinetuneSection, "finetune"),
        dtype=job.params["compute"]["dtype"],
        attention=job.params["compute"]["attention"],
        processes=job.gpus,
        label=f"fine-tuning on {subset}",
        progress=job.progress,
    )
    return {**metrics, **usage(encoded, examples)}
