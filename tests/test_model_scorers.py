"""Scorers that pass texts through the warmed-up target, one text at a time as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, exact_reader, job, random_examples, turns, write_pool, write_task
from test_plan import plan

from iprox.data.chat import IGNORED, Encoded, encode
from iprox.numerics.pooling import POOLINGS
from iprox.plan.scorers import passes_model
from iprox.scorers import Corpus, ifd, perplexity, repsim
from iprox.stages.passes import Reader

MODULES = {"repsim": repsim, "perplexity": perplexity, "ifd": ifd}
QUERIES = [("s", "red cat", "sings"), ("s", "one two three", "dog runs"), ("s", "x", "over")]
POOL = random_examples(12) | {"cut": ("word " * 30, "never seen")}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return exact_reader()


@pytest.fixture
def scored(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scorer's scores for task t."""

    def run(kind: str, **scorer: Any) -> dict[str, float]:
        monkeypatch.setattr(MODULES[kind], "open_model", lambda *_: reader)
        monkeypatch.setattr("iprox.scorers.READ_ROWS", 5)
        parents = {
            "pool": write_pool(tmp_path / "pool", POOL),
            "task/t": write_task(tmp_path / "task", QUERIES),
        }
        of = job("ranking", tmp_path / "out", parents, scorer={"kind": kind, **scorer}, tasks=["t"])
        corpus = Corpus(of, ["t"])
        found = MODULES[kind].score(of, corpus)
        assert found.metrics["flops"] > 0
        assert found.metrics["unsupervised"] == 1
        return dict(zip(corpus.ids.to_pylist(), found.by_task["t"], strict=True))

    return run


def tokens(reader: Reader, prompt: str, response: str, query: bool = False) -> Encoded:
    how: dict[str, Any] = {"eos": False, "last_only": True} if query else {}
    return encode(turns(prompt, response), reader.tokenizer, "tulu", CHAT["max_length"], **how)


@torch.no_grad()
def loss(reader: Reader, ids: list[int], first: int) -> float:
    """Mean of -log p over the tokens from place ``first``, from the model's own logits."""
    log_p = reader.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.mean([-log_p[i - 1, ids[i]] for i in range(first, len(ids))]))


@torch.no_grad()
def states(reader: Reader, ids: list[int]) -> np.ndarray:
    """Last hidden states behind the final norm, (tokens, hidden)."""
    return reader.model.base_model(torch.tensor([ids])).last_hidden_state[0].double().numpy()


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("pooling", ["last", "weighted"])
def test_repsim_is_the_cosine_of_hidden_states(
    reader: Reader, scored: Any, pooling: str, how: str
) -> None:
    def vector(encoded: Encoded) -> np.ndarray:
        rows = states(reader, encoded.input_ids)
        places = np.arange(1, len(rows) + 1)
        one = rows[-1] if pooling == "last" else (places / places.sum()) @ rows
        return one / np.linalg.norm(one)

    found = scored("repsim", pooling=pooling, over_queries=how)
    asked = [vector(tokens(reader, p, r, query=True)) for _, p, r in QUERIES]
    for example, (prompt, response) in POOL.items():
        cosines = [q @ vector(tokens(reader, prompt, response)) for q in asked]
        assert found[example] == pytest.approx(getattr(np, how)(cosines), abs=2e-6)


def test_perplexity_is_the_loss_of_the_response(reader: Reader, scored: Any) -> None:
    found = scored("perplexity", prefer="low")
    for example, turn in POOL.items():
        encoded = tokens(reader, *turn)
        if not encoded.supervised:
            assert example == "cut"
            assert np.isneginf(found[example])
            continue
        first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        last = max(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        expected = loss(reader, encoded.input_ids[: last + 1], first)
        assert found[example] == pytest.approx(-expected, abs=1e-6)


def test_ifd_compares_the_response_with_and_without_its_prompt(reader: Reader, scored: Any) -> None:
    found = scored("ifd", prefer="high")
    for example, turn in POOL.items():
        encoded = tokens(reader, *turn)
        if not encoded.supervised:
            assert np.isneginf(found[example])
            continue
        first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        last = max(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        ids = encoded.input_ids[: last + 1]
        ratio = loss(reader, ids, first) / loss(reader, ids[first - 1 :], 1)
        assert found[example] == (-np.inf if ratio > 1 else pytest.approx(ratio, abs=1e-6))


def test_ifd_leaves_out_what_prompts_mislead(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(_: Reader, encoded: list[Encoded], __: Any) -> np.ndarray:
        """3 with a prompt longer than 36 tokens, 1 with a shorter one, 2 without."""
        given = [e.labels.count(IGNORED) - 1 for e in encoded]
        return np.array([3.0 if n > 36 else 1.0 if n > 8 else 2.0 for n in given])

    monkeypatch.setattr(ifd, "losses", losses)
    found = scored("ifd")
    assert set(found.values()) == {0.5, -np.inf}


def test_only_the_last_response_counts() -> None:
    one = Encoded(list(range(9)), [-100, 1, 2, -100, -100, 5, 6, -100, -100])
    last = ifd.last_response(one)
    assert last.labels == [-100] * 5 + [5, 6, -100, -100]
    alone = ifd.without_prompt(last)
    assert alone.input_ids == [4, 5, 6, 7, 8]
    assert alone.labels == [-100, 5, 6, -100, -100]
    assert alone.supervised == last.supervised == 2
    nothing = Encoded([1, 2], [-100, -100])
    assert ifd.without_prompt(ifd.last_response(nothing)).supervised == 0


def test_pooling_does_not_see_padding() -> None:
    states = torch.randn(2, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 2])
    for pool in POOLINGS.values():
        together = pool(states, lengths)
        alone = pool(states[1:, :2], lengths[1:])
        torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-15)
    torch.testing.assert_close(POOLINGS["last"](states, lengths)[1], states[1, 1])
    weighted = (states[1, 0] + 2 * states[1, 1]) / 3
    torch.testing.assert_close(POOLINGS["weighted"](states, lengths)[1], weighted)


def test_a_ranking_over_checkpoints_passes_no_texts() -> None:
    runs = {"e": {"proxy": {"kind": "target"}}, "p": {"scorer": {"kind": "perplexity"}}}
    p = plan(runs=runs, until="ranking", warmup={"epochs": 2}, influence={"checkpoints": "epochs"})
    assert "warmup" in p.runs["e"].nodes["ranking"].parents
    assert not passes_model(p.runs["e"].nodes["ranking"])
    assert passes_model(p.runs["p"].nodes["ranking"])


def test_model_scorers_read_the_warmed_up_target() -> None:
    runs = {kind: {"scorer": {"kind": kind}} for kind in MODULES}
    p = plan(runs=runs, until="selection")
    made = {s for s, _ in p.nodes} - {"report"}
    assert made == {"pool", "target", "task", "split", "warmup", "ranking", "selection"}
    for kind, roles in (("repsim", {"task/mmlu", "task/bbh"}), ("ifd", set())):
        node = p.runs[kind].nodes["ranking"]
        assert set(node.parents) == {"pool", "warmup"} | roles
        assert node.parents["warmup"] is p.runs[kind].nodes["warmup"]
        assert {"chat", "compute"} <= set(node.params)
