"""Tensors outside a process's memory: the same numbers, and no memory of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import exact_model, random_batch

from iprox.engine.scoring import Scorer
from iprox.errors import ArtifactError
from iprox.models.layers import scored_linears
from iprox.store.mapped import MappedTensors
from iprox.study.schema import LayersSection

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def some(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of odd sizes, one of them empty, one of them not contiguous."""
    torch.manual_seed(0)
    whole = {"a": torch.randn(3, 7), "none": torch.empty(0, 4, 5), "b": torch.randn(5, 2, 33).mT}
    return {name: tensor.to(dtype) for name, tensor in whole.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_what_was_written(dtype: torch.dtype) -> None:
    held, expected = MappedTensors(), some(dtype)
    for name, tensor in expected.items():
        held[name] = tensor
    assert list(held) == list(expected)
    for name in [*expected, *reversed(expected)]:  # again, after others took their turns
        assert held[name].dtype == dtype
        assert torch.equal(held[name], expected[name])


@pytest.mark.parametrize("query_rank", [0, 2])
def test_scores_are_those_of_queries_in_memory_bit_by_bit(query_rank: int) -> None:
    model = exact_model()
    layers = scored_linears(model, LayersSection())
    queries = {name: torch.randn(3, *layer.weight.shape).double() for name, layer in layers.items()}
    batches = [random_batch([9, 6, 40], [2, 1, 3]), random_batch([12], [4], seed=1)]
    home = MappedTensors()
    inside, outside = (
        Scorer(model, layers, queries, query_rank=query_rank, home=one) for one in (None, home)
    )
    assert len(home) == sum(query_rank == 0 or min(q.shape[1:]) <= 2 for q in queries.values())
    for batch in batches:
        a, b = inside.score(batch), outside.score(batch)
        assert torch.equal(a.dots, b.dots)
        assert torch.equal(a.squared_norms, b.squared_norms)
    assert inside.kernels() == outside.kernels()
    assert torch.equal(inside.truncation, outside.truncation)


def test_only_the_tensor_read_last_is_in_memory() -> None:
    """Eight tensors of 32 MiB are read twice, in a process that never grows by two of them."""
    code = """
import resource, torch
from iprox.store.mapped import MappedTensors
held = MappedTensors()
for i in range(8):
    held[str(i)] = torch.full((2**23,), float(i))
def own():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
before, grown = own(), []
for i in [*range(8), *range(8)]:
    assert held[str(i)].sum() == i * 2**23
    grown.append(own() - before)
print(max(grown) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert 30 < float(done.stdout) < 60


def test_the_file_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that nothing is left of a process that is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = MappedTensors()
    held["a"] = torch.ones(100)
    assert held["a"].sum() == 100
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    held = MappedTensors()

    class Full:
        def seek(self, place: int) -> None:
            pass

        def write(self, data: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(held, "_file", Full())
    with pytest.raises(ArtifactError, match=r"no room(.|\n)*No space left(.|\n)*TMPDIR"):
        held["a"] = torch.ones(3)


def test_a_tensor_is_written_once_and_before_the_first_is_read() -> None:
    held = MappedTensors()
    held["a"] = torch.ones(3)
    with pytest.raises(ValueError, match="written once"):
        held["a"] = torch.zeros(3)
    assert held["a"].sum() == 3
    with pytest.raises(ValueError, match="written once"):
        held["b"] = torch.zeros(3)
