"""Rankings: order, ties, unscorable examples, random scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from artifacts import job, random_examples, write_pool

from iprox.errors import ArtifactError, NumericsError
from iprox.numerics.influence import descending, influence, random_scores
from iprox.stages import feature_store, ranking
from iprox.store.arrays import create_store, put
from iprox.store.tables import read_metadata, read_table, write_table


def write_features(folder: Path, dots: np.ndarray, norms: list[float], ids: list[str]) -> Path:
    """A features artifact of one shard for tasks s and t (two subtasks)."""
    folder.mkdir()
    store = create_store(folder / "shard-00000.zarr", {"queries": {}})
    put(store, "example_id", np.array(ids), ("examples",))
    put(store, "dots", dots, ("examples", "columns"))
    put(store, "norms", np.array(norms), ("examples",))
    put(store, "loss", np.ones(len(ids)), ("examples",))
    put(store, "tokens", np.full(len(ids), 9), ("examples",))
    put(store, "supervised", np.full(len(ids), 3), ("examples",))
    put(store, "columns", np.array(["t/a", "t/b", "s/a"]), ("columns",))
    put(store, "query_norms", np.array([1.0, 2.0, 4.0]), ("columns",))
    return folder


@pytest.fixture
def features(tmp_path: Path) -> Path:
    dots = np.array([[3.0, -1, 8], [2, 2, 8], [1, 4, 4], [2, 0, 4], [0, 0, 0]])
    return write_features(tmp_path / "features", dots, [1, 1, 2, 1, 0], ["a", "b", "c", "d", "z"])


def run(tmp_path: Path, features: Path, score: str, name: str = "out") -> pd.DataFrame:
    out = tmp_path / name
    parents = {"features": features}
    ranking.make(
        job("ranking", out, parents, influence={"score": score}, scorer={}, tasks=["t", "s"])
    )
    return read_table(out / "ranking.parquet")


def test_cosine_ranks_with_ties_by_id_and_no_direction_last(tmp_path: Path, features: Path) -> None:
    table = run(tmp_path, features, "cosine")
    assert list(table.columns) == ["task", "rank", "example_id", "score"]
    assert table["score"].dtype == np.float32
    assert table["task"].tolist() == ["s"] * 5 + ["t"] * 5
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    first, second = table[table["task"] == "s"], table[table["task"] == "t"]
    assert first["example_id"].tolist() == ["a", "b", "d", "c", "z"]  # a and b are equal
    assert first["score"].tolist() == [2, 2, 1, 0.5, -np.inf]
    assert second["example_id"].tolist() == ["a", "b", "d", "c", "z"]
    assert second["score"].tolist() == [3, 2, 2, 1, -np.inf]


def test_dot_ranks_by_the_largest_inner_product(tmp_path: Path, features: Path) -> None:
    table = run(tmp_path, features, "dot")
    second = table[table["task"] == "t"]
    assert second["example_id"].tolist() == ["c", "a", "b", "d", "z"]
    assert second["score"].tolist() == [4, 3, 2, 2, 0]


def test_checkpoints_are_summed_by_their_weights_before_a_task_takes_its_best(
    tmp_path: Path, features: Path
) -> None:
    ids, norms = ["a", "b", "c", "d", "z"], [2.0, 0.0, 1.0, 1.0, 1.0]
    dots = np.array([[-4.0, 8, 4], [0, 0, 0], [1, 0, 4], [2, 4, -4], [1, 1, 1]])
    earlier = write_features(tmp_path / "earlier", dots, norms, ids)
    write_table(tmp_path / "epochs.parquet", pd.DataFrame({"weight": [0.75, 0.25]}))
    parents = {"features": features, "checkpoint/1/features": earlier, "warmup": tmp_path}
    settings = {"influence": {"score": "cosine"}, "scorer": {}, "tasks": ["t", "s"]}
    ranking.make(job("ranking", tmp_path / "out", parents, **settings))
    table = read_table(tmp_path / "out" / "ranking.parquet")
    # columns of t: a: .75 (-2, 2) + .25 (3, -.5) and so on; b and z have no gradient somewhere
    expected = {
        "t": {"a": 1.375, "c": 0.875, "d": 2.0, "b": -np.inf, "z": -np.inf},
        "s": {"a": 0.875, "c": 0.875, "d": -0.5, "b": -np.inf, "z": -np.inf},
    }
    for task, scores in expected.items():
        own = table[table["task"] == task]
        assert dict(zip(own["example_id"], own["score"], strict=True)) == pytest.approx(scores)
    assert table[table["task"] == "t"]["example_id"].tolist() == ["d", "a", "c", "b", "z"]


def test_checkpoints_of_other_examples_or_without_weight_are_refused(
    tmp_path: Path, features: Path
) -> None:
    dots, norms = np.ones((5, 3)), [1.0] * 5
    earlier = write_features(tmp_path / "earlier", dots, norms, ["a", "b", "c", "d", "y"])
    parents = {"features": features, "checkpoint/1/features": earlier, "warmup": tmp_path}
    settings = {"influence": {}, "scorer": {}, "tasks": ["t", "s"]}
    for weights, error in (([0.5, 0.5], ArtifactError), ([1.0, 0.0], NumericsError)):
        write_table(tmp_path / "epochs.parquet", pd.DataFrame({"epoch": [1, 2], "weight": weights}))
        with pytest.raises(error):
            ranking.make(job("ranking", tmp_path / error.__name__, parents, **settings))


def test_metadata_counts_what_could_not_be_scored(tmp_path: Path, features: Path) -> None:
    run(tmp_path, features, "cosine")
    metadata = read_metadata(tmp_path / "out" / "ranking.parquet")
    assert metadata["unscorable"] == 1
    assert metadata["influence"]["score"] == "cosine"


def test_equal_scores_keep_their_order() -> None:
    scores = np.array([0.5, 1.0, 0.5, -np.inf, 1.0], dtype=np.float32)
    assert descending(scores).tolist() == [1, 4, 0, 2, 3]


def test_blocks_shards_and_row_groups_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    ids = [f"e{i:02d}" for i in range(40)]
    dots = draw.integers(-2, 3, (40, 3)).astype(float)  # many ties
    norms = [1.0] * 40
    whole = write_features(tmp_path / "whole", dots, norms, ids)
    expected = run(tmp_path, whole, "cosine", "one")
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, rows in enumerate((slice(0, 13), slice(13, 13), slice(13, 40))):
        one = write_features(tmp_path / f"p{number}", dots[rows], norms[rows], ids[rows])
        (one / "shard-00000.zarr").rename(parts / f"shard-{number:05d}.zarr")
    monkeypatch.setattr(feature_store, "BLOCK_ROWS", 7)
    run(tmp_path, parts, "cosine", "two")
    one, two = (tmp_path / out / "ranking.parquet" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    monkeypatch.setattr(ranking, "GROUP_ROWS", 6)
    assert run(tmp_path, parts, "cosine", "three").equals(expected)
    for task, column in (("s", 2), ("t", slice(0, 2))):
        scores = dots[:, column].reshape(40, -1) / np.array([1.0, 2.0, 4.0])[column]
        order = sorted(range(40), key=lambda i: (-scores[i].max(), ids[i]))
        found = expected[expected["task"] == task]["example_id"].tolist()
        assert found == [ids[i] for i in order]


@pytest.mark.parametrize(
    ("ids", "message"), [(["a", "a"], "in two shards"), (["b", "a"], "not in the order")]
)
def test_ids_that_do_not_ascend_are_refused(tmp_path: Path, ids: list[str], message: str) -> None:
    folder = write_features(tmp_path / "features", np.ones((2, 3)), [1, 1], ids)
    with pytest.raises(ArtifactError, match=message):
        run(tmp_path, folder, "cosine")


def test_scores_equal_to_float32_are_ties(tmp_path: Path) -> None:
    dots = np.array([[1.0, 0, 1], [1 + 1e-12, 0, 1]])
    folder = write_features(tmp_path / "features", dots, [1, 1], ["a", "b"])
    table = run(tmp_path, folder, "cosine")
    assert table["example_id"].tolist() == ["a", "b", "a", "b"]


def test_no_features_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no shards"):
        run(tmp_path, tmp_path / "empty", "cosine")


def test_a_query_without_direction_is_an_error() -> None:
    with pytest.raises(NumericsError, match="no direction"):
        influence(np.ones((2, 1)), np.ones(2), np.zeros(1), "cosine")


def test_random_scores_belong_to_ids(tmp_path: Path) -> None:
    ids = [f"e{i}" for i in range(500)]
    scores = dict(zip(ids, random_scores(ids, 7), strict=True))
    assert random_scores(ids[::-1][:3], 7).tolist() == [scores[i] for i in ids[::-1][:3]]
    assert random_scores(ids, 8).tolist() != list(scores.values())
    values = np.array(list(scores.values()))
    assert 0 <= values.min() < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * 500))


def test_a_random_ranking_is_the_same_for_every_task(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", random_examples(9))
    scorer = {"kind": "random", "seed": 3}
    ranking.make(job("ranking", tmp_path / "out", {"pool": pool}, scorer=scorer, tasks=["u", "t"]))
    table = read_table(tmp_path / "out" / "ranking.parquet")
    assert table["task"].tolist() == ["t"] * 9 + ["u"] * 9
    first, second = (table[table["task"] == t].reset_index(drop=True) for t in "tu")
    assert first.drop(columns="task").equals(second.drop(columns="task"))
    assert sorted(first["example_id"]) == sorted(random_examples(9))
    assert (first["score"].diff().dropna() <= 0).all()
