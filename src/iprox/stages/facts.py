"""Stage ``facts``: which pre-training texts a fine-tuned model's answers come from, by each method.

A tiny model learns a made-up corpus of facts, then to answer questions about half of them. The
other half are the queries, and the documents that state a fact are its sources (the task of
multi-stage influence functions, arXiv:2505.05017, at a size where both trainings can be repeated).
Ground truth besides the sources: what leaving the documents of half of the queries' facts out of
*both* trainings really does to the loss of every query.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from iprox.data.chat import IGNORED, Encoded, completion_ids, pad_id
from iprox.data.facts import Document, Fact, draw_corpus, draw_facts
from iprox.engine.attribution import Attribution
from iprox.engine.loss import hidden_states
from iprox.models.device import make_deterministic, pick_device
from iprox.models.flops import load_of, network_of
from iprox.models.layers import scored_linears
from iprox.models.small import small_model, small_tokenizer
from iprox.numerics import flops
from iprox.numerics.correlation import spearman
from iprox.numerics.kfac import Damping
from iprox.numerics.multistage import LaterStage, proximity_of, through_stages
from iprox.numerics.retrieval import recall_at, reciprocal_ranks
from iprox.progress import track
from iprox.stages.small import in_batches, losses_of
from iprox.store.job import Job, Metrics
from iprox.store.tables import write_table
from iprox.study.schema import FactsSection, LayersSection
from iprox.training.sft import fine_tune

K = 10
"""Texts that recall counts among."""


class Trained(NamedTuple):
    """Both models of two trainings."""

    pretrained: Any
    finetuned: Any
    proximity: float  # of the second training


class Scored(NamedTuple):
    """One method's scores (documents, queries), and the operations they took.

    Attributes:
        scores: Scores; of gradients, inner products.
        flops: Operations.
        cosines: Of gradients, the same over both norms: long gradients are not rewarded.
    """

    scores: np.ndarray
    flops: float
    cosines: np.ndarray | None = None


class Setting:
    """The texts of one seed: documents, questions that are learned, and questions that are asked.

    Attributes:
        documents: The corpus.
        facts: All facts; the first half are learned as questions too.
        tokenizer: Learned from all texts.
        corpus: Encoded documents, with a loss on every token.
        learned: Encoded questions of the second training.
        queries: Encoded questions whose answers are traced.
    """

    def __init__(self, section: FactsSection, seed: int) -> None:
        self.section, self.seed = section, seed
        self.facts: list[Fact] = draw_facts(section.people, seed)
        half = len(self.facts) // 2
        self.documents: list[Document] = draw_corpus(self.facts, half, seed)
        texts = [d.text for d in self.documents] + [f.question for f in self.facts]
        self.tokenizer = small_tokenizer(texts, section.vocabulary)
        self.corpus = [self._document(d.text, f"d{i}") for i, d in enumerate(self.documents)]
        questions = [self._question(fact, f"q{i}") for i, fact in enumerate(self.facts)]
        self.learned, self.queries = questions[:half], questions[half:]

    @property
    def asked(self) -> range:
        """Numbers of the facts that are queries."""
        return range(len(self.learned), len(self.facts))

    def sources(self) -> np.ndarray:
        """Which documents state the fact of which query, (documents, queries)."""
        stated = np.array([document.fact for document in self.documents])
        return np.asarray(stated[:, None] == np.array(self.asked)[None, :])

    def train(self, corpus: Sequence[Encoded]) -> Trained:
        """Both trainings, the first on these documents; the same weights to begin with."""
        section, pad = self.section, pad_id(self.tokenizer)
        first, second = section.trainings(self.seed)
        model = small_model(
            self.tokenizer,
            width=section.width,
            blocks=section.blocks,
            heads=section.heads,
            max_length=section.max_length,
            seed=self.seed,
        ).to(pick_device())
        make_deterministic(self.seed)
        fine_tune(model, corpus, first, pad_token_id=pad, label="pre-training")
        pretrained = copy.deepcopy(model)
        make_deterministic(self.seed)
        training = fine_tune(model, self.learned, second, pad_token_id=pad)
        return Trained(pretrained, model, proximity_of(training.log["lr"]))

    def _document(self, text: str, name: str) -> Encoded:
        end = self.tokenizer.eos_token_id
        ids = [end, *completion_ids(text, self.tokenizer), end]
        return Encoded(ids, list(ids), example_id=name)

    def _question(self, fact: Fact, name: str) -> Encoded:
        """A question in the form of the corpus's texts, with a loss on its answer."""
        asked = [self.tokenizer.eos_token_id, *completion_ids(fact.question, self.tokenizer)]
        answer = completion_ids(f" {fact.value}.", self.tokenizer)
        return Encoded(asked + answer, [IGNORED] * len(asked) + answer, example_id=name)


def make(job: Job) -> Metrics:
    """Write ``methods.parquet``: ``method, mrr, mrr_cosine, recall, agreement, flops``.

    ``mrr`` and ``recall`` (among the first 10) are means over queries, ``mrr_cosine`` is the former
    by cosines of gradients, for methods that compare them. ``agreement`` is the mean
    over queries of the Spearman correlation, over groups of documents left out, of what the group's
    scores add up to and what leaving it out did to the query's loss.

    Returns:
        Counts, and the loss of the queries before and after the second training.
    """
    section = job.section(FactsSection, "facts")
    setting = Setting(section, int(job.params["seed"]))
    trained = setting.train(setting.corpus)
    found = all_methods(setting, trained, Damping(section.damping))
    groups, effects = leave_out(setting, trained, section.left_out)
    sources = setting.sources()
    rows = []
    for name, (scores, operations, cosines) in found.items():
        ranked = scores if cosines is None else cosines
        sums = np.stack([scores[group].sum(axis=0) for group in groups])  # (groups, queries)
        rows.append(
            {
                "method": name,
                "mrr": float(reciprocal_ranks(scores, sources).mean()),
                "mrr_cosine": float(reciprocal_ranks(ranked, sources).mean()),
                "recall": float(recall_at(K, scores, sources).mean()),
                "agreement": float(np.nanmean(spearman(sums.T, effects.T))),
                "flops": operations,
            }
        )
    write_table(job.out / "methods.parquet", pd.DataFrame(rows), job.params["facts"])
    before, after = (
        float(losses_of(model, setting.tokenizer, setting.queries).mean())
        for model in (trained.pretrained, trained.finetuned)
    )
    return {
        "documents": len(setting.documents),
        "queries": len(setting.queries),
        "left_out": len(groups),
        "loss_pretrained": before,
        "loss_finetuned": after,
        "proximity": trained.proximity,
    }


def leave_out(setting: Setting, trained: Trained, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What leaving documents out of both trainings does.

    Groups come in pairs: all statements of a random half of the queries' facts, and all of the
    other half.

    Returns:
        Which documents each group is, (groups, documents), and by how much the loss of every
        query grew without them, (groups, queries).
    """
    stated = np.array([document.fact for document in setting.documents])
    rng, halves = np.random.default_rng(setting.seed), list[np.ndarray]()
    while len(halves) < n:
        halves += np.array_split(rng.permutation(list(setting.asked)), 2)
    groups = np.stack([np.isin(stated, half) for half in halves[:n]])
    whole = losses_of(trained.finetuned, setting.tokenizer, setting.queries)
    effects = []
    with track(len(groups), "groups", "left out") as progress:
        for group in groups:
            kept = [e for e, gone in zip(setting.corpus, group, strict=True) if not gone]
            again = setting.train(kept).finetuned
            effects.append(losses_of(again, setting.tokenizer, setting.queries) - whole)
            progress.advance(1)
    return groups, np.stack(effects)


def all_methods(setting: Setting, trained: Trained, damping: Damping) -> dict[str, Scored]:
    """Scores of every document for every query, by each method."""
    section = LayersSection()
    corpus, learned, queries = (
        in_batches(texts, setting.tokenizer)
        for texts in (setting.corpus, setting.learned, setting.queries)
    )

    def at(model: Any, train: Any) -> Attribution:
        return Attribution(model, scored_linears(model, section), train, queries)

    later, single = at(trained.finetuned, learned), at(trained.finetuned, corpus)
    first = at(trained.pretrained, corpus)

    def solved(kind: str) -> dict[str, Tensor]:
        ends, begins = (
            (later.curvature, first.curvature)
            if kind == "kfac"
            else (later.corrected, first.corrected)
        )
        return {
            name: through_stages(
                gradients.double(),
                [LaterStage(ends[name], trained.proximity)],
                begins[name],
                damping,
            )
            for name, gradients in later.query_gradients.items()
        }

    scoring, fitting, both = costs(setting, trained.finetuned)
    found = {
        "BM25": Scored(words_in_common(setting), 0.0),
        "RepSim": Scored(*similar_states(setting, trained.finetuned)),
        "GradDot": _scored(single, single.query_gradients, scoring),
    }
    for kind, name in (("kfac", "K-FAC"), ("ekfac", "EK-FAC")):
        one = single.directions(kind, damping)
        found[f"{name}, one stage"] = _scored(single, one, scoring + fitting[kind])
        found[f"{name}, two stages"] = _scored(first, solved(kind), scoring + both[kind])
    return found


def _scored(at: Attribution, directions: dict[str, Tensor], operations: float) -> Scored:
    """Documents scored at a model against directions."""
    found = at.influences(directions)
    return Scored(found.dots.numpy(), operations, found.cosines.numpy())


def costs(setting: Setting, model: Any) -> tuple[float, dict[str, float], dict[str, float]]:
    """Operations of scoring all pairs, of fitting one curvature, and of fitting and solving two."""
    network = network_of(model, scored_linears(model, LayersSection()))
    corpus, learned, queries = map(load_of, (setting.corpus, setting.learned, setting.queries))
    n = len(setting.queries)
    scoring = flops.query(network, queries) + flops.features(network, corpus, n)
    bases = flops.eigenbases(flops.factor_blocks(network, flops.UNSPLIT))

    def fit(load: Any, corrected: bool) -> float:
        first = flops.covariance(network, load) + bases + flops.solve(network, n)
        return first + (flops.eigenvalues(network, load) if corrected else 0.0)

    one = {"kfac": fit(corpus, False), "ekfac": fit(corpus, True)}
    two = {"kfac": one["kfac"] + fit(learned, False), "ekfac": one["ekfac"] + fit(learned, True)}
    return scoring, one, two


def words_in_common(setting: Setting) -> np.ndarray:
    """BM25 of every document for question and answer, (documents, queries)."""
    import bm25s

    words = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    texts = [document.text for document in setting.documents]
    index.index(bm25s.tokenize(texts, **words), show_progress=False)
    asked = [f"{setting.facts[i].question} {setting.facts[i].value}" for i in setting.asked]
    tokens = bm25s.tokenize(asked, return_ids=False, **words)
    return np.stack([index.get_scores(query) for query in tokens], axis=1)


def similar_states(setting: Setting, model: Any) -> tuple[np.ndarray, float]:
    """Cosine of mean last hidden states, (documents, queries), and the operations."""
    network = network_of(model, scored_linears(model, LayersSection()))

    def means(texts: list[Encoded]) -> Tensor:
        parts = []
        for batch in in_batches(texts, setting.tokenizer).batches:
            with torch.no_grad():
                states = hidden_states(model, batch).double()
            places = torch.arange(states.shape[1], device=states.device)
            real = (places[None, :] < batch.lengths[:, None])[..., None]
            parts.append((states * real).sum(1) / batch.lengths[:, None])
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    scores = means(setting.corpus) @ means(setting.queries).mT
    loads = map(load_of, (setting.corpus, setting.queries))
    return scores.cpu().numpy(), sum(flops.forward(network, load, 0.0) for load in loads)
