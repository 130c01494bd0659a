"""For every key of the schema: which stages a change makes anew, in studies of several kinds.

The answers stand in ``reruns.txt``. After a change of the schema or the plan, write them anew with
``IPROX_WRITE_GOLDEN=1 pytest tests/test_reruns.py`` and read the diff: a stage too many costs
hours, one too few serves a stale result.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from iprox.cli.artifact import STAGES
from iprox.plan.plan import plan_study
from iprox.study.load import merge, parse_study
from iprox.study.schema import StudyConfig

GOLDEN = Path(__file__).with_name("reruns.txt")
AFTER = "features ranking fidelity selection finetune evaluation"
"""Written as three dots in the answers."""

BASE: dict[str, Any] = {
    "study": "s",
    "pool": {"path": "pool.jsonl", "limit": 1000},
    "target": {"model": "model"},
    "tasks": [{"name": "t", "kind": "messages", "path": "task.jsonl"}],
    "runs": {"r": {}},
}
CONTEXTS: dict[str, dict[str, Any]] = {
    "ipsvd": {},
    "aligned": {"proxy": {"passes": "both"}},
    "auto": {"proxy": {"sparsity": "auto", "max_cost": 0.9}},
    "blocks": {"proxy": {"kind": "layers"}},
    "other model": {"proxy": {"kind": "model", "model": "small"}},
    "ekfac": {"influence": {"estimator": "ekfac"}, "curvature": {"labels": "sampled"}},
    "countsketch": {"features": {"kind": "countsketch"}},
    "logra": {"features": {"kind": "logra"}},
    "projection": {"features": {"kind": "random"}},
    "epochs": {"warmup": {"epochs": 2.0}, "influence": {"checkpoints": "epochs"}},
    "random": {"scorer": {"kind": "random", "draws": 2}},
    "bm25": {"scorer": {"kind": "bm25"}},
    "length": {"scorer": {"kind": "length"}},
    "dsir": {"scorer": {"kind": "dsir"}},
    "repsim": {"scorer": {"kind": "repsim"}},
    "influcoder": {"scorer": {"kind": "influcoder"}, "features": {"kind": "lora"}},
    "regression": {"scorer": {"kind": "regression"}},
    "dpp": {"features": {"kind": "logra"}, "select": {"method": "dpp", "tasks": "union"}},
    "threshold": {"features": {"kind": "logra"}, "select": {"method": "threshold"}},
}
"""What a study is over :data:`BASE`: kinds of proxy, estimator, features and scorer."""

VALUES: dict[str, Any] = {
    "study": "other",
    "data_dir": "elsewhere",
    "shards": 4,
    "preset": "paper",
    "until": "fidelity",
    "target.model": "another",
    "target.revision": "v2",
    "pool.path": "pool.csv",
    "pool.name": None,  # three other sources of a pool, each in place of path
    "pool.hub": None,
    "pool.package": None,
    "pool.limit": 900,
    "select.count": 7,
    "select.quotas": {"*": 0.5},
    "pool.max_chars": 500,
    "tasks": None,  # a list: its keys are below
    "tasks[].name": "u",
    "tasks[].kind": "tydiqa",
    "tasks[].path": "other.jsonl",
    "tasks[].prompts": "prompts.json",
    "tasks[].test": "test.jsonl",
    "tasks[].queries": 3,
    "tasks[].test_limit": 3,
    "tasks[].shots": 1,
    "runs": None,
    "split.warmup": 0.1,
    "warmup.epochs": 3.0,
    "scorer.draws": 3,
    "curvature.labels": "empirical",
    "proxy.sparsity": 0.31,
    "proxy.model": "smaller",
    "proxy.revision": "v2",
    "proxy.max_cost": 0.8,
    "proxy.rank_multiple": 16,
    "probe.tokens": 64,
    "proxy.layers.include": ["*_proj"],
    "proxy.layers.exclude": ["*down_proj"],
    "fidelity.floor": 0.7,
    "fidelity.top": [0.2],
    "report.find": ["unsafe"],
}
"""A changed value where the type alone does not give one; None: the key is not tried alone."""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and field of every key of a section, and of the sections in it."""
    for name, info in model.model_fields.items():
        kinds = [info.annotation, *typing.get_args(info.annotation)]
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        is_list = typing.get_origin(info.annotation) is list
        if is_list and sections or not sections:
            yield f"{prefix}{name}", info
        for section in sections:
            if f"{prefix}{name}" not in VALUES or is_list:
                yield from keys(section, f"{prefix}{name}{'[]' if is_list else ''}.")
            else:
                yield f"{prefix}{name}", info


KEYS = dict(keys(StudyConfig))


def other_value(key: str) -> Any:
    """A value of a key that is not its default."""
    if key in VALUES:
        return VALUES[key]
    info = KEYS[key]
    kind, default = info.annotation, info.default
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return next(value for value in typing.get_args(kind) if value != default)
    if kind is bool:
        return not default
    if isinstance(default, float):
        return default / 2 if default else 0.5
    if isinstance(default, int):
        return default + 1
    if kind is str:
        return "other"
    return {"*": 0.5} if typing.get_origin(kind) is dict else 5


def changed(body: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    if key.startswith("tasks[]."):
        return merge(body, {"tasks": [body["tasks"][0] | {key.removeprefix("tasks[]."): value}]})
    change: Any = value
    for part in reversed(key.split(".")):
        change = {part: change}
    return merge(body, change)


def stages(body: dict[str, Any]) -> set[tuple[str, str]]:
    nodes = plan_study(parse_study(body)).nodes
    return {key for key in nodes if key[0] != "report"}


@cache
def before(context: str) -> frozenset[tuple[str, str]]:
    return frozenset(stages(merge(BASE, CONTEXTS[context])))


@cache
def answer(key: str) -> str:
    """``key = value`` and, a line per kind of answer, the studies and the stages made anew."""
    value, found = other_value(key), {}
    for context in CONTEXTS:
        body = merge(BASE, CONTEXTS[context])
        fixed = merge(BASE, CONTEXTS[context]).get(key.split(".")[0])
        if isinstance(fixed, dict) and fixed.get(key.split(".")[-1]) == value:
            continue
        try:
            new = stages(changed(body, key, value)) - before(context)
        except Exception as error:  # what cannot be combined has no answer, but says so
            found.setdefault(f"refused: {str(error).splitlines()[0]}", []).append(context)
            continue
        order = [stage for stage in STAGES if any(s == stage for s, _ in new)]
        said = " ".join(order).replace(AFTER, "...")
        found.setdefault(said or "nothing", []).append(context)
    lines = [
        f"  {'all' if len(where) == len(CONTEXTS) else ', '.join(where)}: {what}"
        for what, where in found.items()
    ]
    return "\n".join([f"{key} = {value}", *lines])


TRIED = [key for key in KEYS if key not in VALUES or VALUES[key] is not None]


def idle() -> list[str]:
    """Keys whose change makes nothing anew in any of the studies."""
    words = (": nothing", ": refused")
    return [
        key
        for key in TRIED
        if all(any(word in line for word in words) for line in answer(key).splitlines()[1:])
    ]


def golden() -> str:
    """All answers, after those keys that make nothing anew here."""
    head = f"What a changed key makes anew; ... is {AFTER}."
    none = "\n  ".join(["Nothing in any of these studies:", *idle()])
    return "\n\n".join([head, none, *map(answer, TRIED)]) + "\n"


def read_golden() -> dict[str, str]:
    blocks = GOLDEN.read_text().strip().split("\n\n")[2:]
    return {block.split(" = ")[0]: block for block in blocks}


def test_every_key_of_the_schema_has_an_answer() -> None:
    if os.environ.get("IPROX_WRITE_GOLDEN"):
        GOLDEN.write_text(golden())
    assert list(read_golden()) == TRIED, "IPROX_WRITE_GOLDEN=1 pytest tests/test_reruns.py"


@pytest.mark.parametrize("key", TRIED)
def test_a_changed_key_makes_anew_what_depends_on_it(key: str) -> None:
    assert answer(key) == read_golden().get(key)


@pytest.mark.parametrize("context", CONTEXTS)
def test_going_back_makes_nothing_anew(context: str) -> None:
    body = merge(BASE, CONTEXTS[context])
    for key in TRIED:
        try:
            there = changed(body, key, other_value(key))
            stages(there)
        except Exception:
            continue
        assert stages(merge({}, body)) == before(context)


OUTSIDE = ("study", "data_dir", "shards", "report.examples", "report.find")
"""Keys that change no result."""


@pytest.mark.parametrize("key", OUTSIDE)
def test_keys_outside_every_identity_make_nothing_anew(key: str) -> None:
    assert answer(key).splitlines()[1:] == ["  all: nothing"]


def test_keys_that_make_nothing_anew_are_known() -> None:
    """Such a key is read by no stage, is missing in the plan, or needs a study of another kind."""
    assert golden().split("\n\n")[1] == GOLDEN.read_text().split("\n\n")[1]
