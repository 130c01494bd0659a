"""The parts of the suite; each runs in a process of its own and returns rows."""

from __future__ import annotations

import importlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import compress, fit, floor, material, ours
from bench.agreement import compare
from bench.peers import less
from bench.problem import Answer, Problem, Scoring, pose
from bench.rows import Row
from bench.timing import in_turn, peak_bytes, ratio_to_best
from iprox.data.chat import Encoded
from iprox.engine.loss import Batch
from iprox.models.device import dtype_of
from iprox.models.layers import scored_linears
from iprox.models.load import load_model
from iprox.study.schema import LayersSection

SWEEP_TOKENS = 512
"""Tokens of a point of a sweep over lengths, tasks or ranks."""

QUERY_RANK = 32
CUT = f"ours, queries of rank {QUERY_RANK}"
THIN_BACKWARD = f"backward-{material.BACKWARD}"

TAIL_TOKENS = 1536
"""Tokens of each of the pools whose throughput is compared."""

Plan = dict[tuple[str, str, int], Callable[[], object]]
"""(case, model, queries) -> what to run."""


class Setting(NamedTuple):
    """What a run of the suite was asked for."""

    work: Path
    n_examples: int
    rounds: int

    def texts(self) -> tuple[list[Encoded], list[Encoded], int]:
        """Pool, queries and the token id of padding."""
        texts, pad_id = material.read_texts(self.work)
        return texts[: self.n_examples], texts[-material.N_QUERIES :], pad_id

    def problem(self, model: Any) -> Problem:
        """The suite's problem at a model."""
        return pose(model, *self.texts())


def scores(setting: Setting, dtype: str) -> list[Row]:
    """Plain passes and the exact scorer on target and proxies; then brute force, untimed."""
    kind = dtype_of(dtype)
    problems = {
        "target": setting.problem(load_model(setting.work / "target", kind)),
        **{
            name: setting.problem(load_model(setting.work / name, kind))
            for name in ("svd-0.5", "svd-0.7", THIN_BACKWARD)
        },
    }
    target = problems["target"]
    plan: Plan = {}
    for name, run in floor.floors(target, padded(target)).items():
        plan[name, "target", 0] = run
    for model, problem in problems.items():
        if model != "target":
            plan["frozen", model, 0] = floor.floors(problem, ())["frozen"]
        for n_queries in (1, 3):
            plan["ours", model, n_queries] = ours.prepare(problem.asking(n_queries))
    for model in ("target", THIN_BACKWARD):
        plan[CUT, model, 3] = ours.prepare(problems[model], QUERY_RANK)
    rows = _timed("scores", plan, target, setting.rounds, dtype)
    truth = _truth(setting, problems, dtype)
    for row in rows:
        if row.case in ("ours", CUT) and row.queries == 3 and row.model in truth:
            reference, query_norms = truth[row.model]
            answer = ours.prepare(problems[row.model], QUERY_RANK if row.case == CUT else 0)()
            row.cosine_error, row.spearman = compare(answer, reference, query_norms)
            row.against = "brute force in float32"
    return rows


def blocks(setting: Setting, dtype: str) -> list[Row]:
    """Four blocks of Llama-3.2-3B's shapes: dense and at two sparsities."""
    texts, _ = material.read_texts(setting.work)
    pool = material.cut(texts, [len(t) for t in texts[:6]], material.LARGE_VOCABULARY)
    kind = dtype_of(dtype)
    dense = _unposed(material.large_blocks(None).to(kind), pool, 1)
    plan: Plan = {
        (name, "dense", 0): run for name, run in floor.frozen_floors(dense, padded(dense)).items()
    }
    plan["ours", "dense", 1] = ours.prepare(dense)
    for sparsity in (0.5, 0.7):
        proxy = _unposed(material.large_blocks(sparsity).to(kind), pool, 1)
        plan["ours", f"rho {sparsity}", 1] = ours.prepare(proxy)
    return _timed("blocks", plan, dense, setting.rounds, dtype)


def scaling(setting: Setting) -> list[Row]:
    """Cost against pool size, length, number of tasks, rank, and the shape of the lengths."""
    texts, _ = material.read_texts(setting.work)
    target = load_model(setting.work / "target")
    rows: list[Row] = []
    for n in (4, 8, 16):
        rows += _point("pool size", n, _unposed(target, texts[:n], 1), setting.rounds)
    for length in (32, 64, 128, 256, 512):
        pool = material.cut(texts, [length] * (SWEEP_TOKENS // length))
        rows += _point("length", length, _unposed(target, pool, 1), setting.rounds)
    pool = material.cut(texts, [64] * (SWEEP_TOKENS // 64))
    for n_queries in (1, 2, 4, 8):
        problem = _unposed(target, pool, n_queries)
        rows += _point("tasks", n_queries, problem, setting.rounds)
    dense = _unposed(target, pool, 1)
    for sparsity in material.SPARSITIES:
        proxy = _unposed(load_model(setting.work / f"svd-{sparsity}"), pool, 1)
        rows += _point("rank", sparsity, proxy, setting.rounds, floor_of=dense)
    return rows + _tail(target, texts, setting.rounds)


def curvature(setting: Setting) -> list[Row]:
    """Our EK-FAC fit beside two frozen passes, and scores of its directions beside TracIn's."""
    problem = setting.problem(load_model(setting.work / "target")).asking(1)
    fitted = fit.Fit(problem)
    steps = fitted.first_pass, fitted.eigenbases, fitted.second_pass
    rows = _fit_rows(problem, "ours", *steps, rounds=setting.rounds)
    directions = replace(problem, gradients=fitted.directions(problem.gradients))
    plan: Plan = dict(_frozen(problem))
    plan["ours, TracIn", "target", 1] = ours.prepare(problem)
    plan["ours, EK-FAC", "target", 1] = ours.prepare(directions)
    return rows + _timed("directions", plan, problem, setting.rounds, "float32")[-2:]


def peer_curvature(setting: Setting, name: str) -> list[Row]:
    """A library's EK-FAC fit beside two frozen passes."""
    module = importlib.import_module(f"bench.peers.{name}")
    problem = setting.problem(load_model(setting.work / "target")).asking(1)
    own = _at(problem, load_model(setting.work / "target"))
    with tempfile.TemporaryDirectory(dir=setting.work) as scratch:
        return _fit_rows(problem, name, *module.fit(own, Path(scratch)), rounds=setting.rounds)


def _fit_rows(
    problem: Problem,
    case: str,
    first_pass: Callable[[], None],
    eigenbases: Callable[[], None],
    second_pass: Callable[[], None],
    rounds: int,
) -> list[Row]:
    """The passes of a fit as a ratio to two frozen passes, and the seconds between them.

    Eigenbases do not depend on how many texts are passed, so they have no ratio.
    """
    plan: Plan = {key: _twice(run) for key, run in _frozen(problem).items()}
    plan["first", "target", 0] = first_pass
    seconds = in_turn(plan, rounds)
    between = in_turn({"eigenbases": eigenbases}, 1)["eigenbases"][0]
    after = in_turn({"second": second_pass}, rounds)["second"]
    floors = [taken for (name, _, _), taken in seconds.items() if name in floor.FROZEN]
    passes = [a + b for a, b in zip(seconds["first", "target", 0], after, strict=True)]
    ratio, spread = ratio_to_best(passes, floors)
    about = {"examples": len(problem.pool), "tokens": problem.tokens}
    return [
        Row(
            "curvature",
            f"{case}, both passes",
            "target",
            seconds=statistics.median(passes),
            ratio=ratio,
            spread=spread,
            **about,
        ),
        Row("curvature", f"{case}, eigenbases", "target", seconds=between, **about),
    ]


def _frozen(problem: Problem) -> Plan:
    """The plain passes that ratios are taken to."""
    floors = floor.frozen_floors(problem, padded(problem))
    return {(name, "target", 0): run for name, run in floors.items()}


def _twice(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: (run(), run())


def memory(setting: Setting, model: str, n_queries: int, how: str) -> list[Row]:
    """Peak memory of the scorer above that of the frozen pass.

    Args:
        setting: What the run was asked for.
        model: Which model.
        n_queries: Query gradients.
        how: Precision of the query gradients, ``cut`` to a low rank, or in a file on ``disk``.
    """
    rank = QUERY_RANK if how == "cut" else 0
    dtype = dtype_of("float32" if how in ("cut", "disk") else how)

    def prepare(problem: Problem, scratch: Path) -> Scoring:
        # a layer at a time, as the stage reads them from its store
        stored = replace(problem, gradients=RandomGradients(problem.layers, n_queries))
        return ours.prepare(stored, rank, dtype, on_disk=how == "disk")

    names = {"float32": "ours", "cut": CUT, "disk": "ours, queries on disk"}
    case = names.get(how, f"ours, queries in {how}")
    return [_memory(setting, model, n_queries, case, prepare, takes_gradients=False)]


def decomposition(setting: Setting, model: str) -> list[Row]:
    """IPSVD of layers of a model's shapes, beside dense roots and a full SVD."""
    return compress.layers(model)


def alignment(setting: Setting, kind: str) -> list[Row]:
    """Peak memory of a training step, or of an alignment step of some kind."""
    return [compress.step_memory(setting.work, kind)]


def peer(setting: Setting, name: str, dtype: str) -> list[Row]:
    """One library beside the frozen pass, its agreement with ours, in one process."""
    module = importlib.import_module(f"bench.peers.{name}")
    rows, kind = [], dtype_of(dtype)
    floor_problem = setting.problem(load_model(setting.work / "target", kind))
    reference = ours.prepare(floor_problem)()
    for n_queries in (1, 3):
        problem = floor_problem.asking(n_queries)
        passed = problem.pool
        if module.READS_QUERIES:
            passed = [*problem.pool, *problem.queries]
        base = replace(problem, pool=sorted(passed, key=len, reverse=True))
        own = _at(problem, load_model(setting.work / "target", kind))
        with tempfile.TemporaryDirectory(dir=setting.work) as scratch:
            scoring = module.prepare(own, Path(scratch))
            plan = {
                (n, "target", 0): run for n, run in floor.frozen_floors(base, padded(base)).items()
            }
            plan[name, "target", n_queries] = scoring
            row = _timed("peers", plan, problem, setting.rounds, dtype)[-1]
            row.cosine_error, row.spearman = compare(
                scoring(), reference, floor_problem.query_norms()
            )
        row.against, row.note = "ours", module.DIFFERS
        rows.append(row)
    return rows


def peer_memory(setting: Setting, name: str) -> list[Row]:
    """Peak memory of one library above that of the frozen pass."""
    module = importlib.import_module(f"bench.peers.{name}")
    return [_memory(setting, "target", 1, name, module.prepare, not module.READS_QUERIES)]


def padded(problem: Problem) -> list[Batch]:
    """The pool in the padded batches of the stages."""
    return [batch for _, batch in ours.batched(problem)]


def _timed(
    section: str,
    plan: Plan,
    base: Problem,
    rounds: int,
    dtype: str,
) -> list[Row]:
    """Rows of a plan (case, model, queries) -> run, whose first model has the floor."""
    seconds = in_turn(plan, rounds)
    first = next(iter(plan))[1]
    floors = [
        t for (case, model, _), t in seconds.items() if case in floor.FROZEN and model == first
    ]
    rows = []
    for (case, model, n_queries), taken in seconds.items():
        ratio, spread = ratio_to_best(taken, floors)
        rows.append(
            Row(
                section,
                case,
                model,
                dtype,
                n_queries,
                len(base.pool),
                base.tokens,
                seconds=statistics.median(taken),
                ratio=ratio,
                spread=spread,
            )
        )
    return rows


def _point(
    section: str, x: float, problem: Problem, rounds: int, floor_of: Problem | None = None
) -> list[Row]:
    """One point of a sweep: the scorer beside the frozen pass."""
    base = floor_of or problem
    plan: Plan = {
        (name, "target", 0): run for name, run in floor.frozen_floors(base, padded(base)).items()
    }
    model = "target" if floor_of is None else f"svd-{x}"
    plan["ours", model, len(problem.queries)] = ours.prepare(problem)
    row = _timed(section, plan, problem, rounds, "float32")[-1]
    row.x = x
    return [row]


def _tail(target: Any, texts: Sequence[Encoded], rounds: int) -> list[Row]:
    """A pool of long-tailed lengths and one of equal lengths with as many examples and tokens."""
    tail = long_tail(TAIL_TOKENS, longest=material.MAX_LENGTH)
    equal = [TAIL_TOKENS // len(tail)] * len(tail)
    equal[0] += TAIL_TOKENS - sum(equal)
    problems = {
        name: _unposed(target, material.cut(texts, lengths), 1)
        for name, lengths in (("equal lengths", equal), ("long tail", tail))
    }
    seconds = in_turn({name: ours.prepare(p) for name, p in problems.items()}, rounds)
    return [
        Row(
            "tail",
            name,
            "target",
            queries=1,
            examples=len(problem.pool),
            tokens=problem.tokens,
            seconds=statistics.median(seconds[name]),
            ratio=ratio_to_best(seconds[name], [seconds["equal lengths"]])[0],
        )
        for name, problem in problems.items()
    ]


def long_tail(tokens: int, longest: int) -> list[int]:
    """Lengths of a long-tailed pool: quantiles of a log-normal with sigma 0.9 and median 64."""
    lengths: list[int] = []
    normal = statistics.NormalDist()
    n = 1
    while sum(lengths) < tokens:  # more quantiles until there are enough tokens
        n += 1
        ranks = [(i + 0.5) / n for i in range(n)]
        lengths = [min(longest, round(64 * math.exp(0.9 * normal.inv_cdf(r)))) for r in ranks]
    lengths[-1] -= sum(lengths) - tokens
    return lengths


def _truth(
    setting: Setting, problems: Mapping[str, Problem], dtype: str
) -> dict[str, tuple[Answer, Tensor]]:
    """Brute force in float32 with all queries on target and proxy, and the query norms.

    In bfloat16 on the target alone: the gradients of a plain SVD, whose predictions are noise,
    are mostly rounding there.
    """
    found = {}
    for model in ("target", "svd-0.5") if dtype == "float32" else ("target",):
        problem = problems[model]
        if dtype != "float32":
            problem = setting.problem(load_model(setting.work / model))
        found[model] = less.prepare(problem, setting.work)(), problem.query_norms()
    return found


def _unposed(model: Any, pool: Sequence[Encoded], n_queries: int) -> Problem:
    """A problem with random query gradients: what they are does not change the cost."""
    layers = scored_linears(model, LayersSection())
    gradients = dict(RandomGradients(layers, n_queries))
    longest_first = sorted(pool, key=len, reverse=True)
    return Problem(model, layers, longest_first, longest_first[:n_queries], gradients, pad_id=0)


class RandomGradients(Mapping[str, Tensor]):
    """Random query gradients (queries, out, in), each layer's made when it is asked for."""

    def __init__(self, layers: Mapping[str, nn.Linear], n_queries: int) -> None:
        self.layers, self.n_queries = layers, n_queries

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(list(self.layers).index(name))
        return torch.randn(self.n_queries, *self.layers[name].weight.shape, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _at(problem: Problem, model: Any) -> Problem:
    """The same problem on another copy of its model."""
    return replace(problem, model=model, layers=scored_linears(model, LayersSection()))


def _memory(
    setting: Setting,
    model: str,
    n_queries: int,
    case: str,
    prepare: Callable[[Problem, Path], Scoring],
    takes_gradients: bool = True,
) -> Row:
    """Peak of a case above the peak that the frozen pass left in this process.

    The query gradients count as the case's own, whether it is given them or takes them.
    """
    pool, queries, _ = setting.texts()
    loaded = load_model(setting.work / model)
    plain = _unposed(loaded, pool, 0)
    for run in floor.frozen_floors(plain, padded(plain)).values():
        run()
    before = peak_bytes()
    given = _unposed(loaded, pool, n_queries if takes_gradients else 0)
    problem = replace(given, queries=queries[:n_queries])
    with tempfile.TemporaryDirectory(dir=setting.work) as scratch:
        prepare(problem, Path(scratch))()
    extra = (peak_bytes() - before) / 2**20
    return Row(
        "memory",
        case,
        model,
        queries=n_queries,
        examples=len(pool),
        tokens=problem.tokens,
        memory_mib=extra,
    )
