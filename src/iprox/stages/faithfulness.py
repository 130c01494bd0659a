"""Stage ``faithfulness``: how well the scores of every run predict retraining, beside each other.

The linear datamodeling score of each way of scoring on a tiny model, with 95 % intervals over
the retrained subsets (arXiv:2303.14186, Eq. 2), and for a proxy the share of the target's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from iprox.engine.attribution import Attribution
from iprox.engine.curvature import visit_examples
from iprox.engine.loss import Batch
from iprox.engine.tangents import input_tangents
from iprox.models.layers import block_linears, scored_linears
from iprox.models.load import as_proxy
from iprox.numerics.correlation import interval
from iprox.numerics.datamodels import with_interval
from iprox.numerics.influence import random_scores
from iprox.numerics.ipsvd import DampedRoot, Directions, decompose, plain_svd, truncate
from iprox.numerics.kfac import Damping
from iprox.numerics.ranks import rank_for
from iprox.progress import track
from iprox.report.charts import CHANCE, INK, SERIES, Chart, drawing
from iprox.report.formats import interval as interval_text
from iprox.report.formats import number, text_table, write_everywhere
from iprox.stages.small import in_batches, read_role, read_small
from iprox.stages.tangents import mixtures
from iprox.store.job import Job, Metrics
from iprox.store.tables import read_arrow, write_table
from iprox.study.schema import (
    CurvatureSection,
    FaithfulnessSection,
    InfluenceSection,
    ProxySection,
    ScorerSection,
)

log = logging.getLogger(__name__)

NAMES = {"target": "target", "ipsvd": "IPSVD", "svd": "SVD"}


@dataclass(frozen=True)
class Method:
    """One run's way of scoring."""

    name: str
    scorer: ScorerSection
    proxy: ProxySection
    influence: InfluenceSection
    curvature: CurvatureSection

    @property
    def is_proxy(self) -> bool:
        """Whether something stands in for the target."""
        return self.scorer.kind == "gradient" and self.proxy.is_factorised

    @property
    def is_made_for_queries(self) -> bool:
        """Whether the proxy's factors depend on what is scored against."""
        return self.proxy.kind == "ipsvd" and self.proxy.whiten == "queries"

    @property
    def damping(self) -> Damping:
        """Of the curvature's inverse."""
        return Damping(self.curvature.damping, self.curvature.damping_mode)

    @property
    def at_target(self) -> Method:
        """The same, scored by the target itself."""
        return Method(
            f"{self.name}@target",
            self.scorer,
            ProxySection(kind="target", layers=self.proxy.layers),
            self.influence,
            self.curvature,
        )

    @property
    def model(self) -> str:
        """What scores, in words."""
        if self.scorer.kind == "random":
            return "none"
        words = NAMES[self.proxy.kind]
        if self.is_proxy:
            words += f" {self.proxy.share_removed:g}"
            words += ", backward" if self.proxy.passes == "backward" else ""
        return words


@dataclass(frozen=True)
class Truth:
    """What retraining measured for one seed.

    Attributes:
        masks: Which candidates each model was trained on, (subsets, candidates).
        losses: Its loss on every query, (subsets, queries).
    """

    masks: np.ndarray
    losses: np.ndarray


def make(job: Job) -> Metrics:
    """Write ``faithfulness.{parquet,csv,md,tex,svg,png}``, ``seeds.parquet``, ``summary.txt``.

    ``faithfulness`` has a row per run: ``run, model, estimator, score, lds, low, high, kept,
    kept_low, kept_high, seeds``; ``kept`` is a proxy's share of the score that the target has with
    the same estimator. ``seeds.parquet`` has the score of every run and seed.

    Returns:
        Number of runs, seeds and retrained models.
    """
    section = job.section(FaithfulnessSection, "faithfulness")
    methods = [method_of(name, run) for name, run in job.params["runs"].items()]
    truths = {seed: read_truth(job, seed) for seed in range(section.seeds)}
    scores: dict[str, list[np.ndarray]] = {}
    with track(section.seeds * len(methods), "scorings", "faithfulness") as progress:
        for seed in range(section.seeds):
            scorings = Scorings(job, section, seed)
            for method in methods:
                asked = [method, method.at_target] if method.is_proxy else [method]
                for one in asked:
                    scores.setdefault(one.name, []).append(scorings.score(one))
                progress.advance(1)
    table, seeds = compare(methods, scores, list(truths.values()), section.bootstrap)
    write_table(job.out / "seeds.parquet", seeds, job.params["faithfulness"])
    write_everywhere(job.out, "faithfulness", table)
    chart = draw(table)
    (job.out / "faithfulness.svg").write_text(chart.svg, encoding="utf-8")
    (job.out / "faithfulness.png").write_bytes(chart.png)
    text = summary(table)
    (job.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    log.info("how well scores predict retraining (linear datamodeling score):\n%s", text)
    models = sum(len(truth.losses) for truth in truths.values())
    return {"runs": len(methods), "seeds": section.seeds, "models": models}


def method_of(name: str, run: Mapping[str, Any]) -> Method:
    """A run's way of scoring."""
    return Method(
        name,
        ScorerSection(**run["scorer"]),
        ProxySection(**run["proxy"]),
        InfluenceSection(**run["influence"]),
        CurvatureSection(**run["curvature"]),
    )


def read_truth(job: Job, seed: int) -> Truth:
    """What was measured by all jobs that retrained models of a seed."""
    folders = job.roles(f"retrain/{seed}").values()
    rows = [row for f in folders for row in read_arrow(f / "losses.parquet").to_pylist()]
    rows.sort(key=lambda row: row["subset"])
    masks = np.array([row["kept"] for row in rows], dtype=bool)
    return Truth(masks, np.array([row["losses"] for row in rows]))


class Scorings:
    """The tiny model of one seed, and what it was trained on."""

    def __init__(self, job: Job, section: FaithfulnessSection, seed: int) -> None:
        folder = job.parents[f"small/{seed}"]
        self.model, tokenizer = read_small(folder, "full")
        texts = {
            role: read_role(job, folder, role, tokenizer, section)
            for role in ("candidate", "query")
        }
        self.ids = [e.example_id for e in texts["candidate"]]
        self.train, self.queries = (in_batches(texts[r], tokenizer) for r in texts)
        self._attributions: dict[str, Attribution] = {}

    def score(self, method: Method) -> np.ndarray:
        """Scores of all candidates for all queries, (candidates, queries)."""
        if method.scorer.kind == "random":
            drawn = random_scores(self.ids, method.scorer.seed)
            return np.repeat(drawn[:, None], len(self.queries), axis=1)
        attribution = self._attribution(method)
        directions = attribution.directions(method.influence.estimator, method.damping)
        found = attribution.influences(directions)
        chosen = found.cosines if method.influence.score == "cosine" else found.dots
        return chosen.cpu().numpy()

    def _attribution(self, method: Method) -> Attribution:
        """Model and passes of a method, kept for those that differ in estimator alone."""
        influence, curvature = method.influence, method.curvature
        settings = (influence.loss_reduction, curvature.labels, curvature.seed)
        made_for = influence.estimator if method.is_made_for_queries else None
        key = f"{method.proxy.model_dump_json()} {settings} {made_for}"
        if key not in self._attributions:
            model = self._scoring_model(method)
            layers = scored_linears(model, method.proxy.layers)
            self._attributions[key] = Attribution(
                model, layers, self.train, self.queries, *settings
            )
        return self._attributions[key]

    def _scoring_model(self, method: Method) -> Any:
        proxy = method.proxy
        if not proxy.is_factorised:
            return self.model
        layers = block_linears(self.model, proxy.layers)
        rows = Rows(layers)
        pairs = zip(self.train.batches, self.train.ids, strict=True)
        visit_examples(self.model, layers, pairs, rows, method.influence.loss_reduction)
        if method.is_made_for_queries:
            self._move_inputs(rows, method)
        factors = {}
        for name, layer in layers.items():
            rank = rank_for(
                layer.out_features,
                layer.in_features,
                proxy.share_removed,
                proxy.rank_multiple,
                proxy.rank_rounding,
                proxy.dense_rule,
            )
            if rank is not None:
                cut = truncate(directions_of(layer, *rows.of(name), proxy), rank, proxy.gauge)
                factors[name] = (cut.left.float(), cut.right.float())
        return as_proxy(self.model, factors, passes=proxy.passes).requires_grad_(False)

    def _move_inputs(self, rows: Rows, method: Method) -> None:
        """Put in the inputs' place how far they move along what the method scores against."""
        attribution = self._attribution(method.at_target)
        gradients = attribution.directions(method.influence.estimator, method.damping)
        squares = torch.stack([g.double().square().sum((1, 2)) for g in gradients.values()])
        norms = squares.sum(0).sqrt().cpu().numpy()
        rows.forget_inputs()
        for mix in torch.from_numpy(mixtures(norms, seed=0)):
            moves = {
                name: torch.einsum("q,qoi->oi", mix.to(g.device), g.double()).to(self.model.dtype)
                for name, g in gradients.items()
            }
            for batch in self.train.batches:
                visit = partial(rows.add_moved, batch)
                input_tangents(self.model, attribution.layers, moves, batch, visit)


class Rows:
    """A visitor that keeps the inputs and output gradients of every token."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._grads: dict[str, list[Tensor]] = {name: [] for name in layers}

    def __call__(self, name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
        """Keep a batch's rows of one layer."""
        self._inputs[name].append(x)
        self._grads[name].append(d)

    def forget_inputs(self) -> None:
        """Drop the inputs of all layers; others take their place."""
        self._inputs = {name: [] for name in self._inputs}

    def add_moved(self, batch: Batch, name: str, moved: Tensor) -> None:
        """Keep a batch's moving inputs (examples, tokens, in) of one layer, without padding."""
        if name in self._inputs:
            parts = zip(moved, batch.lengths.tolist(), strict=True)
            self._inputs[name] += [part[:length] for part, length in parts]

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs (rows, in) and output gradients (tokens, out) of a layer."""
        return torch.cat(self._inputs[name]), torch.cat(self._grads[name])


def directions_of(layer: nn.Linear, x: Tensor, d: Tensor, proxy: ProxySection) -> Directions:
    """Nested low-rank solutions of one layer, as a proxy section asks for them."""
    weight = layer.weight.detach()
    if proxy.kind == "svd":
        return plain_svd(weight.double())
    inputs = DampedRoot.from_rows(x, proxy.damping, proxy.damping_mode)
    if proxy.whiten == "inputs":
        grads = DampedRoot.identity(len(weight), weight)
    else:
        grads = DampedRoot.from_rows(d, proxy.damping, proxy.damping_mode)
    return decompose(weight, inputs, grads, proxy.mode, proxy.objective)


def compare(
    methods: list[Method],
    scores: Mapping[str, list[np.ndarray]],
    truths: list[Truth],
    bootstrap: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per run with intervals, and a row per run and seed.

    Args:
        methods: The runs.
        scores: Name -> scores of every seed; that of a proxy is there ``@target``, too.
        truths: What retraining measured, seed by seed.
        bootstrap: Resamples of the subsets.
    """
    rows, seeds = [], []
    for method in methods:
        groups = [(s, t.masks, t.losses) for s, t in zip(scores[method.name], truths, strict=True)]
        lds, resampled = with_interval(groups, bootstrap, seed=0)
        kept = (np.nan, np.nan, np.nan)
        if method.is_proxy:
            own = scores[method.at_target.name]
            at = [(s, t.masks, t.losses) for s, t in zip(own, truths, strict=True)]
            of_target, others = with_interval(at, bootstrap, seed=0)
            kept = (lds.mean / of_target.mean, *interval(resampled / others))
        gradient = method.scorer.kind == "gradient"
        rows.append(
            {
                "run": method.name,
                "model": method.model,
                "estimator": method.influence.estimator if gradient else "random",
                "score": method.influence.score if gradient else "",
                "lds": lds.mean,
                "low": lds.low,
                "high": lds.high,
                **dict(zip(("kept", "kept_low", "kept_high"), kept, strict=True)),
                "seeds": len(groups),
            }
        )
        for seed, group in enumerate(groups):
            seeds.append([method.name, seed, with_interval([group], 0, 0)[0].mean])
    return pd.DataFrame(rows), pd.DataFrame(seeds, columns=["run", "seed", "lds"])


def summary(table: pd.DataFrame) -> str:
    """The table as text."""
    cells = [
        [
            row["run"],
            row["model"],
            row["estimator"],
            row["score"],
            number(row["lds"]),
            interval_text(row["low"], row["high"]),
            number(row["kept"], 2),
            interval_text(row["kept_low"], row["kept_high"], 2),
        ]
        for row in table.to_dict("records")
    ]
    header = ["run", "model", "estimator", "score", "LDS", "95 %", "kept", "95 %"]
    return text_table(header, cells)


def draw(table: pd.DataFrame) -> Chart:
    """Scores of all runs as points with intervals, the best at the top."""
    shown = table.sort_values("lds", kind="stable").reset_index(drop=True)
    height = 90 + 24 * len(shown)
    unit = "linear datamodeling score; bar: 95 % interval over subsets"
    with drawing("faithfulness", "How well scores predict retraining", height, unit) as canvas:
        axes = canvas.axes
        for place, row in enumerate(shown.to_dict("records")):
            colour = INK if row["model"] == "target" else SERIES[0]
            colour = CHANCE if row["model"] == "none" else colour
            axes.plot([row["low"], row["high"]], [place, place], color=colour)
            axes.plot(row["lds"], place, marker="o", ms=6, color=colour)
        axes.set_yticks(range(len(shown)), shown["run"])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.axvline(0, color=CHANCE, lw=0.8)
    return canvas.chart
