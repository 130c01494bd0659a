"""Tasks made of conversations: any file a pool can be read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from iprox.data.items import (
    Item,
    Task,
    development_source,
    divide,
    draw_test,
    recognise,
    refuse_prompts,
    task_facts,
    task_file,
)
from iprox.data.pools import Candidate, Message, read_candidates
from iprox.data.sources import Source
from iprox.errors import ConfigError
from iprox.study.schema import TaskSection


@dataclass(frozen=True)
class Conversation:
    """An example of any pool; its last assistant turn is the completion."""

    example_id: str
    subtask: str
    messages: tuple[Message, ...]

    def shapes(self) -> tuple[str, ...]:
        """All turns, and all but the last."""
        texts = [message["content"] for message in self.messages]
        return tuple("\n".join(some) for some in (texts, texts[:-1]) if some)


def build(section: TaskSection, data_dir: Path) -> Task:
    """Queries and test items of a file of conversations; all are measured by their loss.

    An example's subtask is its field ``subtask``, else its ``category``, else the task's name.

    Raises:
        ConfigError: A key is missing or does not go with this kind.
        DataError: A file or record cannot be used, or there are fewer examples than asked for.
    """
    refuse_prompts(section)
    if section.shots:
        raise ConfigError(
            "a task of kind messages has no worked examples",
            where=f"tasks.{section.name}.shots",
            value=section.shots,
            allowed="0",
        )
    development, dropped = _conversations(section, "path", data_dir)
    queries, heldout, _ = divide(section, development)
    drawn: list[Conversation] = []
    if section.has_test:
        items, dropped_test = _conversations(section, "test", data_dir)
        drawn = draw_test(section, items, [*queries, *heldout])
        dropped += dropped_test

    def item(c: Conversation) -> Item:
        return Item(c.example_id, c.subtask, c.messages, prefix="", eos=True)

    asked, test = [item(c) for c in queries], [item(c) for c in [*heldout, *drawn]]
    facts = task_facts(section, development_source(section), asked, test, dropped)
    return Task(asked, test, facts, recognise(section, development, drawn))


def _conversations(
    section: TaskSection, key: str, data_dir: Path
) -> tuple[list[Conversation], int]:
    """Examples with a response, and the number left out for having none."""
    relative, path = task_file(section, key, data_dir)
    candidates, _ = read_candidates(Source(section.name, relative, ((relative, path),)))
    usable = [c for c in candidates if c.has_response]
    found = [Conversation(c.example_id, _subtask(c) or section.name, c.messages) for c in usable]
    return sorted(found, key=lambda c: (c.subtask, c.example_id)), len(candidates) - len(usable)


def _subtask(candidate: Candidate) -> str:
    subtask = candidate.row.fields.get("subtask")
    return subtask if isinstance(subtask, str) and subtask else candidate.category
