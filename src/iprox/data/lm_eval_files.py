"""Worked examples that the lm-eval package ships with its tasks, read as data.

Its YAML files are found and parsed without importing the package, and nothing in them is run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iprox.errors import DataError

FIX = "pip install lm-eval==0.4.13, or give the task's development examples as files"


@dataclass(frozen=True)
class ShippedTask:
    """One task file.

    Attributes:
        name: Subject or task, as its data set calls it.
        description: What stands before the worked examples.
        samples: The worked examples, by field.
    """

    name: str
    description: str
    samples: list[dict[str, str]]


def shipped_tasks(
    folder: str, pattern: str, fields: tuple[str, ...]
) -> tuple[list[ShippedTask], str]:
    """Task files of one of lm-eval's task folders, in order of their names.

    Args:
        folder: Below ``lm_eval/tasks``.
        pattern: Of the files' names.
        fields: What every worked example must have.

    Returns:
        The tasks, and the package's name and version.

    Raises:
        DataError: The package is missing, or its files are not as expected.
    """
    spec = importlib.util.find_spec("lm_eval")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [f for root in roots for f in sorted(Path(root, "tasks", folder).glob(pattern))]
    if not files:
        raise DataError(
            "the lm-eval package, or its task files, are not installed",
            where=f"lm_eval/tasks/{folder}/{pattern}",
            fix=FIX,
        )
    source = f"lm-eval {importlib.metadata.version('lm-eval')}"
    return [_read(file, fields) for file in files], source


class _PlainLoader(yaml.SafeLoader):
    """Keeps tags such as ``!function`` as their text: a task file is read, never run."""


def _as_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return str(node.value)


_PlainLoader.add_multi_constructor("!", _as_text)


def _read(file: Path, fields: tuple[str, ...]) -> ShippedTask:
    try:
        task: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)
        samples = [{f: str(s[f]) for f in fields} for s in task["fewshot_config"]["samples"]]
        return ShippedTask(str(task["dataset_name"]), str(task["description"]), samples)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            "a task file of lm-eval is not as expected", where=file, value=repr(error), fix=FIX
        ) from None
