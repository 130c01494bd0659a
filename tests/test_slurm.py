"""The Slurm profile on a real Slurm: GPU requests, their limits, killed jobs, and equal bytes.

``IPROX_SLURM_TEST`` names a script that starts a Slurm with pretend GPUs on this machine
(``start|stop FOLDER``); without it, or without Slurm, the tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_workflow import contents, environment, snakemake, study, write_inputs

ROOT = Path(__file__).parents[1]
STARTER = Path(os.environ.get("IPROX_SLURM_TEST", "not set"))
pytestmark = [pytest.mark.slurm, pytest.mark.workflow]

GPU_RULES = ("warmup", "query", "features_shard")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running Slurm of two GPUs and four CPUs; its folder."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("not installed: snakemake-executor-plugin-slurm")
    if not STARTER.is_file():
        pytest.skip("IPROX_SLURM_TEST does not name a script that starts a Slurm")
    work = tmp_path_factory.mktemp("slurm")
    sizes = {"SLURM_TEST_GPUS": "2", "SLURM_TEST_CPUS": "8", "SLURM_TEST_MEM_MB": "60000"}
    started = subprocess.run(
        [STARTER, "start", work], env=os.environ | sizes, capture_output=True, text=True
    )
    if started.returncode:
        pytest.skip(f"Slurm does not start here: {started.stderr[-400:]}")
    yield work
    subprocess.run([STARTER, "stop", work], check=True, stdout=subprocess.DEVNULL)


def tiny() -> dict[str, Any]:
    """A target that scores the pool in three shards: twelve jobs, five of them with a GPU."""
    runs = {"full": {"proxy": {"kind": "target"}, "until": "selection"}}
    return study(runs=runs, shards=3)


PROFILE = ROOT / "workflow" / "profiles" / "slurm" / "config.yaml"


def submit(folder: Path, config: dict[str, Any], *args: str) -> subprocess.Popen[str]:
    """Start the workflow with the project's own Slurm profile, and what this Slurm needs."""
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    profile = yaml.safe_load(PROFILE.read_text())
    profile["default-resources"] |= {"slurm_partition": "test"}
    profile |= {
        "slurm-status-command": "squeue",
        "slurm-init-seconds-before-status-checks": 1,
        "latency-wait": 5,
        "set-threads": dict.fromkeys((*GPU_RULES, "finetune", "evaluation"), 1),
    }
    (folder / "profile").mkdir(exist_ok=True)
    (folder / "profile" / "config.yaml").write_text(yaml.safe_dump(profile))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile")]
    command += ["--configfile", "study.yaml", "--workflow-profile", "profile", *args]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def queue() -> list[dict[str, str]]:
    """Every job that Slurm knows: id, name, state, and the resources it asked for."""
    fields = "JobID:40,Comment:80,State:20,tres-per-job:40,MinMemory:20,TimeLimit:20,tres-alloc:120"
    done = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-O", fields],
        check=True,
        capture_output=True,
        text=True,
    )
    widths = [int(field.rsplit(":", 1)[1]) for field in fields.split(",")]
    rows = []
    for line in done.stdout.splitlines():
        parts, at = [], 0
        for width in widths:
            parts.append(line[at : at + width].strip())
            at += width
        names = ("id", "comment", "state", "per_job", "memory", "limit", "tres")
        rows.append(dict(zip(names, parts, strict=True)))
    return rows


def rule_of(job: dict[str, str]) -> str:
    """The rule of a job: the plugin writes it into the comment."""
    found = re.match(r"(?:rule_)?([a-z_]+?)(?:_wildcards|$)", job["comment"])
    return found[1] if found else job["comment"]


class Watch(threading.Thread):
    """Looks at the queue until stopped: most GPU jobs running at once, and all jobs seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.jobs, self.stopped = 0, {}, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            jobs = queue()
            self.jobs |= {job["id"]: job for job in jobs}
            running = [j for j in jobs if j["state"] == "RUNNING" and "gpu" in j["per_job"]]
            self.most = max(self.most, len(running))

    def end(self) -> None:
        self.stopped.set()
        self.join()
        self.jobs |= {job["id"]: job for job in queue()}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study run on this machine alone."""
    folder = tmp_path_factory.mktemp("local")
    write_inputs(folder)
    snakemake(folder, tiny(), "selections")
    return folder


@pytest.mark.usefixtures("slurm")
def test_a_study_on_slurm_gives_the_bytes_of_a_local_run(local: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    watch = Watch()
    watch.start()
    process = submit(tmp_path, tiny(), "selections")
    output, _ = process.communicate(timeout=1200)
    watch.end()
    assert process.returncode == 0, output[-5000:]
    assert contents(tmp_path) == contents(local)
    asked = [job for job in watch.jobs.values() if "gpu" in job["per_job"]]
    assert len(asked) == 1 + 1 + 3, watch.jobs  # warmup, query, three shards
    assert all(job["per_job"].endswith("gpu:1") for job in asked)
    assert len(watch.jobs) > len(asked)  # pool, task and target ask for none
    assert 1 <= watch.most <= 2  # there are two GPUs


@pytest.mark.usefixtures("slurm")
def test_a_cancelled_job_is_reported_and_sent_again_with_more(local: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    process = submit(tmp_path, tiny(), "--until", "target", "selections")
    first: dict[str, str] = {}
    give_up = time.monotonic() + 120
    while not first and time.monotonic() < give_up:
        new = [j for j in queue() if j["id"] not in before and j["state"] == "RUNNING"]
        for job in new:
            subprocess.run(["scancel", job["id"]], check=True)
            first = job
        time.sleep(0.2)
    output, _ = process.communicate(timeout=1200)
    assert first, output[-3000:]
    assert process.returncode == 0, output[-5000:]
    assert first["id"] in output  # it is said which job was lost
    again = [j for j in queue() if j["id"] not in before and j["comment"] == first["comment"]]
    assert len(again) == 2
    memory = sorted(int(j["memory"].rstrip("M")) for j in again)
    assert memory[1] > memory[0]  # the second attempt asks for more
    ours = contents(tmp_path)
    assert ours
    assert {k: contents(local)[k] for k in ours} == ours


@pytest.mark.usefixtures("slurm")
def test_a_job_killed_for_memory_is_retried_until_it_fits(local: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    less = "target:mem_mb=500*attempt**3"  # too little for torch at the first attempt
    process = submit(tmp_path, tiny(), "--set-resources", less, "--until", "target", "selections")
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-5000:]
    sent = [j for j in queue() if j["id"] not in before and rule_of(j).startswith("target")]
    assert len(sent) >= 2
    states = {j["state"] for j in sent}
    assert "COMPLETED" in states
    assert states & {"FAILED", "CANCELLED", "OUT_OF_MEMORY"}
    ours = contents(tmp_path)
    assert {k: contents(local)[k] for k in ours} == ours
