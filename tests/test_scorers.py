"""Cheap scorers against their definitions, and as stages of a study."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import job, random_examples, write_pool, write_task
from test_plan import plan, stages

from iprox import scorers
from iprox.errors import ConfigError, DataError
from iprox.numerics.ngrams import gumbel
from iprox.scorers import OverQueries, preferred, text_of
from iprox.stages import ranking
from iprox.store.tables import read_metadata, read_table
from iprox.study.schema import ScorerSection
from iprox.study.scorers import Scorer


class SectionOfAnyKind(ScorerSection):
    """A section as it is once a scorer's name is registered."""

    kind: str = "gradient"  # type: ignore[assignment]


POOL = {
    "a": ("red green blue", "cat dog"),
    "b": ("one two", "bird bird bird runs"),
    "c": ("cat", "dog sleeps under"),
    "d": ("over", "x"),
}
QUERIES = {
    "t": [("s", "cat dog", "sleeps"), ("s", "green", "green bird")],
    "u": [("s", "one bird", "runs runs")],
}


def scored(tmp_path: Path, kind: str, pool: Any = POOL, **scorer: Any) -> dict[str, dict[str, Any]]:
    """Scores by task and example, from the ranking that the stage writes."""
    parents = {"pool": write_pool(tmp_path / "pool", pool)}
    parents |= {f"task/{t}": write_task(tmp_path / t, rows) for t, rows in QUERIES.items()}
    settings = {"kind": kind, **scorer}
    ranking.make(job("ranking", tmp_path / "out", parents, scorer=settings, tasks=list(QUERIES)))
    table = read_table(tmp_path / "out" / "ranking.parquet")
    for _, rows in table.groupby("task"):
        assert rows["rank"].tolist() == list(range(1, len(pool) + 1))
        assert (np.diff(rows["score"]) <= 0).all()
        assert sorted(rows["example_id"]) == sorted(pool)
    grouped = table.groupby("task")
    return {str(t): dict(zip(r["example_id"], r["score"], strict=True)) for t, r in grouped}


def words(text: str) -> list[str]:
    """Words of two letters and more, as both libraries take them."""
    return re.findall(r"\b\w\w+\b", text.lower())


def candidate_words() -> dict[str, list[str]]:
    return {i: words(" ".join(turns)) for i, turns in POOL.items()}


def query_words(task: str) -> list[list[str]]:
    return [words(f"{prompt} {response}") for _, prompt, response in QUERIES[task]]


def idf_vector(text: list[str], documents: list[list[str]]) -> dict[str, float]:
    """Unit vector of (1 + log count) (1 + log (1 + n) / (1 + documents with the word))."""
    known = {w for d in documents for w in d}
    weights = {
        w: (1 + math.log(c))
        * (1 + math.log((1 + len(documents)) / (1 + sum(w in d for d in documents))))
        for w, c in Counter(text).items()
        if w in known
    }
    norm = math.sqrt(sum(v * v for v in weights.values())) or 1.0
    return {w: v / norm for w, v in weights.items()}


def cosine(a: dict[str, float], b: dict[str, float]) -> float:
    return sum(v * b.get(w, 0.0) for w, v in a.items())


def bm25(query: list[str], text: list[str], documents: list[list[str]]) -> float:
    """Sum over the query's words of idf (k1 + 1) tf / (k1 (1 - b + b length / mean) + tf)."""
    total, mean = 0.0, sum(map(len, documents)) / len(documents)
    for word in query:
        holding = sum(word in d for d in documents)
        if not holding:
            continue
        idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        tf = text.count(word)
        total += idf * tf / (1.5 * (1 - 0.75 + 0.75 * len(text) / mean) + tf)
    return total


@pytest.mark.parametrize("how", ["mean", "max"])
def test_tfidf_is_the_cosine_of_weighted_words(tmp_path: Path, how: str) -> None:
    found, documents = scored(tmp_path, "tfidf", over_queries=how), list(candidate_words().values())
    for task in QUERIES:
        vectors = [idf_vector(q, documents) for q in query_words(task)]
        for example, text in candidate_words().items():
            cosines = [cosine(v, idf_vector(text, documents)) for v in vectors]
            expected = max(cosines) if how == "max" else sum(cosines) / len(cosines)
            assert found[task][example] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_bm25_is_its_formula(tmp_path: Path, how: str) -> None:
    found, documents = scored(tmp_path, "bm25", over_queries=how), list(candidate_words().values())
    for task in QUERIES:
        for example, text in candidate_words().items():
            values = [bm25(q, text, documents) for q in query_words(task)]
            expected = max(values) if how == "max" else sum(values) / len(values)
            assert found[task][example] == pytest.approx(expected, abs=1e-6)


def test_a_part_of_the_text_can_be_compared_alone(tmp_path: Path) -> None:
    found = scored(tmp_path, "tfidf", text="response")
    assert found["u"]["b"] == max(found["u"].values())
    assert found["u"]["a"] == found["u"]["c"] == 0  # share no word with "runs runs"


@pytest.mark.parametrize(("prefer", "first"), [("high", "b"), ("low", "d"), ("middle", {"a", "c"})])
def test_length_ranks_by_the_response_alone(tmp_path: Path, prefer: str, first: Any) -> None:
    found = scored(tmp_path, "length", prefer=prefer)
    assert found["t"] == found["u"]
    best = max(found["t"].values())
    assert {i for i, s in found["t"].items() if s == best} == set(first)


def test_preferred_middle_is_the_middle_of_the_order_and_nan_is_last() -> None:
    values = np.array([1.0, 1000.0, 3.0, np.nan, 2.0, 4.0])
    assert preferred(values, "middle").argsort(kind="stable").tolist() == [3, 0, 1, 4, 5, 2]
    assert preferred(values, "low").argmax() == 0
    assert preferred(values, "high").argmax() == 1
    assert np.isneginf(preferred(values, "low")[3])


def test_queries_come_in_any_parts() -> None:
    similarities = np.random.default_rng(0).normal(size=(7, 5))
    for how in ("mean", "max"):
        over = OverQueries(how, 5)
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            over.add(similarities[part])
        np.testing.assert_allclose(over.scores(), getattr(similarities, how)(axis=0), rtol=1e-12)


def test_parts_of_a_conversation() -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert text_of(messages, "all") == "s\nu\na\nv\nb"
    assert text_of(messages, "prompt") == "s\nu\nv"
    assert text_of(messages, "response") == "a\nb"


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_queries_that_share_nothing_with_the_pool_are_an_error(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="no example of the pool better than another"):
        scored(tmp_path, kind, {"a": ("alpha", "beta"), "b": ("gamma", "delta")})


def test_scores_belong_to_examples_not_to_rows(tmp_path: Path) -> None:
    examples = random_examples(30)
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    renamed = {f"z{i[1:]}" if n % 2 else i: e for n, (i, e) in enumerate(examples.items())}
    for kind in ("tfidf", "bm25", "length"):
        (tmp_path / "x" / kind).mkdir()
        (tmp_path / "y" / kind).mkdir()
        one = scored(tmp_path / "x" / kind, kind, examples)
        two = scored(tmp_path / "y" / kind, kind, renamed)
        for old, new in zip(examples, renamed, strict=True):
            assert one["t"][old] == two["t"][new]


def test_the_ranking_says_how_it_was_made(tmp_path: Path) -> None:
    scored(tmp_path, "tfidf", text="prompt")
    metadata = read_metadata(tmp_path / "out" / "ranking.parquet")
    assert metadata["scorer"] == "tfidf"
    assert metadata["text"] == "prompt"
    assert metadata["words"] == len({w for p, _ in POOL.values() for w in words(p)})


def test_a_scorer_of_texts_needs_no_model_before_selection() -> None:
    p = plan(runs={"b": {"scorer": {"kind": "bm25"}}}, until="selection")
    assert {s for s, _ in p.nodes} == {"pool", "target", "task", "ranking", "selection", "report"}
    assert sorted(p.runs["b"].nodes["ranking"].parents) == ["pool", "task/bbh", "task/mmlu"]


def test_one_order_for_all_tasks_trains_one_model() -> None:
    p = plan(runs={"l": {"scorer": {"kind": "length"}}, "b": {"scorer": {"kind": "bm25"}}})
    trained = [n.params["subset"]["task"] for (s, _), n in p.nodes.items() if s == "finetune"]
    assert sorted(trained) == ["all", "bbh", "mmlu"]


def test_only_the_keys_of_a_scorer_count() -> None:
    def of(**scorer: Any) -> set[tuple[str, str]]:
        return stages(plan(runs={"r": {"scorer": scorer}}))

    assert of(kind="bm25") == of(kind="bm25", seed=3, prefer="low")
    assert of(kind="bm25") != of(kind="bm25", over_queries="max")
    assert of(kind="length") != of(kind="length", prefer="low")


def test_the_scorer_of_the_contributors_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    guide = guide[guide.index("### A scorer") :]
    file, line = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.setattr(scorers, "__path__", [*scorers.__path__, str(tmp_path)])
    monkeypatch.setattr("iprox.stages.ranking.ScorerSection", SectionOfAnyKind)
    monkeypatch.setattr("iprox.study.schema.ScorerSection", SectionOfAnyKind)
    [(name, scorer)] = eval(f"{{{line}}}", {"Scorer": Scorer}).items()
    assert scorer.keys == ("prefer",)
    (tmp_path / f"{name}.py").write_text(file)
    pool = {"a": ("why?", "x"), "b": ("x", "how? why?"), "c": ("who? what?", "x")}
    found = scored(tmp_path, name, pool, prefer="high")
    assert found["t"] == {"a": 1, "b": 0, "c": 2}


def test_an_unknown_scorer_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="bm25"):
        plan(runs={"r": {"scorer": {"kind": "bm52"}}})


def test_dsir_weighs_words_and_pairs_of_words(tmp_path: Path) -> None:
    buckets = 2**18  # nothing collides
    found = scored(tmp_path, "dsir", buckets=buckets, resample=False)

    def grams(text: str) -> Counter[str]:
        units = re.findall(r"\w+|[^\w\s]+", text.lower())
        return Counter(units + [f"{a} {b}" for a, b in itertools.pairwise(units)])

    bags = {i: grams("\n".join(turns)) for i, turns in POOL.items()}
    pool = sum(bags.values(), Counter())
    for task, rows in QUERIES.items():
        wanted = sum((grams(f"{p}\n{r}") for _, p, r in rows), Counter())
        for example, bag in bags.items():
            expected = sum(
                n * math.log((wanted[g] + 1) / (wanted.total() + buckets))
                - n * math.log((pool[g] + 1) / (pool.total() + buckets))
                for g, n in bag.items()
            )
            assert found[task][example] == pytest.approx(expected, abs=1e-5)


def test_the_top_of_noisy_weights_is_a_draw_in_proportion_to_them() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    draws = 20_000
    uniforms = np.random.default_rng(0).random((draws, 3))
    order = np.argsort(-(np.log(weights) + gumbel(uniforms)), axis=1)
    first = np.bincount(order[:, 0], minlength=3) / draws
    np.testing.assert_allclose(first, weights, atol=4 * 0.5 / math.sqrt(draws))
    second = order[order[:, 0] == 0, 1]  # of what is left: 0.6 and 0.4
    assert np.mean(second == 1) == pytest.approx(0.6, abs=4 * 0.5 / math.sqrt(len(second)))


def test_a_dsir_draw_depends_on_its_seed_and_on_nothing_else(tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        found.append(scored(tmp_path / name, "dsir", seed=seed))
    assert found[0] == found[1]
    assert found[0] != found[2]
