"""Batches of similar length under a budget of padded tokens, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iprox.data.chat import IGNORED, Encoded


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of examples in batches whose padded size stays within a budget.

    Examples are taken longest first (equal lengths in their order), so that the first batch is
    the largest in memory and padding is little. An example longer than the budget is alone.

    Args:
        lengths: Tokens of each example.
        budget: Padded tokens (longest times number of examples) a batch may have.

    Returns:
        Batches of indices; each index is in exactly one.

    Raises:
        ValueError: The budget or a length is not positive.
    """
    if budget < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"budget {budget} and all lengths must be positive")
    batches: list[list[int]] = []
    widest = 0  # length of the open batch's first, longest example
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and widest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            widest = lengths[index]
    return batches


def collate(encoded: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of a batch, padded at the right.

    Args:
        encoded: The examples.
        pad_id: Token id of padding; its labels are -100.

    Returns:
        ``input_ids`` (examples, longest), ``labels`` (examples, longest) and ``lengths``
        (examples,), all int64.

    Raises:
        ValueError: There is no example.
    """
    if not encoded:
        raise ValueError("a batch needs at least one example")
    lengths = torch.tensor([len(e) for e in encoded])
    shape = (len(encoded), int(lengths.max()))
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(encoded):
        input_ids[row, : len(example)] = torch.tensor(example.input_ids)
        labels[row, : len(example)] = torch.tensor(example.labels)
    return input_ids, labels, lengths
