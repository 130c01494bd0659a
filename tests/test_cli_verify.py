from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_artifacts import Results, every_stage, write_pool
from click.testing import Result
from typer.testing import CliRunner

from iprox.cli.main import app
from iprox.plan.nodes import Node


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Results, dict[str, Node]]:
    results = Results(tmp_path)
    nodes = every_stage(results)
    monkeypatch.chdir(tmp_path)
    return results, nodes


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_untouched_results_are_all_as_their_manifests_say(
    made: tuple[Results, dict[str, Node]],
) -> None:
    results, nodes = made
    result = verify()
    assert result.exit_code == 0, result.output
    files = sum(
        len(json.loads(p.read_text())["files"])
        for p in (results.root / "results").glob("*/*/manifest.json")
    )
    assert f"{len(nodes)} artifacts, {files} files," in result.stdout
    assert "all as their manifests say" in result.stdout
    assert result.stderr == ""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "sha256"), (truncate, "should be"), (Path.unlink, "missing")],
)
@pytest.mark.parametrize(
    ("stage", "name"),
    [("pool", "pool.parquet"), ("probe", "probe.zarr/inputs/s0/c/0/0"), ("target", "config.json")],
)
def test_damage_is_found_and_named(
    made: tuple[Results, dict[str, Node]],
    stage: str,
    name: str,
    damage: object,
    message: str,
) -> None:
    results, nodes = made
    path = results.folder(nodes[stage]) / name
    damage(path)  # type: ignore[operator]
    for arguments in ([], [results.folder(nodes[stage])]):
        result = verify(*arguments)
        assert result.exit_code == 1
        (line,) = (line for line in result.stdout.splitlines() if name in line)
        assert message in line
        assert "1 problem\n" in result.stdout
    assert verify(results.folder(nodes["report"])).exit_code == 0


def test_an_extra_file_is_a_warning(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    (results.folder(nodes["pool"]) / "notes.txt").write_text("mine")
    result = verify()
    assert result.exit_code == 0
    assert "notes.txt" in result.stderr
    assert "warning" in result.stderr


def test_shards_are_verified_before_they_are_gathered(
    made: tuple[Results, dict[str, Node]],
) -> None:
    results, nodes = made
    folder = results.folder(nodes["features"])
    (folder / "manifest.json").unlink()
    assert verify(folder).exit_code == 0
    flip(folder / "shard-00001.zarr" / "dots" / "c" / "0" / "0")
    result = verify(folder)
    assert result.exit_code == 1
    assert "shard-00001.zarr/dots" in result.stdout


def test_an_unfinished_artifact_is_a_warning(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    (results.folder(nodes["split"]) / "manifest.json").unlink()
    result = verify()
    assert result.exit_code == 0
    assert "not finished" in result.stderr


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    next(iter(raw["files"].values()))["sha256"] = "0" * 64
    path.write_text(json.dumps(raw))


def edit_params(folder: Path) -> None:
    path = folder / "spec.json"
    path.write_text(path.read_text().replace("demo", "other", 1))


def break_spec(folder: Path) -> None:
    (folder / "spec.json").write_text("{")


def remove_spec(folder: Path) -> None:
    (folder / "spec.json").unlink()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_manifest, "contradicts itself"),
        (edit_params, "does not belong"),
        (break_spec, "not JSON"),
        (remove_spec, "missing"),
    ],
)
def test_edited_descriptions_are_found(
    made: tuple[Results, dict[str, Node]], edit: object, message: str
) -> None:
    results, nodes = made
    edit(results.folder(nodes["pool"]))  # type: ignore[operator]
    result = verify()
    assert result.exit_code == 1
    assert message in result.stdout


def test_a_run_stands_for_the_artifacts_it_links_to(
    made: tuple[Results, dict[str, Node]],
) -> None:
    results, nodes = made
    folder = results.link("demo", "full", {"pool": nodes["pool"], "ranking": nodes["ranking"]})
    assert verify(folder).stdout.startswith("2 artifacts")
    assert verify(folder.parent).stdout.startswith("2 artifacts")
    assert verify().stdout.startswith(f"{len(nodes)} artifacts")
    flip(results.folder(nodes["ranking"]) / "ranking.parquet")
    assert verify(folder).exit_code == 1


def test_json_lists_the_problems(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    flip(results.folder(nodes["pool"]) / "pool.parquet")
    result = verify("--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["result"]["problems"]
    assert "pool.parquet" in problem


def test_the_content_store_is_left_out(made: tuple[Results, dict[str, Node]]) -> None:
    results, nodes = made
    kept = results.root / "results" / ".objects" / "ab"
    kept.mkdir(parents=True)
    write_pool(kept)
    (kept / "manifest.json").write_text("{}")
    assert verify().stdout.startswith(f"{len(nodes)} artifacts")


def test_a_folder_without_artifacts_is_an_error(made: tuple[Results, dict[str, Node]]) -> None:
    empty = made[0].root / "empty"
    empty.mkdir()
    for path in (empty, empty / "nothing"):
        result = verify(path)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error:")
