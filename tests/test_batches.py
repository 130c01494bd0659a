"""Batches: every example once, within the budget, padded without a loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iprox.data.batches import collate, token_batches
from iprox.data.chat import Encoded


def test_longest_first_and_ties_in_their_order() -> None:
    assert token_batches([3, 9, 3, 5, 4], budget=10) == [[1], [3, 4], [0, 2]]


def test_an_example_longer_than_the_budget_is_alone() -> None:
    assert token_batches([2, 50, 1], budget=4) == [[1], [0, 2]]


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_batches_partition_the_examples_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("lengths", "budget"), [([1], 0), ([0], 4), ([3, -1], 4)])
def test_senseless_sizes_are_refused(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        token_batches(lengths, budget)


def test_collate_pads_at_the_right_without_a_loss() -> None:
    examples = [Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8], [-100])]
    input_ids, labels, lengths = collate(examples, pad_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert lengths.tolist() == [3, 1]
    assert {t.dtype for t in (input_ids, labels, lengths)} == {torch.int64}


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], pad_id=0)
