"""The real workflow on tiny random models: from a JSONL pool to the report, and what reruns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ARCHITECTURES, save_tiny_encoder, tiny_model, tiny_tokenizer

from iprox.stages.feature_store import read_features
from iprox.store.manifest import check

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.workflow

WORDS = "red blue seven nine cat dog adds takes runs sings from with over under slowly".split()


def sentence(i: int, n: int) -> str:
    return " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(n))


def write_inputs(folder: Path, architecture: str = "llama", examples: int = 24) -> None:
    """A model folder, a pool and a task, as a user would have them."""
    # Some tokenizer classes add special tokens of their own when they are loaded.
    model = tiny_model(architecture, dtype=torch.float32, vocab_size=272)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with (folder / "pool.jsonl").open("w") as file:
        for i in range(examples):
            row = {"instruction": sentence(i, 3), "input": "", "output": sentence(i + 5, 2 + i % 4)}
            file.write(json.dumps(row) + "\n")
    with (folder / "task.jsonl").open("w") as file:
        for i in range(8):
            row = {
                "prompt": "say " + sentence(i + 40, 3),  # "say" keeps it out of the pool
                "response": sentence(i + 41, 2),
                "category": f"s{i % 2}",
            }
            file.write(json.dumps(row) + "\n")


def study(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "study": "tiny",
        "target": {"model": "model", "attention": "eager"},
        "pool": {"path": "pool.jsonl"},
        "tasks": [
            {"name": "own", "kind": "messages", "path": "task.jsonl", "queries": 4, "heldout": 2}
        ],
        "chat": {"max_length": 64},
        "split": {"warmup": 4, "probe": 6, "align": 6, "fidelity": 1.0},
        "warmup": {"batch": 4},
        "probe": {"tokens": 64},
        "align": {"epochs": 1, "batch": 2, "heldout": 0.5},
        "fidelity": {"bootstrap": 20},
        "select": {"fraction": 0.2},
        "finetune": {"epochs": 1, "batch": 4},
        "evaluate": {"bootstrap": 20},
        "shards": 2,
        "runs": {
            "full": {"proxy": {"kind": "target"}},
            "iprox": {"proxy": {"sparsity": 0.5}},
            "svd": {"proxy": {"kind": "svd"}, "align": {"epochs": 0}, "until": "fidelity"},
            "auto": {
                "proxy": {"kind": "svd", "sparsity": "auto"},
                "align": {"epochs": 0},
                "fidelity": {"floor": 0.3},
                "until": "fidelity",
            },
            "random": {"scorer": {"kind": "random", "draws": 2}},
        },
    }
    return {**base, **changes}


def snakemake(folder: Path, config: dict[str, Any], *args: str, check_ok: bool = True) -> str:
    """Run the workflow in ``folder`` and return what it printed."""
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        command(folder, *args), cwd=folder, env=environment(), capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    if check_ok:
        assert done.returncode == 0, output[-6000:]
    return output


def command(folder: Path, *args: str) -> list[str]:
    base = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        str(ROOT / "Snakefile"),
        "--configfile",
        "study.yaml",
    ]
    return [*base, "--cores", "2", *args]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def jobs(output: str) -> dict[str, int]:
    """Rule -> number of jobs, from Snakemake's job table."""
    found = {}
    lines = iter(output.splitlines())
    for line in lines:
        if line.split() == ["job", "count"]:
            next(lines)
            for row in lines:
                if len(row.split()) != 2:
                    break
                found[row.split()[0]] = int(row.split()[1])
            break
    return found


def contents(folder: Path) -> dict[str, str]:
    """Content digest of every finished artifact, the report excepted: it shows times."""
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_text())["content"]
        for path in sorted((folder / "results").glob("*/*/manifest.json"))
        if path.parent.parent.name != "report"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study has run to its end."""
    folder = tmp_path_factory.mktemp("study")
    write_inputs(folder)
    snakemake(folder, study())
    return folder


def test_a_papers_table_is_filled_from_the_studys_own_runs(finished: Path) -> None:
    output = snakemake(finished, study(), "t2")
    assert jobs(output) == {"paper_table": 1, "t2": 1, "total": 2}
    table = finished / "results" / "studies" / "tiny" / "tables" / "t2"
    cells = pd.read_parquet(table / "cells.parquet")
    ours = cells[cells["column"] == "own loss"].set_index("setting")
    runs = {"untouched target": "", "full target": "full", "IProX 0.5": "iprox"}
    assert dict(ours["runs"]) == runs | {"random": "random-1 random-2"}
    for source in " ".join(ours["sources"]).split():
        assert (finished / "results" / source / "metrics.json").is_file()
    assert "Ours: model, pool.jsonl (24 examples)" in (table / "table.md").read_text()


def test_the_study_ends_with_rankings_models_and_a_report(finished: Path) -> None:
    links = finished / "results" / "studies" / "tiny"
    ranking = pd.read_parquet(links / "iprox" / "ranking" / "ranking.parquet")
    assert len(ranking) == 24
    assert ranking["rank"].tolist() == list(range(1, 25))
    assert ranking["score"].is_monotonic_decreasing
    selected = (links / "full" / "selection" / "selected.jsonl").read_text().splitlines()
    assert len(selected) == 4
    assert {"example_id", "messages"} <= json.loads(selected[0]).keys()
    metrics = json.loads((links / "iprox" / "evaluation-own" / "metrics.json").read_text())
    base = json.loads((links / "base" / "evaluation-own" / "metrics.json").read_text())
    assert metrics["loss"]["n"] == base["loss"]["n"] == 2
    page = (links / "report" / "index.html").read_text()
    assert "iprox" in page
    fidelity = pd.read_parquet(links / "iprox" / "fidelity" / "fidelity.parquet")
    assert {"spearman", "kendall", "above_length", "flops_ratio"} <= set(fidelity["metric"])
    by_layer = pd.read_parquet(links / "iprox" / "fidelity" / "layers.parquet")
    assert by_layer["layer"].nunique() == 14


def test_a_sparsity_that_was_looked_for_meets_its_floor(finished: Path) -> None:
    auto = finished / "results" / "studies" / "tiny" / "auto"
    chosen = json.loads((auto / "sparsity" / "chosen.json").read_text())
    assert chosen["spearman"] >= 0.3
    fidelity = pd.read_parquet(auto / "fidelity" / "fidelity.parquet")
    measured = fidelity.set_index(["task", "metric"])["value"]
    # nothing was aligned, so what was found is what is measured
    assert measured["mean", "spearman"] == pytest.approx(chosen["spearman"], abs=1e-3)
    assert measured["mean", "flops_ratio"] == pytest.approx(chosen["flops_ratio"])


def test_every_artifact_is_as_its_manifest_says_and_explains_itself(finished: Path) -> None:
    manifests = sorted((finished / "results").glob("*/*/manifest.json"))
    # the papers' tables are not part of a study: another test asks for one
    assert {path.parent.parent.name for path in manifests} - {"paper_table"} == {
        "pool",
        "task",
        "target",
        "split",
        "warmup",
        "probe",
        "decomposition",
        "sparsity",
        "factors",
        "proxy",
        "query",
        "features",
        "ranking",
        "fidelity",
        "selection",
        "finetune",
        "evaluation",
        "report",
    }
    for path in manifests:
        check(path.parent)
        spec = json.loads((path.parent / "spec.json").read_text())
        assert spec["id"] == path.parent.name
        provenance = json.loads((path.parent / "provenance.json").read_text())
        assert provenance["seconds"] >= 0


def test_a_finished_study_has_nothing_to_do(finished: Path) -> None:
    assert "Nothing to be done" in snakemake(finished, study())


def test_snakemakes_own_report_shows_the_page(finished: Path) -> None:
    snakemake(finished, study(), "--report", "snakemake.html")
    page = (finished / "snakemake.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'"labels": \{[^}]*"file": "([^"]+)"', page))
    assert shown == {"index.html", "summary.txt"}


def test_a_changed_parameter_reruns_what_depends_on_it_and_going_back_runs_nothing(
    finished: Path,
) -> None:
    changed = study(select={"fraction": 0.3})
    before = contents(finished)
    todo = jobs(snakemake(finished, changed, "-n"))
    assert {r for r in todo if r != "total"} == {
        "selection",
        "finetune",
        "evaluation",
        "report_page",
        "study_index",
        "all",
    }
    assert contents(finished) == before
    todo = jobs(snakemake(finished, study(), "-n"))
    assert not todo


def test_another_number_of_shards_gives_the_same_ranking(finished: Path) -> None:
    path = finished / "results" / "studies" / "tiny" / "iprox" / "ranking" / "ranking.parquet"
    before = pd.read_parquet(path)
    snakemake(finished, study(shards=3), "rankings")
    after = pd.read_parquet(path)
    features = path.parents[1] / "features"
    assert len(list(features.glob("shard-*.zarr"))) == 3
    assert after["example_id"].tolist() == before["example_id"].tolist()
    # Other batches round differently in the last digits of float32, and in nothing else.
    assert after["score"].to_numpy() == pytest.approx(before["score"].to_numpy(), abs=1e-5)
    snakemake(finished, study())


def test_an_upstream_rerun_without_consequences_computes_nothing(finished: Path) -> None:
    before = contents(finished)
    pool = finished / "pool.jsonl"
    pool.write_text("".join(reversed(pool.read_text().splitlines(keepends=True))))
    config = study(runs={"iprox": {"proxy": {"sparsity": 0.5}, "until": "ranking"}})
    snakemake(finished, config, "rankings")
    assert contents(finished) == before
    logs = [p.read_text() for p in (finished / "results/logs").rglob("*.log")]
    reran = [text for text in logs if "nothing to compute" in text]
    assert len(reran) >= 10  # split, warmup, probe ... ranking: looked at, and served
    snakemake(finished, study())


def test_a_new_task_ranks_stored_sketches_without_another_pass(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    settings = {"kind": "logra", "rank": 4, "check": 6}
    runs = {"full": {"proxy": {"kind": "target"}, "features": settings, "until": "ranking"}}
    config = study(runs=runs)
    snakemake(tmp_path, config, "rankings")
    link = tmp_path / "results" / "studies" / "tiny" / "full"
    assert pd.read_parquet(link / "features" / "sketch.parquet")["examples"].item() == 6
    assert "sketch.parquet" in check(link / "features").files
    other = config["tasks"][0] | {"name": "later", "seed": 1}
    config["tasks"].append(other)
    todo = jobs(snakemake(tmp_path, config, "-n", "rankings"))
    assert {rule for rule in todo if rule not in ("total", "study_index", "rankings")} == {
        "task",
        "query",
        "ranking",
    }
    snakemake(tmp_path, config, "rankings", "fidelities")
    ranking = pd.read_parquet(link / "ranking" / "ranking.parquet")
    assert ranking["task"].unique().tolist() == ["later", "own"]
    assert (link / "query-later" / "query.zarr").is_dir()
    found = pd.read_parquet(link / "fidelity" / "fidelity.parquet").set_index(["task", "metric"])
    assert found.loc[("mean", "spearman"), "value"] > 0


def test_influence_is_summed_over_the_epochs_of_the_warm_up(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    runs = {
        "full": {"proxy": {"kind": "target"}, "until": "ranking"},
        "svd": {"proxy": {"kind": "svd"}, "align": {"epochs": 0}, "until": "ranking"},
    }
    config = study(runs=runs, warmup={"batch": 2, "epochs": 2.0, "lr": 1e-3})
    done = jobs(snakemake(tmp_path, config | {"influence": {"checkpoints": "epochs"}}))
    assert (done["warmup"], done["checkpoint"], done["proxy"]) == (1, 1, 2)
    links = tmp_path / "results" / "studies" / "tiny"
    weights = pd.read_parquet(links / "full" / "warmup" / "epochs.parquet")["weight"]
    for run in runs:
        parts = []
        for name in ("features-epoch-1", "features"):
            scores = read_features(links / run / name).scores("cosine")["own"].astype(float)
            parts.append(scores)
        total = weights[0] * parts[0] + weights[1] * parts[1]
        ids = read_features(links / run / "features").example_id.to_pylist()
        ranking = pd.read_parquet(links / run / "ranking" / "ranking.parquet")
        found = ranking.set_index("example_id")["score"][ids].to_numpy()
        assert np.abs(parts[0] - parts[1]).max() > 1e-4
        np.testing.assert_allclose(found, total, atol=1e-6)


def test_second_order_influence_and_a_sweep_over_damping(tmp_path: Path) -> None:
    write_inputs(tmp_path, examples=12)
    estimators = {"estimator": ["ekfac", "datainf"]}
    runs = {"r": {"proxy": {"kind": "target"}, "influence": estimators, "until": "ranking"}}
    runs["svd"] = {"proxy": {"kind": "svd"}, "influence": {"estimator": "ekfac"}}
    runs["svd"] |= {"until": "fidelity"}
    split = {"warmup": 4, "fisher": 6, "fidelity": 1.0}
    config = study(runs=runs, split=split, align={"epochs": 0})
    snakemake(tmp_path, config, "rankings", "fidelities")
    links = tmp_path / "results" / "studies" / "tiny"
    assert len(list((links / "r-ekfac" / "eigenvalues").glob("shard-*.zarr"))) == 2
    for name in ("ekfac", "datainf"):
        ranking = pd.read_parquet(links / f"r-{name}" / "ranking" / "ranking.parquet")
        assert len(ranking) == 12
        assert (links / f"r-{name}" / "direction-own" / "query.zarr").is_dir()
    assert (links / "svd" / "fidelity" / "fidelity.parquet").is_file()
    damped = config | {"curvature": {"damping": 1.0}}
    todo = jobs(snakemake(tmp_path, damped, "-n", "rankings", "fidelities"))
    assert {rule for rule in todo if rule not in ("total", "study_index")} == {
        "direction",
        "features_shard",
        "features",
        "ranking",
        "fidelity",
        "rankings",
        "fidelities",
    }


def test_the_study_is_the_same_bytes_in_another_folder(finished: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    small = study(runs={"iprox": {"proxy": {"sparsity": 0.5}, "until": "selection"}})
    snakemake(tmp_path, small)
    ours = contents(tmp_path)
    theirs = contents(finished)
    assert ours
    assert {k: theirs.get(k) for k in ours} == ours


def test_a_killed_workflow_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    small = study(runs={"iprox": {"proxy": {"sparsity": 0.5}, "until": "selection"}})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small))
    for seconds in (9.0, 15.0):
        process = subprocess.Popen(
            command(tmp_path),
            cwd=tmp_path,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    snakemake(tmp_path, small, "--unlock", check_ok=False)
    snakemake(tmp_path, small)
    theirs = contents(finished)
    assert {k: theirs.get(k) for k in contents(tmp_path)} == contents(tmp_path)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "llama"])
def test_other_architectures_go_through(tmp_path: Path, architecture: str) -> None:
    write_inputs(tmp_path, architecture, examples=12)
    snakemake(tmp_path, study(runs={"iprox": {"until": "ranking"}}, shards=1))
    link = tmp_path / "results" / "studies" / "tiny" / "iprox"
    assert len(pd.read_parquet(link / "ranking" / "ranking.parquet")) == 12
    assert json.loads((link / "proxy" / "proxy.json").read_text())["ranks"]


def test_other_scoring_models_go_through(tmp_path: Path) -> None:
    write_inputs(tmp_path, examples=12)
    runs = {
        "back": {"proxy": {"passes": "backward", "whiten": "queries", "sparsity": 0.3}},
        "cut": {"proxy": {"kind": "layers", "sparsity": 0.5}},
        "other": {"proxy": {"kind": "model", "model": "other"}},
    }
    (tmp_path / "other").mkdir()
    tiny_model("llama", torch.float32, vocab_size=272, num_hidden_layers=1).save_pretrained(
        tmp_path / "other"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    config = study(runs=runs, until="fidelity", shards=1)
    todo = jobs(snakemake(tmp_path, config, "-n"))
    assert (todo["extraction"], todo["target"], todo["warmup"]) == (1, 2, 2)
    snakemake(tmp_path, config)
    folder = tmp_path / "results" / "studies" / "tiny"
    for run in runs:
        table = pd.read_parquet(folder / run / "fidelity" / "fidelity.parquet")
        measured = table[table["metric"] != "unseen_spearman"]  # all of a tiny pool may be seen
        assert measured["value"].notna().all()
    blocks = pd.read_parquet(folder / "cut" / "extraction" / "blocks.parquet")
    assert blocks["kept"].sum() == 1
    table = pd.read_parquet(folder / "report" / "tables" / "runs.parquet").set_index("run")
    assert table.loc["cut", "sparsity_effective"] == 0.5
    assert pd.isna(table.loc["other", "sparsity"])


def test_the_study_of_rivals_starts(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config" / "small" / "rivals.yaml").read_text())
    todo = jobs(snakemake(tmp_path, config, "-n", "fidelities"))
    assert (todo["extraction"], todo["probe"]) == (3, 6)
    assert (todo["decomposition"], todo["factors"], todo["proxy"]) == (8, 17, 23)
    assert todo["fidelity"] == 27


def test_a_mistake_is_a_message_and_no_traceback(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for change, words in [
        ({"proxy": {"sparsty": 0.5}}, ["unknown key proxy.sparsty", "sparsity?", "study.yaml:"]),
        ({"pool": {"path": "absent.jsonl"}}, ["no such file", "absent.jsonl"]),
        ({"pool": {"path": "../pool.jsonl"}}, ["leaves the data folder"]),
    ]:
        output = snakemake(tmp_path, study(**change), "-n", check_ok=False)
        assert all(word in output for word in words), output
        assert "Traceback" not in output


def test_a_fault_inside_a_job_is_shown_with_its_message(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with (tmp_path / "pool.jsonl").open("a") as file:
        file.write('{"instruction": "no output"}\n')
    output = snakemake(tmp_path, study(), "rankings", check_ok=False)
    assert "pool.jsonl:25" in output
    assert "Traceback" not in output


def test_lint_is_clean() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_encoder_learns_from_a_proxy_and_serves_a_new_pool(tmp_path: Path) -> None:
    """The same folder then ranks another pool with no model but the encoder."""
    write_inputs(tmp_path)
    save_tiny_encoder(tmp_path / "encoder")
    split = {"warmup": 4, "probe": 6, "align": 6, "fidelity": 8, "teach": 10}
    section = {"model": "encoder", "max_length": 64, "max_cut": 1.0, "epochs": 1}
    runs = {
        "taught": {
            "scorer": {"kind": "influcoder"},
            "features": {"kind": "lora", "dim": 64, "rank": 4},
            "proxy": {"kind": "svd"},
            "align": {"epochs": 0},
            "until": "selection",
        }
    }
    config = study(runs=runs, split=split, encoder=section)
    snakemake(tmp_path, config)
    run = tmp_path / "results/studies/tiny/taught"
    ranked = pd.read_parquet(run / "ranking/ranking.parquet")
    assert len(ranked) == 24
    metrics = set(pd.read_parquet(run / "fidelity/fidelity.parquet")["metric"])
    assert {"spearman", "teacher_spearman"} <= metrics
    assert snakemake(tmp_path, config).count("Nothing to be done") == 1

    write_inputs(tmp_path, examples=30)
    again = {
        "new": {
            "scorer": {"kind": "influcoder"},
            "until": "ranking",
            "fidelity": {"enabled": False},
        }
    }
    taught = section | {"model": os.path.relpath((run / "encoder").resolve(), tmp_path)}
    later = study(study="later", runs=again, encoder=taught | {"train": False})
    made = jobs(snakemake(tmp_path, later, "rankings"))
    assert made["embeddings_shard"] == 2
    assert not {"target", "warmup", "features_shard", "encoder"} & set(made)
    assert (
        len(pd.read_parquet(tmp_path / "results/studies/later/new/ranking/ranking.parquet")) == 30
    )
