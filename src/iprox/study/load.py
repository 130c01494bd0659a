"""From a study file to a validated study and its runs.

Values come, later ones winning, from: the schema's defaults, the study's preset, the study
file, the run's preset (which takes the place of the study's), the run's own keys.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from iprox.errors import ConfigError, did_you_mean, shorten
from iprox.study.presets import PRESETS
from iprox.study.schema import NAME, RunConfig, StudyConfig
from iprox.study.scorers import GRADIENT

KNOWN_TASKS: dict[str, dict[str, Any]] = {
    "mmlu": {"name": "mmlu", "kind": "mmlu"},
    "bbh": {"name": "bbh", "kind": "bbh"},
}
"""Tasks that may be given by name alone: their development examples come with lm-eval."""

MAX_READABLE = 32
"""Characters of a grid value that a run's name shows."""

RUN_KEYS = tuple(RunConfig.model_fields)


@dataclass(frozen=True)
class Run:
    """One way of scoring the pool.

    Attributes:
        name: Its name, unique in the study: the name in the file plus its grid values.
        group: The name without the number of a random draw; runs of a group are averaged.
        config: All its sections, resolved.
        changed: Dotted key -> value of what it sets itself.
        draw: Number of the random draw, from 0; 0 for runs without draws.
    """

    name: str
    group: str
    config: RunConfig
    changed: dict[str, Any]
    draw: int = 0

    @property
    def proxy(self) -> str | None:
        """Kind of the model that scores; None when none does."""
        return self.config.proxy.kind if self.config.scorer.kind == GRADIENT else None

    @property
    def sparsity(self) -> float | str | None:
        """Share of the target that the run asks to remove, ``auto`` for one that is looked for.

        None when it removes nothing.
        """
        made_of_target = self.proxy not in (None, "target", "model")
        return self.config.proxy.sparsity if made_of_target else None


@dataclass(frozen=True)
class Study:
    """A validated study: its own sections, and its runs in the order of the file."""

    config: StudyConfig
    runs: list[Run]
    files: tuple[Path, ...] = field(default=())


def load_study(paths: Sequence[Path], extra: Mapping[str, Any] | None = None) -> Study:
    """Read one study file, or a study file and overlays on top of it.

    Args:
        paths: YAML files; later ones win, mappings are merged.
        extra: Top-level keys that win over all files.

    Raises:
        ConfigError: A file is not YAML, or the study breaks the schema.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, read_yaml(path))
    return parse_study(merge(merged, dict(extra or {})), paths)


def parse_study(raw: Mapping[str, Any], files: Iterable[Path] = ()) -> Study:
    """Validate the content of study files.

    Args:
        raw: Their merged content.
        files: Where it came from, to name file and line in errors.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of range, runs of equal names.
    """
    files = tuple(files)
    # A section whose keys are all commented out is YAML's null: it means its defaults.
    body = {key: copy.deepcopy(value) for key, value in raw.items() if value is not None}
    preset = _preset(body.get("preset", "default"), "preset", files)
    runs_raw = body.get("runs")
    body["tasks"] = _tasks(body.get("tasks"), files)
    config = _validate(StudyConfig, merge(preset, body), (), files)
    own = {k: v for k, v in body.items() if k in RUN_KEYS}
    runs = [
        run
        for name, overrides in (runs_raw or {}).items()
        for run in _expand_run(name, overrides, own, preset, files)
    ]
    names = [run.name for run in runs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(
            "two runs have the same name",
            where=_place(("runs",), files),
            value=twice[0],
            fix="rename one; a grid value is appended to the name, for example iprox-0.5",
        )
    if "base" in names:
        raise ConfigError(
            "a run may not be called base",
            where=_place(("runs", "base"), files),
            fix="base is the untouched target in every table; choose another name",
        )
    return Study(config, runs, files)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file is missing, is not UTF-8 YAML, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StudyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "a study file cannot be read",
            where=path,
            value=str(error),
            fix="give the path of a YAML file in UTF-8",
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(
            "a study file is not valid YAML",
            where=where,
            value=getattr(error, "problem", str(error)),
            fix="check indentation, quotes, brackets and repeated keys on this line",
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            "a study file is not a mapping",
            where=path,
            value=content,
            allowed="key: value lines",
            fix="begin with config/config.yaml, and change what differs",
        )
    _refuse_cycles(content, path)
    return content


class _StudyLoader(yaml.SafeLoader):
    """Plain YAML, in which a key that stands twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; without this check the later of two keys would win."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_cycles(content: Any, path: Path) -> None:
    """Refuse a mapping or list that contains itself through a YAML alias.

    Raises:
        ConfigError: There is one.
    """
    open_now: set[int] = set()
    done: set[int] = set()

    def visit(value: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(value, (dict, list)) or id(value) in done:
            return
        if id(value) in open_now:
            raise ConfigError(
                "a study file contains itself: a YAML alias leads back to where it stands",
                where=f"{path} (key {'.'.join(keys)})",
                fix="write the values out instead of the alias",
            )
        open_now.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            visit(item, (*keys, str(key)))
        open_now.discard(id(value))
        done.add(id(value))

    visit(content, ())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; mappings are merged, everything else replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _preset(name: Any, where: str, files: tuple[Path, ...]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            "unknown preset",
            where=_place(tuple(where.split(".")), files),
            value=name,
            allowed=did_you_mean(str(name), PRESETS),
        )
    return PRESETS[name]


def _tasks(raw: Any, files: tuple[Path, ...]) -> Any:
    """Tasks given by name become mappings; names must be known and differ."""
    if not isinstance(raw, list):
        return raw
    tasks = []
    for i, task in enumerate(raw):
        if isinstance(task, str):
            if task not in KNOWN_TASKS:
                raise ConfigError(
                    "unknown task",
                    where=_place(("tasks", i), files),
                    value=task,
                    allowed=did_you_mean(task, KNOWN_TASKS),
                    fix="describe your own task: {name: ..., kind: messages, path: ...}",
                )
            task = KNOWN_TASKS[task]
        elif isinstance(task, dict) and task.get("name") in KNOWN_TASKS:
            task = {**KNOWN_TASKS[task["name"]], **task}
        tasks.append(task)
    names = [t.get("name") for t in tasks if isinstance(t, dict)]
    if "all" in names:
        raise ConfigError(
            "a task may not be called all",
            where=_place(("tasks", names.index("all")), files),
            fix="all means every task in file names; choose another name",
        )
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise ConfigError(
            "two tasks have the same name",
            where=_place(("tasks",), files),
            value=twice[0],
            fix="remove one, or give it a name of its own: {name: ..., kind: ..., path: ...}",
        )
    return tasks


def _expand_run(
    name: Any,
    overrides: Mapping[str, Any],
    own: Mapping[str, Any],
    preset: Mapping[str, Any],
    files: tuple[Path, ...],
) -> Iterator[Run]:
    """The runs of one entry: one per combination of its grid values, one per random draw.

    Args:
        name: The entry's.
        overrides: What it sets. A preset of its own takes the place of the study's, and wins over
            what the study file says.
        own: What the study file says of all runs.
        preset: Of the study.
        files: Named in errors.
    """
    preset_name = overrides.get("preset")
    if preset_name is None:
        base = merge(preset, own)
    else:
        base = merge(own, _preset(preset_name, f"runs.{name}.preset", files))
    for values, point in _grid(overrides):
        settings = merge(base, point)
        config = _validate(RunConfig, settings, ("runs", name), files, under=overrides).settled()
        full_name = "-".join([str(name), *(_readable(v) for v in values)])
        changed = flatten(point)
        draws = config.scorer.draws if config.scorer.kind == "random" else 1
        if draws == 1:
            yield Run(full_name, full_name, config, changed)
            continue
        for draw in range(draws):
            yield Run(f"{full_name}-{draw + 1}", full_name, config, changed, draw)


def _grid(overrides: Mapping[str, Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Each combination of the listed values: (values in order, overrides with single values)."""
    axes = list(_axes(overrides, RunConfig))
    for values in itertools.product(*(options for _, options in axes)):
        point = copy.deepcopy(dict(overrides))
        for (path, _), value in zip(axes, values, strict=True):
            inner = point
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
        yield list(values), point


def _axes(
    tree: Mapping[str, Any], model: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Keys that hold a list where the schema wants a single value."""
    for key, value in tree.items():
        field_info = model.model_fields.get(key)
        if field_info is None:
            continue
        kind = field_info.annotation
        if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _axes(value, kind, (*path, key))
        elif isinstance(value, list) and typing.get_origin(kind) is not list:
            if not value:
                raise ConfigError(
                    "a grid is empty", where=".".join((*path, key)), fix="list at least one value"
                )
            yield (*path, key), value


def _readable(value: Any) -> str:
    """A grid value as part of a run's name: of plain characters, and short."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = "".join(c if (c.isascii() and c.isalnum()) or c in "._" else "-" for c in text)
    if len(plain) <= MAX_READABLE:
        return plain
    return f"{plain[:MAX_READABLE]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _validate(
    model: type[Any],
    raw: Mapping[str, Any],
    prefix: tuple[Any, ...],
    files: tuple[Path, ...],
    under: Mapping[str, Any] | None = None,
) -> Any:
    """Validate, and turn the first failure into one message with file, line and key.

    Args:
        model: Section class to validate against.
        raw: Values.
        prefix: Key path of ``raw`` in the file.
        files: The study files, last one first in precedence.
        under: The part that stands below ``prefix`` in the file; a wrong key that is not in it
            was inherited from the study's own sections and is reported there.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first, path = problems[0], _key_path(problems[0])
        same = [p for p in problems if _key_path(p) == path]  # one for each form a value may have
        inherited = under is not None and path and path[0] not in under
        full = path if inherited else (*prefix, *path)
        key = ".".join(map(str, full))
        others = len(problems) - len(same)
        more = f" ({others} more problems after this one)" if others else ""
        allowed: object = None
        what = f"{key or 'the study'}: {_plain(same)}{more}"
        if first["type"] == "extra_forbidden":
            what = f"unknown key {key}{more}"
            allowed = did_you_mean(str(path[-1]), _keys_at(model, path[:-1]))
        elif first["type"] == "missing":
            what = f"missing key {key}{more}"
        elif first["type"] == "string_pattern_mismatch" and NAME in first["msg"]:
            what = f"{key}: not a name that files can have{more}"
            allowed = "1 to 64 of the letters A to Z and a to z, digits, . _ and -, no sign first"
        raise ConfigError(
            what,
            where=_place(full, files),
            value=None if first["type"] == "missing" else first.get("input"),
            allowed=allowed,
            fix="config/README.md lists every key with its type, default and meaning",
        ) from None


def _key_path(problem: Any) -> tuple[Any, ...]:
    """Where a problem is, without Pydantic's names of the forms that a value may have."""
    forms = ("function-", "constrained-", "literal[")
    path = tuple(p for p in problem["loc"] if p != "[key]" and not str(p).startswith(forms))
    return path[:-1] if path and path[-1] in ("int", "float", "str") else path


def _plain(problems: Sequence[Any]) -> str:
    """Pydantic's messages about one key without their preambles."""
    first, *others = (problem["msg"].removeprefix("Value error, ") for problem in problems)
    rest = (message.removeprefix("Input should be ") for message in others)
    return shorten(", or ".join([first, *rest]))


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys the schema knows at a path."""
    current: Any = model
    for part in path:
        if isinstance(part, int) or not hasattr(current, "model_fields"):
            continue
        info = current.model_fields.get(str(part))
        kinds = [info.annotation, *typing.get_args(info.annotation)] if info else []
        current = next(
            (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), current
        )
    return sorted(getattr(current, "model_fields", {}))


def _place(path: tuple[Any, ...], files: tuple[Path, ...]) -> str:
    """``file:line (key)`` of a key path; the deepest part that a file really has."""
    key = ".".join(map(str, path))
    best: tuple[int, str] = (0, "")
    for file in files:
        depth, line = _find_line(file, path)
        if depth >= best[0] and line:
            best = (depth, f"{file}:{line}")
    return f"{best[1]} (key {key})" if best[1] else f"key {key}"


def _find_line(file: Path, path: tuple[Any, ...]) -> tuple[int, int]:
    """(how many parts of the path the file has, line of the last of them)."""
    try:
        node = yaml.compose(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return 0, 0
    depth, line = 0, 1
    for part in path:
        child = None
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(part):
                    child, line = value_node, key_node.start_mark.line + 1
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            child = node.value[part]
            line = child.start_mark.line + 1
        if child is None:
            break
        node, depth = child, depth + 1
    return depth, line


def dump_study(study: Study) -> str:
    """The resolved study as YAML, for ``study.yaml``."""
    body = json.loads(study.config.model_dump_json(exclude={"runs", "data_dir"}))
    body["runs"] = {run.name: run.changed for run in study.runs}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
