"""What all tasks share: formatted items, their tables, seeded draws, and reading records."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from iprox.data.contamination import Recognisable, Text, in_test, refuse, texts_of
from iprox.data.pools import MESSAGES_TYPE, Message, Row, draw_key, explicit_id, hub_rows, read_rows
from iprox.data.sources import data_path
from iprox.errors import ConfigError, DataError
from iprox.study.schema import TaskSection

log = logging.getLogger(__name__)


QUERY_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("subtask", pa.string()),
        ("messages", MESSAGES_TYPE),
        ("prefix", pa.string()),
        ("eos", pa.bool_()),
    ]
)
TEST_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("subtask", pa.string()),
        ("kind", pa.string()),
        ("messages", MESSAGES_TYPE),
        ("prefix", pa.string()),
        ("eos", pa.bool_()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("plain", pa.bool_()),
        ("shots", pa.list_(pa.string())),
        ("passages", pa.list_(pa.string())),
    ]
)


Facts = dict[str, int | float | str]
"""Source and counts of a task, for its tables' metadata and the provenance."""


class Example(Protocol):
    """What every kind's example has."""

    @property
    def example_id(self) -> str:
        """Stable id."""

    @property
    def subtask(self) -> str:
        """Subject, task or language."""


ExampleT = TypeVar("ExampleT", bound=Example)


@dataclass(frozen=True)
class Item:
    """A formatted example: a row of ``queries.parquet`` or ``test.parquet``.

    Attributes:
        example_id: Its id.
        subtask: Subject, task or language.
        messages: The last one is the assistant's: ``prefix``, then the reference completion
            (empty when there is none).
        prefix: Beginning of the assistant's turn that belongs to the prompt.
        eos: Whether the completion ends with the end-of-sequence token.
        kind: ``loss`` (of the completion), ``choice`` (likelihood of each of ``choices``) or
            ``generate`` (compare what is generated with ``answers``).
        choices: Completions to choose from.
        answers: Accepted answers; of ``choice`` the right one of ``choices``.
        plain: Whether the first message is the whole prompt, without a chat template.
        shots: Worked examples as the first message has them, one behind the other: the last
            ones are left out where a context is too small.
        passages: Parts of the first message that are cut when they are long.
    """

    example_id: str
    subtask: str
    messages: tuple[Message, ...]
    prefix: str
    eos: bool
    kind: str = "loss"
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    plain: bool = False
    shots: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task's queries and test items, and where they come from.

    Attributes:
        queries: What influence is measured on.
        test: What models are evaluated on; empty when nothing was held out.
        facts: Source and counts, for the tables' metadata.
        texts: What its examples say, to find them elsewhere.
    """

    queries: list[Item]
    test: list[Item]
    facts: Facts = field(default_factory=dict)
    texts: list[Text] = field(default_factory=list)


def query_table(task: Task) -> pa.Table:
    """Queries as an Arrow table with the columns of :data:`QUERY_SCHEMA`."""
    rows = [
        {
            "example_id": q.example_id,
            "subtask": q.subtask,
            "messages": list(q.messages),
            "prefix": q.prefix,
            "eos": q.eos,
        }
        for q in task.queries
    ]
    return pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)


def item_table(task: Task) -> pa.Table:
    """Test items as an Arrow table with the columns of :data:`TEST_SCHEMA`.

    ``answer`` is the first of ``answers``, or empty.
    """
    rows = [
        {
            "example_id": t.example_id,
            "subtask": t.subtask,
            "kind": t.kind,
            "messages": list(t.messages),
            "prefix": t.prefix,
            "eos": t.eos,
            "choices": list(t.choices),
            "answer": t.answers[0] if t.answers else "",
            "answers": list(t.answers),
            "plain": t.plain,
            "shots": list(t.shots),
            "passages": list(t.passages),
        }
        for t in task.test
    ]
    return pa.Table.from_pylist(rows, schema=TEST_SCHEMA)


def spread(examples: Iterable[ExampleT], n: int | None, seed: int, draw: str) -> list[ExampleT]:
    """Draw ``n`` examples as evenly over subtasks as they allow, in the order they came in.

    Subtasks take turns, in a seeded order, each giving its next example of a seeded order.

    Args:
        examples: To draw from.
        n: How many; all when None or when there are no more.
        seed: The task's seed.
        draw: Name of the draw; draws of different names are independent.
    """
    pool = list(examples)
    by_subtask: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(pool):
        by_subtask[example.subtask].append(i)
    turns = []
    for subtask, members in by_subtask.items():
        members.sort(key=lambda i: draw_key(seed, draw, pool[i].example_id))
        turns += [(t, draw_key(seed, draw, subtask), i) for t, i in enumerate(members)]
    return [pool[i] for i in sorted(i for _, _, i in sorted(turns)[:n])]


def divide(
    section: TaskSection, examples: Sequence[ExampleT]
) -> tuple[list[ExampleT], list[ExampleT], list[ExampleT]]:
    """Divide development examples into queries, held-out ones, and those that may be shown.

    Args:
        section: Numbers of queries and held-out examples.
        examples: All development examples, in their order.

    Returns:
        Queries; held-out examples, none of them a query; and worked examples for prompts: all
        that are not held out.

    Raises:
        DataError: Two examples have one id, or there are fewer than asked for.
    """
    check_ids(section, examples)
    asked = (section.queries or 1) + section.heldout
    if asked > len(examples):
        raise DataError(
            "a task has fewer development examples than asked for",
            where=f"tasks.{section.name}",
            value=f"queries {section.queries or 'all (at least 1)'} + heldout {section.heldout}",
            allowed=f"together at most {len(examples)}",
            fix="ask for fewer queries or held-out examples",
        )
    heldout = spread(examples, section.heldout, section.seed, "heldout")
    out = {e.example_id for e in heldout}
    rest = [e for e in examples if e.example_id not in out]
    return spread(rest, section.queries, section.seed, "queries"), heldout, rest


def shots_for(
    section: TaskSection,
    example: ExampleT,
    shown: Sequence[ExampleT],
    default: int | None,
    key: str = "shots",
) -> list[ExampleT]:
    """Worked examples for a prompt: the first others of the subtask, in their order.

    Args:
        section: The task.
        example: The example that is asked; never among its own worked examples.
        shown: Examples that may be shown: none of them held out.
        default: Number when the config says nothing, at most all there are; None for all.
        key: Which key of the config says: ``shots`` or ``test_shots``.

    Raises:
        DataError: The config asks for more than the subtask has.
    """
    others = [
        s for s in shown if s.subtask == example.subtask and s.example_id != example.example_id
    ]
    asked: int | None = getattr(section, key)
    if asked is not None and asked > len(others):
        raise DataError(
            "a subtask has fewer worked examples than asked for",
            where=f"tasks.{section.name}.{key}, subtask {example.subtask}",
            value=asked,
            allowed=f"at most {len(others)}: others of the subtask that are not held out",
            fix=f"lower {key} or heldout",
        )
    return others[: default if asked is None else asked]


def recognise(
    section: TaskSection, development: Sequence[Recognisable], test: Sequence[Recognisable]
) -> list[Text]:
    """What a task's examples say; none of the first may be among the second.

    Raises:
        DataError: Some are, and the config does not allow it.
    """
    texts = texts_of(development, test)
    where, key = f"tasks.{section.name}", "allow_contaminated of the task"
    place, allowed = "its test set", section.allow_contaminated
    refuse(in_test(texts), where=where, place=place, allowed=allowed, key=key)
    return texts


def test_shots_for(
    section: TaskSection,
    example: ExampleT,
    shown: Sequence[ExampleT],
    *,
    benchmark: int,
    query: int | None,
) -> list[ExampleT]:
    """Worked examples of a test item: the config's number, else that of its kind of prompt.

    Args:
        section: The task.
        example: The item that is asked.
        shown: Examples that may be shown.
        benchmark: The benchmark's number.
        query: The queries' number when the config says nothing of them either; None for all.

    Raises:
        DataError: The config asks for more than the subtask has.
    """
    if section.test_shots is None and section.test_prompt == "query":
        return shots_for(section, example, shown, query)
    return shots_for(section, example, shown, benchmark, "test_shots")


def check_ids(section: TaskSection, examples: Sequence[Example]) -> None:
    """Refuse an empty list of examples, and two with one id."""
    if not examples:
        raise DataError("a task has no examples", where=f"tasks.{section.name}")
    seen: set[str] = set()
    for example in examples:
        if example.example_id in seen:
            raise DataError(
                "two examples of a task have one id",
                where=f"tasks.{section.name}",
                value=example.example_id,
                fix="make the ids unique",
            )
        seen.add(example.example_id)


def draw_test(
    section: TaskSection,
    items: Sequence[ExampleT],
    used: Sequence[Example],
    per_subtask: int | None = None,
) -> list[ExampleT]:
    """Test examples of a file, as many as the config says, spread over subtasks.

    Of each subtask there are at most ``test_per_subtask``, or the benchmark's own number.

    Args:
        section: The task.
        items: All examples of the file.
        used: Queries and held-out examples.
        per_subtask: Examples of a subtask at most, when the config says nothing.

    Raises:
        DataError: There are none, two have one id, or one is also among ``used``.
    """
    check_ids(section, items)
    both = {e.example_id for e in items} & {u.example_id for u in used}
    if both:
        raise DataError(
            "test items are also development examples",
            where=f"tasks.{section.name}.test",
            value=f"{len(both)} ids, for example {min(both)}",
            fix="use another file, or hold examples out with heldout",
        )
    most = section.test_per_subtask or per_subtask
    return spread(_capped(items, most, section.seed), section.test_limit, section.seed, "test")


def _capped(items: Sequence[ExampleT], most: int | None, seed: int) -> list[ExampleT]:
    """At most so many of each subtask, drawn for each by itself."""
    by_subtask: dict[str, list[ExampleT]] = defaultdict(list)
    for item in items:
        by_subtask[item.subtask].append(item)
    return [i for some in by_subtask.values() for i in spread(some, most, seed, "subtask")]


def task_facts(
    section: TaskSection,
    source: str,
    queries: Sequence[Item],
    test: Sequence[Item],
    dropped: int = 0,
    standard_shots: int = 0,
) -> Facts:
    """Source and counts of a task; also logged.

    Args:
        section: The task.
        source: Where its development examples are from.
        queries: Its queries.
        test: Its test items.
        dropped: Examples left out.
        standard_shots: Worked examples before a test item of the benchmark.
    """
    facts: Facts = {
        "task": section.name,
        "kind": section.kind,
        "source": source,
        "test_source": _test_source(section),
        "n_dropped": dropped,
        "n_queries": len(queries),
        "n_subtasks": len({q.subtask for q in queries}),
        "n_heldout": section.heldout,
        "n_test": len({t.example_id for t in test}),
        "n_test_fewer_shots": _fewer_shots(section, test, standard_shots),
    }
    for kind in ("loss", "choice", "generate"):
        facts[f"n_test_{kind}"] = sum(t.kind == kind for t in test)
    kinds = ", ".join(f"{facts[f'n_test_{k}']} {k}" for k in ("loss", "choice", "generate"))
    log.info(
        "%d queries from %d subtasks, %d test items (%s) from %s; %d examples dropped",
        len(queries),
        facts["n_subtasks"],
        facts["n_test"],
        kinds,
        source,
        dropped,
    )
    return facts


def development_source(section: TaskSection) -> str:
    """File or hub data set of a task's development examples."""
    return section.hub.name if section.hub is not None else str(section.path)


def _test_source(section: TaskSection) -> str:
    if section.test_hub is not None:
        return section.test_hub.name
    return section.test or ("held out" if section.heldout else "none")


def exchange(prompt: str, response: str) -> tuple[Message, ...]:
    """One user turn and the assistant's answer."""
    return (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    )


def _fewer_shots(section: TaskSection, test: Sequence[Item], standard: int) -> int:
    """Test items with fewer worked examples than the benchmark has; also logged.

    Args:
        section: The task; where it says a number itself, none is missing.
        test: The items.
        standard: The benchmark's number.
    """
    if section.test_shots is not None or section.test_prompt == "query":
        return 0
    asked = [item for item in test if item.kind != "loss"]
    fewer = sum(len(item.shots) < standard for item in asked)
    if fewer:
        log.warning(
            "%d of %d test items of %s have fewer than %d worked examples: the others of their "
            "subtask are too few, or held out",
            fewer,
            len(asked),
            section.name,
            standard,
        )
    return fewer


def refuse_prompts(section: TaskSection) -> None:
    """Refuse the key ``prompts`` where it means nothing."""
    if section.prompts is not None:
        raise ConfigError(
            "prompts belongs to tasks of kind bbh",
            where=f"tasks.{section.name}.prompts",
            value=section.prompts,
            fix="remove it",
        )


def task_file(section: TaskSection, key: str, data_dir: Path) -> tuple[str, Path]:
    """A task's file: its path as the config gives it, and where it is."""
    relative = getattr(section, key)
    if relative is None:
        raise ConfigError(
            f"a task of kind {section.kind} needs a file",
            where=f"tasks.{section.name}.{key}",
            fix="give the path of its examples below data_dir",
        )
    return relative, data_path(data_dir, relative, where=f"tasks.{section.name}.{key}")


def file_rows(section: TaskSection, key: str, data_dir: Path) -> list[Row]:
    """Records of a task's file, or of its data set on the hub.

    Args:
        section: The task.
        key: ``path`` (or ``hub``) for development examples, ``test`` (or ``test_hub``).
        data_dir: Folder that paths are relative to.

    Raises:
        ConfigError: The config names neither.
        DataError: It cannot be read.
    """
    hub = section.hub if key == "path" else section.test_hub
    if hub is not None:
        return hub_rows(hub)
    relative, path = task_file(section, key, data_dir)
    return read_rows(path, relative)


def of_split(rows: Iterable[Row], split: str) -> list[Row]:
    """Records of one split, where they say which split they are of."""
    every = list(rows)
    kept = [r for r in every if r.fields.get("split", split) == split]
    if not kept:
        raise DataError(
            "a task's file has no records of a split",
            where=every[0].file,
            value=split,
            allowed=", ".join(sorted({str(r.fields.get("split")) for r in every})),
        )
    return kept


def needed(row: Row, name: str) -> Any:
    """A field's value; DataError when the record lacks it."""
    if name not in row.fields:
        raise DataError(
            "a record lacks a field",
            where=row.where,
            value=f"no {name}",
            allowed=f"fields {', '.join(map(str, row.fields))}",
            fix="rename the column, or check the task's kind",
        )
    return row.fields[name]


def text_field(row: Row, name: str) -> str:
    """A field's text; DataError when it is missing or not text."""
    value = needed(row, name)
    if not isinstance(value, str):
        raise DataError("a field is not text", where=f"{row.where}, field {name}", value=value)
    return value


def row_id(row: Row, otherwise: str) -> str:
    """A record's own id, or another when it has none."""
    return explicit_id(row) or otherwise
