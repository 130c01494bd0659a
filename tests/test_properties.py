"""Properties that hold of any input: parsing, planning, shards, merging of rankings."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reruns import BASE, KEYS, OUTSIDE, TRIED, changed, other_value

from iprox.cli.planning import lines
from iprox.errors import ConfigError, IproxError
from iprox.plan.nodes import Plan
from iprox.plan.plan import plan_study
from iprox.stages.ranking import rank
from iprox.store.runner import Request, _shard_rows
from iprox.store.tables import write_table
from iprox.study.load import load_study, merge, parse_study

QUICK = settings(max_examples=60, deadline=None)

# --- parsing ----------------------------------------------------------------------------------

WORDS = st.sampled_from([key.split(".")[-1].removesuffix("[]") for key in KEYS])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    WORDS,
    st.sampled_from(["ipsvd", "auto", "rank", "target", "random", "all", "paper"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(WORDS, st.text(max_size=4)), inner, max_size=4),
    ),
    max_leaves=12,
)
SECTIONS = st.dictionaries(
    st.sampled_from(sorted({key.split(".")[0].removesuffix("[]") for key in KEYS})), TREES
)


@settings(max_examples=300, deadline=None)
@given(over=SECTIONS)
def test_any_tree_is_a_study_or_a_message(over: dict[str, Any]) -> None:
    try:
        plan_study(parse_study(merge(BASE, over)))
    except ConfigError:
        pass  # anything else is a bug


@settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=60), st.text(string.printable, max_size=60)))
def test_any_text_is_a_study_or_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_study([tmp_path / "study.yaml"])
    except ConfigError:
        pass  # anything else is a bug


@given(a=TREES, b=TREES, c=TREES)
@QUICK
def test_merging_is_associative_where_all_are_mappings(a: Any, b: Any, c: Any) -> None:
    x, y, z = ({"s": t} if not isinstance(t, dict) else t for t in (a, b, c))
    if not all(isinstance(v, dict) for t in (x, y, z) for v in t.values()):
        return  # a value over a mapping replaces it
    assert repr(merge(merge(x, y), z)) == repr(merge(x, merge(y, z)))


# --- planning ---------------------------------------------------------------------------------

FREE = [
    key for key in TRIED if not key.startswith(("tasks", "proxy.max_cost", "study", "data_dir"))
]
CHANGES = st.lists(st.sampled_from(FREE), max_size=6, unique=True)


@cache
def planned(keys: tuple[str, ...]) -> Plan | None:
    """The plan of the base study with other values of some keys; None where they do not go."""
    body = BASE
    for key in keys:
        body = changed(body, key, other_value(key))
    try:
        return plan_study(parse_study(body))
    except IproxError:
        return None


@QUICK
@given(keys=CHANGES)
def test_a_plan_is_closed_ordered_and_the_same_each_time(keys: list[str]) -> None:
    plan = planned(tuple(keys))
    if plan is None:
        return
    seen: set[tuple[str, str]] = set()
    for node in plan.in_order():
        for parent in node.parents.values():
            assert plan.nodes[parent.stage, parent.id] is parent
            assert (parent.stage, parent.id) in seen
        seen.add((node.stage, node.id))
    assert seen == set(plan.nodes)
    assert {(x.node.stage, x.node.id) for x in lines(plan)} == seen
    again = planned.__wrapped__(tuple(reversed(keys)))
    assert again is not None
    assert list(again.nodes) == list(plan.nodes)


@QUICK
@given(keys=CHANGES, outside=st.sampled_from([k for k in OUTSIDE if not k.startswith("report.")]))
def test_keys_outside_every_identity_change_no_plan(keys: list[str], outside: str) -> None:
    plan, other = planned(tuple(keys)), planned((*keys, outside))
    if plan is None or other is None:
        assert plan is other
        return
    results = [{k for k in p.nodes if k[0] != "report"} for p in (plan, other)]
    assert results[0] == results[1]


@QUICK
@given(keys=CHANGES, data=st.randoms(use_true_random=False))
def test_the_order_of_keys_in_a_file_changes_nothing(keys: list[str], data: Any) -> None:
    plan = planned(tuple(keys))
    body = BASE
    for key in keys:
        body = changed(body, key, other_value(key))

    def shuffled(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        items = [(k, shuffled(v)) for k, v in tree.items()]
        data.shuffle(items)
        return dict(items)

    text = yaml.safe_dump(shuffled(body), sort_keys=False)
    try:
        other = plan_study(parse_study(yaml.safe_load(text)))
    except IproxError:
        assert plan is None
        return
    assert plan is not None
    assert set(other.nodes) == set(plan.nodes)


# --- shards -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pools")


@QUICK
@given(rows=st.integers(0, 300), total=st.integers(1, 400))
def test_shards_cover_every_row_once_and_are_even(pools: Path, rows: int, total: int) -> None:
    folder = pools / str(rows)
    if not folder.exists():
        folder.mkdir()
        write_table(folder / "pool.parquet", pa.table({"x": pa.array(range(rows), pa.int32())}))
    base: dict[str, Any] = dict(
        spec={}, code="c", parents={"pool": folder}, folder=pools, store=pools, data_dir=pools
    )
    cuts = [_shard_rows(Request(**base, shard=(i, total))) for i in range(total)]
    assert [row for first, last in cuts for row in range(first, last)] == list(range(rows))
    sizes = {last - first for first, last in cuts}
    assert max(sizes) - min(sizes) <= 1


# --- rankings ---------------------------------------------------------------------------------

SCORES = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, float("-inf")]),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    min_size=1,
    max_size=40,
)


@QUICK
@given(scores=SCORES)
def test_a_ranking_is_the_sort_by_score_and_then_by_id(scores: list[float]) -> None:
    ids = [f"e{i:03d}" for i in range(len(scores))]
    values = np.array(scores, dtype=np.float32)
    table = pa.Table.from_batches(
        [b for t in rank({"b": values, "a": values}, pa.array(ids)) for b in t.to_batches()]
    )
    expected = sorted(range(len(ids)), key=lambda i: (-values[i], ids[i]))
    for task in ("a", "b"):
        own = table.filter(pa.compute.equal(table["task"], task))
        assert own["example_id"].to_pylist() == [ids[i] for i in expected]
        assert own["rank"].to_pylist() == list(range(1, len(ids) + 1))
    assert table["task"].to_pylist() == sorted(table["task"].to_pylist())
