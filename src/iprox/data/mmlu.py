"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): multiple-choice questions of 57 subjects."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iprox.data.items import (
    Item,
    Task,
    development_source,
    divide,
    draw_test,
    exchange,
    file_rows,
    needed,
    of_split,
    recognise,
    refuse_prompts,
    row_id,
    shots_for,
    task_facts,
    test_shots_for,
    text_field,
)
from iprox.data.lm_eval_files import ShippedTask, shipped_tasks
from iprox.data.pools import Row
from iprox.errors import DataError
from iprox.study.schema import TaskSection

log = logging.getLogger(__name__)

LETTERS = "ABCD"
TEST_SHOTS = 5
"""Worked examples before a test question."""


@dataclass(frozen=True)
class Question:
    """A question of one subject, with its four choices and the letter of the right one."""

    example_id: str
    subtask: str
    question: str
    choices: tuple[str, ...]
    answer: str

    def shapes(self) -> tuple[str, ...]:
        """The question with its choices, and as a query asks it."""
        return self.block().removesuffix("\nAnswer:"), mmlu_item(self, ()).messages[0]["content"]

    def block(self) -> str:
        """The question with its choices, up to ``Answer:``."""
        lines = [f"{letter}. {c}" for letter, c in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question, *lines, "Answer:"])


def mmlu_item(
    question: Question, shots: Sequence[Question], kind: str = "loss", *, plain: bool = False
) -> Item:
    """LESS's MMLU formats; their header has two spaces after "about".

    Args:
        question: What is asked.
        shots: Worked examples before it.
        kind: ``loss``, or ``choice`` among the four letters.
        plain: The format of its evaluation: the answer follows ``Answer:``, without chat
            template; of its queries otherwise.
    """
    subject = question.subtask.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
    worked = tuple(f"{shot.block()} {shot.answer}\n\n" for shot in shots)
    prefix = "" if plain else "The answer is:"
    answer = f" {question.answer}"
    prompt = "".join([header, *worked, question.block()])
    return Item(
        example_id=question.example_id,
        subtask=question.subtask,
        messages=exchange(prompt, prefix + answer),
        prefix=prefix,
        eos=False,
        kind=kind,
        choices=tuple(f" {letter}" for letter in LETTERS) if kind == "choice" else (),
        answers=(answer,),
        plain=plain,
        shots=worked if plain else (),
    )


def build(section: TaskSection, data_dir: Path) -> Task:
    """Queries and test items of MMLU.

    Queries are development questions without worked examples, unless ``shots`` asks for some.
    A held-out question is tested for its loss, asked as a query is, and for the likelihoods of
    its choices, a question of a test file for the latter: after five worked examples.

    Raises:
        ConfigError: A key does not go with this kind.
        DataError: A file or record cannot be used, or there are fewer examples than asked for.
    """
    refuse_prompts(section)
    if section.path is None and section.hub is None:
        development, dropped, source = shipped_questions()
    else:
        development, dropped = mmlu_questions(file_rows(section, "path", data_dir), "dev"), 0
        source = development_source(section)
    queries, heldout, shown = divide(section, development)

    def query(question: Question) -> Item:
        return mmlu_item(question, shots_for(section, question, shown, default=0))

    def choice(question: Question) -> Item:
        shots = test_shots_for(section, question, shown, benchmark=TEST_SHOTS, query=0)
        return mmlu_item(question, shots, "choice", plain=section.test_prompt == "benchmark")

    test = [item(q) for q in heldout for item in (query, choice)]
    drawn: list[Question] = []
    if section.has_test:
        questions = mmlu_questions(file_rows(section, "test", data_dir), "test")
        drawn = draw_test(section, questions, [*queries, *heldout])
        test += [choice(q) for q in drawn]
    asked = [query(q) for q in queries]
    facts = task_facts(section, source, asked, test, dropped, standard_shots=TEST_SHOTS)
    return Task(asked, test, facts, recognise(section, development, drawn))


def mmlu_questions(rows: Iterable[Row], split: str) -> list[Question]:
    """Questions from records ``subject, question, A, B, C, D, answer`` (or ``choices``).

    Args:
        rows: Records; ``answer`` is a letter, or an index into ``choices``.
        split: Where records have a ``split``, only those of this one are taken.

    Raises:
        DataError: A field is missing, an answer is unknown, or the split has no records.
    """
    questions: list[Question] = []
    for row in of_split(rows, split):
        subject = text_field(row, "subject")
        questions.append(
            Question(
                example_id=row_id(row, f"{subject}-{split}-{len(questions):04d}"),
                subtask=subject,
                question=text_field(row, "question").strip(),
                choices=_choices(row),
                answer=_letter(row),
            )
        )
    return sorted(questions, key=lambda q: q.subtask)


def _choices(row: Row) -> tuple[str, ...]:
    if "choices" in row.fields:
        choices = row.fields["choices"]
    else:
        choices = [text_field(row, letter) for letter in LETTERS]
    good = isinstance(choices, list) and all(isinstance(c, str) for c in choices)
    if not good or len(choices) != len(LETTERS):
        raise DataError(
            "a question must have four choices",
            where=f"{row.where}, field choices",
            value=choices,
            allowed="four texts",
        )
    return tuple(choice.strip() for choice in choices)


def _letter(row: Row) -> str:
    answer = needed(row, "answer")
    if isinstance(answer, int) and 0 <= answer < 4:
        return LETTERS[answer]
    if isinstance(answer, str) and answer.strip() in tuple(LETTERS):
        return answer.strip()
    raise DataError(
        "unknown answer letter",
        where=f"{row.where}, field answer",
        value=answer,
        allowed="A, B, C, D (or 0 to 3)",
    )


# --- worked examples of lm-eval ------------------------------------------------------------

INLINE_CHOICES = re.compile(
    r"(.*)\s\(A\) (.*)\s\(B\) (.*)\s\(C\) (.*)\s\(D\) ((?:(?!\s\(E\) ).)*)", re.DOTALL
)
FINAL_ANSWER = re.compile(r"answer is \(([A-D])\)\.?\s*$")


def shipped_questions() -> tuple[list[Question], int, str]:
    """Development questions as lm-eval's ``mmlu_flan_cot_fewshot`` tasks show them.

    The choices stand inside the question as ``(A) ... (B) ...`` and the answer at the end of
    the reasoning; a question that has not four choices and one of them as answer is left out.

    Returns:
        Questions by subject, the number left out, and the package's name and version.

    Raises:
        DataError: The package is missing, or its files are not as expected.
    """
    questions, dropped = [], 0
    tasks, source = shipped_tasks("mmlu/flan_cot_fewshot", "mmlu_*.yaml", ("question", "target"))
    for task in tasks:
        for number in range(len(task.samples)):
            question = _inline_question(task, number)
            if question is None:
                log.warning("left out, not four choices: %s, example %d", task.name, number)
                dropped += 1
            else:
                questions.append(question)
    return questions, dropped, source


def _inline_question(task: ShippedTask, number: int) -> Question | None:
    sample = task.samples[number]
    parts = INLINE_CHOICES.fullmatch(sample["question"])
    answer = FINAL_ANSWER.search(sample["target"])
    if parts is None or answer is None:
        return None
    question, *choices = (part.strip() for part in parts.groups())
    return Question(f"{task.name}-dev-{number}", task.name, question, tuple(choices), answer[1])
