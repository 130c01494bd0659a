"""Sizes of a target model from its ``config.json``, without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iprox.errors import ModelError
from iprox.numerics.ranks import Architecture
from iprox.plan.nodes import RESULTS, Node
from iprox.store.manifest import SPEC

CONFIG = "config.json"

PACKAGED = {
    "smollm2-135m": Architecture(
        hidden=576, blocks=30, ff=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152
    ),
    "gemma3-270m": Architecture(
        hidden=640,
        blocks=18,
        ff=2048,
        heads=4,
        kv_heads=1,
        head_dim=256,
        vocab=262144,
        qk_norm=True,
        block_norms=4,
    ),
}
"""Models from pinned packages, whose sizes are known before they are unpacked."""


GEMMA3 = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262208,
}
"""Sizes that published configs of Gemma 3 leave out: the defaults of the architecture."""


def find_architecture(
    target: Node, data_dir: Path, root: Path = Path(), given: Path | None = None
) -> tuple[Architecture, str]:
    """Sizes of a study's target, and where they were found.

    Looked for in ``given``, the finished target or another of the same model, the model's own
    folder, and the Hugging Face cache.

    Args:
        target: The plan's target stage.
        data_dir: Folder that ``target.model`` may be relative to.
        root: The folder that holds ``results``.
        given: A ``config.json``, or a folder with one.

    Raises:
        ModelError: It is nowhere, or lacks a size.
    """
    name = str(target.params["target"]["model"])
    if given is not None:
        path = given / CONFIG if given.is_dir() else given
        if not path.is_file():
            raise ModelError("there is no model config", where=path, fix="give a config.json")
        return read_architecture(path), str(path)
    for folder in _candidates(target, name, data_dir, root):
        if (folder / CONFIG).is_file():
            return read_architecture(folder / CONFIG), str(folder / CONFIG)
    if name in PACKAGED:
        return PACKAGED[name], f"the known sizes of {name}"
    raise ModelError(
        "the sizes of a model are not known: its config.json is not on this machine",
        where="target.model, or proxy.model of a run",
        value=name,
        fix=f"fetch the model (snakemake {target.manifest} --configfile STUDY), or the target's "
        "config.json alone and give it: iprox cost STUDY --model-config config.json",
    )


def read_architecture(path: Path) -> Architecture:
    """Sizes of a decoder from a Hugging Face ``config.json``.

    Raises:
        ModelError: The file is not JSON or lacks a size.
    """
    try:
        return architecture(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError) as error:
        raise ModelError(
            "a model config lacks a size that costs depend on",
            where=path,
            value=str(error),
            allowed="hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, "
            "vocab_size of a decoder with gated feed-forward networks",
        ) from None


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Sizes from a config's fields; those of the text model in a multimodal one.

    Raises:
        KeyError: A size is missing.
    """
    text = dict(config.get("text_config", config))
    kind = str(text.get("model_type", config.get("model_type", "")))
    if kind.startswith("gemma3"):
        text = GEMMA3 | text
    heads = text["num_attention_heads"]
    return Architecture(
        hidden=text["hidden_size"],
        blocks=text["num_hidden_layers"],
        ff=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings", kind.startswith("gemma"))),
        qkv_bias=bool(text.get("attention_bias", kind.startswith("qwen2"))),
        qk_norm=kind.startswith(("qwen3", "gemma3")),
        block_norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
    )


def _candidates(target: Node, name: str, data_dir: Path, root: Path) -> Iterator[Path]:
    """Folders that may have the model's config, nearest first."""
    yield root / target.folder
    for spec in sorted((root / RESULTS / "target").glob(f"*/{SPEC}")):
        made = json.loads(spec.read_text(encoding="utf-8"))["params"]["target"]
        if made["model"] == name and made["revision"] == target.params["target"]["revision"]:
            yield spec.parent
    yield data_dir / name
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    yield from sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*"))
