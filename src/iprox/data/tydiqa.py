"""TyDiQA's gold passage task (Clark et al. 2020, arXiv:2003.05002): nine languages."""

from __future__ import annotations

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
    recognise,
    refuse_prompts,
    row_id,
    shots_for,
    task_facts,
    test_shots_for,
    text_field,
)
from iprox.data.pools import Row
from iprox.errors import DataError, did_you_mean
from iprox.study.schema import TaskSection

TESTED_PER_LANGUAGE = 200
"""Questions of a language that LESS evaluates on, at most."""

TEST_SHOTS = 1
"""Worked examples before a test question."""


@dataclass(frozen=True)
class Wording:
    """What LESS's TyDiQA prompt says in one language."""

    instruction: str
    passage: str
    question: str
    answer: str


WORDING = {
    "arabic": Wording(
        "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.",
        "المقطع:",
        "السؤال:",
        "الإجابة:",
    ),
    "bengali": Wording(
        "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
        "অধ্যায়:",
        "প্রশ্ন:",
        "উত্তর:",
    ),
    "english": Wording(
        "Answer the following question based on the information in the given passage.",
        "Passage:",
        "Question:",
        "Answer:",
    ),
    "finnish": Wording(
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
        "Kappale:",
        "Kysymys:",
        "Vastaus:",
    ),
    "indonesian": Wording(
        "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
        "Bagian:",
        "Pertanyaan:",
        "Jawaban:",
    ),
    "korean": Wording(
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.", "문단:", "질문:", "답변:"
    ),
    "russian": Wording(
        "Ответьте на следующий вопрос на основе информации в данном отрывке.",
        "Отрывок:",
        "Вопрос:",
        "Ответ:",
    ),
    "swahili": Wording(
        "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
        "Kifungu:",
        "Swali:",
        "Jibu:",
    ),
    "telugu": Wording(
        "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
        "పేరా:",
        "ప్రశ్న:",
        "సమాధానం:",
    ),
}


@dataclass(frozen=True)
class PassageQuestion:
    """A question about a passage, and the answers accepted (texts of the passage)."""

    example_id: str
    subtask: str
    context: str
    question: str
    answers: tuple[str, ...]

    def shapes(self) -> tuple[str, ...]:
        """Passage and question, in either order."""
        return f"{self.context}\n{self.question}", f"{self.question}\n{self.context}"


def tydiqa_item(
    asked: PassageQuestion,
    shots: Sequence[PassageQuestion],
    kind: str = "loss",
    *,
    evaluated: bool = False,
) -> Item:
    """LESS's TyDiQA formats: of a query without shots, else of its one-shot evaluation.

    Without shots, nothing stands between the instruction and ``Passage:``; with them, blank
    lines separate instruction, worked examples and question.

    Args:
        asked: What is asked.
        shots: Worked examples before it.
        kind: ``loss`` of the first answer, or ``generate``.
        evaluated: The format of its evaluation, whatever the number of shots: shots may be left
            out, and long passages are cut.
    """
    words = WORDING[asked.subtask]

    def passage(example: PassageQuestion) -> str:
        return f"{words.passage} {example.context}\n{words.question} {example.question}"

    worked = tuple(f"{passage(s)}\n{words.answer} {s.answers[0]}\n\n" for s in shots)
    blank = "\n\n" if worked or evaluated else ""
    prompt = "".join([words.instruction, blank, *worked, passage(asked)])
    return Item(
        example_id=asked.example_id,
        subtask=asked.subtask,
        messages=exchange(prompt, f"{words.answer} {asked.answers[0]}"),
        prefix=words.answer,
        eos=False,
        kind=kind,
        answers=asked.answers,
        shots=worked if evaluated else (),
        passages=tuple(e.context for e in [*shots, asked]) if evaluated else (),
    )


def build(section: TaskSection, data_dir: Path) -> Task:
    """Queries and test items of TyDiQA.

    A test item of a file is tested for the loss of its first answer and by generation, with
    one worked example of its language, on at most 200 questions of each language.

    Raises:
        ConfigError: A key is missing or does not go with this kind.
        DataError: A file or record cannot be used, or there are fewer examples than asked for.
    """
    refuse_prompts(section)
    development = tydiqa_questions(file_rows(section, "path", data_dir))
    queries, heldout, shown = divide(section, development)

    def query(asked: PassageQuestion) -> Item:
        return tydiqa_item(asked, shots_for(section, asked, shown, default=0))

    def tested(asked: PassageQuestion, kind: str) -> Item:
        shots = test_shots_for(section, asked, shown, benchmark=TEST_SHOTS, query=0)
        return tydiqa_item(asked, shots, kind, evaluated=section.test_prompt == "benchmark")

    test = [query(q) for q in heldout]
    drawn: list[PassageQuestion] = []
    if section.has_test:
        questions = tydiqa_questions(file_rows(section, "test", data_dir))
        drawn = draw_test(section, questions, [*queries, *heldout], TESTED_PER_LANGUAGE)
        test += [tested(q, kind) for q in drawn for kind in ("loss", "generate")]
    asked = [query(q) for q in queries]
    facts = task_facts(section, development_source(section), asked, test, standard_shots=TEST_SHOTS)
    return Task(asked, test, facts, recognise(section, development, drawn))


def tydiqa_questions(rows: Iterable[Row]) -> list[PassageQuestion]:
    """Questions from records ``language, context, question, answers``.

    Args:
        rows: Records; ``answers`` is a list of texts or of ``{"text": ...}``, or the hub's
            ``{"text": [...]}``. Without ``language`` the id begins with it, as on the hub.

    Raises:
        DataError: A field is missing, a language is unknown, or there is no answer.
    """
    questions: list[PassageQuestion] = []
    for row in rows:
        language = _language(row)
        if language not in WORDING:
            raise DataError(
                "unknown language",
                where=f"{row.where}, field language",
                value=language,
                allowed=did_you_mean(language, WORDING),
            )
        questions.append(
            PassageQuestion(
                example_id=row_id(row, f"{language}-{len(questions):05d}"),
                subtask=language,
                context=text_field(row, "context"),
                question=text_field(row, "question"),
                answers=_answers(row),
            )
        )
    return sorted(questions, key=lambda q: q.subtask)


def _language(row: Row) -> str:
    if "language" not in row.fields and "-" in str(row.fields.get("id")):
        return str(row.fields["id"]).partition("-")[0]
    return text_field(row, "language")


def _answers(row: Row) -> tuple[str, ...]:
    """Different accepted answers, in their order."""
    answers = needed(row, "answers")
    if isinstance(answers, dict):
        answers = answers.get("text")
    texts: list[str] = []
    for answer in answers if isinstance(answers, list) else []:
        text = answer.get("text") if isinstance(answer, dict) else answer
        if isinstance(text, str) and text.strip():
            texts.append(text)
    if not texts or len(texts) < len(answers or []):
        raise DataError(
            "a question has no answer, or an empty one",
            where=f"{row.where}, field answers",
            value=answers,
            allowed='a list of texts, or of {"text": ...}',
        )
    return tuple(dict.fromkeys(texts))
