"""Entry point of the ``iprox`` command: its commands, and the one place that prints errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import iprox
from iprox.cli.cost import cost
from iprox.cli.diff import diff
from iprox.cli.gc import gc
from iprox.cli.plan import plan
from iprox.cli.runs import runs
from iprox.cli.schema import schema
from iprox.cli.show import show
from iprox.cli.verify import verify
from iprox.errors import IproxError


class Commands(TyperGroup):
    """Commands whose :class:`IproxError` ends in its message and exit code 1, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except IproxError as error:
            from iprox.cli.render import inert_lines

            typer.echo(f"Error: {inert_lines(str(error))}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Look at what the workflow made. `snakemake` makes things; this command makes nothing, "
    "and removes nothing but what `gc --delete` lists.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(show)
app.command()(verify)
app.command()(plan)
app.command()(cost)
app.command()(diff)
app.command()(runs)
app.command()(gc)
app.command()(schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"iprox {iprox.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    """Options of ``iprox`` itself."""
