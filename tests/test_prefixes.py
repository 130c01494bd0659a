"""Shared beginnings are found, read once, and change no likelihood and no prediction."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

from iprox.evaluation import likelihood
from iprox.evaluation.likelihood import harness, log_likelihoods
from iprox.evaluation.prefixes import Family, Reading, Request, families, readings


def choices(prompts: list[list[int]], letters: tuple[int, ...] = (7, 8, 9, 10)) -> list[Request]:
    return [Request(p, [letter]) for p in prompts for letter in letters]


def subjects(n_subjects: int, n_items: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share 60 tokens inside a subject and 5 between subjects."""
    draw = np.random.default_rng(seed)
    head = draw.integers(11, 260, 5).tolist()
    prompts = []
    for _ in range(n_subjects):
        shots = head + draw.integers(11, 260, 55).tolist()
        prompts += [
            shots + draw.integers(11, 260, draw.integers(3, 30)).tolist() for _ in range(n_items)
        ]
    return [prompts[i] for i in draw.permutation(len(prompts))]


def test_prompts_of_a_subject_are_a_family() -> None:
    prompts = subjects(3, 6)
    found = families(choices(prompts))
    assert sorted(len(f.members) for f in found) == [6, 6, 6]
    assert [f.shared for f in found] == [60, 60, 60]
    for family in found:
        assert len({m.tokens[:60] for m in family.members}) == 1
        lengths = [len(m) for m in family.members]
        assert lengths == sorted(lengths, reverse=True)
    read = sum(f.n_tokens for f in found)
    assert read == 3 * 60 + sum(len(p) - 60 for p in prompts)


def test_every_request_is_answered_once() -> None:
    requests = [*choices(subjects(2, 5)), Request([1, 2], [3, 4]), Request([1, 2], [3, 5])]
    asked = [i for f in families(requests) for m in f.members for i in m.asked]
    assert sorted(asked) == list(range(len(requests)))


def test_a_first_word_in_common_is_not_shared() -> None:
    prompts = subjects(4, 1)
    (alone,) = families(choices(prompts))
    assert alone.shared == 0
    assert len(alone.members) == 4


def test_what_is_predicted_is_never_in_the_shared_part() -> None:
    context = list(range(20, 40))
    requests = [Request(context, [5, 6]), Request(context, [5, 7]), Request(context[:10], [30])]
    for family in families(requests):
        assert all(family.shared <= member.first for member in family.members)


def test_continuations_that_differ_in_the_last_token_are_read_together() -> None:
    found = readings([Request([1, 2], [3, 4]), Request([1, 2], [3, 9]), Request([1, 2, 3], [5])])
    assert found == [Reading((1, 2, 3), 1, (0, 1, 2))]


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_batches_keep_to_the_budget(budget: int) -> None:
    members = tuple(Reading(tuple(range(n)), n - 1, (n,)) for n in (50, 48, 30, 26, 21))
    family = Family(20, members)
    batches = list(family.batches(budget))
    assert tuple(itertools.chain(*batches)) == members
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (len(batch[0]) - 20) <= budget


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_likelihoods_are_the_harness_s_own(architecture: str, tokenizer: Any) -> None:
    """Cached beginnings, sliding windows included, against one pass per request."""
    lm = harness(tiny_model(architecture), tokenizer)
    draw = np.random.default_rng(1)
    requests = choices(subjects(2, 4))
    requests += [
        Request(context, draw.integers(11, 260, n).tolist())
        for context in (requests[0].context, requests[4].context)
        for n in (1, 3, 6)
    ]
    ours = log_likelihoods(lm, requests)
    own = lm._loglikelihood_tokens(
        [(("", ""), r.context, r.continuation) for r in requests], disable_tqdm=True
    )
    assert ours == pytest.approx([value for value, _ in own], abs=1e-6)
    best = np.reshape(ours[:32], (8, 4)).argmax(1)
    assert best.tolist() == np.reshape([v for v, _ in own[:32]], (8, 4)).argmax(1).tolist()


def test_a_family_s_beginning_is_read_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(likelihood.TOKENS_PER_BATCH, "cpu", 40)  # several batches of a family
    lm, read, told = harness(model, tokenizer), [], []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _module, args, _out: read.append(args[0].numel())
    )
    prompts = [p[:61] + p[61:71].copy() + [11] * 10 for p in subjects(1, 6)]
    prompts = [p[:80] for p in prompts]
    requests = choices(prompts)
    log_likelihoods(lm, requests, lambda done, tokens: told.append((done, tokens)))
    hook.remove()
    (family,) = families(requests)
    assert len(read) > 2
    assert sum(read) >= family.n_tokens  # padding
    assert read[0] == family.shared
    assert tuple(map(sum, zip(*told, strict=True))) == (len(requests), family.n_tokens)


def test_order_and_company_change_no_prediction(model: Any, tokenizer: Any) -> None:
    lm, requests = harness(model, tokenizer), choices(subjects(3, 3))
    together = log_likelihoods(lm, requests)
    torch.manual_seed(3)
    order = torch.randperm(len(requests)).tolist()
    shuffled = log_likelihoods(lm, [requests[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(len(order))] == pytest.approx(
        together, abs=1e-9
    )
    alone = [log_likelihoods(lm, [r])[0] for r in requests]
    assert alone == pytest.approx(together, abs=1e-6)
