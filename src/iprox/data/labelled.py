"""Texts with labels as tokens, for models that sort texts.

An example is a conversation like any other: its turns but the last are the text, the last, the
assistant's, is the label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iprox.data.chat import IGNORED, Encoded, Turn, encode_plain, pad_id
from iprox.errors import DataError, did_you_mean


def encode_labelled(
    messages: Sequence[Turn],
    tokenizer: Any,
    labels: Mapping[str, int],
    max_length: int,
    example_id: str = "",
) -> Encoded:
    """Token ids of a text without chat template, and a last token that stands for its label.

    The label is thereby what the text's last token is to predict, as the next token is for a
    causal LM; the stand-in itself is not passed through the model.

    Args:
        messages: Turns ``{"role", "content"}``; the last one's content is the label.
        tokenizer: A Hugging Face tokenizer.
        labels: Label -> its number.
        max_length: Tokens of the text kept; the rest is cut off at the right.
        example_id: Kept in the result, and named in errors.

    Raises:
        DataError: There is no text, or the label is not one of the model's.
    """
    *before, last = messages
    label, text = last["content"].strip(), "\n".join(turn["content"] for turn in before)
    if label not in labels:
        raise DataError(
            "a label is not one of the model's",
            where=f"example {example_id}",
            value=label,
            allowed=did_you_mean(label, labels),
            fix="a classifier's examples have a text as the prompt and the name of its label, as "
            "label2id of the model's config.json has it, as the response",
        )
    ids = encode_plain(text, tokenizer)
    if not ids:
        raise DataError("there is no text to label", where=f"example {example_id}")
    kept = ids[:max_length]
    return Encoded(
        input_ids=[*kept, pad_id(tokenizer)],
        labels=[IGNORED] * len(kept) + [labels[label]],
        n_truncated=len(ids) - len(kept),
        example_id=example_id,
    )
