"""The papers' tables: numbers as printed, the runs that stand beside them, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from report_fixture import Fixture, plain_texts

from iprox.cli.together import shared
from iprox.papers.tables import Table, papers
from iprox.plan.papers import plan_tables
from iprox.plan.plan import plan_study
from iprox.report import measures
from iprox.report.artifacts import Study
from iprox.report.papers import Line, draw, setting
from iprox.stages import paper_table
from iprox.store.job import Job
from iprox.store.tables import read_table
from iprox.study.load import load_study, parse_study

ROOT = Path(__file__).parents[1]
IPROX, INFLUCODER = papers()
CONTRADICTED = {("t13", "BioInstruct IProX 0.5")}
"""Rows whose printed average is not that of the printed parts, as their note says."""

FULL, IPROX_5, RANDOM = "full", "iprox-0.5", ["random-1", "random-2"]


def studied(**changes: Any) -> Any:
    body: dict[str, Any] = {
        "study": "s",
        "pool": {"path": "cot.jsonl"},
        "tasks": ["mmlu", "bbh"],
        "split": {"probe": 64},
        "runs": {
            "full": {"proxy": {"kind": "target"}},
            "iprox": {"proxy": {"sparsity": [0.5, 0.7]}},
            "random": {"scorer": {"kind": "random", "draws": 2}},
            "quick": {"proxy": {"sparsity": 0.5}, "until": "fidelity"},
            "kfac": {"proxy": {"kind": "target"}, "influence": {"estimator": "kfac"}},
            "probe": {"proxy": {"sparsity": 0.7}, "split": {"probe": [32, 192]}},
            "tenth": {"proxy": {"sparsity": 0.5}, "select": {"fraction": 0.2}},
            "paper": {"preset": "paper", "proxy": {"sparsity": 0.5}},
        },
    }
    return plan_study(parse_study(body | changes))


def beside(name: str, **changes: Any) -> dict[str, list[str]]:
    """Setting -> runs of ours in the rows of the table's first model."""
    _, nodes = plan_tables(studied(**changes))
    params = nodes[name].params
    rows = params["table"]["rows"]
    return {
        row["row"]: runs
        for row, runs in zip(rows, params["ours"], strict=True)
        if row["model"] == rows[0]["model"]
    }


@pytest.mark.parametrize("name", [n for n, t in IPROX.tables.items() if t.measure == "outcome"])
def test_printed_averages_are_those_of_the_printed_parts(name: str) -> None:
    for row in IPROX.tables[name].rows:
        if len(row.paper) == 4:
            *parts, mean = (float(number) for number in row.paper)
            off = abs(np.mean(parts) - mean) > 0.01
            assert off == ((name, row.row) in CONTRADICTED), row
            assert bool(row.note) or not off


def test_gains_of_table_3_are_those_over_the_better_baseline() -> None:
    rows = IPROX.tables["t3"].rows
    for model in IPROX.models:
        layers, scorer, ours, gain = [
            np.array(row.paper[:3], float) for row in rows if row.model == model and row.paper
        ]
        np.testing.assert_allclose(ours - np.maximum(layers, scorer), gain, atol=0.011)


def test_the_same_numbers_stand_in_tables_that_share_rows() -> None:
    t2 = {(row.model, row.row): row.paper for row in IPROX.tables["t2"].rows if row.paper}
    assert len(t2) == 20
    for row in IPROX.tables["f1"].rows:
        assert not row.paper or t2[row.model, row.row] == row.paper
    probe = {row.row: row.paper for row in IPROX.tables["t7"].rows}
    anchor = {row.row: row.paper for row in IPROX.tables["t15"].rows}
    assert probe["1x"] == anchor["0.1"] == t2["Llama3.2-3B", "IProX 0.7"]
    assert IPROX.tables["t10"].rows == IPROX.tables["t3"].rows


def test_a_row_with_too_many_numbers_or_an_unknown_key_is_refused() -> None:
    row = {"model": "M", "row": "r", "paper": [1.0, 2.0]}
    table = {"title": "t", "measure": "outcome", "columns": ["MMLU"], "rows": [row]}
    with pytest.raises(ValidationError, match="more numbers than columns"):
        Table.model_validate(table)
    with pytest.raises(ValidationError, match="papers"):
        Table.model_validate({**table, "rows": [{**row, "papers": []}]})


def test_runs_stand_where_their_settings_say() -> None:
    found = beside("t2")
    assert found["full target"] == ["full"]
    assert found["IProX 0.5"] == ["iprox-0.5", "paper"]  # a preset is no setting of its own
    assert found["IProX 0.3"] == []
    assert found["random"] == RANDOM
    assert beside("t4")["full target"] == ["kfac"]
    assert beside("t11")["20 % IProX 0.5"] == ["tenth"]


def test_a_multiple_is_of_the_studys_own_value() -> None:
    assert beside("t7") == {
        "0.5x": ["probe-32"],
        "1x": ["iprox-0.7"],
        "3x": ["probe-192"],
        "5x": [],
    }
    assert beside("t7", split={"probe": 384})["0.5x"] == ["probe-192"]


def test_a_study_of_a_papers_model_stands_in_that_models_rows_alone() -> None:
    plan = studied(target={"model": "Qwen/Qwen2-7B"})
    params = plan_tables(plan)[1]["t2"].params
    models = {
        row["model"]
        for row, runs in zip(params["table"]["rows"], params["ours"], strict=True)
        if runs
    }
    assert models == {"Qwen2-7B"}
    assert not any(plan_tables(plan)[1]["t9"].params["ours"])


def test_rows_of_a_pool_need_its_name() -> None:
    assert beside("t13")["CoT full target"] == ["full"]
    assert beside("t13")["BioInstruct full target"] == []
    assert not any(beside("t13", pool={"path": "dolly.jsonl"}).values())


def test_a_table_needs_the_stages_of_its_own_runs_alone() -> None:
    _, nodes = plan_tables(studied())
    owners = {role.split("/")[0] for role in nodes["t4"].parents}
    assert owners == {"kfac", "random-1", "random-2", "base", "pool"}
    stages = {node.stage for node in nodes["t2"].parents.values()}
    assert stages == {"evaluation", "pool"}
    assert {"probe", "decomposition", "proxy", "features", "query"} <= {
        node.stage for node in nodes["t5"].parents.values()
    }


STUDIES = {
    "llama-3.2-3b": "t2 t4 t7 t8 t9 t11 t12 t14 t15",
    "gemma-3-4b": "t2 t4",
    "qwen3-4b": "t2 f1",
    "qwen2-7b": "t2 t14",
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_row_of_a_papers_model_has_a_run_in_its_study_file(study: str) -> None:
    plan = plan_study(load_study([ROOT / f"config/paper/{study}.yaml"], {}))
    model = next(k for k, v in IPROX.models.items() if v == plan.study.config.target.model)
    tables = plan_tables(plan)[1]
    for name in STUDIES[study].split():
        params = tables[name].params
        for row, runs in zip(params["table"]["rows"], params["ours"], strict=True):
            if row["model"] == model and row["runs"]:
                assert runs, (name, row["row"])


def test_the_small_study_has_a_run_for_every_row_that_its_models_and_pool_allow() -> None:
    plan = plan_study(load_study([ROOT / "config/small/papers.yaml"], {}))
    tables = plan_tables(plan)[1]
    missing = []
    for name in "t2 t3 t4 t5 t6 t7 t8 t9 t10 t11 t12 t14 t15 f1 f4".split():
        params = tables[name].params
        first = params["table"]["rows"][0]["model"]
        for row, runs in zip(params["table"]["rows"], params["ours"], strict=True):
            needed = row["model"] == first and row["runs"] and not runs
            if needed and row["runs"].get("proxy.kind") != "model":  # no smaller model is at hand
                missing.append((name, row["row"]))
    assert missing == [("t7", "5x")]  # more examples than the pool has


def test_small_studies_share_more_than_half_of_their_jobs() -> None:
    files = sorted((ROOT / "config" / "small").glob("*.yaml"))
    plans = [plan_study(load_study([file], {})) for file in files]
    found = shared(plans)
    assert found.studies == [plan.name for plan in plans]
    nodes = {(stage, id): n.shards for plan in plans for (stage, id), n in plan.nodes.items()}
    assert found.together == sum(nodes.values()) < sum(found.jobs)
    assert found.together < sum(found.alone) / 2
    assert found.saved == sum(found.alone) - found.together


def test_two_equal_studies_are_the_jobs_of_one() -> None:
    one, both = shared([studied()]), shared([studied(), studied()])
    assert both.together == one.together == one.jobs[0]
    assert both.alone == [*one.alone, *one.alone]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """Table 2 of a made-up study."""
    root = tmp_path_factory.mktemp("table")
    fixture = Fixture(root, plain_texts(40), [FULL, IPROX_5, *RANDOM])
    job = fixture.job(root / "out")
    rows = [
        {"model": "A", "row": "full", "runs": {}, "paper": [50.0, 40.0, 30.0, 40.0]},
        {"model": "A", "row": "rho 0.3", "runs": {}, "paper": [51.0, 41.0]},
        {"model": "A", "row": "rho 0.5", "runs": {}, "paper": ["~50"]},
        {"model": "A", "row": "random", "runs": {}},
        {"model": "A", "row": "nowhere", "runs": {}},
    ]
    table = {
        "title": "Table 2: proxies & more",
        "measure": "outcome",
        "figure": "dots",
        "columns": ["MMLU", "BBH", "TyDiQA", "Avg."],
        "rows": rows,
    }
    config = job.params["config"]
    config["tasks"] = [{"name": "mmlu", "kind": "mmlu"}, {"name": "bbh", "kind": "bbh"}]
    config["select"]["count"] = None
    params = job.params | {
        "table": table,
        "ours": [[FULL], [], [IPROX_5], RANDOM, []],
        "paper": "arXiv:0",
        "name": "t2",
    }
    job = replace(job, stage="paper_table", params=params)
    paper_table.make(job)
    return job, job.out


def test_ours_stands_beside_the_paper_and_nothing_is_made_up(made: tuple[Job, Path]) -> None:
    job, out = made
    table = read_table(out / "table.parquet")
    assert list(table["setting"]) == ["untouched target", "full", "rho 0.3", "rho 0.5", "random"]
    full = job.parents["full/evaluation-mmlu"] / "metrics.json"
    accuracy = json.loads(full.read_text())["accuracy"]["value"]
    row = table.set_index("setting").loc["full"]
    assert row["MMLU, ours"] == pytest.approx(100 * accuracy)
    assert row["MMLU, paper"] == "50"
    assert np.isnan(row["TyDiQA, ours"])
    assert np.isnan(row["Avg., ours"])  # of three tasks, one of which was not run
    nothing = table.set_index("setting").loc["rho 0.3"]
    assert np.isnan(nothing["MMLU, ours"])
    assert np.isnan(nothing["MMLU loss, ours"])
    assert "| A | rho 0.3 | 51 | - |" in (out / "table.md").read_text()


def test_draws_are_averaged_and_their_range_is_kept(made: tuple[Job, Path]) -> None:
    job, out = made
    cells = read_table(out / "cells.parquet")
    cell = cells[(cells["setting"] == "random") & (cells["column"] == "BBH loss")].iloc[0]
    losses = [
        json.loads((job.parents[f"{run}/evaluation-bbh"] / "metrics.json").read_text())["loss"]
        for run in RANDOM
    ]
    values = [loss["value"] for loss in losses]
    assert cell["ours"] == pytest.approx(np.mean(values))
    assert (cell["low"], cell["high"]) == (min(values), max(values))
    assert cell["sources"].split() == [
        f"evaluation/{job.parents[f'{run}/evaluation-bbh'].name}" for run in RANDOM
    ]


def test_the_setting_of_ours_is_named(made: tuple[Job, Path]) -> None:
    _, out = made
    for name in ("table.md", "table.tex", "summary.txt"):
        text = (out / name).read_text()
        assert "smollm2-135m" in text
        assert "40 examples" in text
        assert "MMLU 60" in text
    assert r"\caption{Table 2: proxies \& more" in (out / "table.tex").read_text()


def test_the_summary_says_whether_choosing_beats_chance(made: tuple[Job, Path]) -> None:
    text = (made[1] / "summary.txt").read_text()
    assert "mmlu, full: Against random (mean of 2 draws" in text
    assert "bbh, iprox-0.5: Against random" in text
    assert "random (x2): Against" not in text


def test_paper_and_ours_are_drawn_apart(made: tuple[Job, Path]) -> None:
    assert {path.name for path in made[1].glob("*.svg")} == {"t2-paper.svg", "t2-ours.svg"}


def test_a_table_without_runs_of_ours_says_so(made: tuple[Job, Path], tmp_path: Path) -> None:
    job, _ = made
    params = job.params | {"ours": [[]] * 5, "runs": {}}
    parents = {"pool": job.parents["pool"]}
    (tmp_path / "out").mkdir()
    counts = paper_table.make(replace(job, params=params, parents=parents, out=tmp_path / "out"))
    assert counts["numbers_of_ours"] == 0
    assert "no run of this study stands in this table" in (tmp_path / "out/table.md").read_text()


def test_costs_are_sums_over_a_runs_jobs(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(20), [FULL, IPROX_5])
    study = Study.of_job(fixture.job(tmp_path / "out"))
    full, proxy = study.runs
    spent = measures.minutes(study, [proxy])
    assert spent["stage 1"].value == pytest.approx(1.5 / 60)
    assert spent["stage 2"].value == pytest.approx(21 / 60)
    assert spent["influence"].value == pytest.approx(33.5 / 60)
    assert spent["total"].value == pytest.approx(56 / 60)
    assert "stage 1" not in measures.minutes(study, [full])
    study.config["tasks"], study.config["select"]["count"] = [], None
    lines = [Line("A", "rho 0.5", runs=[proxy], ours=spent)]
    proxy.artifacts["features"].provenance["host"] = {"device": "H100", "threads": 8}
    assert "timed on H100, 8 threads." in setting(IPROX.tables["t5"], study, lines)
    assert "timed" not in setting(IPROX.tables["f4"], study, lines)
    assert measures.teraflops(study, [full])["total"].value == pytest.approx(20 * 1.7e11 / 1e12)


def test_an_untaught_or_text_scorer_agrees_as_its_ranking_does(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(30), [FULL, IPROX_5])
    study = Study.of_job(fixture.job(tmp_path / "out"))
    full, proxy = study.runs
    assert measures.agreement(study, [full])["aggregated"].value == pytest.approx(1.0)
    assert 0 < measures.agreement(study, [proxy])["aggregated"].value < 1


def test_figures_of_every_kind_are_drawn_of_what_is_printed(tmp_path: Path) -> None:
    drawn = {}
    for name, table in {**IPROX.tables, **INFLUCODER.tables}.items():
        lines = [
            Line(row.model, row.row, dict(zip(table.columns, row.paper, strict=False)))
            for row in table.rows
        ]
        drawn |= {chart.name: chart.svg for chart in draw(name, table, lines)}
    assert set(drawn) == {"f1-paper", "i1-paper", "i2-paper"}  # Figure 4 has no printed numbers
    assert "65.32" in drawn["f1-paper"]
    assert "TF-IDF" in drawn["i1-paper"]


def test_operations_are_stacked_by_stage(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(20), [FULL, IPROX_5])
    study = Study.of_job(fixture.job(tmp_path / "out"))
    lines = [
        Line("A", run.name, runs=[run], ours=measures.teraflops(study, [run])) for run in study.runs
    ]
    charts = draw("f4", IPROX.tables["f4"], lines)
    assert [chart.name for chart in charts] == ["f4-ours"]
    assert "influence" in charts[0].svg


def test_what_making_a_proxy_takes_is_the_same_to_planner_and_report() -> None:
    """The planner must not load what draws reports, so it names the stages itself."""
    from iprox.plan import papers as planned
    from iprox.report import tables as reported

    assert set(planned.MAKING) == set(reported.MAKING)
