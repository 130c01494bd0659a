"""``iprox plan``: the stages of a study, what exists of them, and what would run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    configs: Annotated[
        list[Path], typer.Argument(help="A study file, and overlays that win over it.")
    ],
    data_dir: Annotated[
        str | None, typer.Option(help="Folder that the study's paths are relative to.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the stages of a study, which of them are finished, and what would run."""
    from iprox.cli.planning import print_plan

    print_plan(configs, data_dir, json)
