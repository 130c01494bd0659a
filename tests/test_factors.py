"""Stages decomposition and factors on a tiny checkpoint and probe, written here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iprox.errors import ArtifactError, ConfigError, ModelError, NumericsError
from iprox.numerics.ipsvd import DampedRoot, decompose, plain_svd, truncate
from iprox.numerics.ranks import rank_for
from iprox.stages import decomposition, factors
from iprox.store.arrays import create_store, open_store, put
from iprox.store.job import Job
from iprox.store.manifest import describe
from iprox.store.tables import read_table

TOKENS = 24
BLOCKS = ("model.layers.0", "model.layers.1")
SHAPES = {
    "self_attn.q_proj": ("attention_in", 16, 12),
    "self_attn.k_proj": ("attention_in", 8, 12),
    "self_attn.o_proj": ("attention_out", 12, 16),
    "mlp.up_proj": ("mlp_in", 30, 12),
    "mlp.down_proj": ("mlp_mid", 12, 30),
}
LAYERS = {
    f"{block}.{name}": {"site": f"{block}.{site}", "out": out_dim, "in": in_dim}
    for block in BLOCKS
    for name, (site, out_dim, in_dim) in SHAPES.items()
}
Q, DOWN = f"{BLOCKS[0]}.self_attn.q_proj", f"{BLOCKS[1]}.mlp.down_proj"


def write_weights(folder: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Layers' weights beside tensors that no stage may touch, in one file or several."""
    folder.mkdir(exist_ok=True)
    weights = {f"{n}.weight": torch.randn(s["out"], s["in"]) for n, s in LAYERS.items()}
    tensors = weights | {
        "model.embed_tokens.weight": torch.randn(20, 12),
        f"{Q}.bias": torch.randn(16),
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return weights
    where = {n: f"model-{i % shards}.safetensors" for i, n in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return weights


def write_probe(folder: Path, change: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """A probe of random rows in the layout of the probe stage; ``change`` replaces arrays."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    inputs = {layer["site"]: layer["in"] for layer in LAYERS.values()}
    arrays = {f"inputs/{s}": rng.normal(size=(TOKENS, n)).astype("f4") for s, n in inputs.items()}
    for name, layer in LAYERS.items():
        rows = 1e-4 * rng.normal(size=(TOKENS, layer["out"]))
        arrays[f"output_grads/{name}"] = rows.astype("f4")
    arrays |= change or {}
    store = create_store(folder / "probe.zarr", {"layers": LAYERS, "tokens": TOKENS})
    for name, array in arrays.items():
        put(store, name, array, ("token", "feature"))
    return arrays


def decompose_job(folder: Path, **settings: Any) -> Job:
    out = folder / "decomposition"
    out.mkdir()
    parents = {"warmup": folder / "warmup"}
    if settings.get("kind") != "svd":
        parents["probe"] = folder / "probe"
    layers = settings.pop("layers", {})
    return Job("decomposition", {"decomposition": settings, "layers": layers}, parents, out)


def factors_job(folder: Path, **settings: Any) -> Job:
    out = folder / "factors"
    out.mkdir()
    return Job("factors", {"factors": settings}, {"decomposition": folder / "decomposition"}, out)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, np.ndarray]]:
    return tmp_path, write_weights(tmp_path / "warmup"), write_probe(tmp_path / "probe")


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "paper"}, {"objective": "influence"}, {"whiten": "queries"}],
    ids=str,
)
def test_directions_are_those_of_each_layer(inputs: Any, settings: dict[str, str]) -> None:
    folder, weights, arrays = inputs
    metrics = decomposition.make(decompose_job(folder, **settings))
    assert metrics.pop("flops") > 0
    assert metrics == {"layers": len(LAYERS), "fallback_layers": 0, "tokens": TOKENS}
    stored = load_file(folder / "decomposition" / "directions.safetensors")
    spectra = open_store(folder / "decomposition" / "spectra.zarr")
    assert list(spectra.attrs["layers"]) == list(LAYERS)
    solver = {key: value for key, value in settings.items() if key != "whiten"}
    for name, layer in LAYERS.items():
        input_root, grad_root = (
            DampedRoot.from_rows(torch.from_numpy(arrays[key]), 0.1)
            for key in (f"inputs/{layer['site']}", f"output_grads/{name}")
        )
        expected = decompose(weights[f"{name}.weight"], input_root, grad_root, **solver)
        left, right = stored[f"{name}.left"], stored[f"{name}.right"]
        kept = (layer["out"] * layer["in"] - 1) // (layer["out"] + layer["in"])
        assert left.shape == (layer["out"], kept)
        assert right.shape == (kept, layer["in"])
        for rank in (1, kept):
            torch.testing.assert_close(
                left[:, :rank] @ right[:rank],
                (expected.left[:, :rank] @ expected.right[:rank]).float(),
                rtol=0,
                atol=1e-4,
            )
        spectrum = spectra[f"singular_values/{name}"]
        np.testing.assert_allclose(spectrum[...], expected.singular_values.numpy(), rtol=1e-6)
        assert spectrum.attrs["total_norm"] == pytest.approx(expected.total_norm, rel=1e-6)
        assert spectrum.attrs["input_lam"] == pytest.approx(input_root.lam)
        assert spectrum.attrs["rank_effective"] == expected.rank_effective


def test_inputs_alone_know_nothing_of_gradients(inputs: Any) -> None:
    folder, weights, arrays = inputs
    stored = []
    for scale in (1, 50):
        grads = {n: scale * a**3 for n, a in arrays.items() if n.startswith("output_grads")}
        write_probe(folder / f"probe-{scale}", grads)
        (folder / f"probe-{scale}").rename(folder / "probe-x")
        (folder / "probe").rename(folder / f"old-{scale}")
        (folder / "probe-x").rename(folder / "probe")
        decomposition.make(decompose_job(folder, whiten="inputs"))
        stored.append(load_file(folder / "decomposition" / "directions.safetensors"))
        (folder / "decomposition").rename(folder / f"decomposition-{scale}")
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name])
    for name, layer in LAYERS.items():
        root = DampedRoot.from_rows(torch.from_numpy(arrays[f"inputs/{layer['site']}"]), 0.1)
        weighted = root.apply(weights[f"{name}.weight"].double().T).T
        spectra = open_store(folder / "decomposition-1" / "spectra.zarr")
        found = spectra[f"singular_values/{name}"][...]
        expected = torch.linalg.svdvals(weighted).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_plain_svd_needs_no_probe(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "warmup", shards=3)
    job = decompose_job(tmp_path, kind="svd", layers={"exclude": ["*.k_proj"]})
    assert decomposition.make(job)["layers"] == len(LAYERS) - len(BLOCKS)
    stored = load_file(tmp_path / "decomposition" / "directions.safetensors")
    assert not [n for n in stored if "k_proj" in n or "embed" in n]
    expected = plain_svd(weights[f"{Q}.weight"])
    torch.testing.assert_close(stored[f"{Q}.left"], expected.left[:, :6].float())
    params = job.params | {"layers": {"include": ["*.none"]}}
    with pytest.raises(ModelError, match="nothing"):
        decomposition.make(Job("decomposition", params, job.parents, job.out))


def test_shards_and_one_file_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for shards in (1, 2):
        folder = tmp_path / str(shards)
        folder.mkdir()
        torch.manual_seed(5)
        write_weights(folder / "warmup", shards)
        write_probe(folder / "probe")
        decomposition.make(decompose_job(folder))
        factors.make(factors_job(folder, sparsity=0.5))
        contents.append([describe(s, folder / s).content for s in ("decomposition", "factors")])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("gauge", ["balanced", "paper"])
def test_factors_are_the_leading_directions(inputs: Any, gauge: str) -> None:
    folder, weights, arrays = inputs
    decomposition.make(decompose_job(folder))
    metrics = factors.make(factors_job(folder, sparsity=0.5, gauge=gauge))
    stored = load_file(folder / "factors" / "factors.safetensors")
    table = read_table(folder / "factors" / "layers.parquet").set_index("layer")

    assert list(table.index) == list(LAYERS)
    parameters = 0
    for name, layer in LAYERS.items():
        rank = rank_for(layer["out"], layer["in"], 0.5)
        assert rank is not None
        row = table.loc[name]
        assert (row["out"], row["in"], row["rank"]) == (layer["out"], layer["in"], rank)
        assert not row["kept_dense"]
        weight = weights[f"{name}.weight"].double()
        input_root, grad_root = (
            DampedRoot.from_rows(torch.from_numpy(arrays[key]), 0.1)
            for key in (f"inputs/{layer['site']}", f"output_grads/{name}")
        )
        expected = truncate(decompose(weight, input_root, grad_root), rank, gauge)
        for side, factor in zip(("left", "right"), expected, strict=True):
            found = stored[f"{name}.{side}"]
            torch.testing.assert_close(found, factor.float(), rtol=1e-4, atol=1e-4)

        def weighted(
            matrix: torch.Tensor, x: DampedRoot = input_root, d: DampedRoot = grad_root
        ) -> Any:
            return d.apply(x.apply(matrix.T).T).norm()

        error = weighted(weight - expected.left @ expected.right) / weighted(weight)
        assert row["truncation_error"] == pytest.approx(float(error), rel=1e-6)
        parameters += rank * (layer["out"] + layer["in"])
        assert row["parameters"] == stored[f"{name}.left"].numel() + stored[f"{name}.right"].numel()
    dense = sum(w.numel() for w in weights.values())
    assert metrics["parameters"] == parameters
    assert metrics["sparsity_effective"] == 1 - parameters / dense
    assert (metrics["dense_layers"], metrics["rank_deficient_layers"]) == (0, 0)


def test_a_global_budget_errs_less_than_equal_sparsities_with_fewer_parameters(
    inputs: Any,
) -> None:
    folder, _, _ = inputs
    rows = np.random.default_rng(1).normal(size=(TOKENS, LAYERS[Q]["out"]))
    write_probe(folder / "probe-2", {f"output_grads/{Q}": (1e-2 * rows).astype("f4")})
    (folder / "probe").rename(folder / "probe-1")
    (folder / "probe-2").rename(folder / "probe")
    decomposition.make(decompose_job(folder))
    found = {}
    for how in ("uniform", "global"):
        metrics = factors.make(factors_job(folder, sparsity=0.5, rank_allocation=how))
        table = read_table(folder / "factors" / "layers.parquet").set_index("layer")
        (folder / "factors").rename(folder / how)
        found[how] = metrics, table
    (uniform, equal), (spent, ranks) = found["uniform"], found["global"]
    budget = sum(layer["out"] * layer["in"] for layer in LAYERS.values()) // 2
    assert budget - 42 < spent["parameters"] <= budget < uniform["parameters"]
    assert spent["error_share"] < uniform["error_share"]
    # this layer's gradients are a hundred times those of the others
    assert ranks.loc[Q, "rank"] > equal.loc[Q, "rank"]
    stored = load_file(folder / "global" / "factors.safetensors")
    for name, row in ranks.iterrows():
        assert row["kept_dense"] == (f"{name}.left" not in stored)
        if not row["kept_dense"]:
            assert stored[f"{name}.left"].shape == (row["out"], row["rank"])
    total = sum(
        (row["truncation_error"] * norm) ** 2
        for (_, row), norm in zip(ranks.iterrows(), norms_of(folder), strict=True)
    )
    whole = sum(norm**2 for norm in norms_of(folder))
    assert spent["error_share"] == pytest.approx(total / whole, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, False), ({"whiten": "inputs"}, True), ({"objective": "influence"}, True)],
    ids=str,
)
def test_a_common_budget_of_errors_without_a_common_unit_is_warned_of(
    inputs: Any, settings: dict[str, str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, _ = inputs
    decomposition.make(decompose_job(folder, **settings))
    factors.make(factors_job(folder, sparsity=0.5, rank_allocation="global"))
    assert ("not changes of the loss" in caplog.text) == warns


def norms_of(folder: Path) -> list[float]:
    """Weighted norm of every layer."""
    spectra = open_store(folder / "decomposition" / "spectra.zarr")
    return [spectra[f"singular_values/{name}"].attrs["total_norm"] for name in LAYERS]


def test_a_layer_without_gradients_gets_the_smallest_rank_of_a_global_budget(
    tmp_path: Path,
) -> None:
    write_weights(tmp_path / "warmup")
    write_probe(tmp_path / "probe", {f"output_grads/{Q}": np.zeros((TOKENS, 16), dtype="f4")})
    decomposition.make(decompose_job(tmp_path))
    factors.make(factors_job(tmp_path, sparsity=0.5, rank_allocation="global"))
    table = read_table(tmp_path / "factors" / "layers.parquet").set_index("layer")
    assert table.loc[Q, "rank"] == 1
    assert table["rank"].max() > 1


def test_a_layer_without_savings_stays_dense(inputs: Any) -> None:
    folder, weights, _ = inputs
    decomposition.make(decompose_job(folder))
    # at rank 6 factors of k (8, 12) would have 120 weights instead of 96
    metrics = factors.make(factors_job(folder, sparsity=0.5, rank_multiple=6))
    table = read_table(folder / "factors" / "layers.parquet").set_index("layer")
    dense = f"{BLOCKS[0]}.self_attn.k_proj"
    assert table.loc[dense, ["kept_dense", "rank", "parameters"]].tolist() == [True, 8, 96]
    assert table.loc[dense, "truncation_error"] == 0
    assert metrics["dense_layers"] == len(BLOCKS)
    with safe_open(folder / "factors" / "factors.safetensors", framework="pt") as file:
        assert not [n for n in file.keys() if n.startswith(dense)]


def test_a_proxy_that_would_be_the_target_is_refused(inputs: Any) -> None:
    folder, _, _ = inputs
    decomposition.make(decompose_job(folder))
    with pytest.raises(ConfigError, match="every layer stays dense"):
        factors.make(factors_job(folder, sparsity=0.5, rank_multiple=128))


def test_ranks_above_what_was_kept_are_refused(inputs: Any) -> None:
    folder, _, _ = inputs
    decomposition.make(decompose_job(folder))
    with pytest.raises(NumericsError, match=r"(?s)rank is out of range.*q_proj.*1 to 6.*proxy\."):
        factors.make(factors_job(folder, sparsity=0.1, rank_multiple=11, dense_rule="min_dim"))


def test_unfilled_ranks_are_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(tmp_path / "warmup")
    write_probe(tmp_path / "probe", {f"output_grads/{DOWN}": np.eye(24, 12, dtype="f4")[:2]})
    decomposition.make(decompose_job(tmp_path, mode="paper"))
    with caplog.at_level(logging.WARNING):
        metrics = factors.make(factors_job(tmp_path, sparsity=0.5))
    assert metrics["rank_deficient_layers"] == 1
    assert f"{DOWN}: only 2 of rank 5" in caplog.text
    stored = load_file(tmp_path / "factors" / "factors.safetensors")
    assert stored[f"{DOWN}.left"].shape == (12, 5)
    assert not stored[f"{DOWN}.left"][:, 2:].any()


def test_a_layer_without_gradients_is_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(tmp_path / "warmup")
    write_probe(tmp_path / "probe", {f"output_grads/{Q}": np.zeros((TOKENS, 16), dtype="f4")})
    with caplog.at_level(logging.WARNING):
        metrics = decomposition.make(decompose_job(tmp_path))
    assert metrics["fallback_layers"] == 1
    assert f"{Q}: plain SVD" in caplog.text
    factors.make(factors_job(tmp_path, sparsity=0.5))
    table = read_table(tmp_path / "factors" / "layers.parquet").set_index("layer")
    assert table.loc[Q, "fallback"] == "output gradients are all zero"


@pytest.mark.parametrize("array", [f"output_grads/{Q}", f"inputs/{LAYERS[Q]['site']}"])
def test_a_bad_probe_row_names_its_layer(tmp_path: Path, array: str) -> None:
    write_weights(tmp_path / "warmup")
    rows = np.ones((TOKENS, LAYERS[Q]["out" if "grads" in array else "in"]), dtype="f4")
    rows[7, 0] = np.nan
    write_probe(tmp_path / "probe", {array: rows})
    with pytest.raises(NumericsError, match=rf"(?s)not finite.*{Q}.*row: 7"):
        decomposition.make(decompose_job(tmp_path))


def test_damping_zero_with_few_tokens_names_the_layer(inputs: Any) -> None:
    folder, _, _ = inputs
    # 24 tokens cannot fill the 30 inputs of down or the 30 outputs of up, the first of them
    with pytest.raises(NumericsError, match=r"(?s)full rank.*layers\.0\.mlp\.up_proj.*24 of 30"):
        decomposition.make(decompose_job(folder, damping=0.0))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_lack_a_probed_layer_are_refused(inputs: Any, change: str) -> None:
    folder, weights, _ = inputs
    weights.pop(f"{Q}.weight")
    if change == "shape":
        weights[f"{Q}.weight"] = torch.randn(4, 4)
    save_file(weights, folder / "warmup" / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"(?s)a probed layer.*{Q}.weight"):
        decomposition.make(decompose_job(folder))


def test_a_missing_weights_file_is_said(inputs: Any) -> None:
    folder, _, _ = inputs
    (folder / "warmup" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="weights cannot be read"):
        decomposition.make(decompose_job(folder))
