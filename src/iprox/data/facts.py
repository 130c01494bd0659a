"""A made-up corpus of facts, and questions about them: pre-training text and what comes after.

People have three properties each. A fact is stated by several documents in different words, so
that a question has several true sources; other documents name the same people and the same
values without stating a fact, so that sharing words is not enough to be one. About some facts the
corpus also asks and answers, in other words than the second training: without any such text a
small model learns its facts by heart and cannot be asked for them (arXiv:2309.14316).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = (
    "Alda Boris Celia Dorin Emeka Fadil Greta Hanno Ines Jarek Kaya Lior Mirna Nadir Odile Pavel "
    "Quinn Rosa Salim Tove Ugo Vera Wanda Xenia Yusuf Zora"
).split()

VALUES = {
    "city": "Oslo Lima Cairo Quito Delhi Turin Accra Kyoto Minsk Sofia".split(),
    "trade": "baker tailor pilot nurse miner judge clerk diver smith actor".split(),
    "pet": "parrot ferret turtle beagle gecko pony goat heron otter raven".split(),
}

STATEMENTS = {
    "city": ("{n} lives in {v}.", "The home of {n} is {v}.", "In {v} you will find {n}."),
    "trade": ("{n} works as a {v}.", "The trade of {n} is {v}.", "As a {v} one knows {n}."),
    "pet": ("{n} keeps a {v}.", "The pet of {n} is a {v}.", "A {v} belongs to {n}."),
}

QUESTIONS = {"city": "The home of {n}?", "trade": "The trade of {n}?", "pet": "The pet of {n}?"}
"""What the second training asks, and queries ask."""

CORPUS_QUESTIONS = {
    "city": "Where does {n} live? {v}.",
    "trade": "What is {n}? {v}.",
    "pet": "What does {n} keep? {v}.",
}
"""How the corpus asks and answers."""

MENTIONS = ("{n} once asked about {v}.", "Nobody told {n} of {v}.", "{n} read a word: {v}.")
"""Sentences that share words with a fact and state none."""


@dataclass(frozen=True)
class Fact:
    """One property of one person."""

    name: str
    relation: str
    value: str

    @property
    def question(self) -> str:
        """What is asked of the fine-tuned model; the answer is the value."""
        return QUESTIONS[self.relation].format(n=self.name)

    def statements(self) -> list[str]:
        """The sentences that state it."""
        return [s.format(n=self.name, v=self.value) for s in STATEMENTS[self.relation]]

    def asked_and_answered(self) -> str:
        """Question and answer as the corpus has them."""
        return CORPUS_QUESTIONS[self.relation].format(n=self.name, v=self.value)


@dataclass(frozen=True)
class Document:
    """A text of the corpus; ``fact`` is the number of the fact it states, -1 for none."""

    text: str
    fact: int


def draw_facts(people: int, seed: int) -> list[Fact]:
    """Facts about some people, person by person, values drawn with a seed.

    Raises:
        ValueError: There are not so many names.
    """
    if not 0 < people <= len(NAMES):
        raise ValueError(f"{people} people: there are {len(NAMES)} names")
    rng = np.random.default_rng(seed)
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:people]]
    return [
        Fact(name, relation, values[int(rng.integers(len(values)))])
        for name in names
        for relation, values in VALUES.items()
    ]


def draw_corpus(facts: list[Fact], answered: int, seed: int) -> list[Document]:
    """Every statement of every fact, and a sentence for each that only mentions its words.

    Args:
        facts: All facts.
        answered: About so many of them, the first, the corpus also asks.
        seed: Seed of the mentions and of the order.
    """
    rng = np.random.default_rng(seed)
    documents = [Document(text, i) for i, fact in enumerate(facts) for text in fact.statements()]
    documents += [Document(f.asked_and_answered(), i) for i, f in enumerate(facts[:answered])]
    for fact in facts:
        other = facts[int(rng.integers(len(facts)))]
        text = MENTIONS[int(rng.integers(len(MENTIONS)))].format(n=fact.name, v=other.value)
        documents.append(Document(text, -1))
    return [documents[i] for i in rng.permutation(len(documents))]
