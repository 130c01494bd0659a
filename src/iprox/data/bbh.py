"""BIG-Bench Hard (Suzgun et al. 2022, arXiv:2210.09261): 27 tasks with worked examples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from iprox.data.items import (
    Item,
    Task,
    development_source,
    divide,
    draw_test,
    exchange,
    file_rows,
    recognise,
    row_id,
    shots_for,
    task_facts,
    test_shots_for,
    text_field,
)
from iprox.data.lm_eval_files import shipped_tasks
from iprox.data.pools import Row, hub_rows
from iprox.data.sources import data_path
from iprox.errors import ConfigError, DataError, did_you_mean
from iprox.study.schema import TaskSection

THINK = "Let's think step by step.\n"
"""How every reasoning of BBH's prompts begins."""

CANARY_RULE = "\n-----\n"
N_WORKED = 3
TESTED_PER_TASK = 40
"""Problems of a task that LESS evaluates on, at most."""


@dataclass(frozen=True)
class Problem:
    """A problem: a worked example with its reasoning, or a test item with its answer.

    Attributes:
        example_id: Its id.
        subtask: The BBH task.
        instruction: What the task asks in general.
        question: The problem, without ``Q:``.
        reasoning: What follows ``A:`` in a worked example; empty for a test item.
        target: The answer of a test item; empty for a worked example.
    """

    example_id: str
    subtask: str
    instruction: str
    question: str
    reasoning: str = ""
    target: str = ""

    def shapes(self) -> tuple[str, ...]:
        """The question, and with what the task asks."""
        return self.question, f"{self.instruction}\n{self.question}"


def bbh_item(problem: Problem, shots: Sequence[Problem], *, plain: bool = False) -> Item:
    """LESS's BBH formats: task text, worked examples, the question; completion after ``A:``.

    Args:
        problem: What is asked.
        shots: Worked examples before it.
        plain: The format of its evaluation, without chat template; of its queries otherwise.
    """
    worked = tuple(f"Q: {s.question}\nA: {s.reasoning}\n\n" for s in shots)
    asked = "".join([f"{problem.instruction}\n\n", *worked, f"Q: {problem.question}"])
    answer = f"A: {problem.reasoning}" if problem.reasoning else "A:"
    return Item(
        example_id=problem.example_id,
        subtask=problem.subtask,
        messages=exchange(f"{asked}\nA:", "") if plain else exchange(asked, answer),
        prefix="" if plain else "A:",
        eos=False,
        kind="generate" if problem.target else "loss",
        answers=(problem.target,) if problem.target else (),
        plain=plain,
        shots=worked if plain else (),
    )


def build(section: TaskSection, data_dir: Path) -> Task:
    """Queries and test items of BBH.

    The prompt of a query shows the other worked examples of its task, those of a held-out
    example and of a test item the ones that are not held out. Test items, at most 40 of a
    task, are generated after three worked examples.

    Raises:
        ConfigError: A key does not go with this kind.
        DataError: A file or record cannot be used, or there are fewer examples than asked for.
    """
    if section.path is not None or section.hub is not None:
        raise ConfigError(
            "bbh takes its development examples from prompts",
            where=f"tasks.{section.name}.path",
            value=development_source(section),
            fix="give the file of 3-shot prompts as prompts, and test items as test",
        )
    if section.prompts is None:
        development, source = shipped_examples()
    else:
        path = data_path(data_dir, section.prompts, where=f"tasks.{section.name}.prompts")
        development, source = bbh_prompts(path), section.prompts
    queries, heldout, shown = divide(section, development)

    def query(problem: Problem) -> Item:
        return bbh_item(problem, shots_for(section, problem, shown, default=None))

    def generated(problem: Problem) -> Item:
        shots = test_shots_for(section, problem, shown, benchmark=N_WORKED, query=None)
        return bbh_item(problem, shots, plain=section.test_prompt == "benchmark")

    test = [query(p) for p in heldout]
    drawn: list[Problem] = []
    if section.has_test:
        instructions = {p.subtask: p.instruction for p in development}
        problems = bbh_problems(_test_rows(section, instructions, data_dir), instructions)
        drawn = draw_test(section, problems, [*queries, *heldout], TESTED_PER_TASK)
        test += [generated(p) for p in drawn]
    asked = [query(p) for p in queries]
    facts = task_facts(section, source, asked, test, standard_shots=N_WORKED)
    return Task(asked, test, facts, recognise(section, development, drawn))


def _test_rows(section: TaskSection, tasks: Iterable[str], data_dir: Path) -> list[Row]:
    """Test records; of a hub data set with a configuration for each task, of all of them."""
    hub = section.test_hub
    if hub is None or hub.config is not None:
        return file_rows(section, "test", data_dir)
    by_task = ((task, hub_rows(hub.model_copy(update={"config": task}))) for task in tasks)
    return [replace(r, fields={**r.fields, "task": task}) for task, rows in by_task for r in rows]


def bbh_prompts(path: Path) -> list[Problem]:
    """Problem examples from a JSON mapping of BBH task to prompt text.

    A prompt text is a canary line and a line of dashes (if there), what the task asks, and
    three ``Q: ... A: ...`` blocks, all separated by blank lines; the last three are the examples.

    Raises:
        DataError: The file is not such a mapping, or a prompt has not three examples.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("a file of prompts cannot be read", where=path, value=str(error)) from None
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise DataError("prompts must be a JSON object of task: text", where=path)
    return [e for task, text in sorted(prompts.items()) for e in _split_prompt(task, text, path)]


def _split_prompt(task: str, text: str, path: Path) -> list[Problem]:
    _, rule, body = text.partition(CANARY_RULE)
    blocks = (body if rule else text).strip().split("\n\n")
    instruction = "\n\n".join(blocks[:-N_WORKED]).strip()
    worked = blocks[-N_WORKED:]
    return [_worked_example(b, task, instruction, i, path) for i, b in enumerate(worked)]


def _worked_example(block: str, task: str, instruction: str, number: int, path: Path) -> Problem:
    found = re.fullmatch(r"Q: (.*?)\nA: (.*)", block, re.DOTALL)
    if found is None or not instruction:
        raise DataError(
            "a prompt is not a text and three worked examples",
            where=f"{path}, task {task}",
            value=block,
            allowed="what the task asks, then three Q: ... A: ... blocks, blank lines between",
        )
    return Problem(f"{task}-dev-{number}", task, instruction, found[1], reasoning=found[2].strip())


def bbh_problems(rows: Iterable[Row], instructions: dict[str, str]) -> list[Problem]:
    """Test items from records ``task, input, target``.

    Args:
        rows: Records.
        instructions: What each task asks, from the development examples.

    Raises:
        DataError: A field is missing, an answer is empty, or a task has no development examples.
    """
    problems: list[Problem] = []
    for row in rows:
        task = text_field(row, "task")
        if task not in instructions:
            raise DataError(
                "a test item's task has no worked examples",
                where=f"{row.where}, field task",
                value=task,
                allowed=did_you_mean(task, instructions),
            )
        if not text_field(row, "target").strip():
            raise DataError("a test item has no answer", where=f"{row.where}, field target")
        problems.append(
            Problem(
                example_id=row_id(row, f"{task}-{len(problems):05d}"),
                subtask=task,
                instruction=instructions[task],
                question=text_field(row, "input"),
                target=text_field(row, "target"),
            )
        )
    return sorted(problems, key=lambda p: p.subtask)


def shipped_examples() -> tuple[list[Problem], str]:
    """The worked examples of lm-eval's ``bbh_cot_fewshot`` tasks, three for each.

    Returns:
        Examples by task, and the package's name and version.

    Raises:
        DataError: The package is missing, or its files are not as expected.
    """
    tasks, source = shipped_tasks("bbh/cot_fewshot", "[a-z]*.yaml", ("input", "target"))
    examples = [
        Problem(
            example_id=f"{task.name}-dev-{number}",
            subtask=task.name,
            instruction=task.description.strip(),
            question=sample["input"].strip(),
            reasoning=THINK + sample["target"].strip(),
        )
        for task in tasks
        for number, sample in enumerate(task.samples)
    ]
    return examples, source
