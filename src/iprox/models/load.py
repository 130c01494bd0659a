"""Loading targets and proxies, and saving proxies as folders others can use."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iprox.errors import ModelError
from iprox.models.classifier import is_classifier
from iprox.models.lowrank import Passes, find_linear, replace_linears

log = logging.getLogger(__name__)

PROXY_FILE = "proxy.json"
"""Marks a folder as a proxy: the rank of every factorised layer, and how it was made."""

CONFIG_KEY = "iprox"
"""Key of a loaded proxy's config with the same content, so that ``save_pretrained`` keeps it."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def is_proxy(folder: Path) -> bool:
    """Whether a model folder holds a proxy rather than an ordinary model."""
    return _about(folder) is not None


def _about(folder: Path) -> dict[str, Any] | None:
    """What a proxy says of itself: in its own file, or in the config ``save_pretrained`` wrote.

    Raises:
        ModelError: The file is not JSON.
    """
    for name in (PROXY_FILE, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError("a model folder is damaged", where=path, value=str(error)) from None
        return found if name == PROXY_FILE else found.get(CONFIG_KEY)
    return None


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> Any:
    """Load a target, proxy or classifier for inference: evaluation mode, weights frozen.

    Args:
        folder: A Hugging Face folder, or a proxy folder.
        dtype: Precision of the weights.
        attention: Attention kernel: sdpa, eager or flash_attention_2.
        device: Where to put it.

    Returns:
        A ``PreTrainedModel``.

    Raises:
        ModelError: The folder is not a model, or its weights do not fit its config.
    """
    if is_proxy(folder):
        model = load_proxy(folder, dtype=dtype, attention=attention)
    else:
        model = _load_dense(folder, dtype, attention)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        ModelError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError("no tokenizer beside the model", where=folder, value=str(error)) from None


def auto_class(name: str | Path, **options: Any) -> Any:
    """The class that loads a model as what its configuration says it is.

    Args:
        name: Its folder, or hub name.
        options: For ``AutoConfig.from_pretrained``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name, **options)
    return AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM


def _load_dense(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    try:
        return auto_class(folder, local_files_only=True).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            "a model folder cannot be loaded", where=folder, value=str(error)
        ) from None


def load_proxy(path: str | Path, dtype: torch.dtype | None = None, attention: str = "sdpa") -> Any:
    """Load a proxy as an ordinary ``PreTrainedModel`` with thin linear layers.

    Generation, ``Trainer``, adapters and other attribution tools run on it as on any model, and
    what its ``save_pretrained`` writes is loaded by this function again, bit by bit. Adapters
    address the factors by the names ``left`` and ``right``.

    Args:
        path: A proxy folder written by the ``proxy`` stage, or by ``save_pretrained`` of a
            model that this function returned.
        dtype: Precision of the weights; as stored when absent.
        attention: Attention kernel.

    Raises:
        ModelError: The folder is not a proxy, or its weights do not match its ranks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights
    from transformers.utils import GENERATION_CONFIG_NAME

    folder = Path(path)
    about = _about(folder)
    if about is None:
        raise ModelError(
            "not a proxy folder",
            where=folder,
            allowed=f"a folder with {PROXY_FILE}, {WEIGHTS} and config.json",
            fix="give the folder of a proxy stage, results/proxy/<id>",
        )
    weights = load_weights(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    setattr(config, CONFIG_KEY, about)
    stored = next(iter(weights.values())).dtype
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or stored, attn_implementation=attention
        )
    replace_linears(model, about["ranks"], about.get("passes", "both"))
    assign_weights(model, weights, folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def assign_weights(model: Any, weights: Mapping[str, Tensor], where: Path) -> None:
    """Copy weights into a model; every one must have its place, tied ones excepted.

    Raises:
        ModelError: A weight is missing, superfluous, or of another shape.
    """
    try:
        result = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ModelError(
            "weights do not fit the model",
            where=where,
            value=str(error),
            allowed="weights of the shapes that config.json and the ranks give",
            fix="make the proxy again from its target",
        ) from None
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [n for n in result.missing_keys if n not in tied]
    if missing or result.unexpected_keys:
        raise ModelError(
            "weights do not fit the model",
            where=where,
            value={"missing": missing[:5], "unexpected": result.unexpected_keys[:5]},
            allowed="every weight of the model and no other",
            fix="make the proxy again from its target",
        )


def save_proxy(
    folder: Path,
    target: Any,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    tokenizer: Any,
    about: Mapping[str, Any],
    passes: Passes = "both",
) -> None:
    """Write a proxy folder: config, safetensors, tokenizer and ``proxy.json``.

    Args:
        folder: Where to write; must exist.
        target: The dense model the factors were made from; embeddings, norms, biases and
            dense layers are taken from it.
        factors: Layer -> (left (out, rank), right (rank, in)).
        tokenizer: Saved beside it.
        about: More entries for ``proxy.json``.
        passes: Passes in which the factors stand in for the weights.
    """
    weights = proxy_weights(target, factors, passes)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(target.config)
    config.save_pretrained(folder)
    target.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    text = json.dumps({**about, "passes": passes, "ranks": ranks}, indent=1, sort_keys=True) + "\n"
    (folder / PROXY_FILE).write_text(text, encoding="utf-8")


def proxy_weights(
    target: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], passes: Passes = "both"
) -> dict[str, Tensor]:
    """State of a proxy: the target's state with factors in place of, or beside, its weights.

    Raises:
        ModelError: The factors were made from another target.
    """
    check_fit(target, factors)
    tied = set(getattr(target, "all_tied_weights_keys", None) or ())
    state = {n: t.detach() for n, t in target.state_dict().items() if n not in tied}
    for name, (left, right) in factors.items():
        if passes == "backward":
            dense = state[f"{name}.weight"]
            state |= {f"{name}.left": left.detach().to(dense)}
            state |= {f"{name}.right": right.detach().to(dense)}
            continue
        dense = state.pop(f"{name}.weight")
        state[f"{name}.left.weight"] = left.detach().to(dense)
        state[f"{name}.right.weight"] = right.detach().to(dense)
        if f"{name}.bias" in state:
            state[f"{name}.left.bias"] = state.pop(f"{name}.bias")
    return {n: t.cpu().contiguous() for n, t in state.items()}


def as_proxy(
    target: Any,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
    passes: Passes = "both",
) -> Any:
    """A proxy in memory that shares no storage with ``target``.

    Args:
        target: The dense model.
        factors: Layer -> (left (out, rank), right (rank, in)).
        dtype: Precision of the proxy; the target's when absent.
        passes: Passes in which the factors stand in for the weights.

    Raises:
        ModelError: The factors were made from another target.
    """
    check_fit(target, factors)
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    if passes == "backward":
        proxy = copy.deepcopy(target)
        replace_linears(proxy, ranks, passes)
        for name, (left, right) in factors.items():
            layer = proxy.get_submodule(name)
            layer.left.copy_(left)
            layer.right.copy_(right)
        return proxy.to(dtype)
    # weights that factors replace are not copied: one stored number stands in for each
    dense = [find_linear(target, name).weight for name in factors]
    stand_ins = {id(w): nn.Parameter(w.detach().new_empty(1).expand(w.shape)) for w in dense}
    proxy = copy.deepcopy(target, stand_ins)
    replace_linears(proxy, ranks)
    proxy.to(dtype)
    with torch.no_grad():
        for name, (left, right) in factors.items():
            find_linear(proxy, f"{name}.left").weight.copy_(left)
            find_linear(proxy, f"{name}.right").weight.copy_(right)
    return proxy


def check_fit(target: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse factors whose product is not of their layer's shape.

    Raises:
        ModelError: Names the first such layer, or one that the target does not have.
    """
    for name, (left, right) in factors.items():
        shape = tuple(find_linear(target, name).weight.shape)
        fits = left.shape[0] == shape[0] and right.shape[1] == shape[1]
        if not fits or left.shape[1] != right.shape[0]:
            raise ModelError(
                "factors do not fit their layer: they were made from another target",
                where=name,
                value=f"left {tuple(left.shape)}, right {tuple(right.shape)}",
                allowed=f"left ({shape[0]}, rank), right (rank, {shape[1]})",
                fix="make the factors from this target's own decomposition",
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ModelError: There are none, or the index of them is not one, or leaves the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in _indexed(folder / INDEX)]
    raise ModelError(
        "a model folder has no safetensors weights",
        where=folder,
        allowed=f"{WEIGHTS} or {INDEX}",
        fix="convert the weights with save_pretrained(..., safe_serialization=True)",
    )


def _indexed(path: Path) -> list[str]:
    """Names of the files that an index of weights lists.

    Raises:
        ModelError: It is not an index, or names something outside its folder.
    """
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or name == ".."]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "an index of weights cannot be read",
            where=path,
            value=str(error),
            fix="download or save the model again",
        ) from None
    if wrong:
        raise ModelError(
            "an index of weights names a file outside its folder",
            where=path,
            value=wrong[0],
            allowed="names of files beside it",
        )
    return names


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, on the CPU.

    Raises:
        ModelError: A file is missing or is not safetensors.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError("weights cannot be read", where=path, value=str(error)) from None
    return weights
