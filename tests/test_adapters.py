"""Sketches of LoRA updates' gradients, and what a warm-up with LoRA leaves for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import job, random_examples, write_pool, write_split, write_task
from test_learned import plan
from test_less import RUN
from torch import Tensor

from iprox.errors import ArtifactError
from iprox.models.layers import block_linears
from iprox.models.load import load_model
from iprox.models.moments import open_adapters, open_moments
from iprox.numerics.adapters import AdapterSketch, adapter_shapes
from iprox.numerics.sketch import Sketch
from iprox.stages import checkpoint, features, query_sketches, warmup
from iprox.stages.query_rows import read_rows
from iprox.store.arrays import open_store
from iprox.study.schema import LayersSection

CPU = torch.device("cpu")
SHAPES = {"b": (6, 5), "a": (4, 7)}
RANK, SCALE = 2, 1.5
EXAMPLES = random_examples(6)
LORA = {"adapters": {"rank": RANK}}


class Whole(Sketch):
    """Keeps every gradient as it is, one weight after the other."""

    kind = "whole"

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        self.add_gradients(layer, d.mT @ x, into)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        sizes = [out * inn for out, inn in self.shapes.values()]
        place = list(self.shapes).index(layer)
        start = sum(sizes[:place])
        into[:, start : start + sizes[place]] += gradients.flatten(1)


def test_gradients_of_updates_are_those_of_autograd() -> None:
    weights = {n: torch.randn(s).double() for n, s in adapter_shapes(SHAPES, RANK).items()}
    inner = Whole(adapter_shapes(SHAPES, RANK), 2 * (11 + 11), 0, CPU)

    def adapters(layer: str) -> tuple[Tensor, Tensor]:
        return weights[f"{layer}.lora_A"], weights[f"{layer}.lora_B"]

    sketch = AdapterSketch(inner, SHAPES, adapters, SCALE)
    by_rows, by_gradients = torch.zeros(2, 3, inner.dim, dtype=torch.float64)
    expected = []
    inputs = {n: torch.randn(3, 4, inn).double() for n, (_, inn) in SHAPES.items()}
    slopes = {n: torch.randn(3, 4, out).double() for n, (out, _) in SHAPES.items()}
    for layer, x in inputs.items():
        sketch.add_rows(layer, x, slopes[layer], by_rows)
        sketch.add_gradients(layer, slopes[layer].mT @ x, by_gradients)
        down, up = (weight.requires_grad_() for weight in adapters(layer))
        for one, slope in zip(x, slopes[layer], strict=True):
            loss = (slope * (one @ (SCALE * up @ down).T)).sum()
            expected.append([g.flatten() for g in torch.autograd.grad(loss, (down, up))])
    rows = [torch.cat([*expected[i], *expected[3 + i]]) for i in range(3)]
    torch.testing.assert_close(by_rows, torch.stack(rows))
    torch.testing.assert_close(by_gradients, torch.stack(rows))


@pytest.fixture
def trained(tmp_path: Path, target_folder: Path) -> Path:
    """A warm-up of two epochs with LoRA that keeps everything."""
    pytest.importorskip("peft")
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    split = write_split(tmp_path / "split", "warmup", sorted(EXAMPLES)[:4])
    parents = {"target": target_folder, "split": split, "pool": pool}
    kept = {"epochs": {"kept": True}, "moments": {"kept": True}}
    section = {"batch": 2, "epochs": 2, "lr": 1e-2, "lora_rank": RANK, "lora_alpha": 3.0}
    warmup.make(job("warmup", tmp_path / "warmup", parents, warmup=section, **kept))
    plain = tmp_path / "plain"
    warmup.make(job("warmup", plain, parents, warmup=section))
    files = [folder / "model.safetensors" for folder in (tmp_path / "warmup", plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
    return tmp_path / "warmup"


def test_updates_that_are_kept_are_those_that_were_merged(
    tmp_path: Path, target_folder: Path, trained: Path
) -> None:
    early = tmp_path / "early"
    at = {"checkpoint": {"epoch": 1}}
    checkpoint.make(job("checkpoint", early, {"warmup": trained}, **at))
    start = load_model(target_folder)
    steps = []
    for folder in (early, trained):
        adapters, rank, scale = open_adapters(folder)
        assert (rank, scale) == (RANK, 1.5)
        model = load_model(folder)
        for name, layer in block_linears(model, LayersSection()).items():
            down, up = adapters(name)
            weight = start.get_submodule(name).weight + scale * up @ down
            torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-6)
            for part, update in (("lora_A", down), ("lora_B", up)):
                first, second = open_moments(folder)(f"{name}.{part}")
                assert first.shape == second.shape == update.shape
        steps.append(adapters(name)[1])
    assert (steps[0] - steps[1]).abs().max() > 0


def test_a_query_s_sketch_is_that_of_the_same_text_in_the_pool(
    tmp_path: Path, trained: Path
) -> None:
    ids = sorted(EXAMPLES)
    queries = [("s", *EXAMPLES[name]) for name in ids]
    parents = {"model": trained, "task": write_task(tmp_path / "task", queries)}
    section = {"kind": "countsketch", "dim": 512, "dtype": "float32"}
    rows = tmp_path / "rows"
    query_sketches.make(job("query_sketches", rows, parents, features=section, **LORA))
    parents = {"model": trained, "moments": trained, "pool": tmp_path / "pool"}
    stage = {"subset": {"name": "all"}, "features": section | {"check": 0}} | LORA
    features.make(job("features", tmp_path / "features", parents, **stage))
    store = open_store(tmp_path / "features" / "shard.zarr")
    cosines = read_rows(rows).rows @ store["sketch"][:].T  # a query has no end of turn
    assert (cosines.argmax(1) == np.arange(len(ids))).all()
    assert cosines.diagonal().min() > 0.8
    assert store.attrs["weights"] == "lora"


def test_a_warm_up_without_updates_has_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no low-rank updates"):
        open_adapters(tmp_path)


def test_less_compares_by_updates_where_the_warm_up_trains_them() -> None:
    nodes = plan(**RUN, warmup={"lora_rank": 8}).runs["ic"].nodes
    assert nodes["features"].params["adapters"] == {"rank": 8}
    assert nodes["ranking"].parents["query/mmlu"].params["adapters"] == {"rank": 8}
    other = plan(scorer={"kind": "gradient"}, warmup={"lora_rank": 8}).runs["ic"].nodes
    assert "adapters" not in other["features"].params
