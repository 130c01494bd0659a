"""Jobs of one machine take a GPU each, and wait when there is none left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iprox.models.device import claim_gpu

CLAIM = """
import sys
from pathlib import Path
from iprox.models.device import claim_gpu
number = claim_gpu(2, Path(sys.argv[1]))
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
    assert claim_gpu(count, tmp_path) is None
    assert not list(tmp_path.iterdir())
