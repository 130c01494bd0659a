"""The tables behind ``iprox cost``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iprox.cli.planning import lines as plan_lines
from iprox.cli.planning import load_plan
from iprox.cli.render import Facts, Page, Table, emit, human_bytes, human_flops, human_memory
from iprox.errors import ConfigError, ModelError
from iprox.numerics.ranks import Architecture, model_size
from iprox.plan.estimate import Estimator, Need
from iprox.plan.forecast import (
    Check,
    Line,
    Measured,
    Rates,
    check,
    comparable,
    lines,
    makespan,
    measured_rates,
)
from iprox.plan.history import Made, read_history
from iprox.plan.nodes import Node, Plan
from iprox.plan.sizes import find_architecture
from iprox.plan.volumes import Volumes, target_of
from iprox.progress import clock

ASSUMED_TFLOPS = 120.0
"""What one data-centre GPU sustains in bfloat16 on models of some billions of parameters."""

CPU_JOBS = 2
"""Jobs with a model that the workflow runs at a time on a CPU; measured rates are of one of them
while the other runs."""


@dataclass(frozen=True)
class Question:
    """What ``iprox cost`` was asked; None where an option was left out."""

    configs: list[Path]
    data_dir: str | None = None
    pool: int | None = None
    tokens: float | None = None
    gpus: int | None = None
    tflops: float | None = None
    model_config: Path | None = None


@dataclass(frozen=True)
class Forecast:
    """The answer.

    Attributes:
        plan: The study.
        arch: Sizes of the target.
        arch_source: Where they were found.
        rates: Operations per second, and where they are from.
        sources: What the numbers of examples and tokens rest on.
        lines: Every stage.
        checks: Predictions against earlier runs.
        devices: Stages with a model that run at a time.
        on_gpu: Whether they run on GPUs.
    """

    plan: Plan
    arch: Architecture
    arch_source: str
    rates: Rates
    sources: dict[str, str]
    lines: list[Line]
    checks: list[Check]
    devices: int
    on_gpu: bool


def forecast(question: Question, root: Path = Path()) -> Forecast:
    """Predict a study.

    Args:
        question: What is asked.
        root: The folder that holds ``results``.

    Raises:
        ConfigError: The study breaks the schema, the size of its pool is not known, or a training
            is spread over more GPUs than asked about.
        ModelError: The sizes of its target, or of another model it scores with, are not known.
    """
    plan = load_plan(question.configs, question.data_dir, weights=False)
    folder = Path(plan.study.config.data_dir or ".")
    target, pool = plan.shared["target"], plan.shared["pool"]
    arch, arch_source = find_architecture(target, folder, root, question.model_config)
    history = read_history(root)
    known, of = comparable(history, target, True if question.gpus else None)
    on_gpu = known[0].on_gpu if known else True
    measured = _measured(known, Volumes(history), folder, root)
    assumed = 1e12 * (question.tflops or ASSUMED_TFLOPS)
    if question.tflops or not measured:
        rates = Rates(assumed, f"assumed: {assumed / 1e12:g} TFLOP/s a device (--tflops)")
    else:
        rates = measured_rates(measured, assumed, f"measured: {of} ({len(measured)} artifacts)")
    sizes = {} if question.pool is None else {pool.id: question.pool}
    volumes = Volumes(history, sizes, question.tokens)
    spread = plan.study.config.train_gpus if on_gpu else 1
    devices = (question.gpus or spread) if on_gpu else CPU_JOBS
    if devices < spread:
        raise ConfigError(
            "a training is spread over more GPUs than there are",
            where="train_gpus, --gpus",
            value=f"{spread} of {devices}",
            fix="ask about at least as many GPUs, or lower train_gpus",
        )
    estimators = {target.id: Estimator(arch, volumes, on_gpu, spread)}
    for other in (node for node in plan.nodes.values() if node.stage == "target"):
        if other.id not in estimators:
            sizes_of, _ = find_architecture(other, folder, root)
            estimators[other.id] = Estimator(sizes_of, volumes, on_gpu, spread)

    def need_of(node: Node) -> Need:
        return estimators[(target_of(node) or target).id].need(node)

    stages = [(x.node, x.finished and not sizes, x.runs) for x in plan_lines(plan, root)]
    return Forecast(
        plan,
        arch,
        arch_source,
        rates,
        volumes.sources,
        lines(stages, need_of, rates, spread),
        check(measured, assumed),
        devices,
        on_gpu,
    )


def _measured(
    known: Sequence[Made], volumes: Volumes, data_dir: Path, root: Path
) -> list[Measured]:
    """Finished stages with their needs; those of a model whose sizes are gone are left out."""
    estimators: dict[str, Estimator | None] = {}
    found = []
    for made in known:
        target = target_of(made.node)
        if target is None:
            found.append(Measured(made, Need()))
            continue
        if target.id not in estimators:
            try:
                arch, _ = find_architecture(target, data_dir, root)
                estimators[target.id] = Estimator(arch, volumes, made.on_gpu)
            except ModelError:
                estimators[target.id] = None
        estimator = estimators[target.id]
        if estimator is not None:
            found.append(Measured(made, estimator.need(made.node)))
    return found


def print_cost(question: Question, as_json: bool) -> None:
    """Print a prediction as tables, or as JSON with a row per stage."""
    answer = forecast(question)
    if as_json:
        print(json.dumps(_as_json(answer), indent=1, sort_keys=True))
    else:
        emit(page(answer))


def page(answer: Forecast) -> Page:
    """The prediction for people."""
    blocks: list[Facts | Table] = [_totals(answer), _stages(answer), _runs(answer)]
    blocks.append(Facts("what this rests on", _basis(answer)))
    if answer.checks:
        blocks.append(_checks(answer.checks))
    return Page(f"predicted cost of study {answer.plan.name}", blocks)


def _totals(answer: Forecast) -> Facts:
    """The study in a few numbers, stages that runs share counted once."""
    todo = [line for line in answer.lines if not line.finished]
    working = [line for line in answer.lines if line.need.flops]
    to_work = [line for line in working if not line.finished]
    device = "GPU" if answer.on_gpu else "CPU"
    at_once = f"{answer.devices} {device} jobs at a time"
    parameters = model_size(answer.arch).total
    return Facts(
        "in all",
        {
            "target": f"{parameters / 1e6:,.0f} M parameters, from {answer.arch_source}",
            "stages": f"{len(answer.lines)}, {len(todo)} of them to run",
            "operations": human_flops(_flops(answer.lines)),
            f"{device} time": f"{clock(_seconds(working))} (to run: {clock(_seconds(to_work))})",
            f"from start to end, {at_once}": f"{clock(makespan(answer.lines, answer.devices))} "
            f"(to run: {clock(makespan(todo, answer.devices))})",
            "peak memory of a job": human_memory(_memory(answer.lines)),
            "disk": human_bytes(sum(line.need.disk for line in answer.lines)),
        },
    )


def _stages(answer: Forecast) -> Table:
    columns = ["stage", "jobs", "to run", "operations", "time", "memory", "disk"]
    rows = []
    for stage in dict.fromkeys(line.node.stage for line in answer.lines):
        own = [line for line in answer.lines if line.node.stage == stage]
        rows.append(
            [
                stage,
                sum(line.node.shards for line in own),
                sum(line.node.shards for line in own if not line.finished),
                human_flops(_flops(own)),
                clock(_seconds(own)),
                human_memory(_memory(own)),
                human_bytes(sum(line.need.disk for line in own)),
            ]
        )
    note = "memory is that of the largest job; times are without the start of a job"
    return Table("per stage", columns, rows, note=note)


def _runs(answer: Forecast) -> Table:
    columns = ["run", "operations", "time alone", "time of its own", "memory", "disk of its own"]
    rows = []
    for run in answer.plan.runs:
        needed = [line for line in answer.lines if run in line.runs]
        own = [line for line in needed if line.runs == (run,)]
        rows.append(
            [
                run,
                human_flops(_flops(needed)),
                clock(_seconds(needed)),
                clock(_seconds(own)),
                human_memory(_memory(needed)),
                human_bytes(sum(line.need.disk for line in own)),
            ]
        )
    note = "alone: without the other runs; its own: what no other run of the study needs"
    return Table("per run", columns, rows, note=note)


def _basis(answer: Forecast) -> dict[str, str]:
    rates = {
        f"rate of {stage}": f"{rate / 1e9:,.3g} GFLOP/s"
        for stage, rate in sorted(answer.rates.per_stage.items())
    }
    basis = {"speed": answer.rates.source, **rates, **dict(sorted(answer.sources.items()))}
    if not answer.checks:
        return {**basis, "checked": "never: nothing comparable has run here yet"}
    last = max(row.last for row in answer.checks)
    ratios = [row.seconds for row in answer.checks if row.seconds is not None]
    far = f"time predicted / measured from {min(ratios):.2f} to {max(ratios):.2f} by stage"
    return {**basis, "checked": f"against runs until {last}: {far if ratios else 'memory only'}"}


def _checks(checks: Sequence[Check]) -> Table:
    """Prediction over measurement: 1 is right, 2 is twice too much."""
    rows = [
        [
            row.stage,
            row.n,
            None if row.seconds is None else f"{row.seconds:.2f}",
            None if row.spread is None else f"{row.spread[0]:.2f} to {row.spread[1]:.2f}",
            None if row.memory is None else f"{row.memory:.2f}",
            None if row.disk is None else f"{row.disk:.2f}",
            row.last,
        ]
        for row in checks
    ]
    columns = ["stage", "artifacts", "time", "range", "memory", "disk", "last run"]
    note = "medians; the time of each artifact is predicted from the rates of the others"
    return Table("predicted / measured", columns, rows, note=note)


def _as_json(answer: Forecast) -> dict[str, Any]:
    todo = [line for line in answer.lines if not line.finished]
    return {
        "study": answer.plan.name,
        "parameters": model_size(answer.arch).total,
        "devices": answer.devices,
        "on_gpu": answer.on_gpu,
        "flops": _flops(answer.lines),
        "seconds": _seconds(answer.lines),
        "seconds_to_run": _seconds(todo),
        "seconds_from_start_to_end": makespan(answer.lines, answer.devices),
        "seconds_from_start_to_end_to_run": makespan(todo, answer.devices),
        "peak_memory_bytes": _memory(answer.lines),
        "disk_bytes": sum(line.need.disk for line in answer.lines),
        "stages": [
            {
                "stage": line.node.stage,
                "id": line.node.id,
                "runs": list(line.runs),
                "finished": line.finished,
                "jobs": line.node.shards,
                "flops": line.need.flops,
                "tokens": line.need.tokens,
                "seconds": line.seconds,
                "peak_memory_bytes": line.need.memory,
                "disk_bytes": line.need.disk,
            }
            for line in answer.lines
        ],
        "basis": _basis(answer),
        "checks": [asdict(row) for row in answer.checks],
    }


def _flops(found: Sequence[Line]) -> float:
    return sum(line.need.flops for line in found)


def _seconds(found: Sequence[Line]) -> float:
    return sum(line.seconds for line in found)


def _memory(found: Sequence[Line]) -> float:
    return max((line.need.memory for line in found), default=0.0)
