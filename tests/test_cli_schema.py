from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from iprox.cli.main import app
from iprox.errors import ConfigError
from iprox.study.document import (
    BEGIN,
    END,
    README_FILE,
    SCHEMA_FILE,
    json_schema,
    key_table,
    readme_text,
    schema_text,
)
from iprox.study.load import parse_study

PROJECT = Path(__file__).parent.parent
STUDY: dict[str, Any] = {
    "study": "s",
    "pool": {"name": "alpaca-demo"},
    "tasks": ["mmlu"],
    "runs": {"full": {}},
}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (PROJECT / SCHEMA_FILE).read_text(encoding="utf-8")
    assert committed == schema_text(), "run: iprox schema --write"


def test_the_committed_table_of_keys_is_the_generated_one() -> None:
    committed = (PROJECT / README_FILE).read_text(encoding="utf-8")
    assert committed == readme_text(committed), "run: iprox schema --write"


def test_every_level_refuses_unknown_keys() -> None:
    def objects(part: Any) -> Any:
        if isinstance(part, dict):
            if "properties" in part and part.get("type") == "object":
                yield part
            for value in part.values():
                yield from objects(value)
        elif isinstance(part, list):
            for value in part:
                yield from objects(value)

    found = list(objects(json_schema()))
    assert len(found) > 20
    assert all(part["additionalProperties"] is False for part in found)


def test_the_schema_sets_no_defaults() -> None:
    assert '"default":' not in schema_text()  # a validator that fills them in would undo presets


@pytest.mark.parametrize("file", sorted((PROJECT / "config").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_studies_are_valid(validator: Draft202012Validator, file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    overlay = {key: value for key, value in STUDY.items() if key not in content}
    assert list(validator.iter_errors(overlay | content)) == []


def test_the_study_in_the_readme_is_valid(validator: Draft202012Validator) -> None:
    text = (PROJECT / README_FILE).read_text(encoding="utf-8")
    study = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert list(validator.iter_errors(study)) == []
    assert parse_study(study).runs


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"runs": {"a": {"proxy": {"sparsity": [0.3, 0.5], "layers": {"include": ["*q*"]}}}}}, True),
    ({"runs": {"a": {"preset": "paper", "align": {"epochs": 0}}}}, True),
    (
        {"tasks": [{"name": "mmlu", "queries": 3}, {"name": "x", "kind": "messages", "path": "p"}]},
        True,
    ),
    ({"split": {"warmup": 0.05, "probe": 64}}, True),
    ({"proxy": None, "report": None, "preset": None}, True),
    ({"pool": None}, False),
    ({"sparsity": 0.5}, False),
    ({"proxy": {"sparsty": 0.5}}, False),
    ({"proxy": {"sparsity": 1.5}}, False),
    ({"proxy": {"sparsity": [0.3, 0.5]}}, False),
    ({"proxy": {"kind": "pruned"}}, False),
    ({"split": {"warmup": 0}}, False),
    ({"tasks": ["tydiqa"]}, False),
    ({"tasks": [{"name": "x"}]}, False),
    ({"tasks": []}, False),
    ({"runs": {}}, False),
    ({"runs": {"a": {"pool": {"name": "dolly"}}}}, False),
    ({"runs": {"a": {"proxy": {"layers": {"exclud": []}}}}}, False),
    ({"runs": {"a": {"proxy": {"sparsity": [0.5, 2.0]}}}}, False),
    ({"runs": {"a": {"proxy": {"sparsity": []}}}}, False),
    ({"runs": {"../a": {}}}, False),
    ({"warmup": {"lr": "1e-5"}}, False),
]


@pytest.mark.parametrize(("change", "valid"), CHANGES)
def test_schema_and_loader_agree(
    validator: Draft202012Validator, change: dict[str, Any], valid: bool
) -> None:
    study = STUDY | change
    assert validator.is_valid(study) is valid
    if change == {"warmup": {"lr": "1e-5"}}:
        return  # the loader may be kinder to numbers that YAML took for text
    with nullcontext() if valid else pytest.raises(ConfigError):
        parse_study(study)


def test_the_table_names_every_key_of_the_schema() -> None:
    table = key_table()
    schema = json_schema()
    sections = {
        key: option["$ref"].rsplit("/", 1)[-1]
        for key, spec in schema["properties"].items()
        for option in [spec, *spec.get("anyOf", [])]
        if "$ref" in option
    }
    assert {"target", "pool", "proxy", "report"} <= set(sections)
    for section, name in sections.items():
        for key in schema["$defs"][name]["properties"]:
            assert f"| `{section}.{key}` |" in table
    assert "| `proxy.layers.include` | list of text |" in table
    assert "| `warmup.lr` | number > 0 | `1.0e-5` |" in table
    assert "| `split.warmup` | integer or number > 0 | `0.05` |" in table
    assert "`paper` or `reference`" in table


def test_schema_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == json_schema()
    refused = CliRunner().invoke(app, ["schema", "--write"])
    assert refused.exit_code == 1
    assert "config/README.md" in refused.stderr
    (tmp_path / "config").mkdir()
    (tmp_path / README_FILE).write_text(f"Mine.\n{BEGIN}\nold\n{END}\nMine too.\n")
    written = CliRunner().invoke(app, ["schema", "--write"])
    assert written.exit_code == 0, written.output
    assert (tmp_path / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text()
    text = (tmp_path / README_FILE).read_text(encoding="utf-8")
    assert text == f"Mine.\n{BEGIN}\n\n{key_table()}\n{END}\nMine too.\n"
    (tmp_path / README_FILE).write_text("no markers")
    assert CliRunner().invoke(app, ["schema", "--write"]).exit_code == 1
    assert (tmp_path / README_FILE).read_text() == "no markers"


HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow", "zarr", "numpy", "yaml", "scipy")


@pytest.mark.parametrize("arguments", [["--help"], ["show", "--help"], ["--version"]])
def test_starting_the_command_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from iprox.cli.main import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("stage", ["features", "finetune", "probe", "query", "ranking"])
def test_a_job_imports_no_library_that_it_may_not_need(stage: str) -> None:
    heavy = ("scipy.stats", "sklearn", "transformers", "datasets", "lm_eval", "matplotlib")
    code = f"import sys, iprox.stages.{stage}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["schema"], ["runs"], ["verify", "nothing"]])
def test_looking_never_imports_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from iprox.cli.main import app\n"
        f"CliRunner().invoke(app, {arguments!r})\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"
