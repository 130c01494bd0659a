"""Stage target: the language model to be fine-tuned, as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from iprox.data.sources import data_path
from iprox.errors import ModelError, did_you_mean
from iprox.models.classifier import is_classifier
from iprox.models.device import dtype_of
from iprox.models.gguf import PACKAGED, find_gguf, load_gguf
from iprox.models.load import auto_class, is_proxy, load_model, load_tokenizer, weight_files
from iprox.store.job import Job, Metrics
from iprox.study.schema import TargetSection

log = logging.getLogger(__name__)

SAMPLE = (
    "Name 3 primes.\n\n  2, 3 and 5: \u00fcber 4\u00bd \u6f22\u5b57 \u0440\u0443\u0441 \U0001f600"
)
"""Text on which the saved tokenizer must give the ids of the original."""


def make(job: Job) -> Metrics:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files.

    The folder is loaded again, and its tensors and token ids compared with the original's.

    Raises:
        DataError: A local folder is missing or outside ``data_dir``.
        ModelError: The model cannot be loaded, has weights that are not finite, or its
            tokenizer does not fit; or it sorts texts and is not the model of a second
            training (``job.params["measured"]``), at which tasks alone are measured.
    """
    section = job.section(TargetSection, "target")
    model, tokenizer = load_target(section, job.data_dir, job.cache_dir)
    if "measured" not in job.params:
        refuse_classifier(model, section.model)
    model = model.to(dtype_of(section.dtype))
    check_weights(model)
    check_tokenizer(model, tokenizer)
    save_target(model, tokenizer, job.out)
    check_saved(model, tokenizer, job.out)
    return {
        "model": section.model,
        "architecture": type(model).__name__,
        "dtype": section.dtype,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_vocabulary": len(tokenizer),
    }


def load_target(section: TargetSection, data_dir: Path, cache_dir: Path) -> tuple[Any, Any]:
    """The model and its tokenizer from a package, a folder below ``data_dir``, or the hub.

    Raises:
        DataError: A local folder is missing or outside ``data_dir``.
        ModelError: The model cannot be found or loaded.
    """
    if section.model in PACKAGED:
        log.info("%s: licence %s", section.model, PACKAGED[section.model].licence)
        return load_gguf(find_gguf(section.model, cache_dir))
    if _is_local(section.model, data_dir):
        folder = data_path(data_dir, section.model, where="target.model")
        _refuse_proxy(folder)
        weight_files(folder)
        return _load_pretrained(str(folder), section, revision=None)
    return _load_pretrained(section.model, section, section.revision)


def refuse_classifier(model: Any, name: str) -> None:
    """Refuse a model that sorts texts where one that continues them is needed.

    Raises:
        ModelError: It is a classifier.
    """
    if is_classifier(model.config):
        raise ModelError(
            "a model that sorts texts cannot score or learn next tokens",
            where=f"target.model, or proxy.model of a run: {name}",
            value=type(model).__name__,
            allowed="a causal language model",
            fix="give a classifier as finetuned.model, for estimator multistage",
        )


def check_weights(model: Any) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                "the model has weights that are not finite",
                where=name,
                value=f"{count} of {tensor.numel()} values are NaN or infinite",
                fix="download the model again, or choose another target.dtype",
            )


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer without end-of-sequence token, or with more tokens than embeddings.

    Raises:
        ModelError: Says which.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token",
            where="target.model",
            fix="set eos_token in tokenizer_config.json",
        )
    n_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > n_embeddings:
        raise ModelError(
            "the tokenizer has more tokens than the model has embeddings",
            where="target.model",
            value=len(tokenizer),
            allowed=f"at most {n_embeddings}",
            fix="use the tokenizer that belongs to the model",
        )


def save_target(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the folder, without a trace of where the model was loaded from.

    Raises:
        ModelError: transformers refuses to save it.
    """
    model.config = copy.deepcopy(model.config)
    model.config._name_or_path = tokenizer.name_or_path = ""
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (ValueError, NotImplementedError) as error:
        raise ModelError("the model cannot be saved", where=out, value=str(error)) from None


def check_saved(model: Any, tokenizer: Any, folder: Path) -> None:
    """Load a saved folder and compare it with what was saved.

    Raises:
        ModelError: A tensor or a token id differs.
    """
    saved = load_model(folder, dtype=model.dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in saved or not torch.equal(saved[name], tensor):
            raise ModelError("a tensor changed when it was saved", where=name)
    again = load_tokenizer(folder)
    same = again(SAMPLE)["input_ids"] == tokenizer(SAMPLE)["input_ids"]
    if not same or again.chat_template != tokenizer.chat_template:
        raise ModelError(
            "the tokenizer changed when it was saved",
            where=folder,
            value=again(SAMPLE)["input_ids"],
            allowed=tokenizer(SAMPLE)["input_ids"],
        )


def _is_local(model: str, data_dir: Path) -> bool:
    """A folder that exists, or a name no hub repository can have."""
    return (data_dir / model).exists() or model.startswith((".", "/")) or model.count("/") > 1


def _refuse_proxy(folder: Path) -> None:
    """A folder of factors is no model of its own: only the target it was made from has its scale.

    Raises:
        ModelError: The folder is one.
    """
    if is_proxy(folder):
        raise ModelError(
            "the folder is a proxy that was made from another target",
            where="target.model, or proxy.model of a run",
            value=folder,
            allowed="an ordinary model folder",
            fix="name the model itself; proxies of the study's target are made by the study "
            "(proxy.kind ipsvd, svd or layers)",
        )


def _load_pretrained(name: str, section: TargetSection, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    shared = {"revision": revision, "trust_remote_code": section.trust_remote_code}
    log.info("reading %s; what is not on this machine is downloaded first", section.model)
    try:
        model, loading = auto_class(name, **shared).from_pretrained(
            name,
            dtype=dtype_of(section.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **shared,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **shared)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(section.model, str(error).replace(name, section.model)) from None
    missing = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if missing:
        raise ModelError(
            "the checkpoint lacks weights of its model",
            where="target.model",
            value=missing,
            fix="use a complete checkpoint of a causal language model",
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            "the target is quantised, and gradients need plain weights",
            where="target.model",
            value=section.model,
            fix="use the model's unquantised version",
        )
    return model, tokenizer


def _not_loaded(model: str, reason: str) -> ModelError:
    if "trust_remote_code" in reason:
        fix = "read the code that comes with the model, then set target.trust_remote_code: true"
    else:
        fix = "check the name; load a hub model once with a connection (HF_HUB_OFFLINE unset)"
    return ModelError(
        "a model cannot be loaded",
        where=f"target.model, or proxy.model of a run: {model}",
        value=reason,
        allowed=f"{did_you_mean(model, PACKAGED)}, a folder below data_dir, a hub name",
        fix=fix,
    )
