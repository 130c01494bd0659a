"""Jobs of one machine take a GPU each, and wait when there is none left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_workflow import ROOT, command, environment, study, write_inputs

from iprox.errors import ModelError
from iprox.models.device import claim_gpus

CLAIM = """
import sys
from pathlib import Path
from iprox.models.device import claim_gpus
[number] = claim_gpus(1, 2, Path(sys.argv[1]))
Path(sys.argv[2]).write_text(str(number))
sys.stdin.read()
"""


def job(locks: Path, says: Path) -> subprocess.Popen[bytes]:
    """A process that claims one of two GPUs, writes which, and keeps it until it is killed."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", CLAIM, str(locks), str(says)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE)


def test_a_third_job_waits_for_one_of_two_gpus(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    jobs = [job(tmp_path, file) for file in files]

    def said(least: int, seconds: float) -> list[str]:
        give_up = time.monotonic() + seconds
        while True:
            found = [f.read_text() if f.exists() else "" for f in files]
            if sum(map(bool, found)) >= least or time.monotonic() > give_up:
                return found
            time.sleep(0.1)

    try:
        said(2, 120.0)
        before = said(3, 3.0)  # time enough, were a GPU free
        assert sorted(before) == ["", "0", "1"]
        first = before.index("0")
        jobs[first].kill()  # a killed job gives its GPU back
        assert said(3, 60.0)[before.index("")] == "0"
    finally:
        for each in jobs:
            each.kill()
            each.communicate()


@pytest.mark.parametrize(("count", "visible"), [(1, None), (0, None), (4, "2"), (4, "")])
def test_nothing_is_claimed_without_a_choice(
    count: int, visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert claim_gpus(1, count, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_job_takes_as_many_gpus_as_it_wants_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with (tmp_path / "iprox-gpu-1.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert claim_gpus(2, 4, tmp_path) == [0, 2]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert claim_gpus(1, 4, tmp_path) == [1]  # 0 and 2 are held, 1 and 3 were given back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ModelError, match="more GPUs"):
        claim_gpus(5, 4, tmp_path)


def gpu_jobs(folder: Path) -> int:
    """Jobs of the workflow in a folder that score on a GPU, were there one, right now."""
    found = 0
    for process in psutil.process_iter(["cmdline"]):
        for part in process.info["cmdline"] or []:
            path = Path(part)
            if path.parent == folder / ".snakemake" / "scripts":
                found += path.name.endswith(("query.py", "features_shard.py", "warmup.py"))
    return found


@pytest.mark.workflow
def test_a_workstation_of_two_gpus_never_starts_a_third_job_on_them(tmp_path: Path) -> None:
    write_inputs(tmp_path, examples=12)
    runs = {"full": {"proxy": {"kind": "target"}, "until": "ranking"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(runs=runs, shards=5)))
    profile = str(ROOT / "workflow" / "profiles" / "local")
    run = command(tmp_path, "--workflow-profile", profile, "--resources", "gpu=2")
    run[run.index("--cores") + 1] = "8"  # room for eight jobs, were it not for the GPUs
    process = subprocess.Popen(
        [*run, "--set-threads", "features_shard=1", "--", "rankings"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    most = 0
    while process.poll() is None:
        most = max(most, gpu_jobs(tmp_path))
        time.sleep(0.1)
    assert process.returncode == 0
    assert most == 2
