"""The documented study file and the README agree with the schema."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from iprox.data.pools import build_pool
from iprox.data.sources import resolve
from iprox.data.tasks import build_task
from iprox.plan.plan import plan_study
from iprox.study.load import flatten, load_study
from iprox.study.schema import (
    FaithfulnessSection,
    FinetunedSection,
    PoolSection,
    ReportSection,
    RunConfig,
    TargetSection,
)

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config" / "config.yaml"
STUDIES = sorted((ROOT / "config").rglob("*.yaml"))


def documented_defaults() -> dict[str, Any]:
    """The demo's study file with every commented key in force and every active one out."""
    lines = []
    for line in CONFIG.read_text().splitlines():
        commented = re.match(r"^(\s*)# ((?:  )?[a-z_]+:(?: .*)?)$", line)
        if commented:
            lines.append(commented[1] + commented[2])
        elif re.match(r"^[a-z]+:\s*$", line):
            lines.append(line)
    return flatten({k: v for k, v in yaml.safe_load("\n".join(lines)).items() if v is not None})


def schema_defaults() -> dict[str, Any]:
    sections = {
        "target": TargetSection(),
        "pool": PoolSection(name="x"),
        "report": ReportSection(),
        "finetuned": FinetunedSection(),
        "faithfulness": FaithfulnessSection(),
    }
    values = {name: section.model_dump() for name, section in sections.items()}
    return flatten(values | RunConfig().model_dump())


def test_commented_keys_show_the_defaults() -> None:
    shown = documented_defaults()
    defaults = schema_defaults()
    for key, value in shown.items():
        if key in ("data_dir", "shards", "train_gpus"):
            continue
        assert defaults[key] == value, key


def test_every_key_is_in_the_file() -> None:
    active = flatten({k: v or {} for k, v in yaml.safe_load(CONFIG.read_text()).items()})
    known = set(documented_defaults()) | set(active)
    missing = {key for key in schema_defaults() if key not in known}
    assert not missing


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_every_study_file_plans(path: Path) -> None:
    assert plan_study(load_study([path])).nodes


def test_the_readmes_example_study_plans(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(study: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    path = tmp_path / "my-study.yaml"
    path.write_text(example[1])
    plan = plan_study(load_study([path]))
    assert list(plan.runs) == ["iprox-0.3", "iprox-0.5", "random-1", "random-2", "random-3"]


def test_the_conda_environment_is_the_locks() -> None:
    spec = importlib.util.spec_from_file_location("conda", ROOT / "envs" / "conda.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lock = (ROOT / "envs" / "lock.txt").read_text()
    assert (ROOT / "envs" / "iprox.yaml").read_text() == module.conda_environment(lock)
    assert re.search(r"^torch==[\d.]+$", lock, re.MULTILINE)  # by version only: builds differ


def test_paths_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:config|workflow|envs|src|tests)/[\w./-]+)`", text))
    assert named
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_dolly_study_reads_its_pool_and_tasks(shared_data: Path) -> None:
    config = load_study([ROOT / "config" / "small" / "dolly.yaml"]).config
    source = resolve(config.pool, shared_data, shared_data)
    assert len(build_pool(source, config.pool).candidates) == config.pool.limit
    for task in config.tasks:
        built = build_task(task, shared_data)
        assert built.queries
        assert built.test
