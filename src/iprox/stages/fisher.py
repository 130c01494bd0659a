"""What all passes over the fisher split share: its texts, their batches, and the settings kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iprox.data.chat import Encoded
from iprox.engine.loss import Batch
from iprox.progress import Track
from iprox.stages.passes import Reader, fingerprint
from iprox.stages.texts import Texts, pool_texts, split_ids
from iprox.store.job import Job
from iprox.study.schema import ChatSection, CurvatureSection, InfluenceSection


@dataclass(frozen=True)
class Fisher:
    """The examples of the fisher split that one job passes, at a model.

    Attributes:
        reader: The model.
        texts: All examples of the job.
        encoded: Those that have a loss.
    """

    reader: Reader
    texts: Texts
    encoded: list[Encoded]

    def batches(self, progress: Track) -> Iterator[tuple[list[int], Batch, list[str]]]:
        """Batches, each with its examples' indices in ``encoded`` and their ids."""
        for indices, batch in self.reader.batches(self.encoded):
            yield indices, batch, [self.encoded[i].example_id for i in indices]
            progress.advance(len(indices), tokens=int(batch.lengths.sum()))

    def named(self, progress: Track) -> Iterator[tuple[Batch, list[str]]]:
        """Batches and the ids of their examples."""
        for _, batch, ids in self.batches(progress):
            yield batch, ids


def read_fisher(job: Job, reader: Reader) -> Fisher:
    """The examples of the fisher split in ``job.rows``, all when absent.

    Raises:
        ArtifactError: The split is not a fisher split, or an id of it is not in the pool.
        DataError: A label is not one of the classifier's.
    """
    ids = split_ids(job.parents["split"], "fisher")
    start, stop = job.rows or (0, len(ids))
    chat = job.section(ChatSection, "chat")
    texts = pool_texts(job.parents["pool"], ids[start:stop], reader.tokenizer, chat, reader.labels)
    return Fisher(reader, texts, [e for e in texts.encoded if e.supervised])


def settings(job: Job, reader: Reader, sites: dict[str, str]) -> dict[str, Any]:
    """What the parts of a curvature must agree in."""
    section = job.section(CurvatureSection, "curvature")
    return {
        "labels": section.labels,
        "layers": {n: [m.out_features, m.in_features] for n, m in reader.layers.items()},
        "loss_reduction": job.section(InfluenceSection, "influence").loss_reduction,
        "max_factor_dim": section.max_factor_dim,
        "model": fingerprint(reader.layers),
        "sites": sites,
    }
