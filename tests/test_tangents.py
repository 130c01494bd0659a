"""How layer inputs move along a query gradient, against differences and against scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, exact_reader, job, random_examples, write_pool, write_split, write_task
from oracles import exact_model, one_of, random_batch
from torch import Tensor

from iprox.data.batches import collate
from iprox.engine.capture import backward_pass
from iprox.engine.loss import Batch, hidden_states
from iprox.engine.scoring import Scorer
from iprox.engine.tangents import input_tangents
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy
from iprox.stages import probe, query
from iprox.stages.queries import open_queries
from iprox.stages.tangents import MAX_DIRECTIONS, mixtures
from iprox.stages.texts import pool_texts
from iprox.store.arrays import open_store
from iprox.study.schema import ChatSection, LayersSection

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]


def directions_for(layers: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A random direction of every layer's weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        for name, layer in layers.items()
    }


def tangents(model: Any, layers: Any, directions: Any, batch: Any) -> dict[str, Tensor]:
    """All tangents of a batch by layer."""
    found: dict[str, Tensor] = {}
    input_tangents(model, layers, directions, batch, found.__setitem__)
    return found


def inputs_at(model: Any, layers: Any, directions: Any, batch: Any, step: float) -> Any:
    """Inputs of every layer where the weights have moved by ``step``."""
    found: dict[str, Tensor] = {}
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(weights[name] + step * directions[name])
        hidden_states(model, batch)
        for name, layer in layers.items():
            layer.weight.copy_(weights[name])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tangents_are_the_limit_of_differences(architecture: str) -> None:
    model = exact_model(architecture)
    layers = scored_linears(model, LayersSection())
    directions, batch = directions_for(layers), random_batch([9, 6], [3, 2])
    found = tangents(model, layers, directions, batch)
    ahead, behind = (inputs_at(model, layers, directions, batch, s) for s in (1e-6, -1e-6))
    assert set(found) == set(layers)
    for name in layers:
        for row, length in enumerate(batch.lengths.tolist()):
            difference = (ahead[name] - behind[name])[row, :length] / 2e-6
            scale = max(1.0, float(difference.abs().max()))
            assert torch.allclose(found[name][row, :length], difference, rtol=0, atol=1e-6 * scale)


def test_nothing_moves_before_the_first_layer() -> None:
    model = exact_model()
    layers = scored_linears(model, LayersSection())
    found = tangents(model, layers, directions_for(layers), random_batch([7], [2]))
    first, *others = layers
    assert not found[first].any()
    assert all(found[name].any() for name in others if not name.startswith("model.layers.0.self"))


def test_who_else_is_in_the_batch_changes_nothing() -> None:
    model = exact_model()
    layers = scored_linears(model, LayersSection())
    directions, batch = directions_for(layers), random_batch([9, 5], [3, 2])
    together = tangents(model, layers, directions, batch)
    alone = tangents(model, layers, directions, one_of(batch, 1))
    for name in layers:
        assert torch.allclose(together[name][1, :5], alone[name][0], atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_give_the_error_of_a_score_when_one_layer_is_replaced(architecture: str) -> None:
    model = exact_model(architecture)
    layers = scored_linears(model, LayersSection())
    batch = random_batch([9, 6], [3, 2])
    queries = {name: d[None] for name, d in directions_for(layers, seed=1).items()}
    replaced = "model.layers.1.mlp.gate_proj"
    weight = layers[replaced].weight
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) / 4
        for shape in ((weight.shape[0], 3), (3, weight.shape[1]))
    )
    proxy = as_proxy(model, {replaced: (left, right)}, passes="backward").requires_grad_(False)
    exact = Scorer(model, layers, queries).score(batch).dots[:, 0]
    scored = Scorer(proxy, scored_linears(proxy, LayersSection()), queries).score(batch).dots[:, 0]
    moved = tangents(model, layers, {n: q[0] for n, q in queries.items()}, batch)[replaced]
    grads: dict[str, Tensor] = {}
    backward_pass(model, layers, batch, lambda name, _, d: grads.update({name: d}), "token_mean")
    error = (grads[replaced] * (moved @ (left @ right - weight).T)).sum((1, 2))
    assert error.abs().min() > 1e-6 * exact.abs().max()
    assert torch.allclose(scored - exact, error, rtol=1e-9, atol=1e-12)


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A probe with the queries of two tasks among its parents, the queries and the reader."""
    reader = exact_reader()
    for stage in (probe, query):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)
    parents = {
        "pool": write_pool(tmp_path / "pool", random_examples(5)),
        "split": write_split(tmp_path / "split", "probe", ["e003", "e000", "e004"]),
    }
    for task, text in (("a", "one two"), ("b", "dog sings under")):
        asked = write_task(tmp_path / f"task-{task}", [(f"{task}0", "red", text)])
        query.make(job("query", tmp_path / f"query-{task}", {"task": asked}))
        parents[f"query/{task}"] = tmp_path / f"query-{task}"
    out = tmp_path / "probe"
    metrics = probe.make(job("probe", out, parents, probe={"tokens": 20}))
    queries = open_queries({task: tmp_path / f"query-{task}" for task in "ab"})
    return open_store(out / "probe.zarr"), metrics, queries, reader, tmp_path, parents


def test_a_probe_with_queries_records_how_inputs_move_along_each(probed: Any) -> None:
    store, metrics, queries, reader, folder, parents = probed
    plain = {role: path for role, path in parents.items() if not role.startswith("query/")}
    without = probe.make(job("probe", folder / "plain", plain, probe={"tokens": 20}))
    assert (metrics["directions"], without["directions"]) == (2, 0)
    assert metrics["flops"] > without["flops"]
    ids, positions = store["example_id"][:], store["position"][:]
    chat = ChatSection(**CHAT)
    for column in range(2):
        directions = {
            name: torch.from_numpy(queries.load(name, range(column, column + 1))[0]).double()
            / queries.norms[column]
            for name in reader.layers
        }
        for example_id in set(ids):
            found = pool_texts(parents["pool"], [example_id], reader.tokenizer, chat)
            example = Batch(*collate(found.encoded, 0))
            moved = tangents(reader.model, reader.layers, directions, example)
            mine = np.flatnonzero(ids == example_id)
            for name in reader.layers:
                site = store.attrs["layers"][name]["site"]
                rows = store[f"inputs/{site}"][:][column * len(ids) + mine]
                expected = moved[name][0][positions[mine]].float().numpy()
                np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)


def test_of_many_queries_a_few_mixtures_move_the_weights() -> None:
    norms = np.arange(1.0, 10.0)
    drawn = np.concatenate([mixtures(norms, seed) for seed in range(500)])
    assert mixtures(norms, 0).shape == (MAX_DIRECTIONS, 9)
    second = (drawn * norms).T @ (drawn * norms) / len(drawn)
    np.testing.assert_allclose(second, np.eye(9), atol=0.1)


def test_of_few_queries_each_is_a_direction_of_norm_one(probed: Any) -> None:
    queries = probed[2]
    np.testing.assert_allclose(mixtures(queries.norms, 0) @ queries.norms, [1, 1])
