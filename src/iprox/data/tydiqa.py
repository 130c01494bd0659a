"""TyDiQA's gold passage task (Clark et al. 2020, arXiv:2003.05002): nine languages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iprox.data.items import (
    Item,
    Task,
    divide,
    draw_test,
    exchange,
    file_rows,
    needed,
    refuse_prompts,
    row_id,
    shots_for,
    spread,
    task_facts,
    text_field,
)
from iprox.data.pools import Row
from iprox.errors import DataError, did_you_mean
from iprox.study.schema import TaskSection

TESTED_PER_LANGUAGE = 200
"""Questions of a language that LESS evaluates on, at most."""


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


def tydiqa_item(
    asked: PassageQuestion, shots: Sequence[PassageQuestion], kind: str = "loss"
) -> Item:
    """LESS's TyDiQA formats: of a query without shots, else of its one-shot evaluation.

    Without shots, nothing stands between the instruction and ``Passage:``; with them, blank
    lines separate instruction, worked examples and question.

    Args:
        asked: What is asked.
        shots: Worked examples before it.
        kind: ``loss`` of the first answer, or ``generate``.
    """
    words = WORDING[asked.subtask]

    def passage(example: PassageQuestion) -> str:
        return f"{words.passage} {example.context}\n{words.question} {example.question}"

    worked = [f"{passage(shot)}\n{words.answer} {shot.answers[0]}" for shot in shots]
    if worked:
        prompt = "\n\n".join([words.instruction, *worked, passage(asked)])
    else:
        prompt = words.instruction + passage(asked)
    return Item(
        example_id=asked.example_id,
        subtask=asked.subtask,
        messages=exchange(prompt, f"{words.answer} {asked.answers[0]}"),
        prefix=words.answer,
        eos=False,
        kind=kind,
        answers=asked.answers,
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

    def item(asked: PassageQuestion, kind: str, shots: int) -> Item:
        return tydiqa_item(asked, shots_for(section, asked, shown, default=shots), kind)

    test = [item(q, "loss", shots=0) for q in heldout]
    if section.test is not None:
        questions = _capped(tydiqa_questions(file_rows(section, "test", data_dir)), section.seed)
        tested = draw_test(section, questions, [*queries, *heldout])
        test += [item(q, kind, shots=1) for q in tested for kind in ("loss", "generate")]
    asked = [item(q, "loss", shots=0) for q in queries]
    return Task(asked, test, task_facts(section, str(section.path), asked, test))


def _capped(questions: list[PassageQuestion], seed: int) -> list[PassageQuestion]:
    languages = sorted({q.subtask for q in questions})
    by_language = ([q for q in questions if q.subtask == language] for language in languages)
    return [q for some in by_language for q in spread(some, TESTED_PER_LANGUAGE, seed, "language")]


def tydiqa_questions(rows: Iterable[Row]) -> list[PassageQuestion]:
    """Questions from records ``language, context, question, answers``.

    Args:
        rows: Records; ``answers`` is a list of texts or of ``{"text": ...}``.

    Raises:
        DataError: A field is missing, a language is unknown, or there is no answer.
    """
    questions: list[PassageQuestion] = []
    for row in rows:
        language = text_field(row, "language")
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


def _answers(row: Row) -> tuple[str, ...]:
    """Different accepted answers, in their order."""
    answers = needed(row, "answers")
    texts: list[str] = []
    for answer in answers if isinstance(answers, list) else []:
        text = answer.get("text") if isinstance(answer, dict) else answer
        if isinstance(text, str) and text.strip():
            texts.append(text)
    if not texts or len(texts) < len(answers):
        raise DataError(
            "a question has no answer, or an empty one",
            where=f"{row.where}, field answers",
            value=answers,
            allowed='a list of texts, or of {"text": ...}',
        )
    return tuple(dict.fromkeys(texts))
