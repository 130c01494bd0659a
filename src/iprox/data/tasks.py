"""Tasks: development examples as queries, and test items to evaluate on.

Queries have the exact formats of LESS (Xia et al. 2024, arXiv:2402.04333): a prompt, the
beginning of the answer (``prefix``, no loss), and a completion without end-of-sequence token.
A new kind of task is one module with a ``build`` function and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from iprox.data import bbh, conversations, custom, mmlu, tydiqa
from iprox.data.items import Item, Task, item_table, query_table
from iprox.study.schema import TaskSection

__all__ = ["KINDS", "Item", "Task", "build_task", "item_table", "query_table"]

KINDS: dict[str, Callable[[TaskSection, Path], Task]] = {
    "mmlu": mmlu.build,
    "bbh": bbh.build,
    "tydiqa": tydiqa.build,
    "messages": conversations.build,
    "custom": custom.build,
}


def build_task(section: TaskSection, data_dir: Path) -> Task:
    """Read a task's examples and make its queries and test items.

    Args:
        section: The study's task.
        data_dir: Folder that paths are relative to.

    Raises:
        ConfigError: A key is missing or does not go with the task's kind.
        DataError: A file or record cannot be used, or there are fewer examples than asked for.
    """
    return KINDS[section.kind](section, data_dir)
