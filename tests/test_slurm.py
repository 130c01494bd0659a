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

import psutil
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


def submit(
    folder: Path, config: dict[str, Any], *args: str, groups: bool = True
) -> subprocess.Popen[str]:
    """Start the workflow with the project's own Slurm profile, and what this Slurm needs.

    Without ``groups`` every job of a rule is a job of Slurm's.
    """
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    profile = yaml.safe_load(PROFILE.read_text())
    profile["default-resources"] |= {"slurm_partition": "test"}
    profile |= {
        "slurm-status-command": "squeue",
        "slurm-init-seconds-before-status-checks": 1,
        "latency-wait": 5,
        "set-threads": dict.fromkeys((*GPU_RULES, "finetune", "evaluation"), 1),
    }
    if not groups:
        del profile["groups"], profile["group-components"]
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
    """Every job that Slurm knows: id (those of an array with a "_"), rule, state, and resources."""
    fields = "JobArrayID:40,Comment:80,State:20,tres-per-job:40,MinMemory:20,TimeLimit:20"
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
        names = ("id", "comment", "state", "per_job", "memory", "limit")
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


SHARDS = ["--slurm-array-jobs", "features_shard"]


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("args", [[], SHARDS], ids=["profile", "array"])
def test_a_study_on_slurm_gives_the_bytes_of_a_local_run(
    local: Path, tmp_path: Path, args: list[str]
) -> None:
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    watch = Watch()
    watch.start()
    process = submit(tmp_path, tiny(), *args, "--", "selections")
    output, _ = process.communicate(timeout=1200)
    watch.end()
    assert process.returncode == 0, output[-5000:]
    assert contents(tmp_path) == contents(local)
    jobs = [job for key, job in watch.jobs.items() if key not in before]
    asked = [job for job in jobs if "gpu" in job["per_job"]]
    assert len(asked) == 1 + 1 + 3, jobs  # warmup, query, three shards
    assert all(job["per_job"].endswith("gpu:1") for job in asked)
    assert len(jobs) == len(asked) + 1 + 1  # pool, task and target are one; a ranking
    assert 1 <= watch.most <= 2  # there are two GPUs
    in_arrays = [job for job in jobs if "_" in job["id"]]
    assert len(in_arrays) == (3 if args else 0)


def first_job(before: set[str], process: subprocess.Popen[str]) -> dict[str, str]:
    """The first new job that runs, of a workflow that goes on in the background."""
    while process.poll() is None:
        for job in queue():
            if job["id"] not in before and job["state"] == "RUNNING":
                return job
        time.sleep(0.2)
    raise AssertionError(process.communicate()[0][-5000:])


def attempts(before: set[str], first: dict[str, str]) -> list[dict[str, str]]:
    """All jobs of what a job did, in the order of their submission."""
    same = [j for j in queue() if j["id"] not in before and j["comment"] == first["comment"]]
    return sorted(same, key=lambda job: int(job["id"]))


def is_part(ours: dict[str, str], whole: dict[str, str]) -> bool:
    """Whether there is something, and all of it as in another run."""
    return bool(ours) and ours.items() <= whole.items()


@pytest.mark.usefixtures("slurm")
def test_a_cancelled_job_is_reported_and_sent_again_with_more(local: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    process = submit(tmp_path, tiny(), "--until", "target", "--", "selections")
    first = first_job(before, process)
    subprocess.run(["scancel", first["id"]], check=True)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-5000:]
    assert re.search(rf"JOB {first['id']} ON \S+ CANCELLED", output)
    memory = [int(job["memory"].rstrip("M")) for job in attempts(before, first)]
    assert len(memory) == 2
    assert memory[1] > memory[0]  # the second attempt asks for more
    assert is_part(contents(tmp_path), contents(local))


@pytest.mark.usefixtures("slurm")
def test_a_job_killed_for_memory_is_retried_until_it_fits(local: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    less = "target:mem_mb=500*attempt**3"  # too little for torch at the first attempt
    args = ["--set-resources", less, "--until", "target", "--", "selections"]
    process = submit(tmp_path, tiny(), *args, groups=False)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-5000:]
    sent = [j for j in queue() if j["id"] not in before and rule_of(j).startswith("target")]
    assert len(sent) >= 2
    states = {j["state"] for j in sent}
    assert "COMPLETED" in states
    assert states & {"FAILED", "CANCELLED", "OUT_OF_MEMORY"}
    assert is_part(contents(tmp_path), contents(local))


@pytest.mark.usefixtures("slurm")
def test_a_job_killed_for_its_time_is_retried_with_more(local: Path, tmp_path: Path) -> None:
    """A job that hangs: its process is stopped, until Slurm ends it after a minute."""
    write_inputs(tmp_path)
    before = {job["id"] for job in queue()}
    minutes = "target:runtime=29*attempt-28"  # 1, then 30
    args = ["--set-resources", minutes, "--until", "target", "--", "selections"]
    process = submit(tmp_path, tiny(), *args, groups=False)
    first = first_job(before, process)
    while first["state"] == "RUNNING" and process.poll() is None:
        for job in psutil.process_iter(["cmdline"]):
            if any(f"{tmp_path}/.snakemake/scripts" in part for part in job.info["cmdline"] or []):
                job.suspend()
        time.sleep(0.2)
        first = attempts(before, first)[0]
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-5000:]
    assert f"'{first['id']}' failed, SLURM status is: 'TIMEOUT'" in output
    assert [job["limit"] for job in attempts(before, first)] == ["1:00", "30:00"]
    assert is_part(contents(tmp_path), contents(local))
