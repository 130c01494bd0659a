"""Stage ``backbone``: a text encoder as it was published, as a plain Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

from iprox.data.sources import data_path
from iprox.models.encoder import (
    PACKAGED_ENCODERS,
    Encoder,
    load_encoder,
    packaged_encoder,
)
from iprox.store.job import Job, Metrics
from iprox.study.schema import EncoderSection

log = logging.getLogger(__name__)


def make(job: Job) -> Metrics:
    """Write ``config.json``, ``model.safetensors``, the tokenizer's files and ``encoder.json``.

    Raises:
        DataError: A local folder leaves ``data_dir``.
        ModelError: The encoder cannot be found or loaded.
    """
    section = job.section(EncoderSection, "encoder")
    encoder = find_encoder(section, job.data_dir)
    encoder.save(job.out)
    return {
        "model": section.model,
        "architecture": type(encoder.model).__name__,
        "n_parameters": sum(p.numel() for p in encoder.model.parameters()),
        "dim": encoder.dim,
    }


def find_encoder(section: EncoderSection, data_dir: Path) -> Encoder:
    """The encoder from a package, a folder below ``data_dir``, or the hub.

    Raises:
        DataError: A local folder leaves ``data_dir``.
        ModelError: It cannot be found or loaded.
    """
    if section.model in PACKAGED_ENCODERS:
        packaged = PACKAGED_ENCODERS[section.model]
        log.info("%s: licence %s", section.model, packaged.licence)
        return load_encoder(packaged_encoder(section.model))
    if (data_dir / section.model).exists() or section.model.count("/") > 1:
        return load_encoder(data_path(data_dir, section.model, where="encoder.model"))
    return load_encoder(section.model, revision=section.revision)
