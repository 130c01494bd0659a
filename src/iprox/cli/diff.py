"""``iprox diff``: which parameters of two runs or artifacts differ, and which results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iprox.cli.artifact import (
    Artifact,
    enclosing_folder,
    existing,
    find_run,
    links,
    open_artifact,
    read_json,
)
from iprox.cli.render import Facts, Page, Table, emit
from iprox.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd

TOP = 0.05
"""Share of a ranking whose overlap is compared."""

ABSENT = "absent"


@dataclass(frozen=True)
class Pair:
    """Two artifacts that play the same part; one may be absent.

    Attributes:
        name: The part: a run's link name, or a path of parents' roles.
        first: Artifact of A.
        second: Artifact of B.
    """

    name: str
    first: Artifact | None
    second: Artifact | None

    @property
    def same(self) -> bool:
        """Whether both are one and the same artifact, and so is all their ancestry."""
        return bool(self.first and self.second and self.first.folder == self.second.folder)

    @property
    def both(self) -> tuple[Artifact, Artifact] | None:
        """Both artifacts, when both are there, different, and of one stage."""
        if self.first is None or self.second is None or self.same:
            return None
        return (self.first, self.second) if self.first.stage == self.second.stage else None


def diff(
    a: Annotated[str, typer.Argument(help="A run (folder, or study/run) or an artifact.")],
    b: Annotated[str, typer.Argument(help="Another run, or another artifact of the same stage.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two runs or artifacts: parameters and results.

    Parameters are compared through all stages that led to either side.
    """
    emit(page(a, b), as_json)


def page(a: str, b: str) -> Page:
    """What :func:`diff` prints.

    Raises:
        ArtifactError: One is missing, or they cannot be compared.
    """
    pairs = list(_pairs(a, b))
    blocks: list[Facts | Table] = [
        Table("parameters that differ", ["stage", "key", "A", "B"], _parameters(pairs)),
        Table("results", ["name", "A", "B", "content"], [_contents(pair) for pair in pairs]),
    ]
    for pair in pairs:
        if pair.both is not None and pair.both[0].stage in COMPARISONS:
            first, second = pair.both
            blocks += COMPARISONS[first.stage](pair.name, first.folder, second.folder)
    return Page(f"A: {a}\nB: {b}", blocks)


# --- what is compared with what --------------------------------------------------------------


def _pairs(a: str, b: str) -> Iterator[Pair]:
    """All pairs of artifacts of two runs or of two artifacts' ancestry, each pair once."""
    roots = _roots(a, b)
    named = {_key(pair) for pair in roots}
    seen: set[tuple[Path | None, Path | None]] = set()
    for root in roots:
        for pair in _ancestry(root):
            if _key(pair) in seen or (pair is not root and _key(pair) in named):
                continue
            seen.add(_key(pair))
            yield pair


def _key(pair: Pair) -> tuple[Path | None, Path | None]:
    first, second = pair.first, pair.second
    return (first.folder if first else None, second.folder if second else None)


def _roots(a: str, b: str) -> list[Pair]:
    """The pairs one starts from: stages of the same name in two runs, or the two artifacts."""
    runs = [find_run(name) for name in (a, b)]
    if all(runs):
        first, second = ({n: f for n, f in links(run).items() if f.is_dir()} for run in runs if run)
        names = list(dict.fromkeys([*first, *second]))
        return [Pair(n, _maybe(first.get(n)), _maybe(second.get(n))) for n in names]
    artifacts = [_artifact(name) for name in (a, b)]
    if artifacts[0].stage != artifacts[1].stage:
        raise ArtifactError(
            "these two cannot be compared",
            value=[artifact.stage for artifact in artifacts],
            allowed="two runs, or two artifacts of one stage",
        )
    return [Pair(artifacts[0].stage, *artifacts)]


def _artifact(name: str) -> Artifact:
    folder = enclosing_folder(existing(Path(name)))
    if folder is None:
        raise ArtifactError(
            "this is neither a run nor an artifact",
            where=name,
            allowed="study/run, results/studies/<study>/<run> or results/<stage>/<id>",
        )
    return open_artifact(folder)


def _maybe(folder: Path | None) -> Artifact | None:
    return None if folder is None else open_artifact(folder)


def _ancestry(pair: Pair) -> Iterator[Pair]:
    """A pair, then the pairs of their parents in the same roles, where the pair differs."""
    yield pair
    if pair.both is None:
        return
    first, second = (artifact.parents() for artifact in pair.both)
    for role in dict.fromkeys([*first, *second]):
        parents = Pair(f"{pair.name} < {role}", first.get(role), second.get(role))
        if not parents.same:
            yield from _ancestry(parents)


# --- parameters ------------------------------------------------------------------------------


def _parameters(pairs: list[Pair]) -> list[list[Any]]:
    """A row for each parameter that differs: stage, key, value in A, value in B."""
    from iprox.cli.views import flat

    rows: list[list[Any]] = []
    for pair in pairs:
        if pair.both is None:
            if pair.first and pair.second and not pair.same:
                rows.append([pair.name, "made by", pair.first.stage, pair.second.stage])
            continue
        first, second = (flat(artifact.params) for artifact in pair.both)
        for key in dict.fromkeys([*first, *second]):
            values = [_text(side.get(key, ABSENT)) for side in (first, second)]
            row = [pair.both[0].stage, key, *values]
            if values[0] != values[1] and row not in rows:
                rows.append(row)
    return rows


def _text(value: Any) -> Any:
    return "none" if value is None else value


def _contents(pair: Pair) -> list[Any]:
    """Ids of a pair and whether their content is equal."""
    ids = [f"{side.stage}/{side.id}" if side else ABSENT for side in (pair.first, pair.second)]
    return [pair.name, *ids, _verdict(pair)]


def _verdict(pair: Pair) -> str:
    if not (pair.first and pair.second):
        return f"only in {'A' if pair.first else 'B'}"
    if pair.same:
        return "the same artifact"
    manifests = pair.first.manifest(), pair.second.manifest()
    if manifests[0] is None or manifests[1] is None:
        return "not finished"
    return "identical" if manifests[0].content == manifests[1].content else "differs"


# --- results ---------------------------------------------------------------------------------


def _rankings(name: str, first: Path, second: Path) -> list[Facts | Table]:
    """Rank correlation and overlap of the top of two rankings, by task."""
    tables = _both(first, second, "ranking.parquet")
    if tables is None:
        return [Facts(name, {"ranking.parquet": ABSENT})]
    a, b = ({str(t): group for t, group in table.groupby("task")} for table in tables)
    rows = [[task, *agreement(a[task], b[task])] for task in sorted(a.keys() & b.keys())]
    columns = ["task", "in common", "only in A", "only in B", "Spearman", f"top {TOP:.0%} overlap"]
    return [Table(f"{name}: agreement", columns, rows)]


def agreement(a: pd.DataFrame, b: pd.DataFrame) -> tuple[int, int, int, float | None, float | None]:
    """How far two rankings of one task agree.

    Args:
        a: Columns example_id, rank, score; each example once.
        b: Likewise.

    Returns:
        Examples in common, only in A, only in B; Spearman's correlation of the scores over the
        common examples (those that both sides could score; average ranks
        for ties; ``None`` when a side is constant); share of the
        first 5 % of A (at least one example) that is in the first 5 % of B, among the common ones.
    """
    import numpy as np

    both = a.merge(b, on="example_id", suffixes=("_a", "_b"))
    n = len(both)
    counts = (n, len(a) - n, len(b) - n)
    if n == 0:
        return (*counts, None, None)
    scored = both[np.isfinite(both["score_a"]) & np.isfinite(both["score_b"])]
    ranks_a, ranks_b = scored["score_a"].rank(), scored["score_b"].rank()
    varied = ranks_a.nunique() > 1 and ranks_b.nunique() > 1
    spearman = float(ranks_a.corr(ranks_b)) if varied else None
    top = max(1, int(TOP * n))
    best = [set(both.nsmallest(top, side)["example_id"]) for side in ("rank_a", "rank_b")]
    return (*counts, spearman, len(best[0] & best[1]) / top)


def _evaluations(name: str, first: Path, second: Path) -> list[Facts | Table]:
    """Metrics of two evaluations side by side; means over items also paired, item by item."""
    a, b = (read_json(folder / "metrics.json") for folder in (first, second))
    rows = []
    for metric in dict.fromkeys([*a, *b]):
        values = [_value(side.get(metric)) for side in (a, b)]
        if any(value is not None for value in values):
            rows.append([metric, *values, _difference(*values)])
    blocks: list[Facts | Table] = [Table(f"{name}: metrics", ["metric", "A", "B", "B - A"], rows)]
    tables = _both(first, second, "items.parquet")
    tested = _paired(*tables, a.keys() & b.keys()) if tables is not None else []
    if tested:
        columns = ["metric", "items", "B - A", "low", "high", "p"]
        blocks.append(Table(f"{name}: on the same items (95 % interval, test)", columns, tested))
    return blocks


def _paired(a: pd.DataFrame, b: pd.DataFrame, measured: set[str]) -> list[list[Any]]:
    """Paired difference, interval and test of every measured metric that is a mean over items."""
    from iprox.report.compare import paired_difference
    from iprox.report.tables import ITEMS, values_of

    rows = []
    for metric in (m for m in ITEMS if m in measured):
        first, second = values_of(a, metric), values_of(b, metric)
        if first is None or second is None or first.index.intersection(second.index).empty:
            continue
        d = paired_difference(second, first)
        rows.append([metric, d.n, d.value, d.low, d.high, d.p_value])
    return rows


def _value(entry: Any) -> float | None:
    """A metric's number: ``{"value": ...}`` or the number itself."""
    value = entry.get("value") if isinstance(entry, dict) else entry
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _fidelities(name: str, first: Path, second: Path) -> list[Facts | Table]:
    """Values of two fidelity tables side by side."""
    tables = _both(first, second, "fidelity.parquet")
    keys = ["task", "metric"]
    if tables is None or not all({*keys, "value"} <= set(t.columns) for t in tables):
        return [Facts(name, {"fidelity.parquet": ABSENT})]
    a, b = (table[[*keys, "value"]] for table in tables)
    both = a.merge(b, on=keys, how="outer", suffixes=("_a", "_b"))
    both["difference"] = both["value_b"] - both["value_a"]
    rows = both.to_numpy(dtype=object).tolist()
    return [Table(f"{name}: values", [*keys, "A", "B", "B - A"], rows)]


def _both(first: Path, second: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """One table of two artifacts; ``None`` when it is missing from either."""
    from iprox.store.tables import read_table

    if not ((first / name).is_file() and (second / name).is_file()):
        return None
    return read_table(first / name), read_table(second / name)


COMPARISONS = {"ranking": _rankings, "evaluation": _evaluations, "fidelity": _fidelities}
"""Stages whose results are numbers to compare."""
