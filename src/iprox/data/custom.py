"""Tasks of one's own: a task file of the Language Model Evaluation Harness, and examples.

The file says how a record is asked and answered, in the harness's own keys and Jinja templates
(https://github.com/EleutherAI/lm-evaluation-harness, docs/task_guide.md), so that it also runs
there. It is read, never run: functions (``!function``) and filters are refused.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iprox.data.items import (
    Facts,
    Item,
    Task,
    development_source,
    divide,
    draw_test,
    exchange,
    file_rows,
    recognise,
    refuse_prompts,
    row_id,
    shots_for,
    task_facts,
    task_file,
    test_shots_for,
)
from iprox.data.pools import Row
from iprox.errors import DataError, did_you_mean
from iprox.study.schema import TaskSection

REQUIRED = ("output_type", "doc_to_text", "doc_to_target")
READ = (
    *REQUIRED,
    "doc_to_choice",
    "description",
    "target_delimiter",
    "fewshot_delimiter",
    "num_fewshot",
    "generation_kwargs",
)
IGNORED = (
    "task",
    "tag",
    "group",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "metric_list",
    "metadata",
)
"""Keys of the harness that say where its data is and what it reports; a study says so itself."""

KINDS = {"multiple_choice": "choice", "generate_until": "generate"}
"""Output types, and what a test item of that type is."""


@dataclass(frozen=True)
class Template:
    """What a task file says.

    Attributes:
        file: Its name, for messages.
        kind: ``choice`` or ``generate``.
        text: Template of the question.
        target: Template of the answer, or of its index among the choices.
        choices: The choices, or a template of their list; None where answers are generated.
        description: What stands before everything else.
        delimiter: Between question and answer.
        separator: Between worked examples.
        shots: Worked examples before a test item.
        until: Texts that end a generated answer.
        max_new_tokens: Longest generated answer.
    """

    file: str
    kind: str
    text: str
    target: str
    choices: str | list[str] | None
    description: str
    delimiter: str
    separator: str
    shots: int
    until: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Question:
    """A record as the task file asks it, with the accepted answers (of choices: the one)."""

    example_id: str
    subtask: str
    text: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]

    def shapes(self) -> tuple[str, ...]:
        """The question as it is asked."""
        return (self.text,)


def build(section: TaskSection, data_dir: Path) -> Task:
    """Queries and test items of a task of one's own.

    A query is the question as the user's turn and the answer as the assistant's; held-out
    examples are tested for its loss. All of them, and the items of a test file, are tested for
    their answer, as the harness asks it: without chat template, after ``num_fewshot`` worked
    examples.

    Raises:
        ConfigError: A key is missing or does not go with this kind.
        DataError: The task file or a record cannot be used, or there are fewer examples than
            asked for.
    """
    refuse_prompts(section)
    name, path = task_file(section, "yaml", data_dir)
    template = read_template(path, name)
    development = questions(template, file_rows(section, "path", data_dir), section.name)
    queries, heldout, shown = divide(section, development)

    def query(question: Question) -> Item:
        return _chat(template, question, shots_for(section, question, shown, default=0))

    def test(question: Question) -> Item:
        shots = test_shots_for(section, question, shown, benchmark=template.shots, query=0)
        if section.test_prompt == "query":
            return _chat(template, question, shots, template.kind)
        return _plain(template, question, shots)

    drawn: list[Question] = []
    if section.has_test:
        found = questions(template, file_rows(section, "test", data_dir), section.name)
        drawn = draw_test(section, found, [*queries, *heldout])
    asked = [query(q) for q in queries]
    items = [item(q) for q in heldout for item in (query, test)] + [test(q) for q in drawn]
    source = development_source(section)
    facts = task_facts(section, source, asked, items, standard_shots=template.shots)
    texts = recognise(section, development, drawn)
    return Task(asked, items, facts | _generation(template), texts)


def read_template(path: Path, name: str) -> Template:
    """Read a task file.

    Args:
        path: The file.
        name: What to call it in messages.

    Raises:
        DataError: It is not a mapping, lacks a key, or has one that is not understood.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(
            "a task file cannot be read",
            where=name,
            value=str(error),
            allowed="YAML without !function: the file is read, not run",
        ) from None
    if not isinstance(content, dict):
        raise DataError("a task file must be a mapping", where=name, value=content)
    kind = _check_keys(content, name)
    generation = content.get("generation_kwargs") or {}
    until = generation.get("until", ["\n\n"])
    return Template(
        file=name,
        kind=kind,
        text=str(content["doc_to_text"]),
        target=str(content["doc_to_target"]),
        choices=content.get("doc_to_choice"),
        description=str(content.get("description", "")),
        delimiter=str(content.get("target_delimiter", " ")),
        separator=str(content.get("fewshot_delimiter", "\n\n")),
        shots=int(content.get("num_fewshot") or 0),
        until=tuple([until] if isinstance(until, str) else until),
        max_new_tokens=int(generation.get("max_gen_toks", 256)),
    )


def _check_keys(content: Mapping[str, Any], name: str) -> str:
    """The kind of test items; DataError when a key is missing or unknown."""
    for key in content:
        if key not in READ + IGNORED:
            raise DataError(
                "a task file has a key that a study does not understand",
                where=name,
                value=key,
                allowed=did_you_mean(str(key), READ),
            )
    kind = KINDS.get(str(content.get("output_type")), "")
    needed = (*REQUIRED, "doc_to_choice") if kind == "choice" else REQUIRED
    for key in needed:
        if content.get(key) in (None, ""):
            raise DataError(
                "a task file lacks a key", where=name, value=f"no {key}", allowed=needed
            )
    if not kind:
        raise DataError(
            "unknown output type",
            where=f"{name}, output_type",
            value=content["output_type"],
            allowed=", ".join(KINDS),
        )
    return kind


def questions(template: Template, rows: Sequence[Row], task: str) -> list[Question]:
    """Records as a task file asks them.

    Args:
        template: The task file.
        rows: Records with the fields its templates name. ``subtask``, if there, is the group
            that means over subtasks are taken of.
        task: The subtask of the others.

    Raises:
        DataError: A template fails on a record, or its answer is empty or none of the choices.
    """
    found = []
    for number, row in enumerate(rows):
        choices = _choices(template, row)
        subtask = row.fields.get("subtask")
        found.append(
            Question(
                example_id=row_id(row, f"{row.file}-{number:05d}"),
                subtask=subtask if isinstance(subtask, str) and subtask else task,
                text=_render(template.text, row, template.file),
                choices=choices,
                answers=(_answer(template, row, choices),),
            )
        )
    return sorted(found, key=lambda q: q.subtask)


def _render(text: str, row: Row, file: str) -> str:
    """A template on a record; the name of a field stands for the field, as in the harness."""
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    if text in row.fields:
        return str(row.fields[text])
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text).render(**row.fields)
    except jinja2.TemplateError as error:
        raise DataError(
            "a template of a task file fails on a record",
            where=f"{row.where}, with {file}",
            value=f"{text}: {error}",
            allowed=f"fields {', '.join(map(str, row.fields))}",
        ) from None


def _choices(template: Template, row: Row) -> tuple[str, ...]:
    given = template.choices
    if given is None or template.kind != "choice":
        return ()
    if isinstance(given, str):
        given = row.fields[given] if given in row.fields else _literal(template, given, row)
    if not isinstance(given, list) or len(given) < 2 or not all(str(c).strip() for c in given):
        raise DataError(
            "a record has no choices",
            where=f"{row.where}, with {template.file}",
            value=given,
            allowed="a list of at least two texts",
        )
    return tuple(str(choice) for choice in given)


def _literal(template: Template, text: str, row: Row) -> Any:
    rendered = _render(text, row, template.file)
    try:
        return ast.literal_eval(rendered)
    except (ValueError, SyntaxError):
        return rendered


def _answer(template: Template, row: Row, choices: Sequence[str]) -> str:
    """The answer's text; of choices the one named, or numbered."""
    answer = _render(template.target, row, template.file)
    if not answer.strip():
        raise DataError("a test item has no answer", where=f"{row.where}, with {template.file}")
    if not choices or answer in choices:
        return answer
    if answer.isdecimal() and int(answer) < len(choices):
        return choices[int(answer)]
    raise DataError(
        "an answer is none of the choices",
        where=f"{row.where}, with {template.file}",
        value=answer,
        allowed=f"{', '.join(choices)}, or a number from 0 to {len(choices) - 1}",
    )


def _chat(
    template: Template, question: Question, shots: Sequence[Question], kind: str = "loss"
) -> Item:
    """A query: the question as the user's turn, the answer as the assistant's."""
    worked = [f"{s.text}{template.delimiter}{s.answers[0]}{template.separator}" for s in shots]
    prompt = "".join([template.description, *worked, question.text])
    return Item(
        example_id=question.example_id,
        subtask=question.subtask,
        messages=exchange(prompt, question.answers[0]),
        prefix="",
        eos=False,
        kind=kind,
        choices=question.choices if kind == "choice" else (),
        answers=question.answers,
    )


def _plain(template: Template, question: Question, shots: Sequence[Question]) -> Item:
    """A test item as the harness asks it."""
    delimiter = template.delimiter
    worked = tuple(f"{s.text}{delimiter}{s.answers[0]}{template.separator}" for s in shots)
    choices = tuple(f"{delimiter}{choice}" for choice in question.choices)
    answer = f"{delimiter}{question.answers[0]}" if choices else question.answers[0]
    return Item(
        example_id=question.example_id,
        subtask=question.subtask,
        messages=exchange("".join([template.description, *worked, question.text]), answer),
        prefix="",
        eos=False,
        kind=template.kind,
        choices=choices,
        answers=(answer,),
        plain=True,
        shots=worked,
    )


def _generation(template: Template) -> Facts:
    """How answers are generated, for the evaluation."""
    until = json.dumps(list(template.until), ensure_ascii=False)
    return {"until": until, "max_new_tokens": template.max_new_tokens}
