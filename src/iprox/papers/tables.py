"""The tables and figures of the papers as data, from the YAML files beside this module."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from iprox.study.schema import Section

Setting = bool | int | float | str

FILES = ("iprox.yaml", "influcoder.yaml")


class Row(Section):
    """One line of a table."""

    model: str = Field(description="The paper's name of the model.")
    row: str = Field(description="What is varied; 'any': ours alone, named by its run.")
    paper: list[float | str] = Field(
        default=[], description="Numbers as printed, in the order of the columns; may end early."
    )
    runs: dict[str, Setting] | None = Field(
        None,
        description="Settings of the runs that stand beside it, all other settings being the "
        "study's: a value, 'any', or a multiple of the study's own ('3x').",
    )
    pool: str | None = Field(None, description="Part of the name of the pool it is about.")
    note: str | None = Field(None, description="What else the paper says about its numbers.")


class Table(Section):
    """A table or figure."""

    title: str
    measure: Literal[
        "outcome",
        "minutes",
        "teraflops",
        "diversity",
        "agreement",
        "training_size",
        "amortisation",
        "storage",
    ] = Field(description="What is measured of our runs: a function of iprox.report.measures.")
    figure: Literal["dots", "stack", "scatter", "curve"] | None = Field(
        None, description="How the paper draws it."
    )
    columns: list[str] = Field(min_length=1)
    rows: list[Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _numbers_have_columns(self) -> Table:
        for row in self.rows:
            if len(row.paper) > len(self.columns):
                raise ValueError(f"{row.row}: more numbers than columns")
        return self


class Paper(Section):
    """A paper's tables.

    Attributes:
        paper: Where it is found.
        models: Its names of models -> ``target.model`` of a study.
        settings: Settings that rows share, for the YAML file's own aliases.
        tables: By the name that ``snakemake NAME`` makes them by.
    """

    paper: str
    models: dict[str, str]
    settings: dict[str, dict[str, Setting]]
    tables: dict[str, Table]

    @model_validator(mode="after")
    def _models_are_known(self) -> Paper:
        for name, table in self.tables.items():
            unknown = {row.model for row in table.rows} - set(self.models)
            if unknown:
                raise ValueError(f"{name}: {', '.join(sorted(unknown))} is not among models")
        return self


@cache
def papers() -> tuple[Paper, ...]:
    """All papers whose tables can be asked for."""
    folder = Path(__file__).parent
    texts = [(folder / name).read_text(encoding="utf-8") for name in FILES]
    return tuple(Paper.model_validate(yaml.safe_load(text)) for text in texts)
