"""The study's plan, and functions that turn it into file names for the rules."""

import sys
from pathlib import Path

from iprox.errors import IproxError
from iprox.plan.code import code_hash
from iprox.plan.environment import prepare_jobs
from iprox.plan.papers import plan_tables
from iprox.plan.plan import plan_study
from iprox.plan.preflight import check_inputs
from iprox.store.inputs import raw_input_files
from iprox.study.load import parse_study
from iprox.study.scorers import GRADIENT

# The files of each stage that its children open. They stand beside the manifest in a rule's
# input: the manifest alone decides whether to rerun, the files must merely exist.
FILES = {
    "pool": ["pool.parquet"],
    "task": ["queries.parquet", "test.parquet", "texts.parquet"],
    "target": ["config.json"],
    "split": ["split.parquet"],
    "warmup": ["config.json"],
    "checkpoint": ["config.json"],
    "probe": ["probe.zarr/zarr.json"],
    "decomposition": ["directions.safetensors", "spectra.zarr/zarr.json"],
    "sparsity": ["chosen.json", "tried.parquet"],
    "factors": ["factors.safetensors", "layers.parquet"],
    "extraction": ["config.json", "blocks.parquet"],
    "proxy": ["model.safetensors", "proxy.json"],
    "covariance": [],
    "curvature": ["curvature.zarr/zarr.json"],
    "eigenvalues": [],
    "query": ["query.zarr/zarr.json"],
    "direction": ["query.zarr/zarr.json"],
    "features": [],
    "query_sketches": ["rows.zarr/zarr.json"],
    "backbone": ["config.json", "encoder.json"],
    "encoder": ["config.json", "encoder.json", "quality.parquet"],
    "embeddings": [],
    "head": ["rows.zarr/zarr.json", "quality.parquet"],
    "query_embeddings": ["rows.zarr/zarr.json"],
    "ranking": ["ranking.parquet"],
    "fidelity": ["fidelity.parquet", "layers.parquet"],
    "selection": ["selection.parquet", "selected.jsonl"],
    "diversity": ["diversity.parquet"],
    "finetune": ["config.json"],
    "evaluation": ["items.parquet", "metrics.json"],
    "report": ["index.html", "summary.txt"],
    "synthetic": ["retention.parquet", "retention.svg"],
    "small": ["examples.parquet", "start/config.json", "full/config.json"],
    "retrain": ["losses.parquet"],
    "faithfulness": ["faithfulness.parquet", "summary.txt"],
    "facts": ["methods.parquet"],
    "retrieval": ["retrieval.parquet", "summary.txt"],
    "paper_table": [
        "table.parquet",
        "table.md",
        "table.tex",
        "cells.parquet",
        "summary.txt",
    ],
}

# What a person reads, by the heading under which `snakemake --report` shows it.
SHOWN = {
    "report": ("Study", ["index.html", "summary.txt"]),
    "paper_table": ("Tables of the papers", ["table.md", "summary.txt"]),
    "synthetic": ("Small networks", ["retention.svg"]),
    "faithfulness": ("Faithfulness", ["summary.txt"]),
    "retrieval": ("Retrieval of facts", ["summary.txt"]),
}
SCRIPTS = Path(workflow.basedir) / "workflow" / "scripts"

prepare_jobs(Path(workflow.basedir) / "src")

try:
    PLAN = plan_study(parse_study(config, map(Path, workflow.configfiles)))
    DATA_DIR = Path(config.get("data_dir") or ".")
    check_inputs(PLAN, DATA_DIR)
    TABULATED, TABLES = plan_tables(PLAN)
except IproxError as error:
    # A user's mistake is a message, not a traceback through the workflow engine.
    print(f"\n{error}\n", file=sys.stderr)
    sys.exit(1)


wildcard_constraints:
    id=r"[A-Za-z0-9._-]+-[0-9a-f]{10}",
    shard=r"\d{5}",


def files(stage):
    """Output of a stage's rule: its main files by pattern, those to be shown marked."""
    category, shown = SHOWN.get(stage, ("", []))
    found = {name: f"results/{stage}/{{id}}/{name}" for name in FILES[stage]}
    for name in shown:
        labels = {"artifact": "{id}", "file": name}
        found[name] = report(found[name], category=category, labels=labels)
    return list(found.values())


def manifest(stage):
    """Output of a stage's rule: the file that says it is finished."""
    return f"results/{stage}/{{id}}/manifest.json"


def made(node):
    """What a child needs of a parent: its manifest, and its files whatever their age."""
    return [
        str(node.manifest),
        *(ancient(str(node.folder / f)) for f in FILES[node.stage]),
    ]


def parent(stage, role):
    """Input function: one parent, or nothing when this artifact has no such parent."""

    def find(wildcards):
        node = PLAN.node(stage, wildcards.id).parents.get(role)
        return [] if node is None else made(node)

    return find


def all_parents(stage, prefix="", plan=PLAN):
    """Input function: every parent whose role starts with a prefix."""

    def find(wildcards):
        parents = plan.node(stage, wildcards.id).parents
        return [
            f
            for role, node in parents.items()
            if role.startswith(prefix)
            for f in made(node)
        ]

    return find


def raw_files(stage):
    """Input function: files of the user's that the study names for this stage."""
    return lambda wildcards: [
        str(path)
        for path in raw_input_files(PLAN.node(stage, wildcards.id).params, DATA_DIR)
    ]


def spec(stage, plan=PLAN):
    """Parameter: everything that went into the identity of this artifact."""
    return lambda wildcards: plan.node(stage, wildcards.id).spec


def parents(stage, plan=PLAN):
    """Parameter: manifest of every parent by role."""
    return lambda wildcards: {
        role: str(node.manifest)
        for role, node in plan.node(stage, wildcards.id).parents.items()
    }


def code(stage, script=None):
    """Parameter: digest of the code that makes this stage.

    Worked out when a job asks: a job of its own process needs its own stage's alone.
    """
    return lambda wildcards: code_hash(
        f"iprox.stages.{stage}", SCRIPTS / f"{script or stage}.py"
    )


def estimator_code(wildcards):
    """Parameter: digest of the code that makes a direction, its estimator's included."""
    kind = PLAN.node("direction", wildcards.id).params["estimator"]["kind"]
    return code("direction")(wildcards) + code_hash(f"iprox.estimators.{kind}")


def ranking_code(wildcards):
    """Parameter: digest of the code that makes a ranking, its scorer's included."""
    kind = PLAN.node("ranking", wildcards.id).params["scorer"]["kind"]
    own = "" if kind == GRADIENT else code_hash(f"iprox.scorers.{kind}")
    return code("ranking")(wildcards) + own


def shards(stage):
    """Parameter: how many jobs this artifact is cut into."""
    return lambda wildcards: PLAN.node(stage, wildcards.id).shards


def shard_manifests(stage):
    """Input function: the manifests of all shards, in order."""

    def find(wildcards):
        node = PLAN.node(stage, wildcards.id)
        return [
            f"{node.folder}/shard-{i:05d}.manifest.json" for i in range(node.shards)
        ]

    return find


def manifests_of(stage):
    """Manifests of a stage in all runs."""
    nodes = [run.nodes[stage] for run in PLAN.runs.values() if stage in run.nodes]
    return [str(node.manifest) for node in nodes]
