"""The listing behind ``iprox plan``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from iprox.plan.nodes import Node, Plan
from iprox.plan.plan import plan_study
from iprox.plan.preflight import check_inputs
from iprox.store.manifest import PROVENANCE
from iprox.store.runner import NUMERIC_LIBRARIES, versions
from iprox.study.load import load_study


@dataclass(frozen=True)
class Line:
    """One stage in the listing."""

    node: Node
    finished: bool
    runs: tuple[str, ...]


def load_plan(configs: list[Path], data_dir: str | None = None, weights: bool = True) -> Plan:
    """Plan of a study file and its overlays, with every named file checked.

    Args:
        configs: The files, later ones winning.
        data_dir: Folder that wins over the study's own.
        weights: Whether model folders must have their weights.

    Raises:
        ConfigError: The study breaks the schema.
        DataError: A file that the study names is not there, or cannot be what it is named for.
        ModelError: A model folder lacks its config or its weights.
    """
    plan = plan_study(load_study(configs, {} if data_dir is None else {"data_dir": data_dir}))
    check_inputs(plan, Path(plan.study.config.data_dir or "."), weights)
    return plan


def lines(plan: Plan, root: Path = Path()) -> list[Line]:
    """Every stage, parents first, with the runs that need it.

    Args:
        plan: A study's plan.
        root: The folder that holds ``results``.
    """
    users = _users(plan)
    return [
        Line(node, (root / node.manifest).is_file(), tuple(users.get((node.stage, node.id), ())))
        for node in plan.in_order()
    ]


def other_versions(node: Node, root: Path = Path()) -> list[str]:
    """Numeric libraries that a finished stage was made with in other versions than are installed.

    Such a stage is used as it is: its path says what was asked for, not with which libraries. A
    job that runs again computes anew with the installed ones.
    """
    path = root / node.folder / PROVENANCE
    if not path.is_file():
        return []
    try:
        made = json.loads(path.read_text(encoding="utf-8")).get("versions", {})
    except ValueError:
        return []  # `iprox verify` says that the file is damaged
    now = versions(NUMERIC_LIBRARIES)
    return [f"{name} {made[name]}, now {now[name]}" for name in now if made.get(name) != now[name]]


def _users(plan: Plan) -> dict[tuple[str, str], list[str]]:
    users: dict[tuple[str, str], list[str]] = {}
    for name, run in plan.runs.items():
        seen: set[tuple[str, str]] = set()
        for node in run.nodes.values():
            seen |= {(n.stage, n.id) for n in _ancestry(node)}
        for key in seen:
            users.setdefault(key, []).append(name)
    return users


def _ancestry(node: Node) -> Iterator[Node]:
    yield node
    for parent in node.parents.values():
        yield from _ancestry(parent)


def summary(found: list[Line]) -> str:
    """How many stages there are, exist and are shared, in a sentence."""
    jobs = sum(line.node.shards for line in found)
    alone = sum(max(1, len(line.runs)) * line.node.shards for line in found)
    missing = sum(not line.finished for line in found)
    return (
        f"{len(found)} stages in {jobs} jobs, {len(found) - missing} finished, {missing} to run; "
        f"each run on its own would need {alone} jobs in all"
    )


def print_plan(configs: list[Path], data_dir: str | None, as_json: bool) -> None:
    """Print the listing as a table or as JSON."""
    plan = load_plan(configs, data_dir)
    found = lines(plan)
    if as_json:
        rows = [
            {
                **x.node.spec,
                "finished": x.finished,
                "other_versions": other_versions(x.node),
                "runs": list(x.runs),
            }
            for x in found
        ]
        print(json.dumps(rows, indent=1, sort_keys=True))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "id", "state", "runs", box=None, pad_edge=False, header_style="bold")
    for line in found:
        everyone = len(line.runs) == len(plan.runs)
        runs = "all" if everyone else ", ".join(line.runs) or "-"
        table.add_row(
            line.node.stage, line.node.id, "finished" if line.finished else "to run", runs
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    older = Counter(text for x in found if x.finished for text in other_versions(x.node))
    for text, count in sorted(older.items()):
        console.print(f"{count} finished stages were made with another version: {text}")
    stages = Counter(x.node.stage for x in found if not x.finished)
    console.print(summary(found))
    if stages:
        console.print("to run: " + ", ".join(f"{n} {stage}" for stage, n in stages.items()))
    console.print("`snakemake -n` also sees changed code and inputs, and says why it would rerun")
