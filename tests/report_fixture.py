"""A small made-up study on disk, in the formats of the stages: what the report is tested on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from iprox.store.job import Job
from iprox.store.manifest import MANIFEST, PROVENANCE, SPEC, describe, dump_json
from iprox.store.tables import write_table

TASKS = ("mmlu", "bbh")
FRACTION = 0.1
HOSTILE = (
    "<script>alert('owned')</script><img src=x onerror=alert(1)>",
    "\N{RIGHT-TO-LEFT OVERRIDE}evil \N{RIGHT-TO-LEFT EMBEDDING}\u05e9\u05dc\u05d5\u05dd unclosed",
    "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\N{WOMAN} emoji, a bell \x07 and an escape \x1b[31m",
    "x" * 10_000,
    "</td></table></script><!-- {{ 7 * 7 }} {% raw %} $\\frac{1}{0}$ | a & b",
)
"""Texts that a page must show without acting on them."""

NOISE = {"full": 0.0, "iprox-0.3": 0.35, "iprox-0.5": 0.7, "svd-0.5": 3.0}
"""How far the scores of each gradient run are from the target's, in their own spread."""

SECONDS = {"full": 61.0, "iprox-0.3": 47.0, "iprox-0.5": 33.5, "svd-0.5": 34.0, "glance": 8.0}
GAIN = {"full": 0.14, "iprox-0.3": 0.135, "iprox-0.5": 0.12, "svd-0.5": 0.06, "random": 0.055}
"""Loss that fine-tuning on each run's selection takes off."""


class Fixture:
    """Writes the stage folders of a study and hands them out as a report job.

    Args:
        root: Folder to write into.
        texts: First user turn of each pool example.
        runs: Names of the runs to make: of ``NOISE``, ``random-<draw>``, or ``glance``, which
            goes until fidelity only.
        tasks: Names of the tasks.
        categories: Category of each example, in turn.
    """

    def __init__(
        self,
        root: Path,
        texts: Sequence[str],
        runs: Sequence[str],
        tasks: Sequence[str] = TASKS,
        categories: Sequence[str] = ("open_qa", "closed_qa", "brainstorming"),
    ) -> None:
        self.root, self.tasks, self.runs = root, tuple(tasks), tuple(runs)
        self.texts, self.categories = texts, categories
        self.ids = [f"pool-{i:04d}" for i in range(len(texts))]
        self.n_selected = max(1, int(FRACTION * len(texts)))
        self.parents: dict[str, Path] = {}
        self._shared()
        self.warmup = self.stage("warmup", "warmup", lambda f: write_log(f, 7), 55.0)
        self.target_pass = self.stage(
            "target-features",
            "features",
            lambda f: (f / "shard.json").write_text("{}"),
            metrics={"tokens_per_s": 200.0},
        )
        del self.parents["warmup"], self.parents["target-features"]
        for run in runs:
            self._run(run)

    def job(self, out: Path, **report: Any) -> Job:
        """A report job of everything that was written."""
        out.mkdir(parents=True)
        params = {
            "study": "toy",
            "report": {"examples": 4, **report},
            "tasks": list(self.tasks),
            "runs": {run: about(run) for run in self.runs},
            "config": {
                "study": "toy",
                "pool": {"name": "toy-pool", "path": None},
                "target": {"model": "smollm2-135m"},
                "select": {"fraction": FRACTION},
            },
        }
        return Job(stage="report", params=params, parents=dict(self.parents), out=out)

    def stage(
        self,
        role: str,
        stage: str,
        write: Callable[[Path], object],
        seconds: float = 1.5,
        **more: Any,
    ) -> Path:
        """Write one stage folder: its files, manifest, spec and provenance."""
        name = f"{role.replace('/', '-')}-0a1b2c3d"
        folder = self.root / "results" / stage / name
        folder.mkdir(parents=True)
        write(folder)
        spec = {"id": name, "stage": stage, "params": more.pop("params", {}), "parents": {}}
        (folder / SPEC).write_text(dump_json(spec))
        about = {
            "seconds": seconds,
            "peak_memory_bytes": 1_200_000_000,
            "versions": {"iprox": "0.1.0", "torch": "2.13.0"},
            "git_revision": "c0ffee" * 6,
            "metrics": more.pop("metrics", {}),
        }
        (folder / PROVENANCE).write_text(dump_json(about | more))
        (folder / MANIFEST).write_text(describe(stage, folder).to_json())
        self.parents[role] = folder
        return folder

    def _shared(self) -> None:
        self.stage("pool", "pool", lambda f: write_table(f / "pool.parquet", self._pool()))
        self.stage("target", "target", lambda f: (f / "config.json").write_text("{}"))
        for i, task in enumerate(self.tasks):
            self.stage(f"task/{task}", "task", lambda f: (f / "queries.parquet").write_bytes(b"-"))
            self.stage(
                f"base/evaluation-{task}",
                "evaluation",
                lambda f, i=i: write_evaluation(f, i, 0.0, 0),
            )

    def _pool(self) -> pd.DataFrame:
        rows = [
            {
                "example_id": name,
                "source": "toy",
                "category": self.categories[i % len(self.categories)],
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": f"Answer {i}. " * (1 + i % 7)},
                ],
                "text_hash": f"{i:08x}",
            }
            for i, (name, text) in enumerate(zip(self.ids, self.texts, strict=True))
        ]
        return pd.DataFrame(rows)

    def _run(self, run: str) -> None:
        random = run.startswith("random")
        seed = 100 + self.runs.index(run)
        if not random:
            self._scoring(run, seed)
        if run == "glance":
            return
        ranking = self._ranking(run, seed)
        self.stage(
            f"{run}/ranking", "ranking", lambda f: write_table(f / "ranking.parquet", ranking)
        )
        chosen = ranking[ranking["rank"] <= self.n_selected].assign(reason="best scores")
        columns = ["example_id", "task", "rank", "score", "reason"]
        self.stage(
            f"{run}/selection",
            "selection",
            lambda f: write_table(f / "selection.parquet", chosen[columns]),
        )
        for subset in ["all"] if random else self.tasks:
            self.stage(f"{run}/finetune-{subset}", "finetune", lambda f: write_log(f, seed), 140.0)
        gain = GAIN["random" if random else run]
        for i, task in enumerate(self.tasks):
            self.stage(
                f"{run}/evaluation-{task}",
                "evaluation",
                lambda f, i=i: write_evaluation(f, i, gain + 0.004 * (seed % 3) * random, seed),
                6.0,
            )

    def _scoring(self, run: str, seed: int) -> None:
        subset = "fidelity" if run == "glance" else "all"
        n = 20 if run == "glance" else len(self.ids)
        self.stage(
            f"{run}/features",
            "features",
            lambda f: (f / "shard.json").write_text("{}"),
            SECONDS[run],
            params={"subset": {"name": subset}},
            metrics={
                "examples": n,
                "tokens": 210 * n,
                "flops": 1.7e11 * n,
                "tokens_per_s": 12_000 / SECONDS[run],
            },
        )
        self.parents[f"{run}/warmup"] = self.warmup
        if run == "full":
            return
        self.stage(
            f"{run}/factors", "factors", lambda f: write_layers(f, 0.3 if "0.3" in run else 0.5)
        )
        self.stage(f"{run}/proxy", "proxy", lambda f: write_alignment(f, seed), 21.0)
        noise = NOISE.get(run, 1.0)
        self.stage(
            f"{run}/fidelity",
            "fidelity",
            lambda f: (
                write_fidelity(f, self.tasks, noise),
                write_layer_fidelity(f, self.tasks, noise),
            ),
        )
        self.parents[f"{run}/target-features"] = self.target_pass

    def _ranking(self, run: str, seed: int) -> pd.DataFrame:
        parts = []
        for i, task in enumerate(sorted(self.tasks)):
            truth = np.random.default_rng(i).normal(size=len(self.ids))
            noise = np.random.default_rng(seed + i).normal(size=len(self.ids))
            score = noise if run.startswith("random") else truth + NOISE[run] * noise
            part = pd.DataFrame(
                {"example_id": self.ids, "score": (0.05 * score).astype(np.float32)}
            )
            part = part.sort_values("score", ascending=False).reset_index(drop=True)
            parts.append(part.assign(task=task, rank=np.arange(1, len(part) + 1)))
        return pd.concat(parts, ignore_index=True)[["task", "rank", "example_id", "score"]]


def about(run: str) -> dict[str, Any]:
    """Entry of a run in the report's parameters."""
    random, target = run.startswith("random"), run == "full"
    sparsity = None if random or target else float(run.split("-")[1]) if "-" in run else 0.5
    return {
        "group": "random" if random else run,
        "scorer": "random" if random else "gradient",
        "proxy": None if random else "target" if target else "svd" if "svd" in run else "ipsvd",
        "sparsity": sparsity,
        "preset": "default",
        "changed": {"proxy.sparsity": sparsity} if sparsity else {},
        "until": "fidelity" if run == "glance" else "evaluation",
    }


def write_evaluation(folder: Path, task: int, gain: float, seed: int) -> None:
    """``items.parquet`` and ``metrics.json`` of one model on one task."""
    n = 60
    hardness = np.random.default_rng(50 + task).gamma(4.0, 0.6, size=n)
    loss = hardness - gain + 0.05 * np.random.default_rng(seed).normal(size=n) * (seed > 0)
    right = np.random.default_rng(seed + 9).random(n) < 0.4 + gain
    rows = [{"example_id": f"loss-{i}", "kind": "loss", "loss": x} for i, x in enumerate(loss)]
    rows += [{"example_id": f"mc-{i}", "kind": "choice", "correct": x} for i, x in enumerate(right)]
    # the last item could not be run, as when its prompt is too long
    rows.append({"example_id": "mc-long", "kind": "choice", "not_run": "the prompt leaves no room"})
    items = pd.DataFrame(rows).assign(subtask="one")
    write_table(folder / "items.parquet", items)
    metrics = {
        "loss": _mean(items["loss"].dropna()),
        "loss_macro": _mean(items["loss"].dropna()),
        "accuracy": _mean(items["correct"].dropna().astype(float)),
        "choice_items_not_run": 1,
    }
    (folder / "metrics.json").write_text(dump_json(metrics))


def _mean(values: pd.Series) -> dict[str, float]:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    mean = float(values.mean())
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def write_fidelity(folder: Path, tasks: Sequence[str], noise: float) -> None:
    """``fidelity.parquet`` of a proxy whose scores carry this much noise."""
    rows = []
    for i, task in enumerate([*tasks, "mean"]):
        value = 1 / np.hypot(1, noise) - 0.02 * (i == 1) - 0.01 * (i == len(tasks))
        for metric, shift in (
            ("spearman", 0.0),
            ("kendall", -0.13),
            ("pearson", 0.01),
            ("top_5%", -0.2),
        ):
            middle = value + shift
            rows.append([task, metric, middle, middle - 0.06, middle + 0.04, 256])
        guess = 0.3 - 0.01 * i
        rows.append([task, "length_spearman", guess, guess - 0.1, guess + 0.1, 256])
        above = value - guess
        rows.append([task, "above_length", above, above - 0.12, above + 0.11, 256])
    rows.append(["mean", "loss_retention", 0.62, 0.6, 0.65, 256])
    sizes = {"parameters_ratio": 0.7, "scored_parameters_ratio": 0.5}
    for metric, ratio in (sizes | {"flops_ratio": 0.5 + 0.1 / (1 + noise)}).items():
        rows.append(["mean", metric, ratio, np.nan, np.nan, 256])
    columns = ["task", "metric", "value", "low", "high", "n"]
    write_table(folder / "fidelity.parquet", pd.DataFrame(rows, columns=columns))


def write_layer_fidelity(folder: Path, tasks: Sequence[str], noise: float) -> None:
    """``layers.parquet`` of a fidelity artifact: deeper layers lose more; one is undefined."""
    rows = []
    for block in range(12):
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
            value = np.cos(0.25 * block * noise) if (block, kind) != (0, "mlp.down_proj") else None
            layer = f"model.layers.{block}.{kind}"
            rows += [[layer, task, value, value, 1 / 48, 256] for task in [*tasks, "mean"]]
    columns = ["layer", "task", "spearman", "cosine", "share", "n"]
    table = pd.DataFrame(rows, columns=columns).astype({"spearman": float, "cosine": float})
    write_table(folder / "layers.parquet", table)


def write_log(folder: Path, seed: int) -> None:
    """``log.parquet`` of a training."""
    steps = np.arange(1, 33)
    loss = (
        1.9 + 0.7 * np.exp(-steps / 9) + 0.05 * np.random.default_rng(seed).normal(size=len(steps))
    )
    log = pd.DataFrame(
        {"step": steps, "epoch": steps / 8, "loss": loss, "lr": 1e-5, "grad_norm": 1.0}
    )
    write_table(folder / "log.parquet", log)


def write_alignment(folder: Path, seed: int) -> None:
    """``alignment.parquet`` of a proxy: train steps, and a held-out row for every eighth."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(33):
        down = 0.3 + 0.5 * np.exp(-step / 10) + 0.02 * rng.normal()
        row = {
            "step": step,
            "epoch": step / 32,
            "loss_ga": down,
            "kl": down / 2,
            "objective": 1.05 * down,
        }
        row |= {"proxy_loss": 3 + down, "target_loss": 2.7, "fidelity": None, "chosen": False}
        rows.append({**row, "split": "train", "lr": 5e-5, "grad_norm": 1.0})
        if step % 8 == 0:
            held = {"fidelity": 0.9 - down / 2, "chosen": step == 24, "lr": None, "grad_norm": None}
            rows.append({**row, "split": "heldout", **held})
    write_table(folder / "alignment.parquet", pd.DataFrame(rows))


def write_layers(folder: Path, sparsity: float) -> None:
    """``layers.parquet`` of twelve blocks; the smallest layers stay dense."""
    shapes = {
        "q_proj": (64, 64),
        "k_proj": (16, 64),
        "gate_proj": (160, 64),
        "down_proj": (64, 160),
    }
    rows = []
    for block in range(12):
        for kind, (out_dim, in_dim) in shapes.items():
            dense, size = kind == "k_proj", out_dim * in_dim
            rank = 16 if dense else int((1 - sparsity) * size / (out_dim + in_dim))
            parameters = size if dense else rank * (out_dim + in_dim)
            error = 0.0 if dense else sparsity * (0.3 + 0.02 * block + 0.1 * (kind == "down_proj"))
            part = "mlp" if kind in ("gate_proj", "down_proj") else "self_attn"
            rows.append(
                {
                    "layer": f"model.layers.{block}.{part}.{kind}",
                    "out": out_dim,
                    "in": in_dim,
                    "rank": rank,
                    "rank_effective": rank,
                    "kept_dense": dense,
                    "truncation_error": error,
                    "parameters": parameters,
                    "parameters_dense": size,
                    "sparsity_effective": 1 - parameters / size,
                    "kernel": "exact",
                    "fallback": "",
                }
            )
    write_table(folder / "layers.parquet", pd.DataFrame(rows))


def plain_texts(count: int) -> list[str]:
    """Ordinary requests, each different."""
    return [f"Explain in {i} words why number {i} matters. " * (1 + i % 5) for i in range(count)]


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics file of an evaluation folder."""
    loaded: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return loaded
