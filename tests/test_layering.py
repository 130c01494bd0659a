"""Imports point inward: workflow -> stages -> numerics, and never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "iprox"

# package -> packages of ours it may not import
FORBIDDEN = {
    "numerics": {
        "models",
        "engine",
        "data",
        "stages",
        "store",
        "plan",
        "study",
        "cli",
        "report",
        "training",
        "evaluation",
        "progress",
        "logs",
    },
    "models": {"stages", "plan", "cli", "report", "data", "engine"},
    "engine": {"stages", "plan", "cli", "report", "store"},
    "data": {"models", "engine", "stages", "plan", "cli", "report", "numerics"},
    "training": {"stages", "plan", "cli", "report"},
    "evaluation": {"stages", "plan", "cli", "report"},
    "report": {"stages", "plan", "cli", "models", "engine"},
    "stages": {"plan", "cli"},
    "estimators": {"plan", "cli", "report"},
    "scorers": {"plan", "cli", "report"},
    "store": {"stages", "plan", "cli", "report", "engine", "data"},
    "study": {
        "estimators",
        "scorers",
        "stages",
        "plan",
        "cli",
        "report",
        "engine",
        "data",
        "models",
    },
    "plan": {"estimators", "scorers", "stages", "cli", "report", "engine", "data", "models"},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_inward(package: str) -> None:
    files = sorted((SOURCE / package).glob("*.py"))
    assert files
    for path in files:
        ours = {n.split(".")[1] for n in imports(path) if n.startswith("iprox.")}
        assert not ours & FORBIDDEN[package], path


def test_the_package_knows_nothing_of_snakemake_or_pickle() -> None:
    for path in SOURCE.rglob("*.py"):
        tops = {n.split(".")[0] for n in imports(path)}
        assert not tops & {"snakemake", "pickle", "dill", "joblib", "cloudpickle"}, path


def test_the_rule_would_be_noticed_if_broken(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from iprox.stages import pool\n")
    assert "iprox.stages.pool" in imports(bad)
