"""Norms and activations compiled: the same captured rows and scores, or an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from iprox.engine.capture import packed_pass
from iprox.engine.compiled import compile_between_layers
from iprox.engine.loss import Batch
from iprox.engine.packed import pack
from iprox.engine.scoring import Scorer
from iprox.errors import ModelError
from iprox.models.layers import scored_linears
from iprox.study.schema import LayersSection

# Of torch's own, while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

LENGTHS = ([5, 3], [9], [4, 7, 2])


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was compiled before, in this process or an earlier one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


def batch(lengths: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, 250, (len(lengths), max(lengths)), generator=generator)
    places = torch.arange(max(lengths))[None, :]
    labels = ids.masked_fill((places < 1) | (places >= torch.tensor(lengths)[:, None]), -100)
    return Batch(ids, labels, torch.tensor(lengths))


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_captures_and_scores_are_those_of_the_model(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, vocab_size=272).requires_grad_(False)
    layers = scored_linears(model, LayersSection())
    generator = torch.Generator().manual_seed(0)
    queries = {n: torch.randn(2, *x.weight.shape, generator=generator) for n, x in layers.items()}
    close = 1e-5 if dtype == torch.float32 else 2e-2

    def measured(lengths: list[int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
            found[f"{name} X"], found[f"{name} D"] = x.clone(), d.clone()

        found["losses"] = packed_pass(model, layers, pack(batch(lengths)), visit)
        scores = Scorer(model, layers, queries).score(batch(lengths))
        return found | {"dots": scores.dots, "norms": scores.squared_norms.sqrt()}

    before = [measured(lengths) for lengths in LENGTHS]
    compile_between_layers(model)
    for eager, lengths in zip(before, LENGTHS, strict=True):
        compiled = measured(lengths)
        assert compiled.keys() == eager.keys()
        for name, value in eager.items():
            error = (compiled[name].double() - value.double()).norm() / value.double().norm()
            assert error < close, name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 2  # a norm's and the activation's
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("fresh")
def test_what_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    model = tiny_model("llama", dtype=torch.float32, vocab_size=272).requires_grad_(False)
    with pytest.raises(ModelError, match="cannot be compiled") as caught:
        compile_between_layers(model)
    assert "target.compile: false" in str(caught.value)
