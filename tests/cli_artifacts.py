"""A results folder with a tiny artifact of every stage, written without running any stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from iprox.plan.nodes import Node, Plan
from iprox.stages.query_rows import write_rows
from iprox.store.arrays import create_store, put
from iprox.store.manifest import (
    MANIFEST,
    PROVENANCE,
    SPEC,
    Manifest,
    describe,
    dump_json,
    list_files,
)
from iprox.store.tables import write_table

EVIL = "[red]x[/red] \x1b[31mred\x1b[0m \x9b31m \u202eabc"
"""Text of a pool that would colour, move or reverse what a terminal shows."""

LAYER = "model.layers.0.mlp.up_proj"


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


class Results:
    """Writes artifacts below ``root/results`` with the plan's own identities."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan = Plan(study=None)  # type: ignore[arg-type]

    def add(
        self,
        stage: str,
        label: str,
        params: dict[str, Any],
        parents: dict[str, Node] | None,
        write: Callable[[Path], None],
    ) -> Node:
        node = self.plan.add(stage, label, params, parents)
        folder = self.root / node.folder
        folder.mkdir(parents=True)
        write(folder)
        about_shards = (
            "shard-*.manifest.json"  # as the runner leaves them: beside, not in, the manifest
        )
        names = [n for n in list_files(folder) if not fnmatch(n, about_shards)]
        manifest = describe(stage, folder, names)
        provenance = {
            "git_revision": "abc",
            "metrics": {"examples": 3},
            "peak_memory_bytes": 123_456_789,
            "seconds": 1.5,
            "versions": {"torch": "2.13.0"},
        }
        (folder / SPEC).write_text(dump_json(node.spec))
        (folder / PROVENANCE).write_text(dump_json(provenance))
        (folder / MANIFEST).write_text(manifest.to_json())
        return node

    def folder(self, node: Node) -> Path:
        return self.root / node.folder

    def link(self, study: str, run: str, nodes: dict[str, Node]) -> Path:
        """A run's folder of relative links, as the plan's index makes it."""
        folder = self.root / "results" / "studies" / study / run
        folder.mkdir(parents=True)
        for name, node in nodes.items():
            (folder / name).symlink_to(Path("../../..") / node.stage / node.id)
        return folder


def write_pool(folder: Path) -> None:
    rows = [
        {
            "example_id": f"e{i}",
            "source": "demo",
            "category": "qa",
            "messages": chat(EVIL, f"answer {i}"),
            "text_hash": f"h{i}",
        }
        for i in range(4)
    ]
    write_table(folder / "pool.parquet", pd.DataFrame(rows), {"licence": "CC BY 4.0"})


def write_diversity(folder: Path) -> None:
    row = {"task": "mmlu", "selected": 2, "compared": 2, "nearest": 0.875, "affinity": 0.5}
    write_table(folder / "diversity.parquet", pd.DataFrame([row]))


def write_task(folder: Path) -> None:
    query = {
        "example_id": "q0",
        "subtask": "law",
        "messages": chat("Q", "A"),
        "prefix": "",
        "eos": True,
    }
    item = {
        "example_id": "t0",
        "subtask": "law",
        "kind": "choice",
        "messages": chat("Q"),
        "prefix": "",
        "choices": ["A", "B"],
        "answer": "A",
    }
    write_table(folder / "queries.parquet", pd.DataFrame([query]))
    write_table(folder / "test.parquet", pd.DataFrame([item]))


def write_model(folder: Path, log: str = "") -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{LAYER}.weight": np.zeros((6, 4), np.float32)}, folder / "model.safetensors")
    if log:
        table = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.25]})
        write_table(folder / log, table)


def write_proxy(folder: Path) -> None:
    write_model(folder)
    steps = {"step": [0, 1, 1], "split": ["heldout", "train", "heldout"], "kl": [None, 1.25, 0.5]}
    table = pd.DataFrame(steps).assign(chosen=[False, None, True]).astype({"chosen": "boolean"})
    write_table(folder / "alignment.parquet", table)
    cosines = pd.DataFrame({"step": [0, 1], "layer": LAYER, "cosine_left": [0.25, 0.875]})
    write_table(folder / "alignment_layers.parquet", cosines)
    (folder / "proxy.json").write_text(json.dumps({"ranks": {LAYER: 2}, "gauge": "balanced"}))


def write_extraction(folder: Path) -> None:
    write_model(folder)
    blocks = {"block": [0, 1], "influence": [0.375, 0.0], "kept": [True, False], "place": [0, -1]}
    write_table(folder / "blocks.parquet", pd.DataFrame(blocks))


def write_search(folder: Path) -> None:
    row = {"sparsity": 0.5, "flops_ratio": 0.625, "verdict": "met", "spearman": 0.8125}
    write_table(folder / "tried.parquet", pd.DataFrame([row | {"chosen": True}]))
    (folder / "chosen.json").write_text(json.dumps(row | {"floor": 0.75}))


def write_synthetic(folder: Path) -> None:
    row = {"kind": "ipsvd", "sparsity": 0.5, "metric": "influence_retention", "mean": 0.5625}
    write_table(folder / "retention.parquet", pd.DataFrame([row]))


def write_small(folder: Path) -> None:
    for name in ("start", "full"):
        (folder / name).mkdir()
        write_model(folder / name)


def write_retrain(folder: Path) -> None:
    row = {"subset": 0, "kept": [True, False], "losses": [1.25]}
    write_table(folder / "losses.parquet", pd.DataFrame([row]))


def write_faithfulness(folder: Path) -> None:
    row = {"run": "ekfac", "estimator": "ekfac", "lds": 0.6875, "low": 0.5, "high": 0.75}
    write_table(folder / "faithfulness.parquet", pd.DataFrame([row]))


def write_facts(folder: Path) -> None:
    row = {"method": "GradDot", "mrr": 0.3125, "recall": 0.25, "agreement": 0.5, "flops": 1e9}
    write_table(folder / "methods.parquet", pd.DataFrame([row]))


def write_paper_table(folder: Path) -> None:
    row = {"setting": "IProX 0.3", "MMLU, paper": 56.75, "MMLU, ours": 25.5}
    write_table(folder / "table.parquet", pd.DataFrame([row]))


def write_retrieval(folder: Path) -> None:
    write_table(folder / "retrieval.parquet", pd.DataFrame([{"method": "RepSim", "mrr": 0.4375}]))


def write_split(folder: Path) -> None:
    table = pd.DataFrame({"example_id": ["e0", "e1"], "split": "probe", "position": [0, 1]})
    write_table(folder / "split.parquet", table)


def write_probe(folder: Path) -> None:
    layers = {LAYER: {"site": "s0", "out": 6, "in": 4}}
    group = create_store(folder / "probe.zarr", {"tokens": 5, "layers": layers})
    put(group, "inputs/s0", np.ones((5, 4), np.float32), ("tokens", "in"))
    put(group, f"output_grads/{LAYER}", np.ones((5, 6), np.float32), ("tokens", "out"))


def write_spectra(folder: Path) -> None:
    group = create_store(folder / "spectra.zarr", {"layers": [LAYER]})
    attrs = {"out": 6, "in": 4, "kernel": "exact/product", "floor": 0.0, "fallback": None}
    values = np.array([2.5, 1.0])
    put(group, f"singular_values/{LAYER}", values, ("component",), attrs)


def write_decomposition(folder: Path) -> None:
    write_spectra(folder)
    pair = {
        f"{LAYER}.left": np.ones((6, 2), np.float32),
        f"{LAYER}.right": np.ones((2, 4), np.float32),
    }
    save_file(pair, folder / "directions.safetensors", metadata={"iprox": '{"mode": "exact"}'})


def write_factors(folder: Path) -> None:
    write_spectra(folder)
    pair = {
        f"{LAYER}.left": np.ones((6, 1), np.float32),
        f"{LAYER}.right": np.ones((1, 4), np.float32),
    }
    save_file(pair, folder / "factors.safetensors", metadata={"iprox": "{}"})
    row = {
        "layer": LAYER,
        "out": 6,
        "in": 4,
        "rank": 1,
        "kept_dense": False,
        "truncation_error": 0.125,
        "parameters": 10,
        "parameters_dense": 24,
        "kernel": "exact/product",
    }
    write_table(folder / "layers.parquet", pd.DataFrame([row]), {"sparsity": 0.5})


def write_query(folder: Path, **more: Any) -> None:
    attrs = {"val_agg": "mean_raw", "n_queries": {"all": 2}, "layers": {LAYER: [2, 2]}}
    group = create_store(folder / "query.zarr", attrs | more)
    gradient = np.array([[[3.0, 0.0], [0.0, 4.0]]], np.float32)
    put(group, f"gradients/{LAYER}", gradient, ("groups", "out", "in"))
    put(group, "norms", np.array([5.0]), ("groups",))
    put(group, "group", np.array(["all"]), ("groups",))


def write_direction(folder: Path) -> None:
    settings = {"amount": 0.1, "mode": "relative"}
    write_query(folder, estimator="ekfac", damping=settings, layer_damping={LAYER: 0.25})


def write_covariance(folder: Path) -> None:
    attrs = {"labels": "empirical", "examples": 7, "tokens": {LAYER: 90}}
    group = create_store(folder / "shard-00000.zarr", attrs)
    put(group, f"inputs/{LAYER}/0", np.eye(3, dtype=np.float32), ("features", "features"))


def write_curvature(folder: Path) -> None:
    group = create_store(folder / "curvature.zarr", {"examples": 7, "split": {}})
    put(group, f"inputs/{LAYER}/0", np.eye(3, dtype=np.float32), ("features", "vectors"))
    put(group, f"input_values/{LAYER}", np.array([3.0, 2.0, 1.0]), ("vectors",))


def write_eigenvalues(folder: Path) -> None:
    group = create_store(folder / "shard-00000.zarr", {"labels": "empirical", "examples": 7})
    put(group, f"sums/{LAYER}", np.ones((2, 3), np.float32), ("out", "in"))


def write_shard(folder: Path, number: int, ids: list[str]) -> list[str]:
    """One shard; returns the names of its files."""
    kernel = {
        "out": 6,
        "in": 4,
        "layers": 1,
        "example": LAYER,
        "materialise_from": 64,
        "reason": "cheaper",
    }
    name = f"shard-{number:05d}.zarr"
    group = create_store(folder / name, {"kernels": [kernel], "loss_reduction": "token_mean"})
    put(group, "example_id", np.array(ids), ("examples",))
    put(group, "dots", np.ones((len(ids), 1)), ("examples", "columns"))
    put(group, "tokens", np.full(len(ids), 10), ("examples",))
    put(group, "supervised", np.array([0] + [5] * (len(ids) - 1)), ("examples",))
    put(group, "columns", np.array(["mmlu"]), ("columns",))
    put(group, "query_norms", np.array([5.0]), ("columns",))
    return sorted(
        p.relative_to(folder).as_posix() for p in (folder / name).rglob("*") if p.is_file()
    )


def write_features(folder: Path) -> None:
    for number, ids in enumerate((["e0", "e1"], ["e2", "e3"])):
        names = write_shard(folder, number, ids)
        manifest: Manifest = describe("features", folder, names)
        (folder / f"shard-{number:05d}.{MANIFEST}").write_text(manifest.to_json())


def write_encoder(folder: Path) -> None:
    write_model(folder)
    row = {"queries": "heldout", "encoder": "trained", "task": "mmlu", "metric": "aggregated"}
    write_table(folder / "quality.parquet", pd.DataFrame([{**row, "value": 0.6875}]))
    epochs = pd.DataFrame({"epoch": [0, 1], "validation": [0.25, 0.4375]})
    write_table(folder / "epochs.parquet", epochs, {"chosen": 1})


def write_embeddings(folder: Path) -> None:
    """One shard of embeddings, as a scorer that learns makes them."""
    group = create_store(folder / "shard-00000.zarr", {"kind": "embedding", "max_length": 64})
    put(group, "example_id", np.array(["e0", "e1"]), ("examples",))
    put(group, "sketch", np.eye(2, 3, dtype=np.float16), ("examples", "dim"))
    put(group, "tokens", np.array([9, 12]), ("examples",))
    put(group, "supervised", np.ones(2, dtype=int), ("examples",))
    inside = (folder / "shard-00000.zarr").rglob("*")
    names = sorted(p.relative_to(folder).as_posix() for p in inside if p.is_file())
    manifest: Manifest = describe("embeddings", folder, names)
    (folder / f"shard-00000.{MANIFEST}").write_text(manifest.to_json())


def write_query_rows(folder: Path) -> None:
    write_rows(folder, np.eye(2, 3), ["q0", "q1"], ["law", "art"], {"kind": "lora"})


def write_head(folder: Path) -> None:
    write_query_rows(folder)
    row = {"task": "mmlu", "examples": "heldout", "value": 0.3125}
    write_table(folder / "quality.parquet", pd.DataFrame([row]))


def ranking_writer(scores: list[float]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        table = pd.DataFrame({"example_id": [f"e{i}" for i in range(len(scores))], "score": scores})
        table = table.sort_values("score", ascending=False, kind="stable")
        table = table.assign(task="mmlu", rank=range(1, len(scores) + 1)).astype(
            {"score": "float32"}
        )
        columns = ["task", "rank", "example_id", "score"]
        write_table(folder / "ranking.parquet", table[columns], {"scorer": "gradient"})

    return write


def fidelity_writer(value: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        row = {
            "metric": "spearman",
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "n": 4,
        }
        others = {"above_length": 0.375, "flops_ratio": 0.625}
        rows = [{"task": task} | row for task in ("mmlu", "mean")]
        rows += [row | {"task": "mean", "metric": m, "value": v} for m, v in others.items()]
        write_table(folder / "fidelity.parquet", pd.DataFrame(rows))
        layer = {"layer": LAYER, "task": "mean", "spearman": 0.8125, "share": 1.0, "n": 4}
        write_table(folder / "layers.parquet", pd.DataFrame([layer]))

    return write


def write_selection(folder: Path) -> None:
    row = {"example_id": "e0", "task": "mmlu", "rank": 1, "score": 0.5, "reason": "top 1 of 4"}
    write_table(folder / "selection.parquet", pd.DataFrame([row]))
    line = json.dumps({"example_id": "e0", "messages": chat(EVIL, "A")}, ensure_ascii=False)
    (folder / "selected.jsonl").write_text(line + "\n", encoding="utf-8")


def evaluation_writer(loss: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        table = pd.DataFrame(
            {"example_id": ["t0", "t1"], "kind": ["loss", "loss"], "loss": [loss, loss]}
        )
        write_table(folder / "items.parquet", table)
        metrics = {
            "loss": {"value": loss, "low": loss - 1, "high": loss + 1, "n": 2},
            "task": "mmlu",
        }
        (folder / "metrics.json").write_text(dump_json(metrics))

    return write


def write_report(folder: Path) -> None:
    (folder / "tables").mkdir()
    (folder / "tables" / "runs.csv").write_text("run\nfull\n")
    (folder / "index.html").write_text("<html></html>\n")


def every_stage(results: Results) -> dict[str, Node]:
    """One artifact of each stage, with parents as in a run."""
    add = results.add
    nodes = {"pool": add("pool", "demo", {"pool": {"name": "demo"}}, None, write_pool)}
    nodes["task"] = add("task", "mmlu", {"task": {"name": "mmlu"}}, None, write_task)
    nodes["target"] = add("target", "tiny", {"target": {"model": "tiny"}}, None, write_model)
    pool = {"pool": nodes["pool"]}
    nodes["split"] = add("split", "probe", {"split": {"size": 2}}, pool, write_split)
    nodes["warmup"] = add(
        "warmup",
        "tiny",
        {"warmup": {"lr": 1e-5}},
        pool | {"split": nodes["split"], "target": nodes["target"]},
        lambda folder: write_model(folder, "log.parquet"),
    )
    warm = {"warmup": nodes["warmup"]}
    nodes["checkpoint"] = add(
        "checkpoint", "tiny-epoch-1", {"checkpoint": {"epoch": 1}}, warm, write_model
    )
    nodes["probe"] = add("probe", "p", {"probe": {"tokens": 5}}, pool | warm, write_probe)
    nodes["decomposition"] = add(
        "decomposition",
        "exact",
        {"decomposition": {}},
        {"probe": nodes["probe"]},
        write_decomposition,
    )
    made = {"decomposition": nodes["decomposition"]}
    nodes["sparsity"] = add("sparsity", "f", {"search": {"floor": 0.8}}, made, write_search)
    nodes["factors"] = add("factors", "f", {"factors": {"sparsity": 0.5}}, made, write_factors)
    nodes["proxy"] = add("proxy", "f", {"align": {}}, {"factors": nodes["factors"]}, write_proxy)
    cut = {"extraction": {"kind": "layers", "sparsity": 0.5}}
    split = {"split": nodes["split"]}
    nodes["extraction"] = add("extraction", "l", cut, pool | split | warm, write_extraction)
    model = {"model": nodes["proxy"]}
    nodes["query"] = add(
        "query", "mmlu", {"influence": {}}, model | {"task": nodes["task"]}, write_query
    )
    passed = model | pool | {"split": nodes["split"]}
    labels = {"curvature": {"labels": "empirical"}}
    nodes["covariance"] = add("covariance", "f", labels, passed, write_covariance)
    sums = {"covariance": nodes["covariance"]}
    nodes["curvature"] = add("curvature", "f", {}, sums, write_curvature)
    fitted = {"curvature": nodes["curvature"]}
    nodes["eigenvalues"] = add("eigenvalues", "f", labels, passed | fitted, write_eigenvalues)
    nodes["direction"] = add(
        "direction",
        "mmlu-ekfac",
        {"curvature": {"damping": 0.1}},
        fitted | {"query": nodes["query"], "eigenvalues": nodes["eigenvalues"]},
        write_direction,
    )
    nodes["features"] = add("features", "f", {"influence": {}}, model | pool, write_features)
    asked = model | {"task": nodes["task"]}
    nodes["query_sketches"] = add("query_sketches", "mmlu", {}, asked, write_query_rows)
    nodes["backbone"] = add("backbone", "minilm", {"encoder": {}}, None, write_model)
    taught = {"backbone": nodes["backbone"], "sketches/mmlu": nodes["query_sketches"]}
    nodes["encoder"] = add("encoder", "minilm", {"encoder": {}}, taught, write_encoder)
    by = {"encoder": nodes["encoder"]}
    nodes["embeddings"] = add("embeddings", "minilm", {"encoder": {}}, by | pool, write_embeddings)
    asked = by | {"task": nodes["task"]}
    nodes["query_embeddings"] = add("query_embeddings", "mmlu", {}, asked, write_query_rows)
    fit = {"embeddings": nodes["embeddings"]}
    nodes["head"] = add("head", "mmlu", {"scorer": {"fit": "ridge"}}, fit, write_head)
    scored = {"features": nodes["features"]}
    writer = ranking_writer([0.1, 0.4, -np.inf, 0.3])
    nodes["ranking"] = add("ranking", "f", {"influence": {"score": "cosine"}}, scored, writer)
    nodes["fidelity"] = add("fidelity", "f", {"fidelity": {}}, scored, fidelity_writer(0.75))
    nodes["synthetic"] = add("synthetic", "f3", {"synthetic": {}}, None, write_synthetic)
    nodes["facts"] = add("facts", "seed-0", {"facts": {}}, None, write_facts)
    traced = {"facts/0": nodes["facts"]}
    nodes["retrieval"] = add("retrieval", "r", {}, traced, write_retrieval)
    nodes["small"] = add("small", "seed-0", {"seed": 0}, pool, write_small)
    again = pool | {"small": nodes["small"]}
    nodes["retrain"] = add("retrain", "seed-0", {"first": 0}, again, write_retrain)
    judged = again | {"retrain": nodes["retrain"]}
    nodes["faithfulness"] = add("faithfulness", "s", {"runs": {}}, judged, write_faithfulness)
    ranked = pool | {"ranking": nodes["ranking"]}
    nodes["selection"] = add(
        "selection", "f", {"select": {"fraction": 0.25}}, ranked, write_selection
    )
    chosen = {"features": nodes["features"], "selection": nodes["selection"]}
    nodes["diversity"] = add("diversity", "f", {"tasks": ["mmlu"]}, chosen, write_diversity)
    nodes["finetune"] = add(
        "finetune",
        "f-mmlu",
        {"finetune": {"lr": 1e-5}},
        {"selection": nodes["selection"], "model": nodes["target"]},
        lambda folder: write_model(folder, "log.parquet"),
    )
    shown = {"run/selection": nodes["selection"]}
    nodes["paper_table"] = add("paper_table", "t2", {"name": "t2"}, shown, write_paper_table)
    nodes["evaluation"] = add(
        "evaluation",
        "f-mmlu",
        {"evaluate": {}},
        {"model": nodes["finetune"], "task": nodes["task"]},
        evaluation_writer(2.0),
    )
    nodes["report"] = add("report", "demo", {"study": "demo"}, nodes, write_report)
    return nodes
