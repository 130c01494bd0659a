"""Sequences that begin alike, so that a model reads what they share once.

Items of one subject have the same worked examples before them: of the 700 tokens of a 5-shot
MMLU prompt about 100 are its own. The model reads the shared ones into its key-value cache, and
the rest of every sequence after a copy of that cache.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHED_PER_NEW = 8
"""Cached positions that a batch may hold for each new token: they take memory, hardly time."""


@dataclass(frozen=True)
class Request:
    """A continuation whose likelihood is asked for.

    Attributes:
        context: Token ids before it.
        continuation: Its own.
    """

    context: list[int]
    continuation: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Reading:
    """A sequence the model reads, and the requests it answers.

    Attributes:
        tokens: Context and continuation but for the last token, which predicts nothing.
        first: First position whose prediction is needed.
        asked: Indices of the requests: continuations that differ in their last token, or cut
            the same tokens elsewhere.
    """

    tokens: tuple[int, ...]
    first: int
    asked: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Family:
    """Readings with a common beginning.

    Attributes:
        shared: Tokens at their beginning that are read once; 0 to read each by itself.
        members: The readings, longest first.
    """

    shared: int
    members: tuple[Reading, ...]

    @property
    def prefix(self) -> list[int]:
        """The shared tokens."""
        return list(self.members[0].tokens[: self.shared])

    @property
    def n_tokens(self) -> int:
        """Tokens the model reads for this family, without padding."""
        return self.shared + sum(len(member) - self.shared for member in self.members)

    def batches(self, budget: int) -> Iterator[tuple[Reading, ...]]:
        """Members that are passed together.

        Args:
            budget: New tokens of a batch, padding included; cached ones may be
                ``CACHED_PER_NEW`` times as many.
        """
        start = 0
        while start < len(self.members):
            longest = len(self.members[start])  # sorted: no later one is longer
            by_new = budget // max(1, longest - self.shared)
            by_cache = CACHED_PER_NEW * budget // max(1, longest)
            size = max(1, min(by_new, by_cache))
            yield self.members[start : start + size]
            start += size


def readings(requests: Sequence[Request]) -> list[Reading]:
    """The distinct sequences that answer some requests."""
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        asked[tuple(request.context + request.continuation[:-1])].append(i)
    return [
        Reading(tokens, min(len(requests[i].context) for i in of) - 1, tuple(of))
        for tokens, of in asked.items()
    ]


def families(requests: Sequence[Request]) -> list[Family]:
    """Requests as families, the longest sequences first.

    In lexicographic order sequences that begin alike are neighbours. One joins the family
    before it when at least half of it, and of what the family shares, stays shared: a family
    is never opened to one that only has the first words in common. What needs predictions is
    not shared. Sequences without relatives form a family that shares nothing.
    """
    found: list[Family] = []
    alone: list[Reading] = []
    group: list[Reading] = []
    shared = 0

    def close() -> None:
        if len(group) > 1:
            found.append(Family(shared, _longest_first(group)))
        else:
            alone.extend(group)

    for reading in sorted(readings(requests), key=lambda r: r.tokens):
        before = shared if len(group) > 1 else (len(group[0]) if group else 0)
        common = _common(group[-1].tokens, reading.tokens, before) if group else 0
        common = min([common, reading.first, *(member.first for member in group)])
        if group and 2 * common >= max(before, len(reading)):
            shared = common
        else:
            close()
            group, shared = [], 0
        group.append(reading)
    close()
    found += [Family(0, _longest_first(alone))] if alone else []
    return sorted(found, key=lambda f: -len(f.members[0]))


def log_probabilities(
    model: Any, family: Family, budget: int, dtype: torch.dtype
) -> Iterator[list[tuple[Reading, Tensor]]]:
    """Log-probabilities of the next token at every position a request needs, batch by batch.

    Args:
        model: A causal LM.
        family: What to read.
        budget: New tokens of a batch, padding included.
        dtype: Precision of the softmax.

    Yields:
        Readings with (positions from ``first`` on, vocabulary).
    """
    cache = _read(model, family.prefix) if family.shared else None
    for batch in family.batches(budget):
        own = [member.tokens[family.shared :] for member in batch]
        ids = torch.zeros(len(own), max(map(len, own)), dtype=torch.long)
        for row, tokens in enumerate(own):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        # Padding is to the right of all that is predicted from: no token attends to it.
        needed = sorted({p for m in batch for p in range(m.first, len(m))})
        past = None
        if cache is not None:
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(batch))
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device),
                past_key_values=past,
                use_cache=past is not None,
                logits_to_keep=torch.tensor(needed, device=model.device) - family.shared,
            ).logits
        place = {position: i for i, position in enumerate(needed)}
        rows = []
        for member, row in zip(batch, logits, strict=True):
            own_logits = row[[place[p] for p in range(member.first, len(member))]]
            rows.append((member, torch.log_softmax(own_logits, dim=-1, dtype=dtype)))
        yield rows


def _read(model: Any, tokens: list[int]) -> Any:
    """The key-value cache after some tokens."""
    with torch.no_grad():
        ids = torch.tensor([tokens], device=model.device)
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _longest_first(members: Sequence[Reading]) -> tuple[Reading, ...]:
    return tuple(sorted(members, key=lambda m: (-len(m), m.tokens)))


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Length of the common beginning, at most ``limit``."""
    n = 0
    for n, (a, b) in enumerate(zip(first[:limit], second, strict=False)):
        if a != b:
            return n
    return min(limit, len(first), len(second))
