"""The search for a sparsity: what it finds, what it tries, and that its numbers are fidelity's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from artifacts import exact_reader, job, random_examples, write_pool, write_task

from iprox.errors import ConfigError
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy
from iprox.models.lowrank import Passes
from iprox.stages import decomposition, factors, features, fidelity, query, sparsity
from iprox.stages.passes import Reader
from iprox.stages.sparsity import GRID, MET, Tried, bisect
from iprox.store.tables import read_table
from iprox.study.schema import LayersSection

QUERIES = [("b", "red?", "green"), ("a", "one?", "two three"), ("b", "cat?", "dog sleeps over")]
CUT = {"sparsity": "auto", "rank_multiple": 1, "rank_rounding": "ceil", "gauge": "balanced"}


# --- the bisection -----------------------------------------------------------------------------


def looks(fidelity_of: Callable[[float], float], floor: float, ceiling: float = 9) -> Any:
    """A look at proxies whose cost is what their sparsity leaves."""

    def look(s: float) -> Tried:
        if 1 - s > ceiling:
            return Tried(s, 1 - s, 1 - s, "above the ceiling")
        value = fidelity_of(s)
        return Tried(s, 1 - s, 1 - s, MET if value >= floor else "below the floor", value)

    return look


@pytest.mark.parametrize("floor", [0.05, 0.15, 0.35, 0.5, 0.75, 0.85, 0.95])
def test_the_smallest_proxy_above_the_floor_is_found(floor: float) -> None:
    tried, chosen = bisect(GRID, looks(lambda s: 1 - s, floor), to_floor=True)
    enough = [s for s in GRID if 1 - s >= floor]
    assert (chosen.sparsity if chosen else None) == (max(enough) if enough else None)
    assert len(tried) <= math.ceil(math.log2(len(GRID) + 1))


def test_a_ceiling_leaves_out_large_proxies() -> None:
    _, chosen = bisect(GRID, looks(lambda s: 1 - s, 0.35, ceiling=0.45), to_floor=True)
    assert chosen is not None
    assert chosen.sparsity == 0.6
    tried, chosen = bisect(GRID, looks(lambda s: 1 - s, 0.75, ceiling=0.45), to_floor=True)
    assert chosen is None
    assert {t.verdict for t in tried} == {"above the ceiling", "below the floor"}


@pytest.mark.parametrize(("ceiling", "expected"), [(0.95, 0.1), (0.45, 0.6), (0.15, 0.9)])
def test_without_a_floor_the_largest_affordable_proxy_is_taken(
    ceiling: float, expected: float
) -> None:
    _, chosen = bisect(GRID, looks(lambda s: 1.0, -1, ceiling), to_floor=False)
    assert chosen is not None
    assert chosen.sparsity == expected
    assert bisect(GRID, looks(lambda s: 1.0, -1, 0.05), to_floor=False)[1] is None


def test_what_is_chosen_meets_the_floor_even_if_fidelity_is_not_monotone() -> None:
    def fidelity_of(s: float) -> float:
        return {0.5: 0.1, 0.3: 0.9, 0.4: 0.2}.get(s, 0.95)

    _, chosen = bisect(GRID, looks(fidelity_of, 0.8), to_floor=True)
    assert chosen is not None
    assert (chosen.sparsity, chosen.spearman) == (0.3, 0.9)


# --- the stage ---------------------------------------------------------------------------------


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Everything the stage reads, of a tiny model in float64."""
    target = exact_reader()
    open_as(monkeypatch, target)
    target.model.save_pretrained(tmp_path / "warmup")
    made = {
        "warmup": tmp_path / "warmup",
        "pool": write_pool(tmp_path / "pool", random_examples(24)),
        "task/t": write_task(tmp_path / "task", QUERIES),
        "decomposition": tmp_path / "decomposition",
    }
    solver = {"kind": "svd"}
    decomposition.make(
        job(
            "decomposition", made["decomposition"], {"warmup": made["warmup"]}, decomposition=solver
        )
    )
    return made | {"target": score(tmp_path, made, "target")}


def open_as(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    for stage in (query, features, sparsity):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)


def score(tmp_path: Path, parents: dict[str, Path], name: str, val_agg: str = "mean_raw") -> Path:
    """Features of the whole pool, by the stages query and features."""
    queries, out = tmp_path / f"{name}-query", tmp_path / f"{name}-features"
    influence = {"val_agg": val_agg}
    query.make(job("query", queries, {"task": parents["task/t"]}, influence=influence))
    scored = {"pool": parents["pool"], "query/t": queries}
    features.make(job("features", out, scored, subset={"name": "all"}))
    (out / "shard.zarr").rename(out / "shard-00000.zarr")
    return out


def find(
    tmp_path: Path, parents: dict[str, Path], passes: str = "both", **search: Any
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    out = tmp_path / f"found{len(list(tmp_path.iterdir()))}"
    settings = {"bootstrap": 20, "floor": 0.8, "max_cost": None, "seed": 0} | search
    work = job("sparsity", out, parents, factors=CUT, search=settings, passes=passes)
    metrics = sparsity.make(work)
    return read_table(out / "tried.parquet"), json.loads((out / "chosen.json").read_text()), metrics


@pytest.mark.parametrize("passes", ["both", "backward"])
def test_fidelities_are_those_of_the_fidelity_stage(
    tmp_path: Path, parents: dict[str, Path], monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    tried, chosen, metrics = find(tmp_path, parents, passes, floor=0.3)
    assert metrics["tried"] == len(tried)
    assert metrics["flops"] > 0
    target = exact_reader()
    for row in tried.to_dict("records"):
        cut = CUT | {"sparsity": row["sparsity"]}
        out = tmp_path / f"factors-{row['sparsity']}"
        only = {"decomposition": parents["decomposition"]}
        factors.make(job("factors", out, only, factors=cut))
        found, _ = factors.cut_layers(
            parents["decomposition"],
            factors.resolved(job("f", tmp_path / f"{out}x", only, factors=cut)),
        )
        model = as_proxy(target.model, found, passes=passes).eval().requires_grad_(False)
        layers = scored_linears(model, LayersSection())
        open_as(monkeypatch, target._replace(model=model, layers=layers))
        if passes == "backward":
            monkeypatch.setattr(query, "open_reader", lambda *_: target)
        proxy = score(tmp_path, parents, f"proxy-{row['sparsity']}")
        measured = tmp_path / f"fidelity-{row['sparsity']}"
        pair = {"proxy": proxy, "target": parents["target"]}
        fidelity.make(job("fidelity", measured, pair, fidelity={"bootstrap": 20}))
        table = (
            read_table(measured / "fidelity.parquet").query("task == 'mean'").set_index("metric")
        )
        for name, column in (("value", "spearman"), ("low", "low"), ("high", "high")):
            assert row[column] == pytest.approx(table.loc["spearman", name], rel=1e-6)
        for name in ("flops_ratio", "parameters_ratio"):
            assert row[name] == pytest.approx(table.loc[name, "value"], rel=1e-12)
    met = tried[tried["spearman"] >= 0.3]
    assert chosen["sparsity"] == met["sparsity"].max()
    assert tried["chosen"].sum() == 1


def test_factors_are_cut_at_the_sparsity_that_was_found(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    out = tmp_path / "search"
    search = {"bootstrap": 0, "floor": None, "max_cost": 0.9, "seed": 0}
    sparsity.make(job("sparsity", out, parents, factors=CUT, search=search, passes="both"))
    chosen = json.loads((out / "chosen.json").read_text())
    made = {"decomposition": parents["decomposition"]}
    auto, fixed = tmp_path / "auto", tmp_path / "fixed"
    factors.make(job("factors", auto, made | {"sparsity": out}, factors=CUT))
    factors.make(job("factors", fixed, made, factors=CUT | {"sparsity": chosen["sparsity"]}))
    for name in ("factors.safetensors", "layers.parquet"):
        assert (auto / name).read_bytes() == (fixed / name).read_bytes()


def test_nothing_good_enough_is_an_error_that_says_what_was_tried(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(tmp_path, parents, floor=0.9999)
    message = str(caught.value)
    assert "no proxy reaches a fidelity of 0.9999" in message
    assert "sparsity 0.5: Spearman" in message
    assert "the best was" in message
    assert "below the floor" in message


def test_a_proxy_that_replaces_nothing_is_no_proxy(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    search = {"bootstrap": 0, "floor": 0.1, "max_cost": None, "seed": 0}
    dense = CUT | {"rank_multiple": 1000}
    with pytest.raises(ConfigError, match="sparsity 0.9: 1.00 of .*, replaces no layer"):
        sparsity.make(
            job("sparsity", tmp_path / "out", parents, factors=dense, search=search, passes="both")
        )


def test_subtasks_are_scored_as_the_target_was(tmp_path: Path, parents: dict[str, Path]) -> None:
    """With subtask_max a task has several columns; its score is still one."""
    target = score(tmp_path, parents, "by-subtask", "subtask_max")
    out = tmp_path / "out"
    search = {"bootstrap": 0, "floor": -0.99, "max_cost": None, "seed": 0}
    found = sparsity.make(
        job(
            "sparsity",
            out,
            parents | {"target": target},
            factors=CUT,
            influence={"val_agg": "subtask_max"},
            search=search,
            passes="both",
        )
    )
    assert found["sparsity"] == 0.9
    assert torch.isfinite(
        torch.tensor(read_table(out / "tried.parquet")["spearman"].to_numpy())
    ).all()
