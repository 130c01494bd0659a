"""What can be known of a study's files before any job runs.

Nothing is parsed here that a job parses anyway; but a file that is not there, is empty, or is
not what its name says should not be found by a job that waited for a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iprox.errors import ConfigError, DataError, ModelError
from iprox.plan.nodes import Node, Plan
from iprox.store.inputs import check_path, locate, raw_input_files, raw_paths

DATA_KINDS = (".csv", ".json", ".jsonl", ".parquet")

OWN_FILE = {"messages", "tydiqa", "custom"}
"""Kinds of tasks whose examples come from a file of the user's."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_inputs(plan: Plan, data_dir: Path, weights: bool = True) -> None:
    """Check the keys and files that every stage of a plan names.

    Args:
        plan: A study's plan.
        data_dir: Folder that the study's paths are relative to.
        weights: Whether model folders must have weights; to plan a study, sizes are enough.

    Raises:
        ConfigError: A task's keys do not go with its kind.
        DataError: A file is missing, empty, of an unknown kind, or outside ``data_dir``.
        ModelError: A model folder lacks its config or its weights.
    """
    if not data_dir.is_dir():
        raise DataError(
            "data_dir is not a folder",
            where="key data_dir",
            value=str(data_dir),
            fix="give the folder that paths in the study are relative to",
        )
    for node in plan.nodes.values():
        if node.stage == "task":
            _check_task(node.params["task"])
        if node.stage in ("pool", "task"):
            _check_data(node, data_dir)
        if node.stage == "target":
            _check_model(node.params["target"]["model"], data_dir, weights)
        raw_input_files(node.params, data_dir)


def _check_task(task: dict[str, Any]) -> None:
    where = f"tasks.{task['name']}"
    if (task["kind"] == "custom") != (task["yaml"] is not None):
        raise ConfigError(
            "a task of kind custom, and no other, has a task file",
            where=f"{where}.yaml",
            value=task["yaml"],
            fix="give the path of its YAML file below data_dir, or remove the key",
        )
    if task["kind"] in OWN_FILE and task["path"] is None and task["hub"] is None:
        raise ConfigError(
            f"a task of kind {task['kind']} needs a file",
            where=f"{where}.path",
            fix="give the path of its examples below data_dir",
        )
    if task["prompts"] is not None and task["kind"] != "bbh":
        raise ConfigError(
            "prompts belongs to tasks of kind bbh",
            where=f"{where}.prompts",
            value=task["prompts"],
            fix="remove it",
        )
    if task["shots"] and task["kind"] == "messages":
        raise ConfigError(
            "a task of kind messages has no worked examples",
            where=f"{where}.shots",
            value=task["shots"],
            allowed="0",
        )


def _check_data(node: Node, data_dir: Path) -> None:
    for key, path in raw_paths(node.params):
        found = locate(path, data_dir, key)
        if found.is_dir() or key == "task.yaml":
            continue
        if found.suffix.lower() not in DATA_KINDS:
            raise DataError(
                "unknown kind of data file",
                where=key,
                value=path,
                allowed=", ".join(DATA_KINDS),
                fix="convert the file, and name it for what it is",
            )
        if found.stat().st_size == 0:
            raise DataError(
                "a data file is empty", where=key, value=path, fix="remove it, or fill it"
            )


def _check_model(model: str, data_dir: Path, weights: bool) -> None:
    """Check a local model folder; names of packages and of the hub are left to their job."""
    check_path(model, "target.model, or proxy.model of a run")
    if model.startswith((".", "/")) or model.count("/") > 1:  # no name that a hub could have
        locate(model, data_dir, "target.model, or proxy.model of a run")
    folder = data_dir / model
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(
            "a model is a folder, not a file",
            where="target.model, or proxy.model of a run",
            value=model,
            fix="name the folder that has config.json and model.safetensors",
        )
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            "a model folder has no config.json",
            where=folder,
            fix="save the model with save_pretrained, or correct target.model",
        )
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            "a model's config.json is not JSON",
            where=config,
            value=str(error),
            fix="download or save the model again",
        ) from None
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ModelError(
            "a model's config.json does not say what model it is",
            where=config,
            allowed="a JSON object with model_type",
            fix="download or save the model again",
        )
    if weights and not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            "a model folder has no safetensors weights",
            where=folder,
            allowed=" or ".join(WEIGHTS),
            fix="convert the weights with save_pretrained(..., safe_serialization=True)",
        )
