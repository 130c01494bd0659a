"""Hours of a study before it runs, from operations and the rates earlier runs reached.

A stage takes its operations divided by the rate of finished stages of its kind on the same
device in the same precision. Without any, a stated rate is assumed. The same prediction is made
of every finished stage from the *other* finished ones and compared with what it took.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from iprox.plan.estimate import TRAININGS, Need, needs_model
from iprox.plan.history import Made
from iprox.plan.nodes import Node
from iprox.plan.volumes import target_of

SOLVER_SHARE = 0.01
"""Rate of eigensolvers in float64 as a share of the rate of a model's products, when assumed."""

START_S = 6.0
"""Seconds until a job of the workflow begins its work: processes, libraries, the plan."""

FIXED_S = 10.0
"""Seconds of a stage that passes nothing through a model, when none has been measured."""


@dataclass(frozen=True)
class Rates:
    """How fast stages run on one kind of device.

    Attributes:
        per_stage: Stage -> floating-point operations per second.
        per_kind: The same over all stages with a model (True), or of linear algebra (False).
        fixed: Stage -> seconds, of stages without operations.
        assumed: Operations per second where nothing was measured.
        source: Where the rates are from, in words.
    """

    assumed: float
    source: str
    per_stage: Mapping[str, float] = field(default_factory=dict)
    per_kind: Mapping[bool, float] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, node: Node, need: Need) -> float:
        """How long a stage takes on one device."""
        if not need.flops:
            return self.fixed.get(node.stage, FIXED_S)
        return need.flops / self.rate(node)

    def rate(self, node: Node) -> float:
        """Operations per second of a stage: measured for its kind, for any, or assumed."""
        model = needs_model(node)
        share = 1.0 if model else SOLVER_SHARE
        found = self.per_stage.get(node.stage, self.per_kind.get(model))
        return share * self.assumed if found is None else found


@dataclass(frozen=True)
class Measured:
    """A finished stage beside what would be predicted of it."""

    made: Made
    need: Need

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.made.node.stage


def measured_rates(found: Sequence[Measured], assumed: float, source: str) -> Rates:
    """Rates over finished stages: operations of all by seconds of all."""
    working = [m for m in found if m.need.flops and m.made.seconds]
    by_stage = {s: [m for m in working if m.stage == s] for s in {m.stage for m in working}}
    by_kind = {k: [m for m in working if needs_model(m.made.node) == k] for k in (True, False)}
    idle: dict[str, list[float]] = {}
    for m in found:
        if not m.need.flops:
            idle.setdefault(m.stage, []).append(m.made.seconds)
    return Rates(
        assumed,
        source,
        {stage: _rate(of) for stage, of in by_stage.items()},
        {kind: _rate(of) for kind, of in by_kind.items() if of},
        {stage: statistics.mean(seconds) for stage, seconds in idle.items()},
    )


def _rate(found: Iterable[Measured]) -> float:
    kept = list(found)
    return sum(m.need.flops for m in kept) / sum(m.made.seconds for m in kept)


def comparable(
    history: Sequence[Made], target: Node, on_gpu: bool | None
) -> tuple[list[Made], str]:
    """Finished stages whose speed says something about a study, and what they have in common.

    They are of one device, that of the latest; of the study's precision; of the same model if
    there are any, else of any model.

    Args:
        history: Finished artifacts.
        target: The study's target.
        on_gpu: The kind of device asked for; any when None.
    """
    wanted = target.params["target"]
    working = [m for m in history if needs_model(m.node) and on_gpu in (None, m.on_gpu)]
    dtypes = [m for m in working if _precision(m) == wanted["dtype"]]
    if not dtypes:
        return [], ""
    device = max(dtypes, key=lambda m: m.finished).device
    here = [m for m in history if m.device == device and _precision(m) in (None, wanted["dtype"])]
    same = [m for m in here if _model(m) == wanted["model"]]
    model = wanted["model"] if any(needs_model(m.node) for m in same) else None
    kept = [m for m in here if _model(m) in (None, model)] if model else here
    of = model or "other models"
    return kept, f"{of}, {wanted['dtype']}, {device}"


def _precision(made: Made) -> str | None:
    compute = made.node.params.get("compute")
    return None if compute is None else str(compute["dtype"])


def _model(made: Made) -> str | None:
    target = target_of(made.node)
    return None if target is None else str(target.params["target"]["model"])


# --- prediction against measurement ----------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How far predictions of one kind of stage are from what was measured.

    Attributes:
        stage: Its name.
        n: Finished artifacts compared.
        seconds: Median ratio predicted / measured of the time, each predicted from the others.
        spread: Smallest and largest of these ratios.
        memory: Median ratio of peak memory.
        disk: Median ratio of bytes on disk.
        last: When the latest of them was finished.
    """

    stage: str
    n: int
    seconds: float | None
    spread: tuple[float, float] | None
    memory: float | None
    disk: float | None
    last: str


def check(found: Sequence[Measured], assumed: float) -> list[Check]:
    """Prediction and measurement of finished stages side by side, a row for each kind of stage."""
    rows = []
    for stage in dict.fromkeys(m.stage for m in found if m.need.flops):
        own = [m for m in found if m.stage == stage and m.need.flops and m.made.seconds]
        ratios = [r for m in own if (r := _left_out(m, found, assumed)) is not None]
        rows.append(
            Check(
                stage,
                len(own),
                _median((ratio, 1) for ratio in ratios),
                (min(ratios), max(ratios)) if ratios else None,
                _median((m.need.memory, m.made.peak_memory) for m in own),
                _median((m.need.disk, m.made.size) for m in own),
                max(m.made.finished for m in own),
            )
        )
    return rows


def _median(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Median ratio predicted / measured; None when nothing was measured."""
    ratios = [predicted / measured for predicted, measured in pairs if measured]
    return statistics.median(ratios) if ratios else None


def _left_out(one: Measured, found: Sequence[Measured], assumed: float) -> float | None:
    """Ratio predicted / measured of one artifact's time; None when no other tells its rate."""
    others = [m for m in found if m is not one]
    rates = measured_rates(others, assumed, "")
    if one.stage not in rates.per_stage and needs_model(one.made.node) not in rates.per_kind:
        return None
    return rates.seconds(one.made.node, one.need) / one.made.seconds


# --- the whole study -------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One planned stage.

    Attributes:
        node: The stage.
        need: What it takes.
        seconds: How long, on one device.
        finished: Whether it is there already.
        runs: Runs that need it.
        gpus: Devices that each of its jobs takes at once.
    """

    node: Node
    need: Need
    seconds: float
    finished: bool
    runs: tuple[str, ...]
    gpus: int = 1


def lines(
    nodes: Iterable[tuple[Node, bool, tuple[str, ...]]],
    need_of: Callable[[Node], Need],
    rates: Rates,
    train_gpus: int = 1,
) -> list[Line]:
    """Every stage with its need and time.

    Args:
        nodes: Stages, whether each is finished, and the runs that need it.
        need_of: Works out needs.
        rates: Work out times.
        train_gpus: GPUs that a training is spread over.
    """
    found = []
    for node, finished, runs in nodes:
        need = need_of(node)
        gpus = train_gpus if node.stage in TRAININGS else 1
        found.append(Line(node, need, rates.seconds(node, need), finished, runs, gpus))
    return found


def makespan(found: Sequence[Line], devices: int, start_s: float = START_S) -> float:
    """Seconds until the last stage is done, when ``devices`` stages with a model run at a time.

    A stage starts as soon as its parents are done and a device is free, the one with the longest
    way to go first; stages without a model wait for no device. Shards run side by side; a training
    that is spread waits until all its devices are free.

    Args:
        found: Stages in any order; parents that are not among them are done.
        devices: GPUs, or CPU jobs that do not slow each other; no stage takes more at once.
        start_s: Seconds each job takes before its work begins.
    """
    by_key = {(line.node.stage, line.node.id): line for line in found}
    parents = {
        key: [k for p in line.node.parents.values() if (k := (p.stage, p.id)) in by_key]
        for key, line in by_key.items()
    }
    tails = _tails(by_key, parents, start_s)
    free, done = [0.0] * devices, dict[tuple[str, str], float]()
    while len(done) < len(by_key):
        ready = [k for k in by_key if k not in done and all(p in done for p in parents[k])]
        begins = {k: max([0.0, *(done[p] for p in parents[k])]) for k in ready}
        key = min(ready, key=lambda k: (max(begins[k], _wait(by_key[k], free)), -tails[k], k))
        line = by_key[key]
        if not needs_model(line.node):
            done[key] = begins[key] + start_s + line.seconds
            continue
        ends = []
        for _ in range(line.node.shards):
            places = sorted(range(devices), key=free.__getitem__)[: line.gpus]
            begin = max(begins[key], free[places[-1]])
            ends.append(begin + start_s + line.seconds / line.node.shards / line.gpus)
            for place in places:
                free[place] = ends[-1]
        done[key] = max(ends)
    return max(done.values(), default=0.0)


def _wait(line: Line, free: Sequence[float]) -> float:
    return sorted(free)[line.gpus - 1] if needs_model(line.node) else 0.0


def _tails(
    by_key: Mapping[tuple[str, str], Line],
    parents: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    start_s: float,
) -> dict[tuple[str, str], float]:
    """Seconds from the start of each stage to the end of the longest chain it begins."""
    children: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in by_key}
    for key, found in parents.items():
        for parent in found:
            children[parent].append(key)
    tails: dict[tuple[str, str], float] = {}

    def tail(key: tuple[str, str]) -> float:
        if key not in tails:
            own = start_s + by_key[key].seconds / by_key[key].gpus
            tails[key] = own + max(map(tail, children[key]), default=0.0)
        return tails[key]

    for key in by_key:
        tail(key)
    return tails
