"""Models that sort texts: decoders whose last token is read by one linear layer.

As ``AutoModelForSequenceClassification`` loads them. Their blocks are those of a causal LM, so
that gradients of a label's loss can be taken for the same layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from iprox.errors import ModelError

SUFFIX = "ForSequenceClassification"
"""End of the name of such an architecture."""


def is_classifier(config: Any) -> bool:
    """Whether a model of this configuration sorts texts, rather than continuing them."""
    return any(name.endswith(SUFFIX) for name in config.architectures or [])


def class_ids(model: Any) -> dict[str, int] | None:
    """Label -> its place among a classifier's outputs; None for a causal LM.

    Raises:
        ModelError: It gives a text several labels, or a number.
    """
    if not is_classifier(model.config):
        return None
    kind = getattr(model.config, "problem_type", None)
    if kind not in (None, "single_label_classification") or model.config.num_labels < 2:
        raise ModelError(
            "a classifier does not choose one of several labels",
            where=type(model).__name__,
            value=f"problem_type {kind}, {model.config.num_labels} labels",
            allowed="single_label_classification of two labels or more",
        )
    return dict(model.config.label2id)


def output_layer(model: Any) -> nn.Linear:
    """The linear layer that turns last hidden states into logits, of tokens or of labels.

    Raises:
        ModelError: The model has none that is known.
    """
    found = model.get_output_embeddings()
    found = getattr(model, "score", None) if found is None else found
    if not isinstance(found, nn.Linear):
        raise ModelError(
            "a model has no linear layer that turns hidden states into logits",
            where=type(model).__name__,
            allowed="a head of tokens, or a layer named score of labels",
        )
    return found
