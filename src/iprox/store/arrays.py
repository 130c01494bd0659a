"""Zarr stores: directory stores with named dimensions, equal bytes for equal arrays.

A chunk that is missing from a Zarr store reads silently as the fill value, so stores are
always checked against their manifest before they are opened (``iprox.store.runner`` does).
Arrays are stored uncompressed unless asked: gradients and activations barely compress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr

from iprox.errors import ArtifactError

CHUNK_BYTES = 64 * 2**20
"""Arrays are cut along their first axis into chunks of about this size."""


def create_store(path: Path, attrs: dict[str, Any] | None = None) -> zarr.Group:
    """Make an empty Zarr directory store with ``attrs`` on its root group."""
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.attrs.update(attrs or {})
    return group


def open_store(path: Path) -> zarr.Group:
    """Open a store for reading.

    Raises:
        ArtifactError: There is no Zarr group at ``path``.
    """
    try:
        return zarr.open_group(str(path), mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ArtifactError("a Zarr store cannot be opened", where=path, value=str(error)) from None


def allocate(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    dims: tuple[str, ...],
    chunk_rows: int,
) -> zarr.Array[Any]:
    """Make an array to be written block by block; blocks of ``chunk_rows`` are whole chunks.

    Args:
        group: Group to write into.
        name: Name of the array.
        shape: Its shape.
        dtype: Its type.
        dims: One name per axis.
        chunk_rows: Rows of a chunk.
    """
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk_rows, *shape[1:]),
        compressors=None,
        dimension_names=list(dims),
    )


def put(
    group: zarr.Group,
    name: str,
    array: np.ndarray,
    dims: tuple[str, ...],
    attrs: dict[str, Any] | None = None,
) -> None:
    """Store one array, with a name for each dimension.

    Args:
        group: Group to write into; ``/`` in ``name`` makes subgroups.
        name: Name of the array.
        array: Its values; text (numpy ``U`` or ``O``) is stored with variable length.
        dims: One name per axis.
        attrs: Units and settings of this array.

    Raises:
        ValueError: ``dims`` does not have one name per axis.
    """
    if len(dims) != array.ndim:
        raise ValueError(f"{name}: {array.ndim} axes but dims {dims}")
    row_bytes = max(1, array[:1].nbytes)
    rows = max(1, min(array.shape[0] if array.ndim else 1, CHUNK_BYTES // row_bytes))
    chunks = (rows, *array.shape[1:]) if array.ndim else ()
    stored = group.create_array(
        name,
        shape=array.shape,
        dtype="string" if array.dtype.kind in "OTU" else array.dtype,
        chunks=tuple(max(1, c) for c in chunks) or "auto",
        compressors=None,
        dimension_names=list(dims),
        attributes=attrs or {},
    )
    stored[...] = array
