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
    each: Annotated[
        bool, typer.Option("--each", help="Every file is a study of its own: what do they share?")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the stages of a study, which of them are finished, and what would run."""
    if each:
        from iprox.cli.together import print_together

        print_together(configs, data_dir, json)
        return
    from iprox.cli.planning import print_plan

    print_plan(configs, data_dir, json)
