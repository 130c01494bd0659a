"""Stage ``warmup``: a short fine-tuning of the target, where influence is then measured."""

from __future__ import annotations

from iprox.data.chat import Encoded, encode
from iprox.errors import ArtifactError
from iprox.models.load import load_tokenizer
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow, read_table
from iprox.study.schema import ChatSection, WarmupSection
from iprox.training.sft import train_folder, trainable, usage

SPLIT = "warmup"


def make(job: Job) -> Metrics:
    """Write the warmed-up target as a Hugging Face folder, and ``log.parquet``.

    It learns from the examples of the ``warmup`` split (LESS, arXiv:2402.04333).

    Returns:
        Steps, tokens, FLOPs, first and last loss; numbers of examples used, dropped because
        their response is cut away, and truncated.

    Raises:
        ArtifactError: The split names examples that the pool does not have.
        DataError: No example of the split has anything to learn.
        NumericsError: Training diverged.
    """
    encoded = _encoded(job)
    examples = trainable(encoded)
    metrics = train_folder(
        job.parents["target"],
        job.out,
        examples,
        job.section(WarmupSection, "warmup"),
        dtype=job.params["compute"]["dtype"],
        attention=job.params["compute"]["attention"],
        label="warm-up",
    )
    return {**metrics, **usage(encoded, examples)}


def _encoded(job: Job) -> list[Encoded]:
    """The warm-up examples as tokens, in the order of the split."""
    split = read_table(job.parents["split"] / "split.parquet")
    chosen = split[split["split"] == SPLIT].sort_values("position")["example_id"]
    pool = read_arrow(job.parents["pool"] / "pool.parquet", ["example_id", "messages"]).to_pylist()
    messages = {row["example_id"]: row["messages"] for row in pool}
    unknown = [i for i in chosen if i not in messages]
    if unknown:
        raise ArtifactError(
            "the split names examples that the pool does not have",
            where=job.parents["split"],
            value=unknown[:5],
            fix="make the split again from this pool",
        )
    chat, tokenizer = job.section(ChatSection, "chat"), load_tokenizer(job.parents["target"])
    return [
        encode(messages[i], tokenizer, chat.template, chat.max_length, example_id=i) for i in chosen
    ]
