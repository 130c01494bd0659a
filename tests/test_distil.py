"""Teaching an encoder: a toy that can be learnt, blocks, determinism, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from iprox.errors import NumericsError
from iprox.models.encoder import Encoder
from iprox.numerics.distillation import aggregated
from iprox.study.schema import EncoderSection
from iprox.training import checkpoints
from iprox.training.distil import Lesson, blocks, distil, passes, steps_per_epoch

TOPICS, WORDS_PER_TOPIC, LENGTH = 6, 8, 12


class Bag(nn.Module):
    """A bag of words: every token's hidden state is its embedding."""

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(words, dim)
        self.dropout = nn.Dropout(0.1)
        self.config = SimpleNamespace(hidden_size=dim)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.dropout(self.words(input_ids)))


def tokenizer() -> Any:
    return SimpleNamespace(pad_token_id=0)


class Toy:
    """Texts of a few topics each, and a teacher that scores topics against topics."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = np.random.default_rng(seed)
        factors = self.draw.normal(size=(TOPICS, 4))
        self.affinity = factors @ factors.T  # symmetric, as a score of one encoder is
        self.queries = [self.text() for _ in range(24)]
        self.train = [self.text() for _ in range(160)]
        self.held = [self.text() for _ in range(80)]

    def text(self) -> tuple[list[int], np.ndarray]:
        """Token ids, and the share of each topic."""
        shares = self.draw.dirichlet(np.full(TOPICS, 0.3))
        topics = self.draw.choice(TOPICS, size=LENGTH, p=shares)
        words = self.draw.integers(0, WORDS_PER_TOPIC, size=LENGTH)
        counts = np.bincount(topics, minlength=TOPICS) / LENGTH
        return (1 + topics * WORDS_PER_TOPIC + words).tolist(), counts

    def labels(self, candidates: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
        q = np.stack([shares for _, shares in self.queries])
        c = np.stack([shares for _, shares in candidates])
        return (0.3 * q @ self.affinity @ c.T).astype(np.float32)


def ids(texts: list[tuple[list[int], np.ndarray]]) -> list[list[int]]:
    return [one for one, _ in texts]


def agreement(encoder: Encoder, toy: Toy) -> float:
    with torch.no_grad():
        scores = encoder.embed(ids(toy.queries)) @ encoder.embed(ids(toy.held)).mT
    return aggregated(scores.double().numpy(), toy.labels(toy.held))


SETTINGS = EncoderSection(epochs=30, lr=0.05, alpha=1.0, select_by="last")


def taught(toy: Toy, labels: np.ndarray, **changes: Any) -> tuple[Encoder, Any]:
    encoder = Encoder(Bag(1 + TOPICS * WORDS_PER_TOPIC, 16), tokenizer(), 99)
    lesson = Lesson(ids(toy.queries), ids(toy.train), labels)
    settings = SETTINGS.model_copy(update=changes)
    return encoder, distil(encoder, lesson, lambda: 0.0, settings)


def test_a_bag_of_words_learns_topics() -> None:
    toy = Toy()
    before = Encoder(Bag(1 + TOPICS * WORDS_PER_TOPIC, 16), tokenizer(), 99)
    assert agreement(before, toy) < 0.3
    assert agreement(taught(toy, toy.labels(toy.train))[0], toy) > 0.8


def test_shuffled_labels_teach_nothing() -> None:
    """On average: with six topics, one shuffle is right or wrong by chance."""
    toy = Toy()
    labels = toy.labels(toy.train)
    found = []
    for seed in range(6):
        # all of them: a query's mean label alone tells something of the topics that it is about
        shuffled = np.random.default_rng(seed).permutation(labels.ravel()).reshape(labels.shape)
        found.append(agreement(taught(toy, shuffled, epochs=8)[0], toy))
    assert abs(np.mean(found)) < 0.2


def test_the_same_seed_gives_the_same_bytes() -> None:
    toy = Toy()
    labels = toy.labels(toy.train)
    one, two = (taught(toy, labels, epochs=2)[0].model.words.weight for _ in range(2))
    other = taught(toy, labels, epochs=2, seed=1)[0].model.words.weight
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("values", "chosen"), [([0.1, 0.5, 0.3], 1), ([0.6, 0.5, 0.3], 0), ([0.1, 0.2, 0.3], 2)]
)
def test_the_epoch_that_validates_best_is_kept(values: list[float], chosen: int) -> None:
    toy = Toy()
    encoder = Encoder(Bag(1 + TOPICS * WORDS_PER_TOPIC, 16), tokenizer(), 99)
    seen: list[torch.Tensor] = []

    def validate() -> float:
        seen.append(encoder.model.words.weight.detach().clone())
        return values[len(seen) - 1]

    lesson = Lesson(ids(toy.queries), ids(toy.train), toy.labels(toy.train))
    settings = SETTINGS.model_copy(update={"epochs": 2, "select_by": "validation"})
    done = distil(encoder, lesson, validate, settings)
    assert done.chosen == chosen
    assert torch.equal(encoder.model.words.weight, seen[chosen])
    assert done.epochs["validation"].tolist() == values


def test_constant_labels_are_refused() -> None:
    toy = Toy()
    with pytest.raises(NumericsError, match="all equal"):
        taught(toy, np.full((24, 160), 0.25, dtype=np.float32))


def test_passes_go_through_all_in_turn() -> None:
    found = list(passes(7, 3, 7, np.random.default_rng(0)))
    assert all(len(set(one.tolist())) == 3 for one in found)
    assert sorted(np.concatenate(found[:2]).tolist() + [found[2][0]]) == list(range(7))
    counts = np.bincount(np.concatenate(found), minlength=7)
    assert counts.max() - counts.min() <= 1
    assert [len(one) for one in passes(2, 5, 2, np.random.default_rng(0))] == [2, 2]


@pytest.mark.parametrize(("shape", "steps"), [((9, 20), 5), ((30, 8), 8)])
def test_an_epoch_sees_every_query_and_candidate(shape: tuple[int, int], steps: int) -> None:
    settings = EncoderSection(queries=4, candidates=4)
    assert steps_per_epoch(shape, settings) == steps
    labels = np.random.default_rng(0).normal(size=shape)
    found = list(blocks(labels, settings, steps, np.random.default_rng(1)))
    assert set(np.concatenate([q for q, _ in found])) == set(range(shape[0]))
    assert set(np.concatenate([c for _, c in found])) == set(range(shape[1]))


def test_a_loss_that_is_not_finite_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    embed: Callable[..., torch.Tensor] = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, texts: embed(self, texts) * float("nan"))
    with pytest.raises(NumericsError, match="diverged"):
        taught(toy, toy.labels(toy.train))


class Killed(BaseException):
    """Nothing in the package catches it."""


@pytest.mark.parametrize("select_by", ["validation", "last"])
def test_a_killed_training_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select_by: str
) -> None:
    """Three epochs, of which the second validates best; killed at the end of the last."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    toy = Toy()
    lesson = Lesson(ids(toy.queries), ids(toy.train), toy.labels(toy.train))
    settings = SETTINGS.model_copy(update={"epochs": 3, "select_by": select_by, "hard_ratio": 0.5})
    values = [0.1, 0.2, 0.6, 0.4]

    def train(asked: list[float], folder: Path | None) -> tuple[Encoder, Any]:
        encoder = Encoder(Bag(1 + TOPICS * WORDS_PER_TOPIC, 16), tokenizer(), 99)
        answers = iter(asked)

        def validate() -> float:
            answer = next(answers, None)
            if answer is None:
                raise Killed
            return answer

        return encoder, distil(encoder, lesson, validate, settings, folder)

    whole, log = train(values, None)
    with pytest.raises(Killed):
        train(values[:3], tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["step-00000002"]
    resumed, again = train(values[3:], tmp_path)
    assert torch.equal(resumed.model.words.weight, whole.model.words.weight)
    assert again.chosen == log.chosen == (2 if select_by == "validation" else 3)
    assert again.tokens == log.tokens
    pd.testing.assert_frame_equal(again.log, log.log)
    pd.testing.assert_frame_equal(again.epochs, log.epochs)
