"""LESS: Adam's directions, their sketches, and the moments a warm-up keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from artifacts import exact_reader, job, random_examples, write_pool, write_split, write_task
from test_learned import plan

from iprox.errors import ArtifactError, ConfigError
from iprox.models.moments import open_moments, save_moments
from iprox.numerics.adam import AdamSketch, adam_direction
from iprox.numerics.sketch import CountSketch, RandomProjection
from iprox.stages import checkpoint, features, query_sketches, ranking, warmup
from iprox.store.tables import read_table, write_table

CPU = torch.device("cpu")
SHAPES = {"b": (6, 5), "a": (4, 7)}
EXAMPLES = random_examples(10)
RUN = {"scorer": {"kind": "less"}, "features": {"kind": "countsketch"}}


def moments(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(layer) + ord(layer[0]))
    first = torch.randn(*SHAPES[layer], generator=generator, dtype=torch.float64)
    return first, torch.rand(*SHAPES[layer], generator=generator, dtype=torch.float64)


def test_without_memory_the_direction_is_the_sign() -> None:
    g = torch.randn(3, 8, dtype=torch.float64)
    zero = torch.zeros(8, dtype=torch.float64)
    found = adam_direction(g, zero, zero, betas=(0.0, 0.0), eps=0.0)
    torch.testing.assert_close(found, g.sign(), rtol=1e-12, atol=1e-12)


def test_the_direction_is_the_step_that_adam_takes() -> None:
    """Late in training, where torch's correction for the start has faded, and for small eps."""
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.999), eps=1e-12)
    for _ in range(3):
        weight.grad = torch.randn(6, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[weight]
    state["step"].fill_(10**6)
    first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    before, g = weight.detach().clone(), torch.randn(6, dtype=torch.float64)
    weight.grad = g
    optimizer.step()
    torch.testing.assert_close(
        before - weight.detach(), adam_direction(g, first, second, eps=0.0), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("kind", ["countsketch", "random"])
def test_a_sketch_is_that_of_the_directions(kind: str) -> None:
    inner: Any = (
        CountSketch(SHAPES, 16, 0, CPU)
        if kind == "countsketch"
        else RandomProjection(SHAPES, 16, 0, CPU, "rademacher")
    )
    sketch = AdamSketch(inner, moments)
    found, by_rows, expected = torch.zeros(3, 2, 16, dtype=torch.float64)
    for layer, (out, inn) in SHAPES.items():
        x, d = torch.randn(2, 4, inn).double(), torch.randn(2, 4, out).double()
        sketch.add_rows(layer, x, d, by_rows)
        sketch.add_gradients(layer, d.mT @ x, found)
        inner.add_gradients(layer, adam_direction(d.mT @ x, *moments(layer)), expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_rows, expected)


def test_a_warm_up_keeps_moments_that_can_be_read(tmp_path: Path, target_folder: Path) -> None:
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    split = write_split(tmp_path / "split", "warmup", sorted(EXAMPLES)[:4])
    parents = {"target": target_folder, "split": split, "pool": pool}
    section = {"batch": 2}
    for name, extra in (("with", {"moments": {"kept": True}}), ("without", {})):
        warmup.make(job("warmup", tmp_path / name, parents, warmup=section, **extra))
    first, second = open_moments(tmp_path / "with")("model.layers.0.mlp.up_proj")
    assert first.shape == second.shape == (48, 32)
    assert (second > 0).any()
    assert (second >= 0).all()
    one, two = (tmp_path / n / "model.safetensors" for n in ("with", "without"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ArtifactError, match="kept no moments"):
        open_moments(tmp_path / "without")


def test_a_checkpoint_has_the_moments_of_its_time(tmp_path: Path, target_folder: Path) -> None:
    """After one step m = (1 - b1) g and v = (1 - b2) g^2, so that v is a tenth of m^2."""
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    split = write_split(tmp_path / "split", "warmup", sorted(EXAMPLES)[:4])
    parents = {"target": target_folder, "split": split, "pool": pool}
    kept = {"epochs": {"kept": True}, "moments": {"kept": True}}
    trained = tmp_path / "warmup"
    warmup.make(job("warmup", trained, parents, warmup={"batch": 4, "epochs": 2}, **kept))
    first_epoch = tmp_path / "checkpoint"
    at = {"checkpoint": {"epoch": 1}}
    checkpoint.make(job("checkpoint", first_epoch, {"warmup": trained}, **at))
    for folder, is_first in ((first_epoch, True), (trained, False)):
        m, v = open_moments(folder)("model.layers.0.mlp.up_proj")
        assert torch.allclose(v, 0.1 * m**2, rtol=1e-4, atol=0) == is_first


def test_scores_are_the_best_subtasks_mean_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against cosines of the sketched directions of examples and gradients of queries.

    With the moments of two checkpoints, of which the later weighs a quarter.
    """
    reader = exact_reader()
    for stage in (features, query_sketches):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)
    optimizer = torch.optim.AdamW(reader.model.requires_grad_(True).parameters(), lr=0.0)
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    task = write_task(
        tmp_path / "task", [("a", "one?", "cat"), ("a", "two?", "dog"), ("b", "red?", "bird")]
    )
    section = {"kind": "countsketch", "dim": 4096, "dtype": "float32", "seed": 1}
    stage = {"subset": {"name": "all"}, "features": section | {"check": 0}}
    made = [tmp_path / "early", tmp_path / "late"]
    for folder in made:
        for parameter in reader.model.requires_grad_(True).parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        moments = tmp_path / f"{folder.name}-warmup"
        moments.mkdir()
        save_moments(moments, reader.model.requires_grad_(False), optimizer)
        parents = {"pool": pool, "moments": moments}
        features.make(job("features", folder, parents, directions={"kind": "adam"}, **stage))
        (folder / "shard.zarr").rename(folder / "shard-00000.zarr")
    rows = tmp_path / "rows"
    query_sketches.make(job("query_sketches", rows, {"task": task}, features=section))
    write_table(moments / "epochs.parquet", pd.DataFrame({"epoch": [1, 2], "weight": [0.75, 0.25]}))
    settings = {"scorer": {"kind": "less"}, "tasks": ["t"], "influence": {"val_agg": "subtask_max"}}
    ranked = {"features": made[1], "query/t": rows, "pool": pool, "warmup": moments}
    ranked |= {"checkpoint/1/features": made[0], "checkpoint/1/query/t": rows}
    ranking.make(job("ranking", tmp_path / "out", ranked, **settings))
    table = read_table(tmp_path / "out" / "ranking.parquet").sort_values("example_id")

    from iprox.stages.query_rows import read_rows
    from iprox.store.arrays import open_store

    early, late = (open_store(folder / "shard-00000.zarr")["sketch"][:] for folder in made)
    assert abs(early - late).max() > 0.01
    cosines = (0.75 * early + 0.25 * late) @ read_rows(rows).rows.T
    expected = torch.maximum(
        torch.tensor(cosines[:, :2].mean(1)), torch.tensor(cosines[:, 2])
    ).numpy()
    assert table["score"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert open_store(made[0] / "shard-00000.zarr").attrs["directions"] == "adam"


def test_every_run_of_a_study_with_less_shares_the_warm_up() -> None:
    p = plan(**RUN, runs={"ic": {}, "gradient": {"scorer": {"kind": "gradient"}}})
    warmups = [node for (stage, _), node in p.nodes.items() if stage == "warmup"]
    assert len(warmups) == 1
    assert warmups[0].params["moments"] == {"kept": True}
    nodes = p.runs["ic"].nodes
    assert nodes["features"].params["directions"] == {"kind": "adam"}
    assert nodes["features"].params["features"]["check"] == 0
    assert nodes["ranking"].params["influence"] == {"val_agg": "subtask_max"}
    assert nodes["ranking"].parents["query/mmlu"].stage == "query_sketches"
    assert "directions" not in p.runs["gradient"].nodes["features"].params


def test_a_proxy_that_keeps_trained_weights_takes_their_moments() -> None:
    proxy = {"kind": "ipsvd", "sparsity": 0.5, "passes": "backward"}
    nodes = plan(**RUN, proxy=proxy).runs["ic"].nodes
    assert nodes["features"].parents["model"] is nodes["proxy"]
    assert nodes["features"].parents["moments"] is nodes["warmup"]
    assert nodes["ranking"].parents["query/mmlu"].parents["model"] is nodes["warmup"]
    nodes = plan(**RUN, proxy={"kind": "model", "model": "small"}).runs["ic"].nodes
    assert nodes["features"].parents["moments"] is nodes["proxy-warmup"]
    assert nodes["proxy-warmup"].params["moments"] == {"kept": True}


@pytest.mark.parametrize("passes", [None, "backward"])
def test_directions_are_taken_at_every_checkpoint(passes: str | None) -> None:
    proxy = {"kind": "ipsvd", "sparsity": 0.5, "passes": passes} if passes else {"kind": "target"}
    changes = {"proxy": proxy, "influence": {"checkpoints": "epochs"}, "warmup": {"epochs": 3}}
    nodes = plan(**RUN, **changes).runs["ic"].nodes
    ranking = nodes["ranking"]
    assert ranking.parents["warmup"] is nodes["warmup"]
    for epoch in (1, 2):
        early = ranking.parents[f"checkpoint/{epoch}/features"]
        assert early is nodes[f"features-epoch-{epoch}"]
        at = nodes[f"warmup-epoch-{epoch}"]
        assert at.stage == "checkpoint"
        assert early.parents["moments"] is at
        assert (early.parents["model"] is at) == (passes is None)
        query = ranking.parents[f"checkpoint/{epoch}/query/bbh"]
        assert query.parents["model"] is at
    assert "checkpoint/3/features" not in ranking.parents


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {"kind": "logra"}}, "coordinate by coordinate"),
        ({"features": {"kind": "exact"}}, "coordinate by coordinate"),
        (
            {"proxy": {"kind": "ipsvd", "passes": "both"}},
            "weights that were warmed up",
        ),
        ({"proxy": {"kind": "layers"}}, "weights that were warmed up"),
        ({"warmup": {"epochs": 0}}, "weights that were warmed up"),
    ],
)
def test_what_has_no_directions_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**(RUN | change))
