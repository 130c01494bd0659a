from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_fixture import (
    GAIN,
    HOSTILE,
    NOISE,
    SECONDS,
    TASKS,
    Fixture,
    metrics_of,
    plain_texts,
)
from scipy import stats

from iprox.errors import ArtifactError
from iprox.report import selected, tables
from iprox.report.artifacts import Artifact, Run, Study
from iprox.report.charts import CSS_VARIABLES, short, spread_out
from iprox.report.compare import intervals_overlap, paired_difference, sign_flip_p
from iprox.report.figures import layer_fidelity, pareto_front
from iprox.report.formats import duration, interval, latex, markdown, number, scaled, signed
from iprox.report.page import TEXT_LIMIT, searches_grid, sketches_grid
from iprox.stages.report import make
from iprox.store.job import Job
from iprox.store.manifest import PROVENANCE
from iprox.store.tables import write_table

RUNS = ("full", "iprox-0.5", "svd-0.5", "glance", "random-0", "random-1")
SECTIONS = (
    "answer ran fidelity scores agreement selected heldout "
    "training alignment layers costs provenance"
).split()
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text inside each kind of element."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.unbalanced: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.elements if name == tag)


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    texts = [*HOSTILE, *plain_texts(35)]
    categories = ["open_qa", "a & b <i>", *(f"rare{i}" for i in range(12))]
    return Fixture(tmp_path_factory.mktemp("study"), texts, RUNS, categories=categories)


@pytest.fixture(scope="module")
def job(fixture: Fixture, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = fixture.job(tmp_path_factory.mktemp("report") / "out", examples=40)
    make(job)
    return job


@pytest.fixture(scope="module")
def study(job: Job) -> Study:
    return Study.of_job(job)


@pytest.fixture(scope="module")
def page(job: Job) -> Page:
    return Page((job.out / "index.html").read_text(encoding="utf-8"))


def made(fixture: Fixture, out: Path, **report: Any) -> Job:
    job = fixture.job(out, **report)
    make(job)
    return job


def small_study(folder: Path, runs: list[str]) -> Study:
    """A study of one task and twelve examples."""
    fixture = Fixture(folder, plain_texts(12), runs, tasks=["bbh"])
    return Study.of_job(fixture.job(folder / "out"))


# The page


def test_the_page_is_well_formed_and_has_every_section(page: Page) -> None:
    assert page.unbalanced == []
    assert page.open == []
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{name}" for name in SECTIONS]


def test_every_section_shows_something(page: Page) -> None:
    assert len(list(page.all("svg"))) >= 15
    assert len(list(page.all("table"))) >= 10


def test_nothing_is_loaded_from_anywhere(job: Job) -> None:
    source = (job.out / "index.html").read_text(encoding="utf-8")
    for _, attrs in Page(source).elements:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    style = source[source.index("<style>") : source.index("</style>")]
    assert "@import" not in style
    assert re.findall(r"url\((?!#)", source) == []


def test_text_of_examples_cannot_act(page: Page) -> None:
    assert len(page.text["script"]) == 1, "one script, the page's own"
    own = files("iprox.report").joinpath("page.js").read_text(encoding="utf-8")
    assert page.text["script"][0] == own
    assert list(page.all("img")) == []
    handlers = [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert handlers == []


def test_text_of_examples_is_shown_as_it_is(page: Page) -> None:
    shown = set(page.text["p"])
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown
    assert HOSTILE[2].replace("\x07", "\u2407").replace("\x1b", "\u241b") in shown
    assert "x" * TEXT_LIMIT in shown
    assert "6,000 more characters in the pool." in shown
    assert HOSTILE[4] in shown


def test_text_of_examples_keeps_its_direction_to_itself(page: Page) -> None:
    held = [attrs for tag, attrs in page.elements if attrs.get("dir") == "auto"]
    messages = sum(1 for attrs in page.all("div") if attrs.get("class") == "message")
    summaries = sum(1 for attrs in page.all("summary") if attrs.get("dir") == "auto")
    assert len(held) == messages + summaries > 0


def test_only_the_own_script_may_run(page: Page) -> None:
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_every_dash_says_why(page: Page) -> None:
    dashes = [attrs for attrs in page.all("button") if attrs.get("class") == "missing"]
    assert len(dashes) > 20
    reasons = {attrs["title"] for attrs in dashes}
    assert all(reasons)
    assert "a random order has no proxy to measure" in reasons
    assert "the run goes until fidelity only" in reasons
    assert "this run is the reference that proxies are compared with" in reasons


def test_ids_are_unique_across_all_inlined_figures(page: Page) -> None:
    counts = Counter(attrs["id"] for _, attrs in page.elements if "id" in attrs)
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_colour_of_a_figure_has_a_light_and_a_dark_form(job: Job) -> None:
    css = files("iprox.report").joinpath("page.css").read_text(encoding="utf-8")
    for variable in CSS_VARIABLES.values():
        assert css.count(f"{variable}:") == 2, variable
    source = (job.out / "index.html").read_text(encoding="utf-8")
    drawn = source[source.index("<svg") : source.rindex("</svg>")]
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn)) == set()


def test_light_colours_in_the_page_are_those_of_the_files() -> None:
    css = files("iprox.report").joinpath("page.css").read_text(encoding="utf-8")
    for colour, variable in CSS_VARIABLES.items():
        assert f"{variable}: {colour};" in css


# The same bytes


def test_a_rerun_gives_the_same_bytes(fixture: Fixture, job: Job, tmp_path: Path) -> None:
    again = made(fixture, tmp_path / "again", examples=40)
    names = sorted(p.relative_to(job.out) for p in job.out.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again.out) for p in again.out.rglob("*") if p.is_file())
    assert len([n for n in names if n.suffix == ".svg"]) >= 15
    different = [n for n in names if (job.out / n).read_bytes() != (again.out / n).read_bytes()]
    assert different == []


# Numbers


def test_run_table_repeats_what_the_stages_measured(fixture: Fixture, study: Study) -> None:
    table = tables.runs(study).set_index("run")
    assert list(table.index) == list(RUNS)
    for run in ("iprox-0.5", "svd-0.5", "glance"):
        measured = pd.read_parquet(fixture.parents[f"{run}/fidelity"] / "fidelity.parquet")
        for task, column in [*((t, f"spearman_{t}") for t in TASKS), ("mean", "spearman_mean")]:
            row = measured[(measured["task"] == task) & (measured["metric"] == "spearman")].iloc[0]
            assert table.at[run, column] == row["value"]
            assert table.at[run, f"{column}_low"] == row["low"]
            assert table.at[run, f"{column}_high"] == row["high"]
    for task in TASKS:
        base = metrics_of(fixture.parents[f"base/evaluation-{task}"])["loss"]
        for run in ("full", "svd-0.5", "random-1"):
            loss = metrics_of(fixture.parents[f"{run}/evaluation-{task}"])["loss"]
            assert table.at[run, f"loss_{task}"] == loss["value"]
            assert table.at[run, f"loss_{task}_delta"] == loss["value"] - base["value"]


def test_effective_sparsity_is_that_of_all_layers_together(fixture: Fixture, study: Study) -> None:
    layers = pd.read_parquet(fixture.parents["iprox-0.5/factors"] / "layers.parquet")
    kept = dense = 0
    for row in layers.to_dict("records"):
        kept, dense = kept + row["parameters"], dense + row["parameters_dense"]
    table = tables.runs(study).set_index("run")
    assert table.at["iprox-0.5", "sparsity_effective"] == pytest.approx(1 - kept / dense, abs=1e-15)
    assert np.isnan(table.at["full", "sparsity_effective"])


def test_factors_of_the_backward_pass_are_held_beside_the_weights(study: Study) -> None:
    [run] = [r for r in study.runs if r.name == "iprox-0.5"]
    both = tables.size(run)
    proxy = replace(run.artifacts["proxy"], params={"passes": "backward"})
    found = tables.size(replace(run, artifacts=run.artifacts | {"proxy": proxy}))
    assert found["parameters"] == both["parameters"] + both["parameters_dense"]
    assert found["sparsity_effective"] < 0


def test_speed_is_compared_by_example(study: Study) -> None:
    table = tables.runs(study).set_index("run")
    assert table.at["full", "speedup"] == 1
    assert table.at["iprox-0.5", "speedup"] == pytest.approx(61.0 / 33.5)
    # until fidelity: 20 examples in 8 s, where the target took 61 s for 40
    assert table.at["glance", "speedup"] == pytest.approx((61.0 / 40) / (8.0 / 20))
    assert np.isnan(table.at["random-0", "speedup"])


def test_a_run_with_sketches_is_not_the_reference(study: Study) -> None:
    full = study.runs[0]
    features = full.artifacts["features"]
    params = features.params | {"features": {"kind": "logra"}}
    write_table(
        features.folder / "sketch.parquet",
        pd.DataFrame(
            [
                {
                    "kind": "logra",
                    "dim": 99,
                    "dtype": "float16",
                    "bytes_per_example": 198,
                    "examples": 7,
                    "mean_error": 0.0125,
                    "max_error": 0.25,
                    "spearman": 0.875,
                }
            ]
        ),
    )
    artifacts = full.artifacts | {"features": replace(features, params=params)}
    sketched = replace(full, artifacts=artifacts)
    assert full.is_target
    assert not sketched.is_target
    shown = replace(study, runs=[sketched, *study.runs[1:]])
    assert shown.target_run is None
    grid = sketches_grid(shown, tables.sketches(shown))
    assert grid is not None
    assert [c.text for c in grid.rows[0]][1:] == [
        "logra, 99 numbers, float16",
        "198 B",
        "7",
        "0.013",
        "0.250",
        "0.875",
    ]
    (features.folder / "sketch.parquet").unlink()
    assert sketches_grid(study, tables.sketches(study)) is None


def test_costs_are_relative_to_the_targets_pass_over_the_same_examples(study: Study) -> None:
    table = tables.runs(study).set_index("run")
    for run in ("iprox-0.5", "svd-0.5", "glance"):
        rates = 200.0, 12_000 / SECONDS[run]
        assert table["time_ratio"][run] == pytest.approx(rates[0] / rates[1])
        assert table["parameters_ratio"][run] == 0.7
        assert table["flops_ratio"][run] == pytest.approx(0.5 + 0.1 / (1 + NOISE.get(run, 1.0)))
    assert table.loc["full", ["time_ratio", "flops_ratio", "parameters_ratio"]].isna().all()
    assert "target-features" not in set(tables.costs(study)["step"])


def test_a_proxy_below_a_guess_from_lengths_is_said_to_be(study: Study) -> None:
    """svd-0.5 has Spearman 0.31 and the guess 0.28, with wide intervals."""
    said = next(s for s in tables.findings(study) if "lengths" in s)
    assert "is clearly beaten by iprox-0.5 and glance" in said
    assert "not clearly beaten by svd-0.5" in said
    row = tables.runs(study).set_index("run").loc["svd-0.5"]
    assert row["above_length"] == pytest.approx(row["spearman_mean"] - row["length_spearman"])


def test_a_sparsity_that_was_found_is_shown_as_the_runs_own(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(12), ["iprox-0.5"], tasks=["bbh"])

    def write(folder: Path) -> None:
        tried = pd.DataFrame({"sparsity": [0.5, 0.7], "parameters_ratio": 0.8, "flops_ratio": 0.6})
        tried = tried.assign(verdict=["met", "below the floor"], spearman=[0.85, 0.25])
        tried = tried.assign(low=0.2, high=0.9, chosen=[True, False])
        write_table(folder / "tried.parquet", tried)
        (folder / "chosen.json").write_text('{"sparsity": 0.5}')

    fixture.stage("iprox-0.5/sparsity", "sparsity", write, 30.0)
    job = fixture.job(tmp_path / "out")
    job.params["runs"]["iprox-0.5"]["sparsity"] = "auto"
    make(job)
    study = Study.of_job(job)
    row = tables.runs(study).iloc[0]
    assert row["sparsity"] == 0.5
    assert row["making_seconds"] == 30 + 1.5 + 21  # search, factors, proxy
    grid = searches_grid(study, tables.searches(study))
    assert grid is not None
    assert [cells[-1].text for cells in grid.rows] == ["chosen", "below the floor"]
    assert "How sparsities were found" in (job.out / "index.html").read_text()


def test_the_front_has_what_nothing_cheaper_equals() -> None:
    points = [(0.0, 0.2), (0.5, 0.1), (0.6, 0.7), (0.6, 0.8), (0.7, 0.8), (1.0, 1.0)]
    assert pareto_front(points[::-1]) == [(0.0, 0.2), (0.6, 0.8), (1.0, 1.0)]


def test_every_layer_has_a_cell_in_the_map(study: Study) -> None:
    (chart,) = [c for c in layer_fidelity(study) if c.name.endswith("iprox-0.5")]
    cells = re.findall(r'<g id="patch_', chart.svg)
    background = 2  # of figure and axes
    assert len(cells) >= 48 + background
    assert [c.name for c in layer_fidelity(study)] == [
        f"fidelity-layers-{run}" for run in ("iprox-0.5", "svd-0.5", "glance")
    ]


def test_overlap_is_the_share_of_the_targets_selection(fixture: Fixture, study: Study) -> None:
    def chosen(run: str, task: str) -> set[str]:
        rows = pd.read_parquet(fixture.parents[f"{run}/selection"] / "selection.parquet")
        return {r["example_id"] for r in rows.to_dict("records") if r["task"] == task}

    table = tables.runs(study).set_index("run")
    for run in ("iprox-0.5", "random-0"):
        shares = [len(chosen(run, t) & chosen("full", t)) / len(chosen("full", t)) for t in TASKS]
        assert [table.at[run, f"overlap_{t}"] for t in TASKS] == shares
        assert table.at[run, "overlap_mean"] == pytest.approx(sum(shares) / len(shares))
    assert table.at["full", "overlap_mean"] == 1
    assert np.isnan(table.at["glance", "overlap_mean"])


def test_agreement_is_spearmans_correlation(fixture: Fixture, study: Study) -> None:
    table = tables.agreement(study)
    assert set(table["run_a"]) == {"full", "iprox-0.5", "svd-0.5", "random-0"}, "one draw for all"
    hit = table[
        (table["task"] == "bbh") & (table["run_a"] == "full") & (table["run_b"] == "svd-0.5")
    ]
    scores = []
    for run in ("full", "svd-0.5"):
        ranking = pd.read_parquet(fixture.parents[f"{run}/ranking"] / "ranking.parquet")
        scores.append(
            ranking[ranking["task"] == "bbh"].set_index("example_id")["score"].sort_index()
        )
    assert hit["spearman"].item() == pytest.approx(stats.spearmanr(*scores).statistic, abs=1e-12)
    assert hit["n"].item() == 40


def test_overlaps_count_what_two_runs_share(fixture: Fixture, study: Study) -> None:
    table = selected.overlaps(study).set_index(["task", "run_a", "run_b"])
    chosen = {}
    for run in ("full", "svd-0.5"):
        rows = pd.read_parquet(fixture.parents[f"{run}/selection"] / "selection.parquet")
        chosen[run] = set(rows.loc[rows["task"] == "bbh", "example_id"])
    row = table.loc[("bbh", "full", "svd-0.5")]
    both = chosen["full"] & chosen["svd-0.5"]
    assert row["overlap"] == len(both) / min(map(len, chosen.values()))
    assert row["jaccard"] == len(both) / len(chosen["full"] | chosen["svd-0.5"])
    assert table.loc[("bbh", "full", "full"), "overlap"] == 1


def test_a_selection_that_tasks_share_counts_for_each(tmp_path: Path) -> None:
    rows = pd.DataFrame({"example_id": ["x", "y"], "task": ["bbh", "mmlu"]})
    write_table(tmp_path / "selection.parquet", rows)
    for how, expected in (("each", {"x"}), ("round_robin", {"x", "y"})):
        params = {"select": {"tasks": how}}
        artifact = Artifact(tmp_path, "selection", "i", {}, params, {})
        assert selected.selected_ids(artifact, "bbh") == expected


def test_composition_counts_every_selected_example(fixture: Fixture, study: Study) -> None:
    table = selected.composition(study)
    pool = pd.read_parquet(fixture.parents["pool"] / "pool.parquet").set_index("example_id")
    rows = pd.read_parquet(fixture.parents["full/selection"] / "selection.parquet")
    expected = Counter(pool.loc[rows.loc[rows["task"] == "mmlu", "example_id"], "category"])
    part = table[(table["run"] == "full") & (table["task"] == "mmlu")]
    category = part[part["dimension"] == "category"].set_index("value")["count"]
    assert {k: v for k, v in category.items() if v} == dict(expected)
    assert set(part.groupby("dimension")["count"].sum()) == {4}
    pooled = table[table["run"] == "pool"].groupby("dimension")["share"].sum()
    assert pooled.to_numpy() == pytest.approx(1.0)


def test_length_classes_hold_the_examples_they_name(fixture: Fixture, study: Study) -> None:
    table = selected.composition(study)
    length = table[(table["run"] == "pool") & (table["dimension"] == "length")]
    pool = pd.read_parquet(fixture.parents["pool"] / "pool.parquet")
    sizes = [sum(len(m["content"]) for m in messages) for messages in pool["messages"]]
    for name, count in zip(length["value"], length["count"], strict=True):
        low, high = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", name))
        assert count == sum(low <= size <= high for size in sizes)


def test_examples_are_the_ends_of_the_rankings(fixture: Fixture) -> None:
    study = Study.of_job(fixture.job(fixture.root / "unused", examples=3))
    table = selected.examples(study)
    ranking = pd.read_parquet(fixture.parents["iprox-0.5/ranking"] / "ranking.parquet")
    own = ranking[ranking["task"] == "mmlu"].sort_values("rank")["example_id"].tolist()
    part = table[table["task"] == "mmlu"]
    best = part[["iprox-0.5" in runs.split() for runs in part["best_in"]]]
    worst = part[["iprox-0.5" in runs.split() for runs in part["worst_in"]]]
    assert set(best["example_id"]) == set(own[:3])
    assert set(worst["example_id"]) == set(own[-3:])
    assert [int(r) for r in best.set_index("example_id").loc[own[:3], "rank_iprox-0.5"]] == [
        1,
        2,
        3,
    ]


def test_an_example_without_a_gradient_is_nobodys_worst(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(30), ["full"], tasks=["bbh"])
    path = fixture.parents["full/ranking"] / "ranking.parquet"
    ranking = pd.read_parquet(path)
    last = ranking["example_id"].iloc[-1]
    ranking.loc[ranking["example_id"] == last, "score"] = -np.inf
    ranking.to_parquet(path)
    job = made(fixture, tmp_path / "out")
    shown = pd.read_parquet(job.out / "tables/examples.parquet")
    assert last not in set(shown["example_id"])
    assert len(shown) == 8


def test_stage_table_lists_each_folder_once(study: Study) -> None:
    table = tables.stages(study)
    assert not table["id"].duplicated().any()
    warmup = table[table["stage"] == "warmup"]
    assert warmup["runs"].item() == "full, iprox-0.5, svd-0.5, glance"


def test_table_files_hold_the_same_table(job: Job, study: Study) -> None:
    for path in sorted((job.out / "tables").glob("*.parquet")):
        stored, text = (
            pd.read_parquet(path),
            pd.read_csv(path.with_suffix(".csv"), keep_default_na=False),
        )
        assert list(stored.columns) == list(text.columns)
        assert len(stored) == len(text)
        assert path.with_suffix(".md").read_text().count("\n") == len(stored) + 2
        assert path.with_suffix(".tex").read_text().count(r"\\") >= len(stored) + 1
    runs = pd.read_csv(job.out / "tables/runs.csv")
    expected = tables.runs(study)["loss_mmlu"].tolist()[:3]
    assert runs["loss_mmlu"].tolist()[:3] == pytest.approx(expected, rel=1e-15)


# What may be concluded


def test_paired_difference_is_the_t_interval_of_the_items() -> None:
    rng = np.random.default_rng(0)
    first = pd.Series(rng.normal(size=2000), index=[f"i{i}" for i in range(2000)])
    second = first + rng.normal(0.1, 0.2, size=2000)
    got = paired_difference(first, second.sample(frac=1, random_state=1))
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert got.value == pytest.approx((first - second).mean(), abs=1e-12)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-3)
    assert got.beyond_noise


def test_one_item_has_no_interval_and_settles_nothing() -> None:
    got = paired_difference(pd.Series([1.0], index=["a"]), pd.Series([9.0], index=["a"]))
    assert got.value == -8
    assert not got.beyond_noise


def test_right_and_wrong_answers_are_tested_as_mcnemar_does() -> None:
    """Items that both get right or wrong say nothing; 2 against 8 of the others do."""
    first = pd.Series([1.0] * 8 + [0.0] * 2 + [1.0] * 30, index=range(40))
    second = pd.Series([0.0] * 8 + [1.0] * 2 + [1.0] * 30, index=range(40))
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert paired_difference(first, second).p_value == pytest.approx(2 * tail)
    assert paired_difference(second, first).p_value == pytest.approx(2 * tail)
    assert paired_difference(first, first).p_value == 1.0


def test_the_sign_test_tries_every_pattern() -> None:
    delta = np.random.default_rng(0).normal(0.5, 1.0, 9)
    signs = np.array(list(itertools.product((-1, 1), repeat=9)))
    means = (signs * delta).mean(1)
    expected = (np.abs(means) >= abs(delta.mean()) * (1 - 1e-12)).mean()
    assert sign_flip_p(delta) == pytest.approx(expected)
    many = np.random.default_rng(1).normal(0.25, 1.0, 80)
    normal = 2 * stats.norm.sf(abs(many.mean()) / (many.std(ddof=1) / math.sqrt(80)))
    assert sign_flip_p(many) == pytest.approx(normal, rel=0.2)
    assert sign_flip_p(many) == sign_flip_p(many)


def test_every_two_selections_are_compared_item_by_item(study: Study) -> None:
    table = tables.paired(study)
    evaluated = {"base", *(run.group for run in study.runs if run.of("evaluation", study.tasks))}
    pairs = {frozenset(pair) for pair in zip(table["a"], table["b"], strict=True)}
    assert pairs == {frozenset(pair) for pair in itertools.combinations(evaluated, 2)}
    assert table["p"].between(0, 1).all()
    heldout = tables.heldout(study)
    for row in table[(table["a"] == "base") & (table["metric"] == "loss")].itertuples():
        alone = heldout[
            (heldout["run"] == row.b)
            & (heldout["task"] == row.task)
            & (heldout["metric"] == "loss")
        ]
        if len(alone) == 1:  # a group of one run
            assert alone["delta"].item() == pytest.approx(-row.difference)
            assert alone["delta_p"].item() == pytest.approx(row.p)


def test_models_without_a_common_item_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="share no test item"):
        paired_difference(pd.Series([1.0], index=["a"]), pd.Series([1.0], index=["b"]))


def test_unknown_intervals_count_as_overlapping() -> None:
    assert intervals_overlap((0.0, 1.0), (1.0, 2.0))
    assert not intervals_overlap((0.0, 0.9), (1.0, 2.0))
    assert intervals_overlap((float("nan"), float("nan")), (1.0, 2.0))


def test_a_clear_gain_over_chance_is_called_one(study: Study) -> None:
    told = " ".join(tables.findings(study))
    assert "lower than chance, and outside the range of the draws" in told


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["svd-0.5", "random-0", "random-1"], "not a difference this study can show"),
        (["full", "random-0"], "with one draw, its luck is not in the interval"),
        (["full"], "what choosing adds is not known"),
    ],
)
def test_doubt_is_said(
    runs: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GAIN, "svd-0.5", GAIN["random"] + 0.004)
    study = small_study(tmp_path, runs)
    assert said in " ".join(tables.findings(study))


def test_proxies_with_overlapping_intervals_are_not_put_in_order(tmp_path: Path) -> None:
    runs = ["iprox-0.3", "iprox-0.5", "svd-0.5"]
    study = small_study(tmp_path, runs)
    for run in study.runs[:2]:
        path = run.artifacts["fidelity"].folder / "fidelity.parquet"
        table = pd.read_parquet(path)
        table.assign(low=0.5, high=0.99).to_parquet(path)
    told = " ".join(tables.findings(study))
    assert "Its interval overlaps that of iprox-0.5: no order among them is certain." in told


def test_the_price_told_is_that_of_the_most_faithful_proxy(study: Study) -> None:
    best, *others = tables._faithful(study)
    speeds = {r.name: tables.speedup(study, r) for r in study.drawn_once if not r.is_target}
    told = next(s for s in tables.findings(study) if s.startswith("Scoring 1,000"))
    assert f" with {best} and " in told
    assert f"{speeds[best]:.2f} times the speed" in told
    assert any((speeds[name] or 0) > speeds[best] for name in others)  # it is not the fastest


def test_summary_gives_numbers_and_where_the_rankings_are(job: Job, fixture: Fixture) -> None:
    text = (job.out / "summary.txt").read_text(encoding="utf-8")
    assert "Which 10 % of the 40 examples of toy-pool should smollm2-135m be fine-tuned on" in text
    loss = metrics_of(fixture.parents["iprox-0.5/evaluation-mmlu"])["loss"]["value"]
    row = next(line for line in text.splitlines() if line.startswith("iprox-0.5"))
    assert f"{loss:.3f}" in row
    assert "random (x2)" in text
    assert "results/ranking/iprox-0.5-ranking-0a1b2c3d/ranking.parquet" in text


# What is not there


@pytest.mark.parametrize(
    "runs", [["random-0"], ["glance"], ["full"], ["svd-0.5"], ["glance", "random-0", "random-1"]]
)
def test_a_study_with_missing_parts_is_reported(runs: list[str], tmp_path: Path) -> None:
    job = made(Fixture(tmp_path, plain_texts(12), runs, tasks=["bbh"]), tmp_path / "out")
    page = Page((job.out / "index.html").read_text(encoding="utf-8"))
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert page.unbalanced == []
    assert (job.out / "summary.txt").read_text().startswith("Study toy. ")


def test_no_evaluations_and_no_base_leave_dashes(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(12), ["full", "iprox-0.5"], tasks=["bbh"])
    dropped = ("evaluation", "finetune")
    fixture.parents = {r: p for r, p in fixture.parents.items() if not any(d in r for d in dropped)}
    job = made(fixture, tmp_path / "out")
    assert "No model was evaluated." in (job.out / "index.html").read_text()
    assert tables.heldout(Study.of_job(job)).empty


def test_provenance_without_numbers_leaves_dashes(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(12), ["full", "iprox-0.5"], tasks=["bbh"])
    for folder in fixture.parents.values():
        (folder / PROVENANCE).write_text(json.dumps({"metrics": {}}))
    job = made(fixture, tmp_path / "out")
    frame = pd.read_parquet(job.out / "tables/runs.parquet")
    assert frame["scoring_seconds"].isna().all()
    assert frame["speedup"].isna().all()


def test_a_parent_that_no_run_owns_is_refused(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(12), ["full"], tasks=["bbh"])
    fixture.parents["elsewhere/ranking"] = fixture.parents["full/ranking"]
    with pytest.raises(ArtifactError, match="no run owns"):
        Study.of_job(fixture.job(tmp_path / "out"))


def test_an_unreadable_description_names_its_file(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, plain_texts(12), ["full"], tasks=["bbh"])
    (fixture.parents["full/ranking"] / PROVENANCE).write_text("{")
    with pytest.raises(ArtifactError, match=r"provenance\.json"):
        Study.of_job(fixture.job(tmp_path / "out"))


# Small things


def test_markdown_and_latex_cells_cannot_leave_their_cell() -> None:
    table = pd.DataFrame({"a_b": ["x|y\nz <b>", "50 % & \\end{tabular}"], "n": [1.5, np.nan]})
    assert markdown(table).splitlines() == [
        "| a_b | n |",
        "| --- | ---: |",
        "| x\\|y z &lt;b> | 1.5 |",
        "| 50 % &amp; \\\\end{tabular} | - |",
    ]
    assert r"50 \% \& \textbackslash{}end\{tabular\} & - \\" in latex(table)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (number(-0.0004), "0.000"),
        (number(float("nan")), "-"),
        (number(1234.5, 1), "1,234.5"),
        (signed(-0.25, 2), "\N{MINUS SIGN}0.25"),
        (signed(0.25, 2), "+0.25"),
        (interval(float("nan"), 1.0), ""),
        (duration(0.5), "0.5 s"),
        (duration(99.4), "99 s"),
        (duration(125.0), "2 min 05 s"),
        (duration(7_380.0), "2 h 03 min"),
        (scaled(57_000_000), "57 M"),
        (scaled(1.25e9, "B"), "1.25 GB"),
    ],
)
def test_numbers_read_well(got: str, expected: str) -> None:
    assert got == expected


def test_labels_keep_apart_and_in_order() -> None:
    wanted = [5.0, 5.1, 90.0, 4.9, 99.0]
    placed = spread_out(wanted, 10, 0, 100)
    assert np.argsort(placed).tolist() == np.argsort(wanted).tolist()
    assert np.diff(sorted(placed)).min() >= 10 - 1e-9
    assert 0 <= min(placed)
    assert max(placed) <= 100
    assert spread_out([1.0, 50.0], 10, 0, 100) == [1.0, 50.0], "far apart: left alone"


def test_labels_that_do_not_fit_are_spaced_evenly() -> None:
    assert spread_out([3.0] * 5, 40, 0, 100) == pytest.approx([0, 25, 50, 75, 100])


def test_long_names_keep_both_ends() -> None:
    name = "iprox-sparsity-0.5-damping-0.01-seed-3"
    assert short("iprox-0.5") == "iprox-0.5"
    assert len(short(name)) <= 22
    assert short(name).startswith("iprox-sp")
    assert short(name).endswith("seed-3")


def test_the_size_of_kept_blocks_is_that_of_their_layers(tmp_path: Path) -> None:
    blocks = {"block": [0, 1, 2, 3], "kept": [True, False, True, True], "parameters": [10] * 4}
    write_table(tmp_path / "blocks.parquet", pd.DataFrame(blocks))
    made = Artifact(tmp_path, "extraction", "layers-0.25-x", "0", {}, {"seconds": 3.0})
    cut = Run("cut", "cut", "gradient", "layers", 0.25, "default", {}, "fidelity", {})
    whole = replace(cut, artifacts={"extraction": made})
    assert tables.size(whole) == {
        "sparsity_effective": 0.25,
        "parameters": 30,
        "parameters_dense": 40,
    }
    assert tables.making_seconds(whole) == 3
    assert "blocks are left out" in whole.why_missing("factors")
    assert "not made from the target" in replace(cut, proxy="model").why_missing("proxy")
