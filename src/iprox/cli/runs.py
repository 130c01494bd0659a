"""``iprox runs``: all runs of one or all studies, what they change and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from iprox.cli.artifact import RESULTS, STUDIES, existing, is_study, links, read_json
from iprox.cli.render import Facts, Page, Table, emit
from iprox.errors import ArtifactError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

HEADLINE_FIDELITY = "spearman"
"""The fidelity metric shown for each run, averaged over tasks."""

MEAN = "mean"
"""Row of ``fidelity.parquet`` that averages the tasks."""


def runs(
    study: Annotated[
        str | None, typer.Argument(help="A study's name or folder; all studies when absent.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs: what differs between them, and headline metrics."""
    folders = _studies() if study is None else [_study(study)]
    blocks: list[Facts | Table] = [runs_table([folder]) for folder in folders]
    emit(Page(str(RESULTS / STUDIES), blocks), as_json)


def runs_table(folders: list[Path]) -> Table:
    """One row per run of the given studies, in the order of the study file."""
    records = [record for folder in folders for record in _records(folder)]
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(column) for column in columns] for record in records]
    return Table(", ".join(f"runs of {folder.resolve().name}" for folder in folders), columns, rows)


def _studies() -> list[Path]:
    root = RESULTS / STUDIES
    found = [f for f in sorted(root.iterdir()) if is_study(f)] if root.is_dir() else []
    if not found:
        raise ArtifactError(
            "there is no study here",
            where=root.resolve(),
            fix="run Snakemake first, or change to the folder it was run in",
        )
    return found


def _study(name: str) -> Path:
    """The folder of a study given by name or path."""
    for folder in (RESULTS / STUDIES / name, Path(name)):
        if folder.is_dir() and is_study(folder):
            return folder
    raise ArtifactError(
        "there is no such study",
        where=(RESULTS / STUDIES).resolve(),
        value=name,
        allowed=did_you_mean(name, [folder.name for folder in _studies()]),
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    """A study's runs: columns of ``runs.parquet``, settings that differ, metrics."""
    from iprox.store.tables import read_table

    rows = read_table(existing(folder / "runs.parquet")).to_dict("records")
    settings = [_mapping(row.pop("settings", None)) for row in rows]
    differing = _differing(settings)
    records: list[dict[str, Any]] = []
    for row, setting in zip(rows, settings, strict=True):
        plain = {str(k): v for k, v in row.items() if k not in ("changed", "stages")}
        own = {key: setting.get(key) for key in differing}
        records.append(plain | own | _metrics(folder / str(row["run"])))
    return _without_empty(records)


def _mapping(text: Any) -> dict[str, Any]:
    return dict(json.loads(text)) if isinstance(text, str) else {}


_SHOWN_ANYWAY = ("preset", "proxy.kind", "proxy.sparsity", "scorer.kind", "scorer.draws")
"""Settings that have a column of their own in ``runs.parquet``."""


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all runs."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [
        key
        for key in keys
        if key not in _SHOWN_ANYWAY and len({json.dumps(s.get(key)) for s in settings}) > 1
    ]


def _metrics(run: Path) -> dict[str, float | None]:
    """Mean fidelity of a run, and each of its evaluations' metrics, as far as they are there."""
    found: dict[str, float | None] = {}
    if not run.is_dir():
        return found
    for name, folder in links(run).items():
        if name == "fidelity" and (folder / "fidelity.parquet").is_file():
            found |= _fidelity(folder)
        if name == "sparsity" and (folder / "chosen.json").is_file():
            found["sparsity"] = read_json(folder / "chosen.json")["sparsity"]
        if name.startswith("evaluation-"):
            task = name.removeprefix("evaluation-")
            for metric, entry in read_json(folder / "metrics.json").items():
                if isinstance(entry, dict) and "value" in entry:
                    found[f"{task} {metric}"] = entry["value"]
    return found


def _fidelity(folder: Path) -> dict[str, float | None]:
    """Fidelity of a run, how far it is above a guess from lengths, and what scoring costs."""
    from iprox.cli.views import headline, measured_time_ratio
    from iprox.store.tables import read_table

    table = read_table(folder / "fidelity.parquet")
    found = headline(table)
    return {
        "fidelity": _mean_fidelity(table),
        "above lengths": found.get("above lengths"),
        "FLOPs ratio": found.get("FLOPs ratio"),
        "time ratio": measured_time_ratio(folder),
    }


def _mean_fidelity(table: pd.DataFrame) -> float | None:
    """Spearman correlation with the target's scores: the tasks' mean row, or the rows' mean."""
    if not {"metric", "value"} <= set(table.columns):
        return None
    rows = table[table["metric"] == HEADLINE_FIDELITY]
    if "task" in rows and (rows["task"] == MEAN).any():
        rows = rows[rows["task"] == MEAN]
    return float(rows["value"].mean()) if len(rows) else None


def _without_empty(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Columns that no run has a value for are left out."""
    empty = {k for r in records for k in r} - {
        k for r in records for k, v in r.items() if _known(v)
    }
    return [{k: v for k, v in record.items() if k not in empty} for record in records]


def _known(value: Any) -> bool:
    return value is not None and value == value  # NaN is not equal to itself
