from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cli_artifacts import EVIL, LAYER, Results, every_stage
from typer.testing import CliRunner

from iprox.cli.artifact import STAGES
from iprox.cli.main import app
from iprox.cli.render import human_flops, human_memory, inert, plain, shown
from iprox.cli.show import cost_line
from iprox.cli.views import measured_time_ratio
from iprox.plan.nodes import Node
from iprox.store.manifest import PROVENANCE, SPEC
from iprox.store.tables import write_table

MADE = sorted(STAGES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Node]]:
    results = Results(tmp_path_factory.mktemp("show"))
    return results, every_stage(results)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return result.output


def as_json(*arguments: object) -> dict[str, Any]:
    return dict(json.loads(run(*arguments, "--json")))


EXPECTED = {
    "pool": ("examples", "licence", "CC BY 4.0", "answer 0"),
    "task": ("law", "choice"),
    "target": ("LlamaForCausalLM", "parameters"),
    "split": ("probe", "position"),
    "warmup": ("1.25", "hidden size"),
    "checkpoint": ("LlamaForCausalLM", "parameters"),
    "probe": ("inputs/s0", "(5, 4)", "tokens, in"),
    "decomposition": (LAYER, "exact/product", "2.5"),
    "factors": ("0.125", "kept dense", LAYER),
    "proxy": ("up_proj", "balanced", "1.25", "chosen step", "at step 1", "0.875"),
    "extraction": ("blocks.parquet", "0.375", "LlamaForCausalLM"),
    "covariance": ("empirical", f"inputs/{LAYER}/0", "(3, 3)"),
    "curvature": (f"input_values/{LAYER}", "features, vectors"),
    "eigenvalues": (f"sums/{LAYER}", "(2, 3)"),
    "direction": ("ekfac", "damping.amount", "0.25"),
    "query": ("(1, 2, 2)", "5", "mean_raw"),
    "diversity": ("nearest", "0.875"),
    "query_sketches": ("rows.zarr", "(2, 3)"),
    "backbone": ("hidden size",),
    "encoder": ("0.6875", "0.4375", "aggregated"),
    "embeddings": ("embedding", "(2, 3)"),
    "query_embeddings": ("rows.zarr", "(2, 3)"),
    "head": ("0.3125", "heldout"),
    "features": ("cheaper", "materialise_from", "shard-00001.zarr"),
    "ranking": ("mmlu: first", "mmlu: last", "without a score", "gradient"),
    "fidelity": ("spearman", "0.75", "above lengths", "0.625", "up_proj", "0.8125"),
    "selection": ("top 1 of 4", "examples per task"),
    "finetune": ("1.25",),
    "evaluation": ("loss", "mean loss"),
    "sparsity": ("0.8125", "0.625", "met", "floor", "0.75"),
    "synthetic": ("influence_retention", "0.5625"),
    "facts": ("GradDot", "0.3125"),
    "retrieval": ("RepSim", "0.4375"),
    "paper_table": ("IProX 0.3", "56.75", "25.5"),
    "small": ("LlamaForCausalLM", "parameters"),
    "retrain": ("1.25",),
    "faithfulness": ("ekfac", "0.6875"),
    "report": ("index.html", "runs.csv"),
}


@pytest.mark.parametrize("stage", MADE)
def test_show_explains_every_stage(made: tuple[Results, dict[str, Node]], stage: str) -> None:
    results, nodes = made
    text = run("show", results.folder(nodes[stage]))
    assert STAGES[stage] in text
    assert nodes[stage].id in text
    assert "118 MiB" in text
    for role, parent in nodes[stage].parents.items():
        assert role in text
        assert f"{parent.stage}/{parent.id}" in text
    for expected in EXPECTED[stage]:
        assert expected in text, expected


@pytest.mark.parametrize("stage", MADE)
def test_every_file_and_store_can_be_shown_alone(
    made: tuple[Results, dict[str, Node]], stage: str
) -> None:
    results, nodes = made
    folder = results.folder(nodes[stage])
    stores = [p for p in folder.rglob("*") if (p / "zarr.json").is_file()]
    files = [
        p for p in folder.rglob("*") if p.is_file() and not any(s in p.parents for s in stores)
    ]
    assert stores or files
    for path in (*stores, *files):
        assert as_json("show", path)["headline"]


@pytest.mark.parametrize("stage", MADE)
def test_json_and_text_say_the_same_blocks(
    made: tuple[Results, dict[str, Node]], stage: str
) -> None:
    results, nodes = made
    body = as_json("show", results.folder(nodes[stage]))
    text = run("show", results.folder(nodes[stage]))
    assert all(title in text for title in body if title != "headline")


def test_numbers_are_those_of_the_files(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    features = as_json("show", results.folder(nodes["features"]))["features"]
    assert features == {"shards": 2, "examples": 4, "tokens": 40, "without supervised tokens": 2}
    ranking = as_json("show", results.folder(nodes["ranking"]))
    assert ranking["mmlu"]["without a score"] == 1
    assert ranking["mmlu"]["highest score"] == pytest.approx(0.4)
    assert [row["example_id"] for row in ranking["mmlu: first"]] == ["e1", "e3", "e0", "e2"]
    assert ranking["mmlu: last"][-1]["score"] is None
    assert as_json("show", results.folder(nodes["factors"]))["totals"]["sparsity"] == 1 - 10 / 24
    query = as_json("show", results.folder(nodes["query"]))
    assert query["layers"][0]["norm"] == 5.0
    assert as_json("show", results.folder(nodes["target"]))["model"]["parameters"] == 24


def test_measured_time_is_that_of_both_passes(tmp_path: Path) -> None:
    """From the provenance of the parents, tokens per second; unknown when one is not there."""
    folder = tmp_path / "fidelity" / "f"
    folder.mkdir(parents=True)
    parents = {role: {"stage": "features", "id": role} for role in ("proxy", "target")}
    (folder / SPEC).write_text(json.dumps({"parents": parents}))
    for role, rate in (("proxy", 50.0), ("target", 20.0)):
        assert measured_time_ratio(folder) is None
        made = tmp_path / "features" / role
        made.mkdir(parents=True)
        (made / PROVENANCE).write_text(json.dumps({"metrics": {"tokens_per_s": rate}}))
    assert measured_time_ratio(folder) == 0.4


def test_errors_of_sketches_are_shown(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    folder = results.folder(nodes["features"])
    path = folder / "sketch.parquet"
    write_table(path, pd.DataFrame([{"kind": "logra", "rank": 4, "max_error": 0.0625}]))
    text = run("show", folder)
    path.unlink()
    assert "cosines of sketches" in text
    assert "0.0625" in text


def test_rows_limits_tables_and_says_so(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    folder = results.folder(nodes["ranking"])
    assert len(as_json("show", folder, "--rows", 2)["mmlu: first"]) == 2
    assert "1 more row;" in run("show", results.folder(nodes["split"]), "--rows", 1)
    assert "more row" not in run("show", results.folder(nodes["split"]), "--rows", 2)


@pytest.mark.parametrize("stage", ["pool", "selection"])
def test_text_of_a_pool_cannot_act_on_the_terminal(
    made: tuple[Results, dict[str, Node]], stage: str
) -> None:
    results, nodes = made
    for arguments in ([], ["--json"]):
        text = run("show", results.folder(nodes[stage]), *arguments)
        assert not any(c in text for c in "\x1b\x9b\u202e")
        assert "[red]x[/red]" in text


def test_output_in_a_pipe_has_no_colours_and_no_folded_lines(
    made: tuple[Results, dict[str, Node]],
) -> None:
    results, nodes = made
    folder = results.folder(nodes["decomposition"])
    done = subprocess.run(
        [sys.executable, "-c", "from iprox.cli.main import app; app()", "show", folder],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"},
    )
    assert "\x1b" not in done.stdout
    assert any(LAYER in line and "exact/product" in line for line in done.stdout.splitlines())
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_inert_keeps_ordinary_text_of_any_script() -> None:
    ordinary = "naïve café, নমস্কার, 日本語, 👩\u200d💻, a_b [c] {d}"
    assert inert(ordinary) == ordinary
    assert inert("a\nb\tc") == "a b c"
    assert inert(EVIL) == r"[red]x[/red] \x1b[31mred\x1b[0m \x9b31m \u202eabc"


def test_values_are_shown_as_people_read_them() -> None:
    assert [shown(v) for v in (None, float("nan"), True, 12345, 0.1, [1, 2])] == [
        "-", "-", "yes", "12,345", "0.1", "1, 2",
    ]  # fmt: skip
    assert plain(float("-inf")) is None


def test_an_absent_file_is_said_and_does_not_crash(tmp_path: Path) -> None:
    results = Results(tmp_path)
    nodes = every_stage(results)
    for stage, name in (("warmup", "log.parquet"), ("task", "test.parquet"), ("pool", "spec.json")):
        (results.folder(nodes[stage]) / name).unlink()
        assert "absent" in run("show", results.folder(nodes[stage]))
    (results.folder(nodes["split"]) / "manifest.json").unlink()
    assert "not finished" in run("show", results.folder(nodes["split"]))


def test_runs_studies_and_the_results_folder_can_be_shown(
    made: tuple[Results, dict[str, Node]],
) -> None:
    results, nodes = made
    folder = results.link("demo", "full", {"ranking": nodes["ranking"], "pool": nodes["pool"]})
    (folder.parent / "study.yaml").write_text("study: demo\n")
    (folder / "proxy").symlink_to("../../../proxy/never-made")
    text = run("show", folder)
    assert nodes["ranking"].id in text
    assert "not made" in text
    assert nodes["pool"].id in run("show", folder.parent)
    assert nodes["ranking"].id in run("show", folder / "ranking")
    stages = as_json("show", results.root / "results")["stages"]
    assert {row["stage"] for row in stages} == set(MADE)


@pytest.mark.parametrize(
    ("path", "nearby"),
    [("results/pol", "pool?"), ("results/pool/demo", "demo-"), ("nowhere", "results")],
)
def test_an_unknown_path_says_what_is_nearby(
    made: tuple[Results, dict[str, Node]],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    nearby: str,
) -> None:
    monkeypatch.chdir(made[0].root)
    result = CliRunner().invoke(app, ["show", path])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert nearby in result.stderr
    assert "Traceback" not in result.stderr


def test_a_damaged_file_is_an_error_without_traceback(tmp_path: Path) -> None:
    results = Results(tmp_path)
    nodes = every_stage(results)
    for stage, name in (("pool", "pool.parquet"), ("target", "model.safetensors")):
        path = results.folder(nodes[stage]) / name
        path.write_bytes(b"\0" * 5)
        result = CliRunner().invoke(app, ["show", str(results.folder(nodes[stage]))])
        assert result.exit_code == 1
        assert name in result.stderr


def test_cost_in_one_line() -> None:
    made = {
        "seconds": 70.4,
        "metrics": {"flops": 1.234e12, "tokens_per_s": 813.4, "tokens": 5},
        "peak_memory_bytes": 3.1 * 2**30,
    }
    line = "0:01:10, 1.23 TFLOP, 813 tokens/s, peak 3.1 GiB"
    assert cost_line(made) == line
    assert cost_line(made | {"peak_device_memory_bytes": 2**20}) == f"{line}, 1 MiB on the device"
    assert cost_line({"seconds": 2}) == "0:00:02"
    assert cost_line({"git_revision": "abc"}) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (999_900, "1 MFLOP"), (2.5e15, "2.5 PFLOP")],
)
def test_operations_have_metric_prefixes(count: float, text: str) -> None:
    assert human_flops(count) == text


def test_memory_has_binary_prefixes() -> None:
    assert [human_memory(n * 2**20) for n in (0.5, 64, 1536, 2**21)] == [
        "512 KiB",
        "64 MiB",
        "1.5 GiB",
        "2,048 GiB",
    ]
