"""Choosing from a ranking by more than its order: diversity, turns, duplicates, quotas."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from iprox.errors import DataError, did_you_mean
from iprox.numerics import subset
from iprox.numerics.minhash import NearDuplicates, normalised
from iprox.numerics.subset import Accept, Chosen
from iprox.progress import track
from iprox.stages.feature_store import sketch_rows
from iprox.store.job import Job
from iprox.store.tables import read_arrow
from iprox.study.schema import SelectSection

log = logging.getLogger(__name__)

PART_EXAMPLES = 8192
"""Most examples a diverse method compares with each other: their similarities take 256 MB."""

OTHERS = "*"
"""Name of all categories without a quota of their own."""

UNION = "all tasks"


class Outcome(NamedTuple):
    """What was chosen.

    Attributes:
        table: Columns example_id, task, rank, score, reason.
        refused: Examples that stood higher and were passed over, by reason.
    """

    table: pd.DataFrame
    refused: Counter[str]


def is_plain(section: SelectSection) -> bool:
    """Whether the first examples of every task's ranking are what is asked for."""
    return (section.method, section.tasks, section.duplicates, section.quotas) == (
        "top",
        "each",
        "keep",
        {},
    )


def choose(job: Job, section: SelectSection, keep: int, basis: str) -> Outcome:
    """Choose ``keep`` examples for every task, or for all of them together.

    Args:
        job: A selection job; has a parent ``features`` when the method compares examples.
        section: How to choose.
        keep: Number of examples.
        basis: What the ranking is by, in words.

    Raises:
        DataError: Fewer examples pass, or a quota is of a category that is not in the pool.
        NumericsError: Scores that are the same for all examples cannot be compared over tasks.
    """
    chooser = _Chooser(job, section, keep, basis)
    frames = _ranked(job.parents["ranking"] / "ranking.parquet")
    if section.tasks == "round_robin":
        return chooser.in_turns(frames)
    if section.tasks == "union":
        frames = {UNION: _union(frames, section.calibrate)}
    parts = [chooser.best(frame, name) for name, frame in frames.items()]
    table = pd.concat([p.table for p in parts], ignore_index=True)
    table = table.sort_values(["task", "rank"], kind="stable", ignore_index=True)
    return Outcome(table, sum((p.refused for p in parts), Counter()))


def _ranked(path: Path) -> dict[str, pd.DataFrame]:
    """Examples with a score by task, best first: example_id, task, rank, score."""
    table = read_arrow(
        path, ["task", "rank", "example_id", "score"], pc.is_finite(pc.field("score"))
    )
    frame = table.to_pandas().sort_values(["task", "rank"], kind="stable")
    return {str(t): rows.reset_index(drop=True) for t, rows in frame.groupby("task", sort=True)}


def _union(frames: Mapping[str, pd.DataFrame], calibration: str) -> pd.DataFrame:
    """One ranking of all tasks: of every example the task where its calibrated score is highest."""
    rows = [
        f.assign(value=subset.calibrate(f["score"].to_numpy(), calibration))
        for f in frames.values()
    ]
    table = pd.concat(rows, ignore_index=True)
    table = table.sort_values(["value", "example_id", "task"], ascending=[False, True, True])
    table = table.drop_duplicates("example_id", ignore_index=True)
    return table.assign(place=np.arange(1, len(table) + 1))


class _Filters:
    """What examples pass one after the other, best first: no duplicates, room in their category.

    Args:
        section: Which duplicates count, and quotas.
        keep: Number of examples to be selected, which quotas are shares of.
        pool: The pool's file.
    """

    def __init__(self, section: SelectSection, keep: int, pool: Path) -> None:
        self.section, self.pool = section, pool
        self.refused: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self.seen: set[str] = set()
        self.near = NearDuplicates(section.duplicate_overlap) if self._finds("near") else None
        self.categories = _categories(pool, section) if section.quotas else {}
        self.room = Counter(
            {
                category: math.floor(Fraction(str(share)) * keep)
                for category, share in section.quotas.items()
                if category != OTHERS
            }
        )
        others = Fraction(str(section.quotas.get(OTHERS, 1.0)))
        for category in set(self.categories.values()) - set(section.quotas):
            self.room[category] = math.floor(others * keep)

    def prepare(self, ids: pd.Series) -> None:
        """Read the texts of examples that will be asked about."""
        if self.section.duplicates == "keep":
            return
        wanted = pa.array(sorted(set(ids) - self.texts.keys()), pa.string())
        table = read_arrow(
            self.pool, ["example_id", "messages"], pc.field("example_id").isin(wanted)
        )
        for row in table.to_pylist():
            self.texts[row["example_id"]] = "\n".join(m["content"] for m in row["messages"])

    def accept(self, example_id: str) -> bool:
        """Whether an example passes; one that does takes its place."""
        category = self.categories.get(example_id, "")
        if self.categories and self.room[category] < 1:
            self.refused["over_quota"] += 1
            return False
        if not self._is_new(example_id):
            self.refused["duplicates"] += 1
            return False
        if self.categories:
            self.room[category] -= 1
        return True

    def of(self, ids: Sequence[str]) -> Accept:
        """Whether the example at a place of ``ids`` passes."""
        return lambda place: self.accept(ids[place])

    def _finds(self, kind: str) -> bool:
        return self.section.duplicates == kind

    def _is_new(self, example_id: str) -> bool:
        if self.near is not None:
            return self.near.add(self.texts[example_id])
        if self._finds("text"):
            text = normalised(self.texts[example_id])
            known = text in self.seen
            self.seen.add(text)
            return not known
        return True


def _categories(pool: Path, section: SelectSection) -> dict[str, str]:
    """Category or source of every pool example.

    Raises:
        DataError: A quota is of one that no example has.
    """
    table = read_arrow(pool, ["example_id", section.quota_by]).to_pandas()
    found = set(table[section.quota_by])
    for name in section.quotas:
        if name != OTHERS and name not in found:
            raise DataError(
                f"a quota is of a {section.quota_by} that no example of the pool has",
                where="select.quotas",
                value=name,
                allowed=did_you_mean(name, map(str, found)),
                fix="correct the name, leave it out, or take select.quota_by: "
                + ("source" if section.quota_by == "category" else "category"),
            )
    return dict(zip(table["example_id"], table[section.quota_by], strict=True))


class _Chooser:
    """One way of choosing, for every task it is asked for."""

    def __init__(self, job: Job, section: SelectSection, keep: int, basis: str) -> None:
        self.job, self.section, self.keep, self.basis = job, section, keep, basis
        self.pool = job.parents["pool"] / "pool.parquet"

    def best(self, frame: pd.DataFrame, name: str) -> Outcome:
        """Choose from one ranking.

        Raises:
            DataError: Fewer examples pass than are wanted.
        """
        for size in _growing(2 * self._wanted(), len(frame)):
            head, filters = frame.head(size), self._filters()
            filters.prepare(head["example_id"])
            ids = head["example_id"].tolist()
            accept = filters.of(ids)
            if self.section.method == "threshold":
                limit = self.section.max_similarity
                chosen = subset.below_similarity(self._features(head), self.keep, limit, accept)
                enough = self.keep
            else:
                enough = min(self._wanted(), len(frame))
                chosen = subset.first(len(head), enough, accept)
            if len(chosen.places) >= enough:
                break
        self._check(len(chosen.places), len(frame), name, filters.refused)
        if self.section.method not in ("top", "threshold"):
            short = head.iloc[chosen.places].reset_index(drop=True)
            return Outcome(self._diverse(short, name), filters.refused)
        return Outcome(self._told(head, chosen, len(frame), name), filters.refused)

    def in_turns(self, frames: Mapping[str, pd.DataFrame]) -> Outcome:
        """Let every task choose in turn.

        Raises:
            DataError: Fewer examples pass than are wanted.
        """
        longest = max(map(len, frames.values()))
        for size in _growing(2 * self.keep, longest):
            heads = [frame.head(size) for frame in frames.values()]
            filters = self._filters()
            ids = pd.concat([h["example_id"] for h in heads]).drop_duplicates(ignore_index=True)
            filters.prepare(ids)
            places = pd.Series(np.arange(len(ids)), index=ids)
            orders = [places.loc[h["example_id"]].to_numpy() for h in heads]
            names = ids.tolist()
            taken = subset.round_robin(orders, self.keep, filters.of(names))
            if len(taken) == self.keep:
                break
        self._check(len(taken), longest, ", ".join(frames), filters.refused)
        parts = []
        for task, (name, head) in enumerate(zip(frames, heads, strict=True)):
            own = [(turn, place) for turn, (of, place) in enumerate(taken) if of == task]
            rows = head.set_index("example_id").loc[[names[p] for _, p in own]].reset_index()
            turns = [turn // len(frames) + 1 for turn, _ in own]
            ranks = rows["rank"].tolist()
            reasons = [
                f"turn {turn} of {name}: best left, rank {rank} of {len(frames[name])} {self.basis}"
                for turn, rank in zip(turns, ranks, strict=True)
            ]
            parts.append(rows.assign(reason=reasons))
        return Outcome(pd.concat(parts, ignore_index=True), filters.refused)

    def _wanted(self) -> int:
        """Examples that must pass the filters before the method chooses among them."""
        if self.section.method in ("top", "threshold"):
            return self.keep
        return max(self.keep, math.ceil(self.section.shortlist * self.keep))

    def _filters(self) -> _Filters:
        return _Filters(self.section, self.keep, self.pool)

    def _features(self, frame: pd.DataFrame) -> np.ndarray:
        return sketch_rows(self.job.parents["features"], frame["example_id"].tolist())

    def _check(self, found: int, ranked: int, name: str, refused: Counter[str]) -> None:
        if found < self.keep:
            reasons = [f"{n} {reason}" for reason, n in sorted(refused.items())]
            passed_over = ", ".join(reasons) or "none passed over"
            raise DataError(
                "fewer examples pass than are to be selected",
                where=f"select, {name}",
                value=f"{found} of {self.keep}, from {ranked} with a score ({passed_over})",
                fix="select fewer, raise quotas, select.max_similarity or "
                "select.duplicate_overlap, or keep duplicates",
            )

    def _diverse(self, short: pd.DataFrame, name: str) -> pd.DataFrame:
        """Choose among the best examples by how they differ, part by part."""
        features = self._features(short)
        scores = short["value" if "value" in short else "score"].to_numpy()
        rows, reasons = [], []
        with track(self.keep, "chosen", self.section.method) as progress:
            for part, share in self._parts(len(short), features.shape[1]):
                chosen = self._choose(features[part], scores[part], share)
                rows += part[chosen.places].tolist()
                reasons += [
                    self._reason(step, gain, share, len(part), name)
                    for step, gain in enumerate(chosen.gains.tolist(), start=1)
                ]
                progress.advance(share)
        return short.iloc[rows].assign(reason=reasons)

    def _parts(self, n: int, dim: int) -> Iterator[tuple[np.ndarray, int]]:
        """Parts that a method can compare all examples of."""
        size = PART_EXAMPLES
        if self.section.method == "dpp":  # of dim directions at most half are asked for
            size = min(size, max(1, n * dim // (2 * self.keep)))
        return subset.partition(n, size, self.keep, self.section.seed)

    def _choose(self, features: np.ndarray, scores: np.ndarray, k: int) -> Chosen:
        features = features.astype(np.float32)
        if self.section.method == "k_centre":
            return subset.k_centre(features, k)
        quality, weight = _quality(scores), self.section.quality_weight
        if self.section.method == "dpp":
            return subset.dpp_map(features, quality, k, weight)
        return subset.facility_location(subset.coverage(features), quality, k, weight)

    def _reason(self, step: int, gain: float, k: int, n: int, name: str) -> str:
        """Why an example was chosen, in words."""
        what = {
            "k_centre": f"farthest from those before ({gain:.3g})",
            "facility_location": f"adds {gain:.4g} to coverage and quality",
            "dpp": f"multiplies the volume by {gain:.3g}",
        }[self.section.method]
        if math.isinf(gain):
            what = "the best of its part"
        return f"{step} of {k} from {n} of the best {self.basis} on {name}: {what}"

    def _told(self, head: pd.DataFrame, chosen: Chosen, n: int, name: str) -> pd.DataFrame:
        """Rows chosen in the order of a ranking, with reasons."""
        rows = head.iloc[chosen.places]
        if self.section.method == "threshold":
            reasons = [
                f"rank {rank} of {n} {self.basis} on {name}, "
                f"cosine to those before at most {gain:.3f}"
                for rank, gain in zip(rows["rank"], chosen.gains.tolist(), strict=True)
            ]
        elif "place" in rows:
            reasons = [
                f"place {place} of {n} by {self.section.calibrate} over all tasks, best on {task}: "
                f"rank {rank} {self.basis}"
                for place, task, rank in zip(rows["place"], rows["task"], rows["rank"], strict=True)
            ]
        else:
            reasons = [f"rank {rank} of {n} {self.basis} on {name}" for rank in rows["rank"]]
        return rows.assign(reason=reasons)


def _quality(scores: np.ndarray) -> np.ndarray:
    """Shares of the examples scored lower, 0 to 1; all 0 where none is better than another."""
    if len(scores) < 2 or scores.min() == scores.max():
        return np.zeros(len(scores))
    return subset.calibrate(scores, "rank")


def _growing(size: int, most: int) -> Iterator[int]:
    """Sizes of the head of a ranking to look at: doubled until it is all there is."""
    while size < most:
        yield size
        size *= 2
    yield most
