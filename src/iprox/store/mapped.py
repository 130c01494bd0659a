"""Tensors that a process holds outside its memory, in a file without a name.

A scoring pass reads the query gradients of all layers for every batch, one layer after the other.
In memory they may outweigh everything else that the pass needs; mapped from a file they lie in the
system's page cache, which yields to whoever needs the room, and only the layer that is being read
counts as this process's own.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from iprox.errors import ArtifactError

POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, which has no name in Python: map all pages of a range at once."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class MappedTensors(MutableMapping[str, Tensor]):
    """Tensors by name, in a file that is gone when the process is, however it ends.

    Every tensor is written once, before the first is read. One that is read is mapped until the
    next is asked for; it must not be kept longer, nor written to.

    Raises:
        ArtifactError: When a tensor is set and there is no room for it on disk.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        weakref.finalize(self, self._file.close)
        self._places: dict[str, _Place] = {}
        self._end = 0
        self._map: mmap.mmap | None = None
        self._read: tuple[int, int] | None = None

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._map is not None or name in self._places:
            raise ValueError(f"{name}: a tensor is written once, before the first is read")
        data = tensor.detach().cpu().contiguous()
        self._places[name] = _Place(self._end, data.dtype, data.shape)
        try:
            self._file.seek(self._end)
            self._file.write(data.flatten().view(torch.uint8).numpy().data)
            # the next begins on a page of its own, so that one is let go without the other
            self._end += -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._file.truncate(self._end)
        except OSError as error:
            raise ArtifactError(
                "there is no room for query gradients outside memory",
                where=tempfile.gettempdir(),
                value=str(error),
                fix="point TMPDIR to a disk with more room, or set influence.query_home: memory",
            ) from None

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self._places[name]
        n_bytes = shape.numel() * dtype.itemsize
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        if self._map is None:
            self._file.flush()
            # private, because torch takes writable memory only; nothing is ever written
            self._map = mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_COPY)
        if self._read is not None and self._read[0] != start:
            self._map.madvise(mmap.MADV_DONTNEED, *self._read)
        self._read = (start, n_bytes)
        with suppress(OSError):  # older kernels map pages as they are reached
            self._map.madvise(POPULATE_READ, start, n_bytes)
        count = shape.numel()
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def __delitem__(self, name: str) -> None:
        raise ValueError(f"{name}: a tensor is written once, and stays")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
