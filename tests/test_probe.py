"""The probe's rows are the inputs and output gradients that autograd gives at its positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, exact_reader, job, random_examples, write_pool, write_split
from oracles import loss_of
from torch import Tensor, nn

from iprox.data.batches import collate
from iprox.engine.loss import IGNORE, Batch
from iprox.errors import DataError
from iprox.stages import probe
from iprox.stages.passes import Reader
from iprox.stages.texts import pool_texts
from iprox.store.arrays import open_store
from iprox.store.job import Job
from iprox.study.schema import ChatSection

EXAMPLES = random_examples(5)
LAYERS = [
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.up_proj",
]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    opened = exact_reader()
    monkeypatch.setattr(probe, "open_reader", lambda *_: opened)
    return opened


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    ids = ["e003", "e000", "e004", "e001"]
    return {
        "pool": write_pool(tmp_path / "pool", EXAMPLES),
        "split": write_split(tmp_path / "split", "probe", ids),
    }


def run(tmp_path: Path, parents: dict[str, Path], **section: Any) -> Any:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    metrics = probe.make(job("probe", out, parents, probe={"tokens": 40} | section))
    assert metrics.pop("flops") > 0
    return open_store(out / "probe.zarr"), metrics


def encoded(parents: dict[str, Path], reader: Reader, example_id: str) -> Batch:
    chat = ChatSection(**CHAT)
    texts = pool_texts(parents["pool"], [example_id], reader.tokenizer, chat)
    return Batch(*collate(texts.encoded, 0))


def rows_by_autograd(model: Any, layer: nn.Linear, example: Batch) -> tuple[Tensor, Tensor]:
    """Input (tokens, in) and loss gradient (tokens, out) at a layer's output."""
    kept: dict[str, Tensor] = {}

    def add_nothing(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        kept["x"], kept["nothing"] = args[0][0], torch.zeros_like(output, requires_grad=True)
        return output + kept["nothing"]

    handle = layer.register_forward_hook(add_nothing)
    loss = loss_of(model, example)
    handle.remove()
    (grad,) = torch.autograd.grad(loss, kept["nothing"])
    return kept["x"], grad[0]


@pytest.mark.parametrize("labels", ["response", "all"])
def test_rows_equal_autograd_at_the_drawn_positions(
    tmp_path: Path, parents: dict[str, Path], reader: Reader, labels: str
) -> None:
    store, _ = run(tmp_path, parents, labels=labels)
    ids, positions = store["example_id"][:], store["position"][:]
    for name in LAYERS:
        site = store.attrs["layers"][name]["site"]
        inputs, grads = store[f"inputs/{site}"][:], store[f"output_grads/{name}"][:]
        for example_id in set(ids):
            example = encoded(parents, reader, example_id)
            if labels == "all":
                example = example._replace(labels=example.input_ids)
            x, d = rows_by_autograd(reader.model, reader.layers[name], example)
            mine = ids == example_id
            np.testing.assert_array_equal(inputs[mine], x[positions[mine]].float().numpy())
            expected = d[positions[mine]].float().numpy()
            np.testing.assert_allclose(grads[mine], expected, rtol=1e-6, atol=1e-12)


def test_positions_are_spread_over_all_examples_in_the_order_of_the_split(
    tmp_path: Path, parents: dict[str, Path], reader: Reader
) -> None:
    store, metrics = run(tmp_path, parents)
    ids, positions = list(store["example_id"][:]), store["position"][:]
    assert list(dict.fromkeys(ids)) == ["e003", "e000", "e004", "e001"]
    counts = [ids.count(i) for i in dict.fromkeys(ids)]
    assert sum(counts) == metrics["tokens"] == store.attrs["tokens"] == 40
    for example_id in set(ids):
        own = positions[[i == example_id for i in ids]]
        example = encoded(parents, reader, example_id)
        assert (np.diff(own) > 0).all()
        assert own.max() < len(example.input_ids[0]) - 1
    again, _ = run(tmp_path, parents)
    np.testing.assert_array_equal(again["position"][:], positions)


def test_every_layer_has_a_row_per_position(
    tmp_path: Path, parents: dict[str, Path], reader: Reader
) -> None:
    store, _ = run(tmp_path, parents)
    about = store.attrs["layers"]
    assert list(about) == list(reader.layers)
    for name, layer in reader.layers.items():
        assert store[f"output_grads/{name}"].shape == (40, layer.out_features)
        assert store[f"inputs/{about[name]['site']}"].shape == (40, layer.in_features)
        assert (about[name]["out"], about[name]["in"]) == tuple(layer.weight.shape)
    assert set(store["inputs"].array_keys()) == {entry["site"] for entry in about.values()}
    assert len(set(store["inputs"].array_keys())) == 8  # four in each of two blocks


def test_supervised_positions_are_those_before_a_label(
    tmp_path: Path, parents: dict[str, Path], reader: Reader
) -> None:
    store, metrics = run(tmp_path, parents, positions="supervised", tokens=1000)
    taken = set(zip(store["example_id"][:], store["position"][:].tolist(), strict=True))
    expected = set()
    for example_id in ("e003", "e000", "e004", "e001"):
        labels = encoded(parents, reader, example_id).labels[0]
        expected |= {(example_id, t) for t in range(len(labels) - 1) if labels[t + 1] != IGNORE}
    assert taken == expected
    assert metrics["tokens"] == len(expected) < metrics["tokens_requested"] == 1000


def test_layers_in_several_passes_give_the_same_bytes(
    tmp_path: Path, parents: dict[str, Path], reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path, parents)
    monkeypatch.setattr(probe, "free_bytes", lambda _: 2 * 4 * 40 * 200)
    parts, metrics = run(tmp_path, parents)
    assert metrics["passes"] > 2
    for kind in ("inputs", "output_grads"):
        assert set(whole[kind].array_keys()) == set(parts[kind].array_keys())
        for name, array in whole[kind].arrays():
            np.testing.assert_array_equal(array[:], parts[kind][name][:])


@pytest.mark.usefixtures("reader")
def test_a_redundant_probe_blends_the_same_positions_of_every_layer(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    whole, _ = run(tmp_path, parents)
    mixed, _ = run(tmp_path, parents, redundancy=0.25)
    blended = mixed["blended"][:]
    assert len(blended) == 10
    staying = np.setdiff1d(np.arange(40), blended)
    ends = None
    for kind in ("inputs", "output_grads"):
        for name, array in whole[kind].arrays():
            rows, found = array[:].astype(np.float64), mixed[kind][name][:]
            np.testing.assert_array_equal(found[staying], array[:][staying])
            if ends is None:  # of the first blend, looked for among all pairs
                ends = ends_of(found[blended[0]], rows, staying)
            i, j, share = ends
            expected = rows[i] + share * (rows[j] - rows[i])
            np.testing.assert_allclose(found[blended[0]], expected, rtol=1e-4, atol=1e-6)


def ends_of(row: np.ndarray, rows: np.ndarray, staying: np.ndarray) -> tuple[int, int, float]:
    """The pair of rows, and the share of the way between them, that a blend comes closest to."""
    found = []
    for i in staying:
        for j in staying[staying != i]:
            way = rows[j] - rows[i]
            share = float((row - rows[i]) @ way / max(way @ way, 1e-300))
            found.append((np.linalg.norm(row - rows[i] - share * way), i, j, share))
    return min(found)[1:]


def test_the_papers_rule_takes_the_largest_rank_between_512_and_2048() -> None:
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(3072, 8192, device="meta")}
    rule = dict(sparsity=0.3, rank_multiple=128, rank_rounding="ceil", dense_rule="parameters")
    params = {"probe": {"tokens": "rank", "rank_rule": rule}}
    asked = Job("probe", params, {}, Path())
    section = probe._section(asked)
    assert probe._tokens(asked, section, layers) == 1664
    assert probe._tokens(asked, section, {"a": layers["a"]}) == 512


def test_examples_without_a_response_are_counted_and_left_out(
    tmp_path: Path, reader: Reader
) -> None:
    parents = {
        "pool": write_pool(tmp_path / "pool", {"a": ("hi", "yes"), "b": ("long " * 20, "no")}),
        "split": write_split(tmp_path / "split", "probe", ["a", "b"]),
    }
    store, metrics = run(tmp_path, parents)
    assert metrics["unsupervised"] == 1
    assert metrics["sequences"] == 1
    assert set(store["example_id"][:]) == {"a"}
    lost = parents | {"split": write_split(tmp_path / "split2", "probe", ["b"])}
    with pytest.raises(DataError, match="no example has a supervised token"):
        run(tmp_path, lost)
