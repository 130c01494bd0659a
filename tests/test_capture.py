"""Rows handed over by the hooks are those of each example's own gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from oracles import exact_model, one_of, random_batch, weight_gradients
from torch import Tensor, nn

from iprox.engine.capture import backward_pass, input_sites, watch
from iprox.engine.loss import Batch
from iprox.errors import ModelError, NumericsError
from iprox.models.layers import scored_linears
from iprox.study.schema import LayersSection

Rows = dict[str, tuple[Tensor, Tensor]]


def capture(model: Any, layers: dict[str, nn.Linear], batch: Batch) -> Rows:
    seen: Rows = {}
    backward_pass(model, layers, batch, lambda name, x, d: seen.update({name: (x, d)}))
    return seen


@pytest.fixture
def model() -> Any:
    return exact_model()


@pytest.fixture
def layers(model: Any) -> dict[str, nn.Linear]:
    return scored_linears(model, LayersSection())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_padded_batch_are_those_of_each_example_alone(architecture: str) -> None:
    model = exact_model(architecture)
    layers = scored_linears(model, LayersSection())
    batch = random_batch([21, 5, 13], [7, 1, 11])
    together = capture(model, layers, batch)
    padded = capture(model, layers, random_batch([21, 5, 13], [7, 1, 11], pad=6))
    for row, length in enumerate(batch.lengths.tolist()):
        alone = capture(model, layers, one_of(batch, row))
        for name in layers:
            x, d = together[name]
            torch.testing.assert_close(x[row, :length], alone[name][0][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(d[row, :length], alone[name][1][0], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(
                padded[name][1][row, :length], alone[name][1][0], rtol=1e-10, atol=1e-14
            )
            assert not d[row, length:].any()


def test_no_weight_gets_a_gradient(model: Any, layers: dict[str, nn.Linear]) -> None:
    capture(model.requires_grad_(True), layers, random_batch([6, 4], [2, 1]))
    assert all(p.grad is None for p in model.parameters())


def test_prompt_rows_carry_gradients_and_prompt_labels_do_not_matter(
    model: Any, layers: dict[str, nn.Linear]
) -> None:
    batch = random_batch([12], [8])
    _, d = capture(model, layers, batch)["model.layers.0.mlp.down_proj"]
    assert d[0, :7].abs().sum() > 0
    _, last = capture(model, layers, batch)["model.layers.1.mlp.down_proj"]
    assert not last[0, :7].any()  # above the last attention only predicting positions count
    assert last[0, 7:11].abs().sum(-1).min() > 0
    assert not last[0, 11].any()


def test_layers_with_one_input_share_a_site(model: Any, layers: dict[str, nn.Linear]) -> None:
    sites = input_sites(model, layers, random_batch([5], [1]))
    block = "model.layers.1"
    assert {n for n, s in sites.items() if s == f"{block}.self_attn.q_proj"} == {
        f"{block}.self_attn.{x}_proj" for x in "qkv"
    }
    assert sites[f"{block}.mlp.up_proj"] == f"{block}.mlp.gate_proj"
    own = [f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj"]
    assert [sites[n] for n in own] == own


def test_a_module_called_twice_hands_over_the_rows_of_both_calls(
    model: Any, layers: dict[str, nn.Linear]
) -> None:
    name = "model.layers.0.mlp.up_proj"
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    batch = random_batch([9], [3])
    x, d = capture(model, {name: layers[name]}, batch)[name]
    assert x.shape[1] == d.shape[1] == 18
    expected = weight_gradients(model, {name: layers[name]}, batch)[name]
    torch.testing.assert_close(d[0].T @ x[0], expected, rtol=1e-10, atol=1e-14)


def test_a_call_without_influence_on_the_loss_is_an_error() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(1, 2, 3, requires_grad=True)

    def use_one_of_two_calls() -> None:
        with watch({"twice": layer}, lambda *_: None):
            layer(x)
            layer(x).sum().backward()

    with pytest.raises(ModelError, match="no influence"):
        use_one_of_two_calls()


def test_a_loss_that_is_not_finite_names_its_example(
    model: Any, layers: dict[str, nn.Linear]
) -> None:
    batch = random_batch([6, 6], [2, 2])
    broken = int(batch.input_ids[1, 0])
    assert broken not in batch.input_ids[0]
    model.get_output_embeddings().weight = nn.Parameter(model.lm_head.weight.clone())  # untie
    model.get_input_embeddings().weight.data[broken] = float("nan")
    with pytest.raises(NumericsError, match="example b") as error:
        backward_pass(model, layers, batch, lambda *_: None, example_ids=["a", "b"])
    assert "not finite" in str(error.value)
