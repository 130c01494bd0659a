"""Tracing answers to pre-training text: the corpus, retrieval metrics, and both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import job

from iprox.data.facts import VALUES, draw_corpus, draw_facts
from iprox.engine.attribution import Attribution
from iprox.errors import NumericsError
from iprox.models.layers import scored_linears
from iprox.numerics.kfac import Damping
from iprox.numerics.retrieval import recall_at, reciprocal_ranks
from iprox.stages import facts, retrieval
from iprox.stages.small import in_batches
from iprox.store.tables import read_table
from iprox.study.schema import FactsSection, LayersSection

SECTION: dict[str, Any] = {
    "vocabulary": 300,
    "width": 16,
    "blocks": 1,
    "heads": 2,
    "pretrain_epochs": 1.0,
    "epochs": 1.0,
    "people": 2,
    "left_out": 2,
}


def test_every_fact_is_stated_by_three_documents_and_its_words_by_more() -> None:
    known = draw_facts(5, seed=1)
    corpus = draw_corpus(known, 7, seed=1)
    assert len(known) == 15
    for number, fact in enumerate(known):
        stating = [d.text for d in corpus if d.fact == number]
        assert len(stating) == 3 + (number < 7)
        assert (fact.asked_and_answered() in stating) == (number < 7)
        assert not any(fact.question in text for text in stating)
        assert all(fact.name in text and fact.value in text for text in stating)
        assert fact.value in VALUES[fact.relation]
        assert any(fact.name in d.text and d.fact == -1 for d in corpus)
    assert draw_corpus(known, 7, seed=1) == corpus
    assert draw_facts(5, seed=2) != known


@pytest.mark.parametrize("people", [0, 27])
def test_there_are_only_so_many_names(people: int) -> None:
    with pytest.raises(ValueError, match="26 names"):
        draw_facts(people, seed=0)


def test_ranks_of_known_matrices() -> None:
    scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.7, 0.3], [0.1, 0.4]])
    relevant = np.array([[False, True], [True, False], [True, False], [False, True]])
    np.testing.assert_allclose(reciprocal_ranks(scores, relevant), [1 / 2, 1])
    np.testing.assert_allclose(recall_at(2, scores, relevant), [1 / 2, 1 / 2])
    np.testing.assert_allclose(recall_at(4, scores, relevant), [1, 1])


def test_a_method_that_cannot_tell_texts_apart_is_not_rewarded() -> None:
    relevant = np.array([[True], [False], [False], [False]])
    np.testing.assert_allclose(reciprocal_ranks(np.zeros((4, 1)), relevant), [1 / 4])
    np.testing.assert_allclose(recall_at(3, np.zeros((4, 1)), relevant), [0])


def test_a_query_without_a_source_is_named() -> None:
    relevant = np.array([[True, False], [False, False]])
    with pytest.raises(NumericsError, match="query 1"):
        reciprocal_ranks(np.zeros((2, 2)), relevant)


@pytest.fixture(scope="module")
def setting() -> facts.Setting:
    return facts.Setting(FactsSection(**SECTION), seed=0)


@pytest.fixture(scope="module")
def trained(setting: facts.Setting) -> facts.Trained:
    return setting.train(setting.corpus)


def test_queries_are_facts_that_only_the_corpus_states(setting: facts.Setting) -> None:
    assert [len(setting.learned), len(setting.queries), len(setting.corpus)] == [3, 3, 27]
    sources = setting.sources()
    assert (sources.sum(axis=0) == 3).all()
    assert sources.sum(axis=1).max() == 1
    texts = [setting.tokenizer.decode(e.input_ids) for e in setting.learned]
    for number in setting.asked:
        assert not any(setting.facts[number].question in text for text in texts)


def test_two_stages_score_at_the_first_model_with_the_second_ones_queries(
    setting: facts.Setting, trained: facts.Trained
) -> None:
    """Under heavy damping both solves drop out, up to a factor."""
    found = facts.all_methods(setting, trained, Damping(1e6))
    layers = [scored_linears(m, LayersSection()) for m in (trained.finetuned, trained.pretrained)]
    corpus, queries = (in_batches(t, setting.tokenizer) for t in (setting.corpus, setting.queries))
    later = Attribution(trained.finetuned, layers[0], corpus, queries).query_gradients
    first = Attribution(trained.pretrained, layers[1], corpus, queries)
    curvature = first.corrected
    scaled = {n: v / curvature[n].damping(Damping(1e6)) for n, v in later.items()}
    slow = first.influences(scaled).dots.numpy()
    near = found["EK-FAC, two stages"].scores
    correlation = np.corrcoef(near.ravel(), slow.ravel())[0, 1]
    assert correlation > 0.999
    assert found["EK-FAC, two stages"].flops > found["EK-FAC, one stage"].flops
    assert found["K-FAC, one stage"].flops > found["GradDot"].flops


def test_words_in_common_put_a_source_above_texts_about_others(setting: facts.Setting) -> None:
    scores, sources = facts.words_in_common(setting), setting.sources()
    for place, number in enumerate(setting.asked):
        name = setting.facts[number].name
        others = [i for i, d in enumerate(setting.documents) if name not in d.text]
        assert scores[sources[:, place], place].max() > scores[others, place].max()


def test_leaving_documents_out_is_training_without_them(
    setting: facts.Setting, trained: facts.Trained
) -> None:
    groups, effects = facts.leave_out(setting, trained, 2)
    assert groups.shape == (2, 27)
    assert sorted(groups.sum(axis=1)) == [3, 6]  # three statements each of one fact and of two
    np.testing.assert_array_equal(groups.any(axis=0), setting.sources().any(axis=1))
    assert effects.shape == (2, 3)
    assert np.abs(effects).min() > 0
    again = setting.train(setting.corpus).finetuned.state_dict()
    for name, value in trained.finetuned.state_dict().items():
        assert torch.equal(again[name], value)


def test_seeds_are_compared_in_one_table(tmp_path: Path) -> None:
    parents = {}
    for seed in (0, 1):
        out = tmp_path / f"facts{seed}"
        facts.make(job("facts", out, {}, facts=SECTION, seed=seed))
        parents[f"facts/{seed}"] = out
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        retrieval.make(job("retrieval", out, parents))
    parts = [read_table(path / "methods.parquet") for path in parents.values()]
    table = read_table(outs[0] / "retrieval.parquet")
    assert list(table["method"]) == list(parts[0]["method"])
    np.testing.assert_allclose(table["mrr"], (parts[0]["mrr"] + parts[1]["mrr"]) / 2)
    assert (table["mrr_low"] <= table["mrr_high"]).all()
    assert (table["seeds"] == 2).all()
    for path in outs[0].iterdir():
        assert (outs[1] / path.name).read_bytes() == path.read_bytes(), path.name
