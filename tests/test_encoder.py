"""The stages of a learned scorer on tiny models: from the teacher's sketches to a ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import exact_reader, job, random_examples, write_pool, write_split, write_task
from conftest import save_tiny_encoder

from iprox.errors import ArtifactError, DataError, ModelError, NumericsError
from iprox.models.encoder import load_encoder, mean_pool, packaged_encoder
from iprox.stages import (
    backbone,
    embeddings,
    encoder,
    features,
    query_embeddings,
    query_sketches,
    ranking,
)
from iprox.stages.encoding import check_cut, embed_texts, example_texts
from iprox.stages.query_rows import mean_rows, read_rows, write_rows
from iprox.store.arrays import open_store
from iprox.store.tables import read_table

EXAMPLES = random_examples(30)
HELD = sorted(EXAMPLES)[:8]
TAUGHT = sorted(EXAMPLES)[10:28]
SKETCH = {"kind": "lora", "dim": 256, "rank": 4, "dtype": "float32", "seed": 1}
QUERIES = {
    "t": [("a", f"one {i}?", f"green {i} cat") for i in range(5)],
    "u": [("b", f"red {i}?", f"dog {i} sleeps") for i in range(5)],
}
SEEN = {"max_length": 64, "max_cut": 1.0}
SECTION = {**SEEN, "instruction": "find: ", "epochs": 2, "queries": 4, "candidates": 6}


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Everything an encoder learns from."""
    reader = exact_reader()
    for stage in (features, query_sketches):
        monkeypatch.setattr(stage, "open_reader", lambda *_: reader)
    made = {"pool": write_pool(tmp_path / "pool", EXAMPLES)}
    for role, name, ids in (("teach", "teach", TAUGHT), ("heldout", "fidelity", HELD)):
        split = write_split(tmp_path / f"split-{name}", name, ids)
        made[role] = tmp_path / role
        stage = {"subset": {"name": name}, "features": SKETCH | {"check": 0}}
        features.make(job("features", made[role], {"pool": made["pool"], "split": split}, **stage))
        (made[role] / "shard.zarr").rename(made[role] / "shard-00000.zarr")
    for task, queries in QUERIES.items():
        made[f"task/{task}"] = write_task(tmp_path / f"task-{task}", queries)
        made[f"sketches/{task}"] = tmp_path / f"sketches-{task}"
        query_sketches.make(
            job(
                "query_sketches",
                made[f"sketches/{task}"],
                {"task": made[f"task/{task}"]},
                features=SKETCH,
            )
        )
    made["backbone"] = save_tiny_encoder(tmp_path / "backbone")
    return made


def teach(parents: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    return encoder.make(job("encoder", out, parents, encoder=SECTION | changes))


def test_labels_are_cosines_of_gradients(parents: dict[str, Path], tmp_path: Path) -> None:
    """With a sketch that loses nothing but the LoRA's projection, against sketches by hand."""
    found = encoder.read_labels(
        job("encoder", tmp_path / "out", parents, encoder=SECTION), "teach", "find: "
    )
    shard = open_store(parents["teach"] / "shard-00000.zarr")
    candidates = shard["sketch"][:].astype(np.float64)
    rows = np.concatenate([read_rows(parents[f"sketches/{t}"]).rows for t in QUERIES])
    np.testing.assert_allclose(found.labels, rows @ candidates.T, atol=1e-5)
    assert found.candidates.ids == TAUGHT
    assert found.tasks == ["t"] * 5 + ["u"] * 5
    assert found.queries.texts[0] == "find: one 0?\n\ngreen 0 cat"
    assert np.abs(found.labels).max() <= 1 + 1e-6


def test_a_query_s_sketch_is_that_of_the_same_text_in_the_pool(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """But for the end of turn, which a query has not: the cosine is high, not 1."""
    pool = write_pool(tmp_path / "same", {"x": QUERIES["t"][0][1:]})
    split = write_split(tmp_path / "split-same", "teach", ["x"])
    stage = {"subset": {"name": "teach"}, "features": SKETCH | {"check": 0}}
    features.make(job("features", tmp_path / "f", {"pool": pool, "split": split}, **stage))
    row = open_store(tmp_path / "f" / "shard.zarr")["sketch"][0]
    cosines = read_rows(parents["sketches/t"]).rows @ row
    assert cosines.argmax() == 0


def test_an_encoder_is_taught_and_judged(parents: dict[str, Path], tmp_path: Path) -> None:
    metrics = teach(parents, tmp_path / "out", select_by="last", lr=1e-3)
    assert metrics["queries"] + metrics["queries_heldout"] == 10
    assert metrics["queries_heldout"] == 2
    assert metrics["candidates"] + metrics["candidates_validation"] == len(TAUGHT)
    assert metrics["candidates_heldout"] == len(HELD)
    table = read_table(tmp_path / "out" / "quality.parquet")
    keys = ["queries", "encoder", "task", "metric"]
    assert not table.duplicated(keys).any()
    assert set(table["task"]) == {"t", "u", "all", "mean"}
    assert set(table["queries"]) == {"known", "heldout"}
    per_task = table[(table["task"].isin(["t", "u"])) & (table["metric"] == "aggregated")]
    for key, own in per_task.groupby(["queries", "encoder"]):
        mean = table[(table[["queries", "encoder"]] == list(key)).all(axis=1)]
        mean = mean[(mean["task"] == "mean") & (mean["metric"] == "aggregated")]["value"]
        assert mean.item() == pytest.approx(own["value"].mean())
    trained = load_encoder(tmp_path / "out")
    assert trained.max_length == 64
    before = load_encoder(parents["backbone"]).model.embeddings.word_embeddings.weight
    assert not torch.equal(trained.model.embeddings.word_embeddings.weight, before)
    steps = read_table(tmp_path / "out" / "log.parquet")
    assert len(steps) == metrics["steps"]
    assert np.isfinite(steps.to_numpy()).all()


def test_the_same_seed_writes_the_same_bytes(parents: dict[str, Path], tmp_path: Path) -> None:
    for out in ("one", "two"):
        teach(parents, tmp_path / out, select_by="last", epochs=1)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert "model.safetensors" in names
    for name in names:
        one, two = ((tmp_path / out / name).read_bytes() for out in ("one", "two"))
        assert one == two, name


def test_overlapping_splits_are_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="held-out candidates share an id"):
        teach(parents | {"heldout": parents["teach"]}, tmp_path / "out")


def test_an_injected_duplicate_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    """The same text under another id: in the labelled candidates and in the slice."""
    twins = EXAMPLES | {TAUGHT[0]: EXAMPLES[HELD[0]]}
    pool = write_pool(tmp_path / "twins", twins)
    with pytest.raises(DataError, match="share a text"):
        teach(parents | {"pool": pool}, tmp_path / "out", validation=0.01)


def test_a_query_in_the_slice_is_refused(parents: dict[str, Path], tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "asked", EXAMPLES | {HELD[0]: QUERIES["t"][0][1:]})
    with pytest.raises(DataError, match="share a text"):
        teach(parents | {"pool": pool}, tmp_path / "out", heldout=0.01, seed=4)


def test_constant_labels_are_refused(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = encoder.read_labels

    def constant(*arguments: Any) -> encoder.Labelled:
        found = read(*arguments)
        found.labels[:] = 0.5
        return found

    monkeypatch.setattr(encoder, "read_labels", constant)
    with pytest.raises(NumericsError, match="nothing to learn"):
        teach(parents, tmp_path / "out")


def test_an_encoder_too_short_for_its_texts_is_refused(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"too short(.|\n)*texts are cut(.|\n)*max_cut"):
        teach(parents, tmp_path / "out", max_length=8, max_cut=0.1)


def test_more_positions_than_the_encoder_has_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"fewer positions(.|\n)*at most 64"):
        load_encoder(folder, max_length=65)


def test_what_is_cut_is_the_beginning_and_counted(tmp_path: Path) -> None:
    short = load_encoder(save_tiny_encoder(tmp_path / "encoder"), max_length=8)
    found = short.inputs(["abcdefghijkl", "ijkl"])
    assert found.n_cut == 1
    assert short.tokenizer.decode(found.ids[0]) == "efghijkl"
    assert short.tokenizer.decode(found.ids[1]) == "ijkl"


@pytest.mark.parametrize(("n_cut", "fails"), [(0, False), (2, False), (3, True)])
def test_a_share_of_cut_texts_is_allowed(n_cut: int, fails: bool) -> None:
    if not fails:
        check_cut(n_cut, 10, 0.2, "the pool")
        return
    with pytest.raises(DataError, match="3 of 10"):
        check_cut(n_cut, 10, 0.2, "the pool")


def test_pooling_is_the_mean_over_tokens_at_unit_length() -> None:
    states = torch.randn(2, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for row, n in enumerate((2, 4)):
        mean = states[row, :n].mean(0)
        torch.testing.assert_close(mean_pool(states, mask)[row], mean / mean.norm())


def test_embeddings_do_not_depend_on_the_batch_or_the_shards(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    folder = save_tiny_encoder(tmp_path / "encoder")
    short = load_encoder(folder, max_length=64)
    texts = example_texts(pool, sorted(EXAMPLES)).texts
    alone = np.concatenate([embed_texts(short, [text]).rows for text in texts])
    np.testing.assert_allclose(embed_texts(short, texts).rows, alone, atol=1e-6)
    found = []
    for number, rows in enumerate(((0, 11), (11, 30))):
        out = tmp_path / f"shard{number}"
        embeddings.make(
            job("embeddings", out, {"pool": pool, "encoder": folder}, rows, encoder=SEEN)
        )
        found.append(open_store(out / "shard.zarr")["sketch"][:])
    np.testing.assert_allclose(np.concatenate(found), alone, atol=1e-3)


@pytest.mark.parametrize("val_agg", ["mean_raw", "subtask_max"])
def test_a_ranking_is_by_mean_cosine_to_the_queries(tmp_path: Path, val_agg: str) -> None:
    pool = write_pool(tmp_path / "pool", EXAMPLES)
    folder = save_tiny_encoder(tmp_path / "encoder")
    queries = [("a", "one?", "cat"), ("a", "two?", "dog"), ("b", "red?", "blue bird")]
    task = write_task(tmp_path / "task", queries)
    rows = tmp_path / "rows"
    section = SEEN | {"instruction": "find: "}
    query_embeddings.make(
        job("query_embeddings", rows, {"task": task, "encoder": folder}, encoder=section)
    )
    made = tmp_path / "embeddings"
    embeddings.make(job("embeddings", made, {"pool": pool, "encoder": folder}, encoder=SEEN))
    (made / "shard.zarr").rename(made / "shard-00000.zarr")
    stage = {"scorer": {"kind": "influcoder"}, "tasks": ["t"], "influence": {"val_agg": val_agg}}
    parents = {"features": made, "query/t": rows, "pool": pool}
    ranking.make(job("ranking", tmp_path / "out", parents, **stage))
    short = load_encoder(folder, max_length=64)
    examples = embed_texts(short, example_texts(pool, sorted(EXAMPLES)).texts).rows
    asked = embed_texts(short, [f"find: {p}\n\n{c}" for _, p, c in queries]).rows
    cosines = examples @ asked.T
    expected = cosines.mean(1)
    if val_agg == "subtask_max":
        expected = np.maximum(cosines[:, :2].mean(1), cosines[:, 2])
    table = read_table(tmp_path / "out" / "ranking.parquet").sort_values("example_id")
    np.testing.assert_allclose(table["score"], expected, atol=2e-3)


def test_rows_of_different_settings_are_not_compared(tmp_path: Path) -> None:
    for task, about in (("t", {"dim": 2}), ("u", {"dim": 3})):
        (tmp_path / task).mkdir()
        write_rows(tmp_path / task, np.ones((1, 2)), ["q"], ["s"], about)
    with pytest.raises(ArtifactError, match="different settings"):
        mean_rows({"t": tmp_path / "t", "u": tmp_path / "u"}, by_subtask=False)


def test_an_encoder_of_another_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="minilm-l6"):
        packaged_encoder("minilm")


def test_a_folder_becomes_a_backbone(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "mine")
    stage = job("backbone", tmp_path / "out", {}, encoder={"model": "mine", "revision": None})
    object.__setattr__(stage, "data_dir", tmp_path)
    assert backbone.make(stage)["dim"] == 16
    one, two = (load_encoder(tmp_path / f).model.state_dict() for f in ("mine", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
