"""Parquet tables: written with the same bytes each time, read with a clear error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iprox.errors import ArtifactError

_KEY = b"iprox"


def write_table(
    path: Path, table: pd.DataFrame | pa.Table, metadata: dict[str, Any] | None = None
) -> None:
    """Write a table as Parquet (zstd), with ``metadata`` in the file's own key-value metadata.

    Args:
        path: File to write; its folder must exist.
        table: A data frame (its index is not written) or an Arrow table.
        metadata: JSON-able settings the table was made with.
    """
    arrow = (
        table if isinstance(table, pa.Table) else pa.Table.from_pandas(table, preserve_index=False)
    )
    plain = {k: v for k, v in (arrow.schema.metadata or {}).items() if k != b"pandas"}
    if metadata is not None:
        plain[_KEY] = json.dumps(metadata, sort_keys=True, allow_nan=False).encode()
    pq.write_table(arrow.replace_schema_metadata(plain), path, compression="zstd")


def write_groups(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], metadata: dict[str, Any]
) -> None:
    """Write tables one after the other, each as a row group of one Parquet file.

    Only one table is in memory at a time, and a reader that wants a part of the rows skips the
    groups that have none of them. The file is like :func:`write_table`'s otherwise.

    Args:
        path: File to write; its folder must exist.
        schema: Names and types of the columns.
        tables: Tables of this schema.
        metadata: JSON-able settings the table was made with.
    """
    settings = {_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False).encode()}
    with pq.ParquetWriter(path, schema.with_metadata(settings), compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))


def read_arrow(
    path: Path, columns: list[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """Read a Parquet file, or the rows of it that match, as an Arrow table.

    Args:
        path: The file.
        columns: Columns to read; all when absent.
        where: Condition on rows. Row groups that cannot match are not read.

    Raises:
        ArtifactError: The file is missing, is not Parquet, or lacks a column.
    """
    try:
        return pq.read_table(path, columns=columns, filters=where)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ArtifactError("a table cannot be read", where=path, value=str(error)) from None


def read_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read some columns of a Parquet file, a part of the rows at a time.

    Raises:
        ArtifactError: The file is missing, is not Parquet, or lacks a column.
    """
    try:
        yield from pq.ParquetFile(path).iter_batches(columns=columns)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ArtifactError("a table cannot be read", where=path, value=str(error)) from None


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a Parquet file as a data frame.

    Raises:
        ArtifactError: The file is missing, is not Parquet, or lacks a column.
    """
    return read_arrow(path, columns).to_pandas()


def read_metadata(path: Path) -> dict[str, Any]:
    """Settings stored by :func:`write_table`; empty when there are none."""
    raw = (pq.read_schema(path).metadata or {}).get(_KEY, b"{}")
    return dict(json.loads(raw))


def count_rows(path: Path) -> int:
    """Number of rows of a Parquet file, from its footer alone."""
    return int(pq.read_metadata(path).num_rows)
