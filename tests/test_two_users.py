"""Two users of one machine: what they share, and what one of them has no right to."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from iprox.store.manifest import MANIFEST, check

GROUP, FIRST, SECOND = 64200, 64201, 64202

PROGRAM = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

from iprox.models.device import claim_gpus
from iprox.store.runner import run_rule

user, group, umask, home, what, action = sys.argv[1:]
os.setgroups([int(group)])
os.setgid(int(user))
os.setuid(int(user))
os.umask(int(umask, 8))
os.chdir(home)

def make(job):
    print("computed")
    (job.out / "deep").mkdir()
    (job.out / "deep" / "result.txt").write_text(str(job.params))
    return {}

if action == "run":
    folder = Path("results/toy/x")
    run_rule(
        SimpleNamespace(
            params=SimpleNamespace(
                spec={"id": "x-0", "stage": "toy", "params": {"is": what}, "parents": {}},
                code="c", parents={}, shards=1,
            ),
            output=SimpleNamespace(manifest=folder / "manifest.json"),
            log=[f"logs/{what}.log"], config={}, resources=SimpleNamespace(), threads=1,
            wildcards=SimpleNamespace(),
        ),
        make,
    )
else:
    print(*claim_gpus(1, 2, Path(what)), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in which each user has one, with a store of both; not below root's own folders."""
    if os.geteuid() != 0:
        pytest.skip("only root can become two users")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        store = folder / "store"
        store.mkdir()
        os.chown(store, FIRST, GROUP)
        store.chmod(0o2775)
        for user in (FIRST, SECOND):
            results = folder / str(user) / "results"
            results.mkdir(parents=True)
            (results / ".objects").symlink_to(store)
            for path in (results.parent, results):
                os.chown(path, user, user)
        yield folder


def command(place: Path, user: int, what: str, action: str, umask: str = "022") -> list[str]:
    home = place / str(user)
    return [sys.executable, "-c", PROGRAM, str(user), str(GROUP), umask, str(home), what, action]


def run(place: Path, user: int, what: str, umask: str = "022") -> tuple[bool, str]:
    """Bring an artifact into being as a user: whether it was computed, and what was said."""
    done = subprocess.run(
        command(place, user, what, "run", umask), capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        check(place / str(user) / "results" / "toy" / "x")
    return "computed" in done.stdout, done.stderr


def test_a_result_of_one_user_is_the_others_whatever_their_umask(place: Path) -> None:
    assert run(place, FIRST, "a", umask="077")[0]
    assert not run(place, SECOND, "a", umask="077")[0]  # kept
    for path in (place / "store").rglob("*"):
        mode, wanted = path.stat().st_mode, stat.S_IRGRP
        if path.is_dir():
            wanted = stat.S_IRWXG | stat.S_ISGID
        assert mode & wanted == wanted, path
        assert path.stat().st_gid == GROUP
    first, second = (place / str(user) / "results" / "toy" / "x" for user in (FIRST, SECOND))
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert (second / "deep" / "result.txt").stat().st_uid == SECOND


def test_a_damaged_result_of_one_user_is_replaced_by_the_other(place: Path) -> None:
    run(place, FIRST, "a", umask="077")
    kept = next((place / "store").rglob("result.txt"))
    beside = kept.with_name("other")
    beside.write_text("damaged")
    beside.replace(kept)  # the first user's own link stays whole
    computed, said = run(place, SECOND, "a")
    assert computed
    assert "damaged and will be made again" in said
    assert kept.stat().st_uid == SECOND
    assert not run(place, FIRST, "a")[0]


def test_a_store_that_may_only_be_read_is_read_and_its_owner_named(place: Path) -> None:
    run(place, FIRST, "a")
    (place / "store").chmod(0o2755)
    computed, said = run(place, SECOND, "a")
    assert not computed
    assert "nothing to compute" in said
    computed, said = run(place, SECOND, "b")
    assert not computed
    assert "may not be read or written by this user" in said
    assert f"owner {FIRST}:{GROUP}" in said
    assert "results/.objects/" in said
    assert "Traceback" not in said
    log = (place / str(SECOND) / "logs" / "b.log").read_text()
    assert "may not be read or written" in log


def test_an_artifact_in_another_users_folder_is_not_taken_for_ones_own(place: Path) -> None:
    run(place, FIRST, "a")
    results = place / str(SECOND) / "results"
    (results / "toy").symlink_to(place / str(FIRST) / "results" / "toy")
    before = (place / str(FIRST) / "results" / "toy" / "x" / MANIFEST).read_bytes()
    _, said = run(place, SECOND, "b")
    assert "may not be read or written by this user" in said
    assert f"owner {FIRST}:" in said
    assert (place / str(FIRST) / "results" / "toy" / "x" / MANIFEST).read_bytes() == before


def test_each_user_gets_a_gpu_of_their_own(place: Path) -> None:
    locks = place / "tmp"
    locks.mkdir()
    locks.chmod(0o1777)
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    jobs = [
        subprocess.Popen(
            command(place, user, str(locks), "claim", umask="077"),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for user in (FIRST, SECOND)
    ]
    try:
        given = {job.stdout.readline().strip() for job in jobs if job.stdout}
        assert given == {"0", "1"}
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
