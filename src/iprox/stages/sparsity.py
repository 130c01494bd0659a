"""Stage ``sparsity``: the smallest proxy whose scores agree with the target's well enough.

Proxies are cut from one decomposition, put together and scored on the fidelity slice in memory,
before any alignment. The agreement falls as more is removed, so a bisection over a fixed grid of
sparsities needs four of them at most. Should it not fall everywhere, the proxy that is chosen
meets the floor all the same; a still smaller one may be missed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from iprox.errors import ConfigError
from iprox.models.flops import load_of, network_of
from iprox.models.layers import scored_linears
from iprox.models.load import as_proxy
from iprox.numerics import flops
from iprox.numerics.correlation import bootstrap, interval, spearman
from iprox.progress import track
from iprox.stages.factors import cut_layers
from iprox.stages.feature_store import Features, read_features
from iprox.stages.features import score_texts
from iprox.stages.fidelity import score_pairs
from iprox.stages.passes import Reader, model_sizes, open_reader
from iprox.stages.queries import Queries
from iprox.stages.query import gradient_norm, group_gradient, group_queries
from iprox.stages.texts import Texts, pool_texts, query_texts
from iprox.store.job import Job, Metrics
from iprox.store.manifest import dump_json
from iprox.store.tables import write_table
from iprox.study.schema import ChatSection, InfluenceSection, LayersSection, ProxySection

log = logging.getLogger(__name__)

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Tried:
    """One proxy that was looked at.

    Attributes:
        sparsity: Share of each replaced layer's parameters that was asked to be removed.
        parameters_ratio: Parameters of the model over the target's.
        flops_ratio: FLOPs of scoring the slice over the target's.
        verdict: ``met``, ``below the floor``, ``above the ceiling`` or ``replaces no layer``.
        spearman: Mean over tasks of the rank correlation with the target's scores; None when it
            was not scored, because it costs too much or because no floor was asked for.
        low: Lower end of its 95 % interval; None without resamples.
        high: Upper end.
    """

    sparsity: float
    parameters_ratio: float
    flops_ratio: float
    verdict: str
    spearman: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        known = "" if self.spearman is None else f"Spearman {self.spearman:.3f}, "
        cost = f"{self.flops_ratio:.2f} of the target's FLOPs"
        return f"sparsity {self.sparsity:g}: {known}{cost}, {self.verdict}"


MET, BELOW, ABOVE, DENSE = "met", "below the floor", "above the ceiling", "replaces no layer"


def make(job: Job) -> Metrics:
    """Write ``tried.parquet``, a row for each proxy looked at, and ``chosen.json``.

    Returns:
        The sparsity chosen, its fidelity and FLOPs ratio, and how many proxies were tried.

    Raises:
        ConfigError: No proxy meets the floor and the ceiling; says what was tried.
        NumericsError: Scores cannot be compared.
    """
    search = job.params["search"]
    floor, max_cost = search["floor"], search["max_cost"]
    bench = Bench.open(job)

    def look(sparsity: float) -> Tried:
        tried = bench.look(sparsity, floor, max_cost)
        log.info("%s", tried)
        return tried

    tried, chosen = bisect(GRID, look, floor is not None)
    if chosen is None:
        raise _nothing_is_enough(tried, floor, max_cost)
    table = pd.DataFrame([asdict(t) for t in tried]).assign(chosen=[t is chosen for t in tried])
    table = table.astype(dict.fromkeys(("spearman", "low", "high"), float))
    write_table(job.out / "tried.parquet", table, search)
    about = asdict(chosen) | {"floor": floor, "max_cost": max_cost}
    (job.out / "chosen.json").write_text(dump_json(about), encoding="utf-8")
    metrics: Metrics = {"sparsity": chosen.sparsity, "flops_ratio": chosen.flops_ratio}
    if chosen.spearman is not None:
        metrics["spearman"] = chosen.spearman
    return metrics | {"tried": len(tried), "flops": bench.flops}


def bisect(
    grid: Sequence[float], look: Callable[[float], Tried], to_floor: bool
) -> tuple[list[Tried], Tried | None]:
    """Find the highest sparsity that still meets the floor, or the lowest within the ceiling.

    Args:
        grid: Sparsities, ascending.
        look: What becomes of a sparsity.
        to_floor: Whether there is a floor; without one the largest proxy is wanted.

    Returns:
        Everything that was tried, in that order, and what was chosen, None if nothing is enough.
    """
    tried: dict[int, Tried] = {}
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = look(grid[middle])
        costly = tried[middle].verdict in (ABOVE, DENSE)
        if costly or (to_floor and tried[middle].verdict == MET):
            low = middle
        else:
            high = middle
    found = tried.get(low if to_floor else high)
    return list(tried.values()), found if found and found.verdict == MET else None


def _nothing_is_enough(
    tried: list[Tried], floor: float | None, max_cost: float | None
) -> ConfigError:
    """What was tried, and what came closest."""
    scored = [t for t in tried if t.spearman is not None]
    best = max(scored, key=lambda t: t.spearman or -1, default=None)
    wanted = [f"a fidelity of {floor:g}"] if floor is not None else []
    wanted += [f"{max_cost:g} of the target's FLOPs"] if max_cost is not None else []
    lines = "\n".join(f"    {t}" for t in sorted(tried, key=lambda t: t.sparsity))
    return ConfigError(
        f"no proxy reaches {' within '.join(wanted)}; tried:\n{lines}",
        where="fidelity.floor, proxy.max_cost",
        value=None if best is None else f"the best was {best}",
        fix="lower the floor or raise the ceiling; or give proxy.sparsity, and align the proxy",
    )


@dataclass
class Bench:
    """The target, what it scored, and everything that proxies of it are scored with.

    Attributes:
        job: The job.
        reader: The target.
        slice: Texts of the examples that are compared.
        queries: Texts of each task's queries.
        target: The target's features of the same examples.
        influence: How gradients become scores.
        flops: Operations so far.
        exact: The target's query gradients, once they were needed.
    """

    job: Job
    reader: Reader
    slice: Texts
    queries: dict[str, Texts]
    target: Features
    influence: InfluenceSection
    flops: float = 0.0
    exact: Queries | None = None

    @classmethod
    def open(cls, job: Job) -> Bench:
        """Load the target and the texts."""
        reader, chat = open_reader(job, "warmup"), job.section(ChatSection, "chat")
        target = read_features(job.parents["target"])
        ids = target.example_id.to_pylist()
        return cls(
            job,
            reader,
            pool_texts(job.parents["pool"], ids, reader.tokenizer, chat),
            {t: query_texts(f, reader.tokenizer, chat) for t, f in job.roles("task").items()},
            target,
            job.section(InfluenceSection, "influence"),
        )

    def look(self, sparsity: float, floor: float | None, max_cost: float | None) -> Tried:
        """Cut a proxy, and score the slice with it if its cost allows and a floor asks for it."""
        section = self.job.section(ProxySection, "factors")
        cut = section.model_copy(update={"sparsity": sparsity})
        factors, _ = cut_layers(self.job.parents["decomposition"], cut)
        proxy = self._reader(factors)
        cost = self._operations(proxy, self.influence.query_rank) / self._operations(self.reader)
        sizes = [model_sizes(reader)["parameters"] for reader in (proxy, self.reader)]
        about = {
            "sparsity": sparsity,
            "parameters_ratio": sizes[0] / sizes[1],
            "flops_ratio": cost,
        }
        if not factors:
            return Tried(**about, verdict=DENSE)
        if max_cost is not None and cost > max_cost:
            return Tried(**about, verdict=ABOVE)
        if floor is None:
            return Tried(**about, verdict=MET)
        value, low, high = self._fidelity(proxy)
        verdict = MET if value >= floor else BELOW
        return Tried(**about, verdict=verdict, spearman=value, low=low, high=high)

    def _reader(self, factors: dict[str, Any]) -> Reader:
        """A proxy in memory, frozen."""
        passes = self.job.params["passes"]
        model = as_proxy(self.reader.model, factors, passes=passes).eval().requires_grad_(False)
        layers = scored_linears(model, self.job.section(LayersSection, "layers"))
        return self.reader._replace(model=model, layers=layers)

    def _operations(self, reader: Reader, query_rank: int = 0) -> float:
        """FLOPs of scoring the slice once."""
        network, load = network_of(reader.model, reader.layers), load_of(self.slice.encoded)
        return flops.features(network, load, len(self.target.columns), query_rank=query_rank)

    def _fidelity(self, proxy: Reader) -> tuple[float, float | None, float | None]:
        """Mean Spearman over tasks with the target's scores, and its 95 % interval.

        Raises:
            NumericsError: Too few examples can be scored.
        """
        search = self.job.params["search"]
        queries = self._queries(proxy)
        scored = score_texts(proxy, queries, self.slice, self.influence).features
        pairs, _ = score_pairs(scored, self.target, self.influence.score)
        self.flops += self._operations(proxy, self.influence.query_rank)
        values = [float(spearman(ours, theirs)) for ours, theirs in pairs.values()]
        draws = [
            bootstrap(spearman, ours, theirs, search["bootstrap"], search["seed"])
            for ours, theirs in pairs.values()
        ]
        low, high = interval(np.mean(draws, axis=0)) if search["bootstrap"] else (None, None)
        return float(np.mean(values)), low, high

    def _queries(self, proxy: Reader) -> Queries:
        """What a proxy is asked: its own query gradients; the target's by the backward pass alone.

        Raises:
            NumericsError: A loss or gradient is not finite, or a mean gradient is zero.
        """
        if self.job.params["passes"] == "backward":
            if self.exact is None:
                self.exact = self._taken(self.reader)
            return self.exact
        return self._taken(proxy)

    def _taken(self, reader: Reader) -> Queries:
        network, unit = (
            network_of(reader.model, reader.layers),
            self.influence.val_agg == "mean_unit",
        )
        self.flops += sum(
            flops.query(network, load_of(texts.encoded), unit) for texts in self.queries.values()
        )
        return mean_queries(reader, self.queries, self.influence)


def mean_queries(reader: Reader, tasks: dict[str, Texts], influence: InfluenceSection) -> Queries:
    """Query gradients of all tasks at a model, in memory.

    Raises:
        NumericsError: A loss or gradient is not finite, or a mean gradient is zero.
    """
    columns: list[str] = []
    norms: list[float] = []
    stores: list[dict[str, list[np.ndarray]]] = []
    grouped = {t: group_queries(x.supervised_only(), influence.val_agg) for t, x in tasks.items()}
    total = sum(len(members) for groups in grouped.values() for members in groups.values())
    with track(total, "queries", "query gradients") as progress:
        for task, groups in grouped.items():
            store: dict[str, list[np.ndarray]] = {}
            for group, members in groups.items():
                gradients = group_gradient(reader, members, influence, progress)
                for name, gradient in gradients.items():
                    kept = gradient.float().cpu().numpy()
                    store.setdefault(f"gradients/{name}", []).append(kept)
                norms.append(gradient_norm(gradients, group))
                by_subtask = influence.val_agg == "subtask_max"
                columns.append(f"{task}/{group}" if by_subtask else task)
            stores.append(store)
    places = [(s, g) for s, groups in enumerate(grouped.values()) for g in range(len(groups))]
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in reader.layers.items()}
    return Queries(columns, np.array(norms), places, stores, shapes, {})
