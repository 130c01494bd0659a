"""The listing behind ``iprox plan --each``: several studies, and what they share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from iprox.cli.planning import lines
from iprox.plan.nodes import Plan
from iprox.plan.plan import plan_study
from iprox.study.load import load_study


@dataclass(frozen=True)
class Shared:
    """Jobs of some studies.

    Attributes:
        studies: Their names.
        jobs: Jobs of each study.
        alone: Jobs of each study if its runs shared nothing.
        together: Jobs of all studies in one folder.
    """

    studies: list[str]
    jobs: list[int]
    alone: list[int]
    together: int

    @property
    def saved(self) -> int:
        """Jobs that sharing saves, inside studies and between them."""
        return sum(self.alone) - self.together


def shared(plans: Sequence[Plan]) -> Shared:
    """Count the jobs of studies on their own and together."""
    listed = [lines(plan) for plan in plans]
    union = {(x.node.stage, x.node.id): x.node.shards for found in listed for x in found}
    return Shared(
        studies=[plan.name for plan in plans],
        jobs=[sum(x.node.shards for x in found) for found in listed],
        alone=[sum(max(1, len(x.runs)) * x.node.shards for x in found) for found in listed],
        together=sum(union.values()),
    )


def print_together(configs: list[Path], data_dir: str | None, as_json: bool) -> None:
    """Print how many jobs each study has, and all of them together.

    Files that the studies name need not be there.
    """
    values = {} if data_dir is None else {"data_dir": data_dir}
    found = shared([plan_study(load_study([config], values)) for config in configs])
    if as_json:
        print(json.dumps({**asdict(found), "saved": found.saved}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("study", box=None, pad_edge=False, header_style="bold")
    table.add_column("jobs", justify="right")
    table.add_column("if its runs shared nothing", justify="right")
    for name, jobs, alone in zip(found.studies, found.jobs, found.alone, strict=True):
        table.add_row(name, str(jobs), str(alone))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"together {found.together} jobs, where separate runs would need {sum(found.alone)}: "
        f"sharing saves {found.saved}, {found.saved / sum(found.alone):.0%} of them"
    )
