"""Predictions of cost: by hand on small cases, against real models, and against earlier runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ARCHITECTURES, tiny_model
from typer.testing import CliRunner

from iprox.cli.costing import Question, forecast
from iprox.cli.main import app
from iprox.errors import ConfigError, ModelError
from iprox.numerics.ranks import model_size
from iprox.plan.estimate import Estimator, Need, needs_model
from iprox.plan.forecast import Line, Measured, check, comparable, makespan, measured_rates
from iprox.plan.history import Made, read_history
from iprox.plan.nodes import Node, Plan
from iprox.plan.plan import plan_study
from iprox.plan.sizes import GEMMA3, PACKAGED, architecture, find_architecture
from iprox.plan.volumes import Volumes
from iprox.store.manifest import MANIFEST, PROVENANCE, SPEC, dump_json
from iprox.study.load import parse_study

STUDY: dict[str, Any] = {
    "study": "s",
    "target": {"model": "models/tiny"},
    "pool": {"path": "pool.jsonl", "limit": 100},
    "tasks": [{"name": "own", "kind": "messages", "path": "own.jsonl", "queries": 6}],
    "chat": {"max_length": 64},
    "align": {"epochs": 1, "batch": 4, "hvp": "central_diff"},
    "split": {"warmup": 0.1, "probe": 20, "align": 20, "fidelity": 100},
    "runs": {
        "full": {"proxy": {"kind": "target"}},
        "iprox": {"proxy": {"sparsity": 0.5, "passes": "both"}},
    },
    "select": {"fraction": 0.25},
    "shards": 4,
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
ARCH = architecture(CONFIG)
# q 8x8, k and v 4x8, o 8x8, gate, up, down 16x8
LINEARS = 64 + 2 * 32 + 64 + 3 * 128
TOKENS, SHARE = 10.0, 0.5


def planned(**changes: Any) -> Plan:
    return plan_study(parse_study(STUDY | changes))


def node(plan: Plan, stage: str, part: str = "") -> Node:
    found = [n for (s, i), n in plan.nodes.items() if s == stage and part in i]
    assert found
    return found[0]


def volumes(**changes: Any) -> Volumes:
    return Volumes((), length=TOKENS, **changes)


def test_sizes_the_planner_repeats_are_those_of_the_stages() -> None:
    """The planner must not load torch, so it cannot import them."""
    from iprox.engine import align, scoring
    from iprox.plan import estimate
    from iprox.stages import tangents

    assert estimate.MAX_DIRECTIONS == tangents.MAX_DIRECTIONS
    assert (estimate.MAX_COMPARED, estimate.MIN_HELDOUT) == (align.MAX_COMPARED, align.MIN_HELDOUT)
    batches = {"cpu": scoring.CPU_BATCH_TOKENS, "gpu": scoring.CUDA_BATCH_TOKENS}
    assert batches == estimate.BATCH_TOKENS


def test_a_probe_along_queries_costs_three_forward_passes_for_each() -> None:
    plain = {"proxy": {"passes": "backward", "whiten": "both"}}
    along = {"proxy": {"passes": "backward", "whiten": "queries"}}
    needs = []
    for run in (plain, along):
        plan = planned(runs={"b": run})
        needs.append(Estimator(ARCH, volumes()).need(node(plan, "probe")))
    forward = 20 * (2 * 10 * LINEARS + 4 * 10 * 10 * 8)  # 2 heads of width 4, 10 tokens
    assert needs[1].flops - needs[0].flops == 3 * forward
    assert needs[1].disk == pytest.approx(needs[0].disk)  # one task: as many rows as inputs


# --- what a stage takes ------------------------------------------------------------------------


def test_scoring_by_hand() -> None:
    need = Estimator(ARCH, volumes()).need(node(planned(), "features", "target"))
    one = 10 * LINEARS + 5 * 32 * 8  # multiply-adds of a forward pass, head at 5 positions
    attention = 2 * 10 * 10 * 8  # scores and values of 2 heads of width 4
    passes = 2 * 100 * (2 * one + 3 * attention)
    products = 0
    # (out, in) -> for each such layer, whether it is the first to read its input
    firsts = {
        (8, 8): [True, True],  # q, o
        (4, 8): [False, False],  # k, v
        (16, 8): [True, False],  # gate, up
        (8, 16): [True],  # down
    }
    for (out, in_), layers in firsts.items():
        for first in layers:
            by_rows = 10 * out * in_ + 100 * (out + (in_ if first else 0))
            formed = out * in_ * (10 + 2)
            products += min(by_rows, formed)
    assert need.flops == passes + 2 * 100 * products
    assert need.tokens == 1000
    by_layer = 4 * 100 * 7  # float32, of the seven layers of its one block
    assert need.disk == 100 * (8 + 60) + by_layer + 4 * 6500  # four shards


def test_scorers_that_pass_texts_by_hand() -> None:
    kinds = ["repsim", "perplexity", "ifd", "bm25"]
    plan = planned(runs={k: {"scorer": {"kind": k}} for k in kinds}, until="ranking")
    needs = {k: Estimator(ARCH, volumes()).need(node(plan, "ranking", k)) for k in kinds}
    body, head = 2 * (10 * LINEARS + 2 * 10 * 10 * 8), 2 * 5 * 32 * 8
    assert needs["repsim"].flops == 100 * body
    assert needs["perplexity"].flops == 100 * (body + head)
    assert needs["ifd"].flops == 2 * needs["perplexity"].flops
    assert needs["bm25"].flops == needs["bm25"].tokens == 0
    assert needs["repsim"].memory > needs["bm25"].memory


def test_selections_need_memory_for_what_they_compare() -> None:
    sketch = {"kind": "countsketch", "dim": 1000}
    runs = {m: {"select": {"method": m}} for m in ("top", "facility_location")}
    estimator = Estimator(ARCH, volumes())
    plan = planned(runs=runs, until="selection", features=sketch, select={"fraction": 0.1})
    small, large = (estimator.need(plan.runs[m].nodes["selection"]).memory for m in runs)
    assert large - small == 4 * (40 * 1000 + 2 * 40**2)  # four times ten of a hundred examples
    compared = estimator.need(plan.runs["top"].nodes["diversity"]).memory
    assert compared > small + 32 * 10 * 1000
    counted = planned(runs={"c": {"select": {"count": 7}}}, finetune={"epochs": 2.0})
    assert estimator.need(node(counted, "finetune")).tokens == 7 * 10 * 2


def test_training_by_hand() -> None:
    plan = planned(finetune={"epochs": 2.0})
    need = Estimator(ARCH, volumes()).need(node(plan, "finetune"))
    tokens, attention = 25 * 10 * 2, 2 * 10 * 10 * 8
    products = tokens * (LINEARS + 32 * 8)
    assert need.flops == 2 * 3 * products + 2 * 3 * 50 * attention
    assert need.tokens == tokens
    assert need.disk == 4 * model_size(ARCH).total
    warm = Estimator(ARCH, volumes()).need(node(plan, "warmup"))
    assert warm.tokens == 10 * 10  # a tenth of the pool, one epoch
    assert warm.flops == 2 * 3 * 100 * LINEARS + 2 * 2 * 100 * 256 + 2 * 3 * 10 * attention


def test_a_query_stores_a_gradient_per_group_and_linear() -> None:
    plan = planned()
    dense = node(plan, "query", "target")
    estimator = Estimator(ARCH, volumes())
    assert estimator.need(dense).disk == 4 * LINEARS
    thin = next(n for n in plan.nodes.values() if n.stage == "query" and n is not dense)
    net = estimator.network(thin.parents["model"], thin.params["layers"])
    assert estimator.need(thin).disk == 4 * net.factor_weights < 4 * LINEARS
    assert estimator.need(thin).flops < estimator.need(dense).flops


def test_a_search_scores_the_slice_with_up_to_four_proxies() -> None:
    runs = {"auto": {"proxy": {"sparsity": "auto", "passes": "both"}, "until": "fidelity"}}
    plan = planned(runs=runs)
    estimator = Estimator(ARCH, volumes())
    search, factors = node(plan, "sparsity"), node(plan, "factors")
    thin = next(
        n for n in plan.nodes.values() if n.stage == "query" and n.parents["model"].stage == "proxy"
    )
    scored = next(
        n
        for n in plan.nodes.values()
        if n.stage == "features" and n.parents["model"].stage == "proxy"
    )
    each = estimator.need(thin).flops + estimator.need(scored).flops
    assert estimator.need(search).flops == pytest.approx(4 * each)
    # what is not known yet is counted as half
    fixed = node(planned(runs={"iprox": {"proxy": {"sparsity": 0.5, "passes": "both"}}}), "factors")
    assert estimator.need(factors) == estimator.need(fixed)


def test_a_search_in_the_backward_pass_asks_the_target_once() -> None:
    plan = planned(runs={"auto": {"proxy": {"sparsity": "auto"}, "until": "fidelity"}})
    estimator = Estimator(ARCH, volumes())
    asked = node(plan, "query")
    scored = next(
        n
        for n in plan.nodes.values()
        if n.stage == "features" and n.parents["model"].stage == "proxy"
    )
    need, each = estimator.need(node(plan, "sparsity")), estimator.need(scored)
    assert need.flops == pytest.approx(4 * each.flops + estimator.need(asked).flops)
    assert need.tokens == 4 * each.tokens + estimator.need(asked).tokens


def test_curvature_by_hand() -> None:
    plan = planned(
        runs={
            "e": {"proxy": {"kind": "target"}, "influence": {"estimator": "ekfac"}},
            "d": {"proxy": {"kind": "target"}, "influence": {"estimator": "datainf"}},
        },
        split=STUDY["split"] | {"fisher": 20},
        shards=2,
    )
    estimator = Estimator(ARCH, volumes())
    of = {s: estimator.need(node(plan, s)) for s in ("covariance", "curvature", "eigenvalues")}
    # inputs of q, o, gate and down; outputs of q, o, down, of k, v, and of gate, up
    sides = [8, 8, 8, 16, 8, 8, 8, 4, 4, 16, 16]
    squares, tokens = sum(side**2 for side in sides), 20 * 10
    assert of["covariance"].disk == 2 * 4 * squares  # two shards
    assert of["curvature"].disk == 4 * squares
    assert of["curvature"].flops == 9 * sum(side**3 for side in sides)
    assert of["eigenvalues"].disk == 2 * 4 * LINEARS
    difference = of["eigenvalues"].flops - of["covariance"].flops
    assert difference == pytest.approx(2 * tokens * LINEARS)
    ekfac, datainf = (node(plan, "direction", kind) for kind in ("ekfac", "datainf"))
    assert estimator.need(ekfac).disk == 4 * LINEARS == estimator.need(datainf).disk
    assert estimator.need(ekfac).tokens == 0
    assert not needs_model(ekfac)
    assert estimator.need(datainf).tokens == 2 * tokens
    assert needs_model(datainf)


def test_needs_grow_with_the_pool_where_they_must() -> None:
    plan = planned()
    small, large = (
        Estimator(ARCH, volumes(pools={plan.shared["pool"].id: n})) for n in (100, 1000)
    )
    for stage, factor in (("features", 10), ("warmup", 10), ("finetune", 10), ("query", 1)):
        one = node(plan, stage)
        assert large.need(one).flops == pytest.approx(factor * small.need(one).flops)
    assert large.need(node(plan, "probe")).flops == small.need(node(plan, "probe")).flops


def test_only_chosen_layers_are_scored_and_replaced() -> None:
    layers = {"include": ["mlp.*"], "exclude": ["*down_proj"]}
    plan = planned(proxy={"layers": layers, "passes": "both"})
    estimator = Estimator(ARCH, volumes())
    query = next(n for n in plan.nodes.values() if n.stage == "query" and "target" in n.id)
    assert estimator.need(query).disk == 4 * 2 * 128
    proxy = node(plan, "proxy")
    net = estimator.network(proxy, proxy.params["layers"])
    assert net.factor_weights == net.scored_weights
    assert net.weights() - net.factor_weights == LINEARS - 2 * 128


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sizes_from_a_config_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    model.config.save_pretrained(tmp_path)
    found = architecture(json.loads((tmp_path / "config.json").read_text()))
    assert model_size(found).total == sum(p.numel() for p in model.parameters())


# What the published config.json say of sizes, and no more
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
        },
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    "Qwen2-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}

# IProX (arXiv:2602.17835), Table 2: billions of parameters at sparsity .3, .5 and .7, cut
TABLE_2 = {
    "Llama-3.2-3B": (2.5, 1.8, 1.3),
    "Gemma-3-4B": (3.0, 2.3, 1.6),
    "Qwen3-4B": (3.1, 2.2, 1.5),
    "Qwen2-7B": (5.8, 4.4, 3.3),
}


@pytest.mark.parametrize("model", TABLE_2)
def test_the_papers_proxy_sizes_from_configs_alone(model: str) -> None:
    arch = architecture(PUBLISHED[model])
    sizes = [model_size(arch, sparsity, multiple=128).total for sparsity in (0.3, 0.5, 0.7)]
    assert tuple(math.floor(size / 1e8) / 10 for size in sizes) == TABLE_2[model]


def test_what_gemma_configs_leave_out_are_the_architectures_defaults() -> None:
    from transformers import Gemma3TextConfig

    defaults = Gemma3TextConfig()
    assert {key: getattr(defaults, key) for key in GEMMA3} == GEMMA3


def test_sizes_of_packaged_models() -> None:
    sizes = {name: model_size(arch).total for name, arch in PACKAGED.items()}
    assert sizes == {"smollm2-135m": 134_515_008, "gemma3-270m": 268_098_176}


def test_an_unknown_model_says_what_to_do(tmp_path: Path) -> None:
    target = planned(target={"model": "org/absent"}).shared["target"]
    with pytest.raises(ModelError, match="--model-config"):
        find_architecture(target, tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arch, source = find_architecture(target, tmp_path, tmp_path, tmp_path)
    assert arch == ARCH
    assert "config.json" in source
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ModelError, match="num_attention_heads"):
        find_architecture(target, tmp_path, tmp_path, tmp_path)


def test_the_hub_cache_and_a_local_folder_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, folder in {
        "org/cached": tmp_path / "hub/models--org--cached/snapshots/abc",
        "models/local": tmp_path / "models/local",
    }.items():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        target = planned(target={"model": name}).shared["target"]
        assert find_architecture(target, tmp_path, tmp_path) == (
            ARCH,
            str(folder / "config.json"),
        )


# --- numbers of texts --------------------------------------------------------------------------


def made(of: Node, seconds: float = 1.0, device: str = "cpu", **metrics: Any) -> Made:
    provenance = {
        "finished": "2026-01-01T00:00:00Z",
        "host": {"device": device},
        "metrics": metrics,
        "peak_memory_bytes": 10**9,
        "seconds": seconds,
    }
    return Made(of, provenance, 1000)


def test_counted_numbers_win_over_assumed_ones() -> None:
    plan = planned()
    scoring, pool = node(plan, "features"), plan.shared["pool"]
    assumed = Volumes(())
    assert assumed.examples(scoring, pool) == (100, 64, 0.5)
    assert "assumed" in " ".join(assumed.sources.values())
    history = [
        made(pool, n_examples=90),
        made(scoring, examples=90, tokens=2700, supervised=900),
        made(node(plan, "query"), examples=5, tokens=100),
    ]
    counted = Volumes(history)
    assert counted.examples(scoring, pool) == (90, 30, pytest.approx(1 / 3))
    assert counted.queries(node(plan, "query"), plan.shared["task-own"]) == (5, 20, 0.5)
    # another number of the same texts: as long as before, as many as asked
    other = planned(pool=STUDY["pool"] | {"limit": 40})
    assert counted.examples(node(other, "features"), other.shared["pool"])[:2] == (40, 30)
    longer = planned(chat={"max_length": 128})
    assert counted.examples(node(longer, "features"), longer.shared["pool"])[:2] == (90, 128)


def test_a_pool_of_unknown_size_is_asked_for() -> None:
    plan = planned(pool={"path": "pool.jsonl"})
    with pytest.raises(ConfigError, match="--pool N"):
        Volumes(()).pool(plan.shared["pool"])
    assert Volumes((), {plan.shared["pool"].id: 7}).pool(plan.shared["pool"]) == 7


# --- rates and checks --------------------------------------------------------------------------


def test_each_artifact_is_predicted_from_the_others() -> None:
    plan = planned()
    queries = [n for n in plan.nodes.values() if n.stage == "query"]
    found = [
        Measured(made(queries[0], 2.0), Need(100.0, 1e9, 1000)),  # 50 a second
        Measured(made(queries[1], 1.0), Need(100.0, 2e9, 500)),  # 100 a second
        Measured(made(node(plan, "features"), 10.0), Need(1000.0, 1e9, 1000)),
        Measured(made(node(plan, "ranking"), 3.0), Need()),
    ]
    rates = measured_rates(found, 1e12, "here")
    assert rates.per_stage == {"query": pytest.approx(200 / 3), "features": 100.0}
    assert rates.seconds(queries[0], Need(200.0)) == pytest.approx(3.0)
    assert rates.seconds(node(plan, "ranking"), Need()) == 3.0
    assert rates.rate(node(plan, "probe")) == pytest.approx(1200 / 13)  # of all with a model
    assert rates.rate(node(plan, "decomposition")) == 1e10  # nothing like it: assumed
    rows = {row.stage: row for row in check(found, 1e12)}
    assert set(rows) == {"query", "features"}
    # 100 at the other's 100 a second: 1 s of 2; 100 at 50 a second: 2 s of 1
    assert rows["query"].spread == (0.5, 2.0)
    assert rows["query"].seconds == 1.25
    assert (rows["query"].memory, rows["query"].disk) == (1.5, 0.75)
    # features from the queries: 200 in 3 s
    assert rows["features"].seconds == pytest.approx(1.5)


def test_only_the_same_device_and_precision_tell_a_speed() -> None:
    plan = planned()
    rough = planned(target={"model": "models/tiny", "dtype": "bfloat16"})
    history = [
        made(node(plan, "query"), device="cpu"),
        made(node(plan, "features"), device="NVIDIA GH200"),
        made(node(rough, "features"), device="NVIDIA GH200"),
    ]
    history[1].provenance["finished"] = "2026-01-02T00:00:00Z"
    kept, of = comparable(history, plan.shared["target"], None)
    assert kept == history[1:2]
    assert of == "models/tiny, float32, NVIDIA GH200"
    assert comparable(history[:1], plan.shared["target"], on_gpu=True) == ([], "")
    stranger = planned(target={"model": "models/other"}).shared["target"]
    assert comparable(history, stranger, True) == (
        history[1:2],
        "other models, float32, NVIDIA GH200",
    )


def line(stage: str, id: str, seconds: float, *parents: Line, shards: int = 1) -> Line:
    of = {str(i): parent.node for i, parent in enumerate(parents)}
    return Line(Node(stage, id, {}, of, shards), Need(), seconds, False, ())


def test_the_time_from_start_to_end() -> None:
    pool = line("pool", "p", 5)
    a, b, c = (line("query", x, s, pool) for x, s in (("a", 4), ("b", 3), ("c", 3)))
    after_b = line("features", "d", 6, b)
    found = [pool, a, b, c, after_b]
    assert makespan(found, 1, 0) == 5 + 4 + 3 + 3 + 6
    assert makespan(found, 2, 0) == 5 + 9  # b, d beside a, c: the longest chain goes first
    assert makespan(found, 9, 0) == 5 + 9
    assert makespan(found, 9, 1) == 5 + 9 + 3  # three jobs after each other, a second each
    assert makespan([], 1) == 0


def test_a_spread_training_waits_for_all_its_devices() -> None:
    scoring = line("query", "q", 4)
    training = replace(line("finetune", "f", 12), gpus=2)
    assert makespan([training], 2, 0) == 6
    assert makespan([training], 3, 1) == 7
    assert makespan([scoring, training], 3, 0) == 6
    assert makespan([scoring, training], 2, 0) == 6 + 4  # the longer one first


def test_shards_run_side_by_side() -> None:
    whole = [line("features", "f", 12, shards=4)]
    assert [makespan(whole, devices, 0) for devices in (1, 2, 3, 4, 8)] == [12, 6, 6, 3, 3]


def test_kept_blocks_are_what_scoring_costs() -> None:
    plan = planned(runs={"cut": {"proxy": {"kind": "layers", "sparsity": 0.5}}})
    estimator = Estimator(replace(ARCH, blocks=4), volumes())
    extraction = node(plan, "extraction")
    assert estimator.network(extraction).weights() == 2 * LINEARS
    need = estimator.need(extraction)
    # a forward pass of all four blocks over the 20 probe examples, without a head
    tokens = 20 * TOKENS
    assert need.tokens == tokens
    assert need.flops == 2 * 4 * LINEARS * tokens + 4 * (4 * 8) * 20 * TOKENS**2
    ours, theirs = (
        estimator.need(node(plan, "features", part)) for part in ("layers-0.5", "target")
    )
    assert ours.flops < 0.7 * theirs.flops


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the study and what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY))
    for name in ("pool.jsonl", "own.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models/tiny/config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def finish(root: Path, of: Node, **provenance: Any) -> None:
    """Leave a finished artifact."""
    path = root / of.folder
    path.mkdir(parents=True)
    (path / SPEC).write_text(dump_json(of.spec))
    files = {"a": {"bytes": 600, "sha256": "0"}, "b": {"bytes": 400, "sha256": "0"}}
    (path / MANIFEST).write_text(json.dumps({"files": files}))
    about = {"finished": "2026-01-01T00:00:00Z", "host": {"device": "cpu"}, "metrics": {}}
    (path / PROVENANCE).write_text(dump_json(about | {"peak_memory_bytes": 10**9} | provenance))


def asked(folder: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["cost", "study.yaml", "--json", *options])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def test_without_measurements_a_stated_rate_is_assumed(folder: Path) -> None:
    answer = asked(folder)
    assert answer["on_gpu"]
    assert "120 TFLOP/s" in answer["basis"]["speed"]
    assert answer["basis"]["checked"].startswith("never")
    faster = asked(folder, "--tflops", "240")
    for one, other in zip(answer["stages"], faster["stages"], strict=True):
        if one["flops"]:
            assert one["seconds"] == pytest.approx(2 * other["seconds"])
    assert answer["flops"] == pytest.approx(sum(s["flops"] for s in answer["stages"]))
    ids = [(s["stage"], s["id"]) for s in answer["stages"]]
    assert len(ids) == len(set(ids))  # what runs share is there once
    assert any(len(s["runs"]) == 2 for s in answer["stages"])


def test_more_devices_shorten_the_way_and_not_the_work(folder: Path) -> None:
    few, many = (
        asked(folder, "--gpus", n, "--tflops", "1e-6", "--pool", "20000") for n in ("1", "4")
    )
    assert few["seconds"] == many["seconds"]
    assert many["seconds_from_start_to_end"] < few["seconds_from_start_to_end"]


def test_a_measured_rate_is_used_and_the_prediction_checked(folder: Path) -> None:
    plan = planned()
    chain = {"pool", "task", "target", "split", "warmup"}
    for one in plan.nodes.values():
        if one.stage in chain:
            finish(folder, one, seconds=2.0, metrics={"n_examples": 100})
    scoring = node(plan, "query", "target")
    counts = {"examples": 6, "tokens": 120, "supervised": 60}
    finish(folder, scoring, seconds=4.0, metrics=counts)
    assert {m.node.stage for m in read_history(folder)} == chain | {"query"}
    assert {m.node.shards for m in read_history(folder)} == {1}
    for number in range(3):
        (folder / scoring.folder / f"shard-{number:05d}.manifest.json").touch()
    assert max(m.node.shards for m in read_history(folder)) == 3
    answer = asked(folder)
    assert not answer["on_gpu"]
    query = next(s for s in answer["stages"] if s["id"] == scoring.id)
    assert query["seconds"] == pytest.approx(4.0)  # its own operations at its own rate
    assert query["finished"]
    assert query["tokens"] == 120
    row = next(r for r in answer["checks"] if r["stage"] == "query")
    assert row["n"] == 1
    assert row["disk"] == 4 * LINEARS / 1000
    assert row["seconds"] != pytest.approx(1.0)  # predicted from the warm-up, not from itself
    assert "2026-01-01" in answer["basis"]["checked"]
    assert not any(s["finished"] for s in asked(folder, "--pool", "50")["stages"])
    assert "predicted / measured" in CliRunner().invoke(app, ["cost", "study.yaml"]).output


def test_gpus_that_a_training_is_spread_over_are_counted(folder: Path) -> None:
    study = folder / "study.yaml"
    spread = folder / "spread.yaml"
    spread.write_text("train_gpus: 4\n")
    with pytest.raises(ConfigError, match=r"train_gpus[\s\S]*4 of 2"):
        forecast(Question([study, spread], gpus=2, pool=1000, tokens=20), folder)
    one = forecast(Question([study], gpus=4, pool=1000, tokens=20), folder)
    four = forecast(Question([study, spread], gpus=4, pool=1000, tokens=20), folder)

    def training(answer: Any) -> Line:
        return next(x for x in answer.lines if x.node.stage == "warmup")

    assert training(four).seconds == training(one).seconds  # of all GPUs together
    assert (training(one).gpus, training(four).gpus) == (1, 4)
    assert training(four).need.memory < training(one).need.memory


def test_it_is_exact_about_what_it_knows(folder: Path) -> None:
    answer = forecast(Question([folder / "study.yaml"], pool=1000, tokens=20), folder)
    features = [x for x in answer.lines if x.node.stage == "features"]
    assert {x.need.tokens for x in features} == {20_000}
    assert answer.arch == ARCH
    assert math.isfinite(makespan(answer.lines, 3))


def test_another_model_has_sizes_of_its_own(folder: Path) -> None:
    runs = {
        "full": {"proxy": {"kind": "target"}},
        "small": {"proxy": {"kind": "model", "model": "models/small"}},
    }
    (folder / "study.yaml").write_text(json.dumps(STUDY | {"runs": runs}))
    result = CliRunner().invoke(app, ["cost", "study.yaml", "--json"])
    assert result.exit_code != 0
    assert "models/small" in result.output
    (folder / "models" / "small").mkdir()
    sizes = CONFIG | {"hidden_size": 4, "intermediate_size": 8}
    (folder / "models/small/config.json").write_text(json.dumps(sizes))
    flops = {(s["stage"], tuple(s["runs"])): s["flops"] for s in asked(folder)["stages"]}
    assert 0 < flops["features", ("small",)] < flops["features", ("full", "small")]
    assert 0 < flops["warmup", ("small",)] < flops["warmup", ("full", "small")]


def test_costs_need_no_tensor_library(folder: Path) -> None:
    code = (
        "import sys\n"
        "from iprox.cli.main import app\n"
        "app(['cost', 'study.yaml'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'snakemake', 'pandas', 'transformers', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
