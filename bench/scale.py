"""How planning and a dry run grow with a study: 500 runs, 1,000 shards, 10,000 jobs.

    python -m bench.scale [--runs 500] [--shards 1000] [--jobs 10000] [--finished]

Prints seconds and peak memory of `iprox plan`, of `snakemake -n` on a fresh folder, and with
``--finished`` of a dry run and a run where everything is finished: the artifacts are written as
empty files with manifests, which is all that a dry run looks at.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def study(runs: int, shards: int) -> dict[str, Any]:
    """A sweep over damping in ``runs`` proxies, scored in ``shards`` jobs each."""
    dampings = [round(0.001 * (i + 1), 6) for i in range(runs)]
    return {
        "study": "scale",
        "pool": {"path": "pool.jsonl"},
        "target": {"model": "model"},
        "tasks": [{"name": "t", "kind": "messages", "path": "task.jsonl"}],
        "shards": shards,
        "until": "ranking",
        "fidelity": {"enabled": False},
        "align": {"epochs": 0.0},
        "runs": {"r": {"proxy": {"damping": dampings}}},
    }


def write_inputs(folder: Path, config: dict[str, Any]) -> None:
    """Files that planning looks at."""
    record = json.dumps({"instruction": "Add one and two.", "output": "three"}) + "\n"
    for name in ("pool.jsonl", "task.jsonl"):
        (folder / name).write_text(record)
    (folder / "model").mkdir(exist_ok=True)
    sizes = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(sizes))
    (folder / "model" / "model.safetensors").write_bytes(b"")
    (folder / "study.yaml").write_text(yaml.safe_dump(config))


def measure(label: str, command: list[str], folder: Path) -> None:
    """Run a command; print its time, its peak memory, and the last line that says something."""
    start, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - start
    busy = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = busy.ru_utime + busy.ru_stime - spent.ru_utime - spent.ru_stime
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    if done.returncode:
        sys.exit(f"{label} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    jobs = [line for line in done.stdout.splitlines() if line.startswith(("total", "Nothing"))]
    said = " ".join(jobs[:1])
    print(
        f"{label:28} {seconds:7.1f} s ({cpu:.1f} s CPU) {peak:6.0f} MB so far  {said}", flush=True
    )


def finish(folder: Path, config: dict[str, Any]) -> None:
    """Write every output of the study as an empty file, in the order of the stages."""
    sys.path.insert(0, str(ROOT / "src"))
    from iprox.plan.plan import plan_study
    from iprox.study.load import parse_study

    plan = plan_study(parse_study(config))
    for node in plan.in_order():
        for i in range(node.shards if node.stage == "features" else 0):
            inside = folder / node.folder / f"shard-{i:05d}.zarr"
            inside.mkdir(parents=True, exist_ok=True)
            (inside / "zarr.json").touch()
            (folder / node.folder / f"shard-{i:05d}.manifest.json").touch()
        (folder / node.folder).mkdir(parents=True, exist_ok=True)
        for name in FILES.get(node.stage, []):
            path = folder / node.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (folder / node.manifest).touch()


FILES = {
    "pool": ["pool.parquet"],
    "task": ["queries.parquet", "test.parquet", "texts.parquet"],
    "target": ["config.json"],
    "split": ["split.parquet"],
    "warmup": ["config.json"],
    "probe": ["probe.zarr/zarr.json"],
    "decomposition": ["directions.safetensors", "spectra.zarr/zarr.json"],
    "factors": ["factors.safetensors", "layers.parquet"],
    "proxy": ["model.safetensors", "proxy.json"],
    "query": ["query.zarr/zarr.json"],
    "ranking": ["ranking.parquet"],
}
"""Main files of the stages of this study, as ``workflow/rules/common.smk`` names them."""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=10_000, help="of the dry run")
    parser.add_argument("--finished", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, study(args.runs, args.shards))
        iprox = [sys.executable, "-c", "from iprox.cli.main import app; app()", "plan"]
        iprox += ["study.yaml"]
        measure(f"iprox plan, {args.runs} runs", iprox, folder)
        runs = max(1, args.jobs // 200)
        smaller = study(runs, args.jobs // runs)
        write_inputs(folder, smaller)
        snakemake = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile")]
        snakemake += ["--configfile", "study.yaml", "--cores", "1", "--quiet", "rules"]
        measure(f"snakemake -n, {runs} runs", [*snakemake, "-n", "--", "rankings"], folder)
        if args.finished:
            finish(folder, smaller)
            measure("snakemake -n, finished", [*snakemake, "-n", "--", "rankings"], folder)
            measure("snakemake, finished", [*snakemake, "--", "rankings"], folder)


if __name__ == "__main__":
    main()
