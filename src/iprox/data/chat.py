"""Messages to token ids and labels, with the loss on the responses only.

Text is tokenised segment by segment: prompt, response, what follows. So the ids of a prompt
are a prefix of the ids of the whole, whatever the tokenizer would merge across the boundary,
and a label can never sit one token beside the text it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iprox.errors import DataError, ModelError

IGNORED = -100
"""Label of a token without loss, as in PyTorch's cross entropy."""

Template = Literal["tokenizer", "tulu"]
Turn = Mapping[str, str]


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        input_ids: Token ids.
        labels: The same ids at supervised tokens, -100 elsewhere; not shifted.
        n_truncated: Tokens cut off at the right.
        n_truncated_supervised: Supervised tokens among them.
        example_id: The example; empty if not said.
    """

    input_ids: list[int]
    labels: list[int]
    n_truncated: int = 0
    n_truncated_supervised: int = 0
    example_id: str = ""

    @property
    def supervised(self) -> int:
        """Tokens with a loss: labelled ones but the very first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels[1:])

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text that is tokenised by itself."""

    text: str
    supervised: bool


def encode(
    messages: Sequence[Turn],
    tokenizer: Any,
    template: Template,
    max_length: int,
    prefix: str = "",
    eos: bool = True,
    *,
    last_only: bool = False,
    example_id: str = "",
) -> Encoded:
    """Token ids and labels of a conversation.

    Every assistant turn is supervised: its text and the token that ends the turn, nothing
    after it. Of a query (``prefix`` given, ``eos`` false, or ``last_only``) only the last
    assistant turn is, after its prefix; without ``eos`` the ids end with its text.

    Args:
        messages: Turns ``{"role", "content"}``; roles system, user, assistant.
        tokenizer: A Hugging Face tokenizer.
        template: ``tulu`` for the tags of Tulu and LESS (arXiv:2402.04333), ``tokenizer`` for
            the tokenizer's own chat template.
        max_length: Tokens kept; the rest is cut off at the right.
        prefix: Beginning of the last assistant turn that belongs to the prompt.
        eos: Whether the end of the last turn is there and supervised.
        last_only: Supervise the last assistant turn only.
        example_id: Kept in the result, and named in errors.

    Raises:
        ModelError: The tokenizer lacks an end-of-sequence token or a chat template, or its
            chat template does not keep the beginning of a conversation as it was.
        DataError: There is no assistant turn, a role is unknown, or the last turn does not
            begin with ``prefix``.
    """
    segments = _segments(messages, tokenizer, template, prefix, example_id)
    if last_only or prefix or not eos:
        segments = _only_last(segments)
    if not eos:
        segments = segments[: _last_response(segments) + 1]
    return _tokenize(segments, tokenizer, max_length, example_id)


def encode_prompt(
    messages: Sequence[Turn], tokenizer: Any, template: Template, prefix: str = ""
) -> list[int]:
    """Ids of all that comes before the completion: what generation and choices start from.

    They are a prefix of the ids :func:`encode` gives for the same arguments. What the last
    assistant turn says after ``prefix`` is ignored.

    Raises:
        ModelError: As :func:`encode`.
        DataError: As :func:`encode`.
    """
    segments = _segments(messages, tokenizer, template, prefix, example_id="")
    before = segments[: _last_response(segments)]
    # No example is longer than this; prompts are cut, if at all, by whoever scores them.
    return _tokenize(before, tokenizer, max_length=2**31, example_id="").input_ids


def encode_plain(text: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt without a chat template; with whatever the tokenizer puts before a text."""
    return list(tokenizer(text)["input_ids"])


def completion_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a completion (a choice, say), tokenised as :func:`encode` does after a prompt."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pad_id(tokenizer: Any) -> int:
    """Id to pad with: the tokenizer's, else its end-of-sequence token (pads carry no loss).

    Raises:
        ModelError: The tokenizer has neither.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    _eos_token(tokenizer)
    return int(tokenizer.eos_token_id)


def _segments(
    messages: Sequence[Turn], tokenizer: Any, template: Template, prefix: str, example_id: str
) -> list[Segment]:
    """The rendered conversation: prompts, responses, their ends. Neighbouring prompts are one."""
    turns = list(messages)
    _check(turns, prefix, example_id)
    render = _tulu if template == "tulu" else _own_template
    merged: list[Segment] = []
    for segment in render(turns, tokenizer, prefix):
        if merged and not (segment.supervised or merged[-1].supervised):
            merged[-1] = Segment(merged[-1].text + segment.text, False)
        else:
            merged.append(segment)
    return merged


def _check(messages: Sequence[Turn], prefix: str, example_id: str) -> None:
    where = example_id or None
    for i, turn in enumerate(messages):
        if turn["role"] not in ("system", "user", "assistant"):
            raise DataError(
                "a turn has an unknown role",
                where=f"{example_id or 'messages'}[{i}].role",
                value=turn["role"],
                allowed="system, user, assistant",
            )
    if len(messages) == 0 or messages[-1]["role"] != "assistant":
        raise DataError(
            "a conversation does not end with the assistant's turn",
            where=where,
            value=[turn["role"] for turn in messages],
            fix="there must be a response to take a loss on",
        )
    if not messages[-1]["content"].startswith(prefix):
        raise DataError(
            "the assistant's turn does not begin with its prefix",
            where=where,
            value=messages[-1]["content"],
            allowed=f"{prefix!r}...",
        )


def _only_last(segments: list[Segment]) -> list[Segment]:
    last = _last_response(segments)
    return [s if i >= last else Segment(s.text, False) for i, s in enumerate(segments)]


def _last_response(segments: list[Segment]) -> int:
    """Index of the last turn's response: the end of turn after it is the last with a loss."""
    return max(i for i, s in enumerate(segments) if s.supervised) - 1


def _tulu(messages: Sequence[Turn], tokenizer: Any, prefix: str) -> list[Segment]:
    r"""Segments in Tulu's tags: ``<|user|>\n{text}\n<|assistant|>\n{text}{eos}\n``."""
    end = _eos_token(tokenizer)
    segments: list[Segment] = []
    for i, turn in enumerate(messages):
        tag, text = f"<|{turn['role']}|>\n", turn["content"].strip()
        if turn["role"] != "assistant":
            segments.append(Segment(f"{tag}{text}\n", False))
            continue
        given = prefix.lstrip() if i == len(messages) - 1 else ""
        segments.append(Segment(tag + given, False))
        segments.append(Segment(text[len(given) :], True))
        segments += [Segment(end, True), Segment("\n", False)]
    return segments


def _own_template(messages: Sequence[Turn], tokenizer: Any, prefix: str) -> list[Segment]:
    """Segments of the tokenizer's chat template.

    A response is what a rendering adds to the prompt that asks for it, up to its end of turn.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            where="chat.template",
            value="tokenizer",
            fix="set chat.template: tulu",
        )
    _eos_token(tokenizer)
    whole = _render(messages, tokenizer, ask=False)
    segments: list[Segment] = []
    done = 0
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        if i == 0:
            raise DataError(
                "a conversation begins with the assistant, which chat templates do not allow",
                where="chat.template",
                value=turn["content"],
                fix="remove such examples, or set chat.template: tulu",
            )
        asked = _render(messages[:i], tokenizer, ask=True)
        answered = whole if i == len(messages) - 1 else _render(messages[: i + 1], tokenizer)
        if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= done):
            raise ModelError(
                "the chat template rewrites the beginning of a conversation",
                where=f"chat template, before turn {i}",
                value=asked[-80:],
                fix="set chat.template: tulu",
            )
        given = prefix if i == len(messages) - 1 else ""
        before, response, end, rest = _cut_turn(answered[len(asked) :], turn, given, tokenizer)
        segments.append(Segment(whole[done : len(asked)] + before, False))
        segments += [Segment(response, True), Segment(end, True), Segment(rest, False)]
        done = len(answered)
    return segments


def _render(messages: Sequence[Turn], tokenizer: Any, ask: bool = False) -> str:
    from jinja2 import TemplateError

    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise ModelError(
            "the chat template refuses a conversation",
            where="chat template",
            value=f"{error.message}: {[m['role'] for m in messages]}",
            fix="set chat.template: tulu",
        ) from None


def _cut_turn(added: str, turn: Turn, prefix: str, tokenizer: Any) -> tuple[str, str, str, str]:
    """Cut an assistant turn's text into what precedes the response, it, its end, and the rest.

    A template may put something before the response (an empty reasoning block), and may strip
    the spaces around it. The response is found as the turn's text followed by a special token.
    """
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(tokenizer.all_special_tokens)
    longest_first = sorted(special, key=lambda token: (-len(token), token))
    end = rf"\s*(?:{'|'.join(map(re.escape, longest_first))})"
    for content in (turn["content"], turn["content"].strip()):
        found = re.search(f"({re.escape(content)})({end})", added)
        if found is not None:
            first = min(found.start(1) + len(prefix), found.end(1)) if prefix else 0
            return added[:first], added[first : found.end(1)], found[2], added[found.end() :]
    raise ModelError(
        "the chat template changes a response, or does not end it with a special token",
        where="chat template",
        value=added,
        allowed="the response as it is, then a token that ends the turn",
        fix="set chat.template: tulu",
    )


def _eos_token(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer has no end-of-sequence token",
            where="tokenizer",
            fix="set eos_token in the tokenizer's configuration",
        )
    return str(tokenizer.eos_token)


def _tokenize(segments: list[Segment], tokenizer: Any, max_length: int, example_id: str) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for segment in segments:
        piece = completion_ids(segment.text, tokenizer) if segment.text else []
        ids += piece
        labels += piece if segment.supervised else [IGNORED] * len(piece)
    bos = _bos(tokenizer)
    if bos and ids[: len(bos)] != bos:
        ids, labels = bos + ids, [IGNORED] * len(bos) + labels
    cut = labels[max_length:]
    return Encoded(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        n_truncated=len(cut),
        n_truncated_supervised=sum(label != IGNORED for label in cut),
        example_id=example_id,
    )


def _bos(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before a text by itself; mostly none or one."""
    with_special = list(tokenizer("a")["input_ids"])
    plain = completion_ids("a", tokenizer)
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []
