"""What the runs chose: its make-up beside the pool's, its overlap, its best and worst examples."""

from __future__ import annotations

from functools import reduce
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd

from iprox.report.artifacts import Artifact, Run, Study
from iprox.store.tables import read_arrow

POOL = "pool"
"""Name under which the whole pool stands in the composition."""

LENGTH_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Quantiles of the pool's lengths between which the length classes lie."""

BEST, WORST = "best", "worst"


def selected_ids(selection: Artifact, task: str) -> set[str]:
    """Ids selected for one task; all of a selection that tasks share."""
    table = selection.table("selection.parquet")
    if selection.params.get("select", {}).get("tasks", "each") != "each":
        return set(table["example_id"])
    return set(table.loc[table["task"] == task, "example_id"])


def selection_overlap(study: Study, run: Run, task: str) -> float:
    """Share of the target run's selection for one task that ``run`` has too, NaN if unknown."""
    reference = study.target_run
    if (
        reference is None
        or "selection" not in reference.artifacts
        or "selection" not in run.artifacts
    ):
        return float("nan")
    ours = selected_ids(run.artifacts["selection"], task)
    theirs = selected_ids(reference.artifacts["selection"], task)
    return len(ours & theirs) / len(theirs) if theirs else float("nan")


def overlaps(study: Study) -> pd.DataFrame:
    """How much any two runs selected alike: task, run_a, run_b, overlap, jaccard, n_a, n_b.

    ``overlap`` is the part of the smaller selection that is in the other too. Of runs that differ
    only by a random draw the first stands for all.
    """
    selecting = [run for run in study.drawn_once if "selection" in run.artifacts]
    rows = []
    for task in study.tasks:
        chosen = {run.name: selected_ids(run.artifacts["selection"], task) for run in selecting}
        for a, b in combinations_with_replacement(chosen, 2):
            both, sizes = len(chosen[a] & chosen[b]), (len(chosen[a]), len(chosen[b]))
            least, either = min(sizes), len(chosen[a] | chosen[b])
            rows.append([task, a, b, _share(both, least), _share(both, either), sizes[0], sizes[1]])
    columns = ["task", "run_a", "run_b", "overlap", "jaccard", "n_a", "n_b"]
    return pd.DataFrame(rows, columns=columns)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def composition(study: Study) -> pd.DataFrame:
    """Make-up of pool and selections: run (or ``pool``), task, dimension, value, count, share.

    Dimensions are source, category and length (characters of all messages, in fifths of the
    pool). For the pool the task is empty. Of runs that differ only by a draw all are listed.
    """
    columns = ["run", "task", "dimension", "value", "count", "share"]
    if "pool" not in study.shared:
        return pd.DataFrame(columns=columns)
    traits = _traits(study.shared["pool"])
    rows = _counts(POOL, "", traits, traits)
    for run in study.runs:
        if "selection" in run.artifacts:
            for task in study.tasks:
                chosen = selected_ids(run.artifacts["selection"], task)
                rows += _counts(run.name, task, traits[traits.index.isin(chosen)], traits)
    return pd.DataFrame(rows, columns=columns)


def _traits(pool: Artifact) -> pd.DataFrame:
    """Source, category and length class of every pool example (index: example_id)."""
    table = read_arrow(
        pool.folder / "pool.parquet", ["example_id", "source", "category", "messages"]
    )
    lengths = [_characters(messages) for messages in table["messages"].to_pylist()]
    return pd.DataFrame(
        {
            "source": table["source"].to_pylist(),
            "category": table["category"].to_pylist(),
            "length": _length_classes(pd.Series(lengths)).to_list(),
        },
        index=table["example_id"].to_pylist(),
    ).fillna("")


def _characters(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"] or "") for message in messages)


def _length_classes(lengths: pd.Series) -> pd.Series:
    """Class of each length, named by its limits in characters, in fifths of the pool."""
    edges = np.unique(np.quantile(lengths, LENGTH_SHARES, method="higher"))
    if len(edges) < 2:
        return pd.Series([f"{edges[0]:,.0f} characters"] * len(lengths))
    lows = [edges[0], *(edges[1:-1] + 1)]
    names = [
        f"{low:,.0f} to {high:,.0f} characters" for low, high in zip(lows, edges[1:], strict=True)
    ]
    classes = np.searchsorted(edges[1:-1], lengths.to_numpy(), side="left")
    return pd.Series([names[i] for i in classes])


def _counts(run: str, task: str, part: pd.DataFrame, whole: pd.DataFrame) -> list[list[object]]:
    """Rows of the composition for one set of examples; values in the order of the pool."""
    rows: list[list[object]] = []
    for dimension in whole.columns:
        counts = part[dimension].value_counts()
        for value in _values_in_order(whole[dimension]):
            count = int(counts.get(value, 0))
            rows.append([run, task, dimension, value, count, count / max(len(part), 1)])
    return rows


def _values_in_order(column: pd.Series) -> list[str]:
    """Length classes from short to long, other values from frequent to rare, ties by name."""
    counts = column.value_counts()
    if column.name == "length":
        return sorted(counts.index, key=lambda name: int(name.split()[0].replace(",", "")))
    return sorted(counts.index, key=lambda name: (-counts[name], name))


def examples(study: Study) -> pd.DataFrame:
    """Best and worst of every gradient run: task, end, example_id, and ``rank_<run>`` of each run.

    An example that is among the best or worst of any run has one row, with its rank in all.
    ``best_in`` and ``worst_in`` name those runs, separated by spaces.
    """
    ranked = [r for r in study.drawn_once if not r.is_random and "ranking" in r.artifacts]
    tables = [_task_examples(ranked, task, study.settings.examples) for task in study.tasks]
    columns = ["task", "example_id", "best_in", "worst_in", *(f"rank_{run.name}" for run in ranked)]
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True)[columns] if full else pd.DataFrame(columns=columns)


def _task_examples(ranked: list[Run], task: str, count: int) -> pd.DataFrame:
    """Rows of :func:`examples` for one task, ordered by rank in the first run."""
    if not ranked:
        return pd.DataFrame()
    ranks = {run.name: _ranks(run, task) for run in ranked}
    best = {name: set(order.index[:count]) for name, order in ranks.items()}
    worst = {
        name: set(order.index[max(count, len(order) - count) :]) for name, order in ranks.items()
    }
    ids: set[str] = reduce(set.union, [*best.values(), *worst.values()])
    rows = pd.DataFrame({"task": task, "example_id": sorted(ids)})
    for column, ends in (("best_in", best), ("worst_in", worst)):
        rows[column] = [
            " ".join(n for n, top in ends.items() if i in top) for i in rows["example_id"]
        ]
    for name, order in ranks.items():
        rows[f"rank_{name}"] = rows["example_id"].map(order)
    first = f"rank_{ranked[0].name}"
    return rows.sort_values([first, "example_id"], kind="stable").reset_index(drop=True)


def _ranks(run: Run, task: str) -> pd.Series:
    """Rank of every scored example in one run, best first (index: example_id).

    Examples without a gradient have the score -inf and are no run's worst.
    """
    ranking = run.artifacts["ranking"].table("ranking.parquet")
    own = ranking[(ranking["task"] == task) & np.isfinite(ranking["score"])]
    ranks: pd.Series = own.set_index("example_id")["rank"].sort_values(kind="stable")
    return ranks


def texts(study: Study, ids: set[str]) -> dict[str, list[dict[str, str]]]:
    """Messages of the named pool examples."""
    if "pool" not in study.shared or not ids:
        return {}
    table = read_arrow(study.shared["pool"].folder / "pool.parquet", ["example_id", "messages"])
    wanted = [i for i, name in enumerate(table["example_id"].to_pylist()) if name in ids]
    found = table.take(wanted)
    return dict(zip(found["example_id"].to_pylist(), found["messages"].to_pylist(), strict=True))
