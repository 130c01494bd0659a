"""``iprox cost``: what a study will take, before anything of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cost(
    configs: Annotated[
        list[Path], typer.Argument(help="A study file, and overlays that win over it.")
    ],
    pool: Annotated[
        int | None, typer.Option(min=1, help="Examples of the pool, instead of the study's.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean tokens of a pool example.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Predict for this many GPUs that work at a time.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="TFLOP/s a device sustains, instead of the rates measured here. "
            "Without measurements 120 is assumed.",
        ),
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the target, if it is not on this machine.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder that the study's paths are relative to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines, a row per stage.")] = False,
) -> None:
    """Predict operations, hours, memory and disk of a study, per stage and per run."""
    from iprox.cli.costing import Question, print_cost

    question = Question(configs, data_dir, pool, tokens, gpus, tflops, model_config)
    print_cost(question, as_json)
