"""Nothing that is judged on may have been taught with: checks by id and by text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from iprox.data.pools import draw_key
from iprox.errors import DataError


class Group(NamedTuple):
    """Texts that belong together."""

    name: str
    ids: Sequence[str]
    hashes: Sequence[str]  # of the normalised texts


def refuse_overlap(first: Group, second: Group) -> None:
    """Refuse two groups that share an id or a text.

    Texts are compared by digests that do not tell case, spacing or Unicode form apart.

    Raises:
        DataError: Names the first one shared.
    """
    for what, ours, theirs in (
        ("an id", first.ids, second.ids),
        ("a text", first.hashes, second.hashes),
    ):
        shared = set(ours) & set(theirs)
        if shared:
            place = next(i for i, one in enumerate(ours) if one in shared)
            raise DataError(
                f"{first.name} and {second.name} share {what}: what is judged on would be taught",
                where=first.ids[place],
                value=f"{len(shared)} shared",
                fix="make the splits again, or remove the duplicates",
            )


def hold_out(group: Group, share: float, seed: int) -> list[bool]:
    """Who of a group is held out: a share of its texts, equal texts always together.

    Args:
        group: The texts; its name names the draw.
        share: Share of the distinct texts, rounded, at least one and never all of them.
        seed: Seed of the draw.

    Returns:
        Whether each is held out; nobody is when there is only one text.
    """
    distinct = sorted(set(group.hashes), key=lambda text: draw_key(seed, group.name, text))
    n = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = set(distinct[:n])
    return [text in chosen for text in group.hashes]
