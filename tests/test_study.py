"""Reading a study file: precedence, grids, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from iprox.errors import ConfigError
from iprox.study.load import load_study, merge, parse_study

MINIMAL: dict[str, Any] = {
    "study": "s",
    "pool": {"path": "pool.jsonl"},
    "tasks": ["mmlu"],
    "runs": {"a": {}},
}


def study(**changes: Any) -> Any:
    body = MINIMAL | {"runs": changes.pop("runs")} if "runs" in changes else MINIMAL
    return parse_study(merge(body, changes))


def test_graddot_is_a_dot_product_in_a_grid_of_estimators() -> None:
    parsed = study(
        influence={"score": "cosine"},
        runs={"a": {"influence": {"estimator": ["tracin", "graddot"]}}},
    )
    assert [r.config.influence.score for r in parsed.runs] == ["cosine", "dot"]


def test_later_sources_win() -> None:
    parsed = study(
        preset="paper",
        proxy={"damping": 0.5},
        runs={"a": {}, "b": {"preset": "reference"}, "c": {"proxy": {"damping": 0.7}}},
    )
    a, b, c = (run.config for run in parsed.runs)
    assert a.proxy.mode == "paper"  # the study's preset over the schema's default
    assert a.proxy.damping == 0.5  # the study's key over its preset
    assert b.proxy.damping == 1e-3  # the run's preset over the study's key
    assert b.align.tau == 2.0
    assert c.proxy.damping == 0.7  # the run's key over everything


def test_a_list_is_a_grid_and_names_its_runs() -> None:
    parsed = study(
        runs={"iprox": {"proxy": {"sparsity": [0.3, 0.5], "gauge": ["balanced", "paper"]}}}
    )
    assert [r.name for r in parsed.runs] == [
        "iprox-0.3-balanced",
        "iprox-0.3-paper",
        "iprox-0.5-balanced",
        "iprox-0.5-paper",
    ]
    assert parsed.runs[2].config.proxy.sparsity == 0.5
    assert parsed.runs[2].changed == {"proxy.sparsity": 0.5, "proxy.gauge": "balanced"}


def test_a_key_that_is_a_list_is_no_grid() -> None:
    parsed = study(runs={"a": {"fidelity": {"top": [0.1, 0.2]}}})
    assert [r.name for r in parsed.runs] == ["a"]
    assert parsed.runs[0].config.fidelity.top == [0.1, 0.2]


def test_random_draws_are_runs_of_one_group() -> None:
    parsed = study(runs={"random": {"scorer": {"kind": "random", "draws": 3}}})
    assert [(r.name, r.group, r.draw) for r in parsed.runs] == [
        ("random-1", "random", 0),
        ("random-2", "random", 1),
        ("random-3", "random", 2),
    ]


def test_scientific_notation_without_a_point_is_a_number() -> None:
    assert study(align=yaml.safe_load("lr: 1e-5")).runs[0].config.align.lr == 1e-5


BROKEN = {
    "misspelt key": ({"proxy": {"sparcity": 0.5}}, "unknown key proxy.sparcity", "sparsity?"),
    "misspelt section": ({"prox": {}}, "unknown key prox", "proxy or probe?"),
    "sparsity 0": ({"proxy": {"sparsity": 0}}, "proxy.sparsity", "greater than 0"),
    "sparsity 1": ({"proxy": {"sparsity": 1}}, "proxy.sparsity", "less than 1"),
    "sparsity nan": ({"proxy": {"sparsity": float("nan")}}, "proxy.sparsity", "finite"),
    "text for a number": ({"proxy": {"damping": "high"}}, "proxy.damping", "number"),
    "unknown choice": ({"proxy": {"kind": "svdd"}}, "proxy.kind", "svd"),
    "unknown preset": ({"preset": "papr"}, "unknown preset", "paper?"),
    "unknown task": ({"tasks": ["mmul"]}, "unknown task", "mmlu?"),
    "task twice": ({"tasks": ["mmlu", "mmlu"]}, "two tasks have the same name", "mmlu"),
    "task called all": (
        {"tasks": [{"name": "all", "kind": "messages", "path": "t.jsonl"}]},
        "may not be called all",
        "",
    ),
    "no tasks": ({"tasks": []}, "tasks", "at least 1"),
    "two pools": ({"pool": {"name": "alpaca-demo"}}, "pool", "exactly one"),
    "run not a mapping": ({"runs": {"a": 3}}, "runs.a", "valid dictionary"),
    "run called base": ({"runs": {"base": {}}}, "may not be called base", ""),
    "empty grid": (
        {"runs": {"g": {"proxy": {"sparsity": []}}}},
        "a grid is empty",
        "proxy.sparsity",
    ),
    "grid value out of range": (
        {"runs": {"g": {"proxy": {"sparsity": [0.5, 2]}}}},
        "runs.g.proxy.sparsity",
        "",
    ),
    "sparsity neither a number nor auto": (
        {"proxy": {"sparsity": "half"}},
        "proxy.sparsity: Input should be 'auto', or a valid number",
        "",
    ),
    "tokens neither a number nor rank": (
        {"probe": {"tokens": "many"}},
        "probe.tokens: Input should be a valid integer",
        "or 'rank'",
    ),
    "hostile study name": ({"study": "../x"}, "study", "letters"),
    "hostile run name": ({"runs": {"a/../b": {}}}, "runs", "letters"),
    "equal names": (
        {"runs": {"i": {"proxy": {"sparsity": [0.3]}}, "i-0.3": {}}},
        "same name",
        "i-0.3",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_studies_say_what_is_wrong(case: str) -> None:
    changes, what, detail = BROKEN[case]
    changes = dict(changes)
    with pytest.raises(ConfigError) as caught:
        study(**changes)
    assert what in str(caught.value)
    assert detail in str(caught.value)


def test_a_study_without_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match="runs"):
        parse_study({**MINIMAL, "runs": {}})
    with pytest.raises(ConfigError, match="missing key runs"):
        parse_study({k: v for k, v in MINIMAL.items() if k != "runs"})


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    base, over = tmp_path / "base.yaml", tmp_path / "over.yaml"
    base.write_text(yaml.safe_dump(MINIMAL, sort_keys=False))
    over.write_text("proxy:\n  gauge: balanced\n  sparsity: 7\n")
    with pytest.raises(ConfigError) as caught:
        load_study([base, over])
    assert f"{over}:3 (key proxy.sparsity)" in str(caught.value)


def test_yaml_mistakes_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("study: s\nruns: {a: [}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml:2"):
        load_study([path])
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_study([path])
    path.write_bytes(b"study: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study([path])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study([tmp_path / "absent.yaml"])
