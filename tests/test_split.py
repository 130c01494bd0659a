"""Splits: independent, seeded, of the sizes asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from iprox.errors import ConfigError
from iprox.stages.split import draw_split, make, split_size
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table

IDS = [f"x{i:03d}" for i in range(100)]
NAMES = ("warmup", "probe", "align", "fidelity")


def params(name: str, size: float, seed: int = 0, probe: float = 1) -> dict[str, Any]:
    """What the plan hands to the stage for one split."""
    beside = {"disjoint_from": {"name": "probe", "size": probe}} if name == "align" else {}
    return {"name": name, "size": size, "seed": seed, **beside}


def draw(name: str, size: float, seed: int = 0, probe: float = 1) -> list[str]:
    return draw_split(IDS, params(name, size, seed, probe))


def test_sizes_are_counts_or_shares() -> None:
    assert split_size("warmup", 0.05, 15_011) == 750  # as in the IProX paper
    assert split_size("warmup", 0.001, 10) == 1
    assert split_size("warmup", 0.29, 100) == 29  # not 28, as floats multiply
    assert split_size("warmup", 1.0, 10) == 10
    assert split_size("warmup", 1, 10) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_split_has_as_many_examples_as_asked_for_each_once(name: str) -> None:
    for size, expected in ((1, 1), (37, 37), (0.25, 25), (0.999, 99)):
        ids = draw(name, size)
        assert len(ids) == len(set(ids)) == expected
        assert set(ids) <= set(IDS)


@pytest.mark.parametrize("name", ["warmup", "probe", "fidelity"])
def test_a_split_may_be_the_whole_pool(name: str) -> None:
    for size in (100, 1.0):
        assert sorted(draw(name, size)) == IDS


@pytest.mark.parametrize("probe", [1, 10, 50, 99, 0.3])
def test_probe_and_align_are_disjoint(probe: float) -> None:
    probed = draw("probe", probe)
    aligned = draw("align", 100 - len(probed), probe=probe)
    assert set(probed).isdisjoint(aligned)
    assert set(probed) | set(aligned) == set(IDS)


def test_align_does_not_move_when_the_probe_grows() -> None:
    assert draw("align", 20, probe=5) == draw("align", 20, probe=80)


def test_draws_are_independent_shuffles() -> None:
    orders = [draw(name, 100) for name in ("warmup", "probe", "fidelity")]
    assert all(order != sorted(order) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_pool_does_not_matter_and_the_seed_does(name: str) -> None:
    assert draw_split(IDS[::-1], params(name, 30)) == draw(name, 30)
    assert draw(name, 30, seed=1) != draw(name, 30, seed=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_split_begins_with_the_smaller(name: str) -> None:
    assert draw(name, 30)[:10] == draw(name, 10)


@pytest.mark.parametrize(
    ("asked", "where", "parts"),
    [
        (params("warmup", 101), "split.warmup", ["101", "at most 100"]),
        (params("probe", 101), "split.probe", ["101", "at most 100"]),
        (params("align", 200), "split.align", ["200", "at most 100"]),
        (params("fidelity", 101), "split.fidelity", ["101", "at most 100"]),
        (params("warmup", 1.5), "split.warmup", ["1.5", "a share"]),
        (params("align", 60, probe=41), "split.probe, split.align", ["41 + 60 = 101", "100"]),
        (params("align", 0.6, probe=0.5), "split.probe, split.align", ["50 + 60 = 110", "100"]),
    ],
)
def test_what_does_not_fit_is_an_error(asked: Any, where: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        draw_split(IDS, asked)
    assert caught.value.where == where
    for part in parts:
        assert part in str(caught.value)


def test_the_stage_writes_ids_in_order_and_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    write_table(tmp_path / "pool" / "pool.parquet", pd.DataFrame({"example_id": IDS}))
    written = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        asked = {"split": params("align", 12, seed=3, probe=4)}
        make(Job("split", asked, {"pool": tmp_path / "pool"}, tmp_path / run))
        written.append((tmp_path / run / "split.parquet").read_bytes())
    assert written[0] == written[1]
    table = read_table(tmp_path / "one" / "split.parquet")
    assert list(table["example_id"]) == draw("align", 12, seed=3, probe=4)
    assert list(table["position"]) == list(range(12))
    assert set(table["split"]) == {"align"}
