"""``iprox schema``: the JSON schema of a study file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema(
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Write workflow/schemas/config.schema.json and the table in config/README.md "
            "instead of printing.",
        ),
    ] = False,
) -> None:
    """Print the JSON schema of a study file."""
    from iprox.study.document import schema_text, write_documents

    if not write:
        typer.echo(schema_text(), nl=False)
        return
    for path in write_documents(Path(".")):
        typer.echo(f"wrote {path}")
