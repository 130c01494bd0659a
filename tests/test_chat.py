"""Chat formats: what is rendered, which tokens carry a loss, and what is cut."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.data.batches import collate
from iprox.data.chat import IGNORED, Encoded, encode, encode_prompt, pad_id
from iprox.errors import DataError, ModelError

TEMPLATES: tuple[Literal["tokenizer", "tulu"], ...] = ("tokenizer", "tulu")
LONG = 10_000


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def supervised_text(tokenizer: Any, encoded: Encoded) -> str:
    return text(tokenizer, [label for label in encoded.labels if label != IGNORED])


# --- the formats, written by hand ----------------------------------------------------------


def test_tulu_format(tokenizer: Any) -> None:
    messages = talk("  Hi? \n", "\nHo! ", "More", "Less", system="Be brief. ")
    encoded = encode(messages, tokenizer, "tulu", LONG)
    assert text(tokenizer, encoded.input_ids) == (
        "<|system|>\nBe brief.\n<|user|>\nHi?\n<|assistant|>\nHo!<|im_end|>\n"
        "<|user|>\nMore\n<|assistant|>\nLess<|im_end|>\n"
    )
    assert supervised_text(tokenizer, encoded) == "Ho!<|im_end|>Less<|im_end|>"


def test_own_template(tokenizer: Any) -> None:
    encoded = encode(talk("Hi?", "Ho!", "More", "Less"), tokenizer, "tokenizer", LONG)
    assert text(tokenizer, encoded.input_ids) == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHo!<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nLess<|im_end|>\n"
    )
    assert supervised_text(tokenizer, encoded) == "Ho!<|im_end|>Less<|im_end|>"


def test_a_query_is_supervised_after_its_prefix_only(tokenizer: Any) -> None:
    messages = talk("Q", "A", "2 or 3?", "The answer is: B")
    encoded = encode(messages, tokenizer, "tulu", LONG, prefix="The answer is:", eos=False)
    assert text(tokenizer, encoded.input_ids).endswith("\n<|assistant|>\nThe answer is: B")
    assert supervised_text(tokenizer, encoded) == " B"
    encoded = encode(messages, tokenizer, "tokenizer", LONG, prefix="The answer is:", eos=False)
    assert text(tokenizer, encoded.input_ids).endswith("assistant\nThe answer is: B")
    assert supervised_text(tokenizer, encoded) == " B"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_query_with_an_end(tokenizer: Any, template: Any) -> None:
    messages = talk("a", "b", "c", "d e")
    encoded = encode(messages, tokenizer, template, LONG, prefix="d")
    assert supervised_text(tokenizer, encoded) == " e<|im_end|>"
    encoded = encode(messages, tokenizer, template, LONG, last_only=True)
    assert supervised_text(tokenizer, encoded) == "d e<|im_end|>"
    encoded = encode(messages, tokenizer, template, LONG, eos=False)
    assert supervised_text(tokenizer, encoded) == "d e"


# --- the mask ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_supervised_are_the_response_s_tokens_and_the_end(tokenizer: Any, template: Any) -> None:
    response = "Grüße, \U0001f600!"
    encoded = encode(talk("Hi", response), tokenizer, template, LONG)
    expected = tokenizer(response, add_special_tokens=False)["input_ids"]
    assert encoded.supervised == len(expected) + 1
    supervised = [label for label in encoded.labels if label != IGNORED]
    assert supervised == [*expected, tokenizer.eos_token_id]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORED)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_s_ids_are_a_prefix(tokenizer: Any, template: Any) -> None:
    messages = talk("a", "b", "c", "The answer is: B")
    for prefix in ("", "The answer is:"):
        for eos in (True, False):
            whole = encode(messages, tokenizer, template, LONG, prefix=prefix, eos=eos)
            prompt = encode_prompt(messages, tokenizer, template, prefix=prefix)
            assert whole.input_ids[: len(prompt)] == prompt
            rest = text(tokenizer, whole.input_ids[len(prompt) :])
            assert rest.startswith(messages[-1]["content"][len(prefix) :])
            if prefix:
                assert set(whole.labels[: len(prompt)]) == {IGNORED}


def test_prompt_ids_are_a_prefix_even_where_tokens_would_merge() -> None:
    """The tokenizer's merge of newline and response's first letter may not cross the boundary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet, "Ċx"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "x")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    merged = vocab["Ċx"]
    assert merged in tokenizer("a\nx")["input_ids"]
    messages = talk("a", "x")
    whole = encode(messages, tokenizer, "tulu", LONG)
    prompt = encode_prompt(messages, tokenizer, "tulu")
    assert whole.input_ids[: len(prompt)] == prompt
    assert merged not in whole.input_ids
    assert [label for label in whole.labels if label != IGNORED] == [vocab["x"], vocab["<eos>"]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.sampled_from(TEMPLATES))
def test_any_conversation_keeps_its_responses(texts: list[str], template: Any) -> None:
    tokenizer = tiny_tokenizer()
    texts = [t.replace("<|", "") for t in texts]
    messages = talk(*[t for text in texts for t in ("q", text)])
    encoded = encode(messages, tokenizer, template, LONG)
    kept = [t.strip() if template == "tulu" else t for t in texts]
    sizes = [len(tokenizer(t)["input_ids"]) + 1 if t else 1 for t in kept]
    assert encoded.supervised == sum(sizes)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_s_labels_change_nothing(tokenizer: Any, template: Any) -> None:
    """The loss sees response tokens only: other prompt labels, the same loss and gradients."""
    model = tiny_model()
    encoded = encode(talk("Hi?", "Ho!"), tokenizer, template, LONG)
    ids, labels, _ = collate([encoded], pad_id(tokenizer))
    keep = labels != IGNORED

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        taken = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return -(taken * keep[:, 1:]).sum()

    changed = torch.where(keep, labels, torch.randint_like(labels, 4, 260))
    first = torch.autograd.grad(loss(ids), list(model.parameters()))
    second = torch.autograd.grad(loss(changed), list(model.parameters()))
    assert loss(ids) == loss(changed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- BOS, truncation -----------------------------------------------------------------------


def with_bos(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|eos|>"
    bos = [("<|eos|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|eos|> $A", special_tokens=bos
    )
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_comes_once_when_the_tokenizer_adds_it(tokenizer: Any, template: Any) -> None:
    plain = encode(talk("Hi", "Ho"), tokenizer, template, LONG)
    with_bos(tokenizer)
    encoded = encode(talk("Hi", "Ho"), tokenizer, template, LONG)
    assert encoded.input_ids == [tokenizer.bos_token_id, *plain.input_ids]
    assert encoded.labels == [IGNORED, *plain.labels]


def test_bos_that_the_template_writes_is_not_doubled(tokenizer: Any) -> None:
    with_bos(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoded = encode(talk("Hi", "Ho"), tokenizer, "tokenizer", LONG)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", TEMPLATES)
def test_truncation_is_from_the_right_and_counted(tokenizer: Any, template: Any) -> None:
    messages = talk("Hi", "Hello")
    whole = encode(messages, tokenizer, template, LONG)
    assert (whole.n_truncated, whole.n_truncated_supervised) == (0, 0)
    for length in range(8, len(whole)):
        cut = encode(messages, tokenizer, template, length)
        assert cut.input_ids == whole.input_ids[:length]
        assert cut.labels == whole.labels[:length]
        assert cut.n_truncated == len(whole) - length
        assert cut.supervised + cut.n_truncated_supervised == whole.supervised


def test_an_example_without_its_response_has_nothing_supervised(tokenizer: Any) -> None:
    encoded = encode(talk("x" * 50, "Ho"), tokenizer, "tulu", 20)
    assert encoded.supervised == 0
    assert len(encoded) == 20
    assert encoded.n_truncated_supervised == 3


def test_the_very_first_token_is_not_supervised() -> None:
    assert Encoded([1, 2], [1, 2]).supervised == 1


def test_the_example_is_carried_along(tokenizer: Any) -> None:
    assert encode(talk("a", "b"), tokenizer, "tulu", LONG, example_id="x7").example_id == "x7"


# --- templates that do unusual things ------------------------------------------------------


def test_a_template_that_strips_and_adds_an_empty_reasoning_block(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoded = encode(talk("q", " think "), tokenizer, "tokenizer", LONG)
    supervised = supervised_text(tokenizer, encoded)
    assert supervised == "<think>\n\n</think>\n\nthink<|im_end|>"
    encoded = encode(talk("q", "A: think"), tokenizer, "tokenizer", LONG, prefix="A:", eos=False)
    assert supervised_text(tokenizer, encoded) == " think"


def test_a_template_with_a_default_system_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    encoded = encode(talk("a", "b"), tokenizer, "tokenizer", LONG)
    assert text(tokenizer, encoded.input_ids).startswith("<|im_start|>system\nHelp.<|im_end|>\n")
    assert supervised_text(tokenizer, encoded) == "b<|im_end|>"


def refuse(tokenizer: Any, template: str | None, match: str, messages: Any = None) -> ModelError:
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=match) as caught:
        encode(messages or talk("a", "b", "c", "d"), tokenizer, "tokenizer", LONG)
    assert "set chat.template: tulu" in str(caught.value)
    return caught.value


def test_no_chat_template(tokenizer: Any) -> None:
    refuse(tokenizer, None, "no chat template")


def test_a_template_that_rewrites_the_past(tokenizer: Any) -> None:
    template = "{{ messages | length }}" + tokenizer.chat_template
    refuse(tokenizer, template, "rewrites the beginning")


def test_a_template_that_changes_a_response(tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    refuse(tokenizer, template, "changes a response")


def test_a_template_without_an_end_of_turn(tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("<|im_end|>", "")
    refuse(tokenizer, template, "does not end it with a special token")


def test_a_template_that_refuses_a_role(tokenizer: Any) -> None:
    template = "{{ raise_exception('no system turns') }}"
    error = refuse(tokenizer, template, "refuses a conversation")
    assert "no system turns" in str(error)


# --- what cannot be encoded ----------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tokenizer_needs_an_end(tokenizer: Any, template: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(talk("a", "b"), tokenizer, template, LONG)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "prefix", "match"),
    [
        ([], "", "does not end with the assistant"),
        (talk("a", "b", "c"), "", "does not end with the assistant"),
        ([{"role": "tool", "content": "x"}], "", "unknown role"),
        (talk("a", "b"), "c", "does not begin with its prefix"),
    ],
)
def test_what_has_no_response_is_refused(
    tokenizer: Any, template: Any, messages: Any, prefix: str, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        encode(messages, tokenizer, template, LONG, prefix=prefix, example_id="x1")


def test_an_assistant_may_not_begin_in_a_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="begins with the assistant"):
        encode(messages, tokenizer, "tokenizer", LONG)
    encoded = encode(messages, tokenizer, "tulu", LONG)
    assert text(tokenizer, encoded.input_ids) == "<|assistant|>\nb<|im_end|>\n"


def test_pads_are_the_tokenizer_s_or_its_end(tokenizer: Any) -> None:
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence"):
        pad_id(tokenizer)
