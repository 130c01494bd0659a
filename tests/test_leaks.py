"""Splits that must not overlap: by id, by text, and how they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import job, turns, write_pool

from iprox.data.leaks import Group, hold_out, refuse_overlap
from iprox.data.pools import text_hash
from iprox.errors import DataError
from iprox.stages import split
from iprox.store.tables import read_table


def group(name: str, texts: dict[str, str]) -> Group:
    return Group(name, list(texts), [text_hash(turns("?", text)) for text in texts.values()])


TAUGHT = group("taught", {"a": "one", "b": "two"})


def test_disjoint_groups_pass() -> None:
    refuse_overlap(TAUGHT, group("judged", {"c": "three"}))


def test_a_shared_id_is_found() -> None:
    with pytest.raises(DataError, match=r"taught and judged share an id(.|\n)*where: b"):
        refuse_overlap(TAUGHT, group("judged", {"b": "three"}))


def test_an_injected_duplicate_is_found_whatever_its_case_and_spaces() -> None:
    with pytest.raises(DataError, match=r"share a text(.|\n)*where: a"):
        refuse_overlap(TAUGHT, group("judged", {"c": "  ONE "}))


@pytest.mark.parametrize(("share", "n"), [(0.01, 1), (0.3, 3), (1.0, 9)])
def test_a_share_is_held_out_and_some_is_left(share: float, n: int) -> None:
    texts = group("g", {f"e{i}": f"text {i}" for i in range(10)})
    assert sum(hold_out(texts, share, 0)) == n


def test_equal_texts_are_held_out_together() -> None:
    texts = group("g", {f"e{i}": f"text {i % 4}" for i in range(20)})
    for seed in range(5):
        held = hold_out(texts, 0.5, seed)
        assert all(held[i] == held[i % 4] for i in range(20))
        assert 0 < sum(held) < 20


def test_the_only_text_is_not_held_out() -> None:
    assert hold_out(group("g", {"a": "x", "b": "x"}), 0.5, 0) == [False, False]


def test_who_is_held_out_depends_on_texts_and_seed_alone() -> None:
    texts = {f"e{i}": f"text {i}" for i in range(30)}
    one = hold_out(group("g", texts), 0.3, 1)
    shuffled = dict(sorted(texts.items(), key=lambda item: item[1][::-1]))
    two = dict(zip(shuffled, hold_out(group("g", shuffled), 0.3, 1), strict=True))
    assert [two[i] for i in texts] == one
    assert hold_out(group("g", texts), 0.3, 2) != one


def teach(tmp_path: Path, texts: dict[str, tuple[str, str]], size: int) -> tuple[set[str], dict]:
    pool = write_pool(tmp_path / "pool", texts)
    params = {"name": "teach", "size": size, "seed": 0}
    params["disjoint_from"] = {"name": "fidelity", "size": 5}
    counts = split.make(job("split", tmp_path / "out", {"pool": pool}, split=params))
    ids = set(read_table(tmp_path / "out" / "split.parquet")["example_id"])
    return ids, counts


def test_teach_shares_no_example_with_the_fidelity_slice(tmp_path: Path) -> None:
    texts = {f"e{i:02d}": (f"prompt {i}", "answer") for i in range(20)}
    ids, counts = teach(tmp_path, texts, 15)
    slice_ids = split.draw_split(list(texts), {"name": "fidelity", "size": 5, "seed": 0})
    assert ids == set(texts) - set(slice_ids)
    assert counts["same_text"] == 0


def test_teach_leaves_out_texts_of_the_fidelity_slice(tmp_path: Path) -> None:
    ids = [f"e{i:02d}" for i in range(20)]
    held = split.draw_split(ids, {"name": "fidelity", "size": 5, "seed": 0})
    twin = next(i for i in ids if i not in held)
    texts = {i: (f"prompt {i}", "answer") for i in ids}
    texts[twin] = (f"Prompt   {held[0].upper()}", "ANSWER")
    found, counts = teach(tmp_path, texts, 15)
    assert twin not in found
    assert counts["same_text"] == 1


def test_nothing_is_left_to_teach_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no example is left"):
        teach(tmp_path, {f"e{i:02d}": ("same", "same") for i in range(20)}, 15)
