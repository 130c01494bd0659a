"""A tenth of the pool is of the task's kind: the target finds it, and so do its proxies and what
it taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import exact_reader, job, write_pool, write_split, write_task
from conftest import save_tiny_encoder
from oracles import random_batch
from torch import Tensor

from iprox.engine.capture import backward_pass
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy
from iprox.numerics.ipsvd import DampedRoot, decompose, truncate
from iprox.numerics.ranks import rank_for
from iprox.stages import embeddings, encoder, features, query_embeddings, query_sketches, ranking
from iprox.stages.passes import Reader
from iprox.store.tables import read_table
from iprox.study.schema import LayersSection

COMMON = "red green blue one two three four cat dog bird runs sleeps".split()
PLANTED = "ZX QJ KW VX JQ WK".split()
N, SHARE = 120, 0.1
SKETCH = {"kind": "lora", "dim": 1024, "rank": 8, "dtype": "float32", "seed": 1}
SEEN = {"max_length": 64, "max_cut": 1.0}


def text(draw: np.random.Generator, words: Sequence[str], n: int) -> str:
    return " ".join(draw.choice(words, size=n))


def plant(folder: Path, seed: int = 0, purity: float = 1.0) -> dict[str, Any]:
    """A pool, a task, and the examples of the task's kind: so many of their words are its words."""
    draw = np.random.default_rng(seed)

    def mixed(n: int) -> str:
        own = draw.random(n) < purity
        return " ".join(draw.choice(PLANTED if o else COMMON) for o in own)

    of_kind = set(draw.choice(N, size=int(SHARE * N), replace=False).tolist())
    examples = {
        f"e{i:03d}": tuple(mixed(k) if i in of_kind else text(draw, COMMON, k) for k in (3, 5))
        for i in range(N)
    }
    queries = [("s", text(draw, PLANTED, 3), text(draw, PLANTED, 4)) for _ in range(10)]
    return {
        "wanted": {f"e{i:03d}" for i in of_kind},
        "ids": sorted(examples),
        "pool": write_pool(folder / "pool", examples),
        "task": write_task(folder / "task", queries),
    }


def read_with(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    """Let the stages score by this model."""
    for stage in (features, query_sketches):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)


def proxy_of(target: Reader, sparsity: float) -> Reader:
    """A proxy of random texts' IPSVD factors, not aligned."""
    factors = {}

    def visit(layer: str, x: Tensor, d: Tensor) -> None:
        weight = target.layers[layer].weight
        rank = rank_for(*weight.shape, sparsity, multiple=1)
        roots = (DampedRoot.from_rows(rows.flatten(0, -2), 0.1) for rows in (x, d))
        factors[layer] = truncate(decompose(weight, *roots), rank)

    backward_pass(target.model, target.layers, random_batch([24] * 8, [8] * 8), visit)
    model = as_proxy(target.model, factors).requires_grad_(False)
    return target._replace(model=model, layers=scored_linears(model, LayersSection()))


def sketched(
    tmp_path: Path, planted: dict[str, Any], name: str, ids: Sequence[str] | None = None
) -> Path:
    """Sketched features of the pool, or of a split of it."""
    parents = {"pool": planted["pool"]}
    if ids is not None:
        parents["split"] = write_split(tmp_path / f"split-{name}", name, ids)
    stage = {"subset": {"name": name}, "features": SKETCH | {"check": 0}}
    features.make(job("features", tmp_path / name, parents, **stage))
    (tmp_path / name / "shard.zarr").rename(tmp_path / name / "shard-00000.zarr")
    return tmp_path / name


def precision(tmp_path: Path, planted: dict[str, Any], made: Path, rows: Path) -> float:
    """Share of the planted examples among as many of the first."""
    out = tmp_path / f"ranking-{made.name}"
    stage = {"scorer": {"kind": "influcoder"}, "tasks": ["t"], "influence": {"val_agg": "mean_raw"}}
    ranking.make(
        job("ranking", out, {"features": made, "query/t": rows, "pool": planted["pool"]}, **stage)
    )
    table = read_table(out / "ranking.parquet").sort_values("rank")
    first = set(table["example_id"].head(len(planted["wanted"])))
    return len(first & planted["wanted"]) / len(planted["wanted"])


def embedded(tmp_path: Path, planted: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Embeddings of the pool and of the queries."""
    made, rows = (tmp_path / f"{kind}-{folder.name}" for kind in ("embeddings", "rows"))
    parents = {"pool": planted["pool"], "encoder": folder}
    embeddings.make(job("embeddings", made, parents, encoder=SEEN))
    (made / "shard.zarr").rename(made / "shard-00000.zarr")
    section = SEEN | {"instruction": ""}
    parents = {"task": planted["task"], "encoder": folder}
    query_embeddings.make(job("query_embeddings", rows, parents, encoder=section))
    return made, rows


def test_smaller_proxies_find_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of three pools: the target, and proxies with 0.3 and 0.9 of the parameters
    removed. Half the words of a planted example are planted."""
    target = exact_reader()
    readers = {"target": target} | {str(s): proxy_of(target, s) for s in (0.3, 0.9)}
    found = dict.fromkeys(readers, 0.0)
    for seed in range(3):
        for name, reader in readers.items():
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            planted = plant(folder, seed, purity=0.5)
            read_with(monkeypatch, reader)
            rows = folder / "sketches"
            query_sketches.make(
                job("query_sketches", rows, {"task": planted["task"]}, features=SKETCH)
            )
            found[name] += precision(folder, planted, sketched(folder, planted, "all"), rows) / 3
    assert found["0.3"] > 3 * SHARE
    assert found["target"] >= found["0.3"] - 0.05
    assert found["0.3"] >= found["0.9"] - 0.05


def test_the_teacher_and_its_encoder_find_what_was_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = plant(tmp_path)
    read_with(monkeypatch, exact_reader())
    rows = tmp_path / "sketches"
    query_sketches.make(job("query_sketches", rows, {"task": planted["task"]}, features=SKETCH))
    whole = sketched(tmp_path, planted, "all")
    assert precision(tmp_path, planted, whole, rows) > 3 * SHARE
    ids = planted["ids"]
    parents = {
        "backbone": save_tiny_encoder(tmp_path / "backbone"),
        "heldout": sketched(tmp_path, planted, "fidelity", ids[:30]),
        "pool": planted["pool"],
        "sketches/t": rows,
        "task/t": planted["task"],
        "teach": sketched(tmp_path, planted, "teach", ids[30:80]),
    }
    section = SEEN | {"instruction": "", "epochs": 10, "lr": 3e-3, "alpha": 1.0}
    metrics = encoder.make(job("encoder", tmp_path / "taught", parents, encoder=section))
    assert metrics["spearman_trained"] > metrics["spearman_untrained"]
    made = embedded(tmp_path, planted, tmp_path / "taught")
    assert precision(tmp_path, planted, *made) > 3 * SHARE
