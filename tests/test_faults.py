"""Faults, each caused for real: what looks finished is never wrong.

Not in the default run (``pytest -m faults``): the kills take minutes. In every test the ranking in
the end has the bytes of an undisturbed run, or the run stops and says why.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from test_workflow import command, contents, environment, snakemake, study, write_inputs
from typer.testing import CliRunner

from iprox.cli.main import app
from iprox.store.manifest import list_files

pytestmark = [pytest.mark.faults, pytest.mark.workflow]

KILLS = 50
KILLS_PER_JOB = 4


def tiny() -> dict[str, Any]:
    """One aligned proxy up to its selection: every kind of job that a ranking needs."""
    runs = {"iprox": {"proxy": {"sparsity": 0.5}, "until": "selection"}}
    return study(runs=runs, fidelity={"enabled": False}, shards=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_inputs(folder)
    snakemake(folder, tiny(), "selections")
    return folder


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    """The finished study in a folder of its own, hard links and times kept."""
    folder = tmp_path / "study"
    subprocess.run(["cp", "-a", undisturbed, folder], check=True)
    return folder


def ranking(folder: Path) -> bytes:
    link = folder / "results" / "studies" / "tiny" / "iprox" / "ranking"
    return (link / "ranking.parquet").read_bytes()


# --- kills -----------------------------------------------------------------------------------


def scripts(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Running jobs of the workflow in a folder, each with the name of its rule's script."""
    for process in psutil.process_iter(["cmdline"]):
        for part in process.info["cmdline"] or []:
            path = Path(part)
            if path.parent == folder / ".snakemake" / "scripts":
                yield process, path.name.split(".")[-2]


def under_fire(folder: Path, seed: int) -> Counter[str]:
    """Run the study to its end while its jobs are killed; kills by rule.

    Each job is killed up to :data:`KILLS_PER_JOB` times, at a random moment of its life, and
    sometimes the whole workflow with it.
    """
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    seen: dict[int, float] = {}
    most = Counter(split=3 * KILLS_PER_JOB, features_shard=2 * KILLS_PER_JOB)
    for _ in range(KILLS):  # each turn but the last ends with the death of the workflow
        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen(
                command(folder, "--retries", "100", "--rerun-incomplete", "selections"),
                cwd=folder,
                env=environment(),
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        whole = False
        while process.poll() is None and not whole:
            time.sleep(0.02)
            for job, rule in scripts(folder):
                die = seen.setdefault(job.pid, time.monotonic() + rng.uniform(0.0, 1.0) ** 2 * 8)
                if time.monotonic() < die or kills[rule] >= (most[rule] or KILLS_PER_JOB):
                    continue
                seen[job.pid] = float("inf")
                try:
                    job.kill()
                except psutil.NoSuchProcess:
                    continue
                kills[rule] += 1
                whole = rng.random() < 0.1
                if whole:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    break
        if not whole:
            assert process.wait() == 0, (folder / "log.txt").read_text()[-5000:]
            return kills
        subprocess.run([*command(folder), "--unlock"], cwd=folder, env=environment(), check=True)
    raise AssertionError("the study did not end")


def test_fifty_kills_lose_nothing_and_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    kills: Counter[str] = Counter()
    for seed in range(20):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        write_inputs(folder)
        (folder / "study.yaml").write_text(yaml.safe_dump(tiny()))
        kills += under_fire(folder, seed)
        assert contents(folder) == contents(undisturbed)
        assert ranking(folder) == ranking(undisturbed)
        (folder / "kills.json").write_text(json.dumps(kills))
        print("kills by rule", dict(kills), "sum", kills.total(), flush=True)
        if kills.total() >= KILLS:
            return
    pytest.fail(f"only {kills.total()} kills")


# --- damaged artifacts -----------------------------------------------------------------------


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Change the bytes of a file as a fault of the disk would: in a file of its own, same time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    beside = path.with_name(f"{path.name}.new")  # the content store keeps its own bytes
    beside.write_bytes(data)
    beside.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verify(folder: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["verify", str(folder / "results")])
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_verify_finds_damage_of_every_file_of_every_artifact(copied: Path, kind: str) -> None:
    rng = random.Random(0)
    assert verify(copied)[0] == 0
    tried = 0
    for manifest in sorted(copied.glob("results/*/*/manifest.json")):
        for name in list_files(manifest.parent):
            path = manifest.parent / name
            if not path.stat().st_size or ".json" in path.suffixes and "shard-" in path.name:
                continue
            kept = path.with_name(f".{path.name}.kept")
            path.rename(kept)
            shutil.copy2(kept, path)
            damage(path, kind, rng)
            found = CliRunner().invoke(app, ["verify", str(manifest.parent)])
            assert found.exit_code == 1, path
            assert path.name in found.output
            kept.replace(path)
            tried += 1
    assert tried > 60
    assert verify(copied)[0] == 0


@pytest.mark.parametrize("kind", ["truncated", "flipped", "both"])
def test_a_rerun_after_damage_stops_and_then_repairs(undisturbed: Path, kind: str) -> None:
    """A damaged parent stops the job that would use it; without its folder it is made again."""
    folder, before = undisturbed, contents(undisturbed)
    proxy = next(folder.glob("results/proxy/*/model.safetensors"))
    damage(proxy, "truncated" if kind == "truncated" else "flipped", random.Random(1))
    if kind == "both":  # the store lost its copy too
        for kept in folder.glob("results/.objects/*/*/model.safetensors"):
            if kept.stat().st_size == proxy.stat().st_size:
                damage(kept, "flipped", random.Random(2))
    query = next(folder.glob("results/query/*/manifest.json"))
    query.unlink()  # a job that reads the proxy runs again, and finds no result of its own kept
    for kept in folder.glob("results/.objects/*/*/query.zarr"):
        shutil.rmtree(kept.parent)
    wanted = str(query.relative_to(folder))
    output = snakemake(folder, tiny(), wanted, check_ok=False)
    assert "an artifact is corrupted" in output, output[-4000:]
    assert str(proxy.relative_to(folder)) in output
    shutil.rmtree(proxy.parent)  # what the message says to do
    snakemake(folder, tiny(), wanted)
    assert contents(folder) == before
    assert verify(folder)[0] == 0


# --- the machine -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_more_room_ends_it(
    undisturbed: Path, small_disk: Path
) -> None:
    write_inputs(small_disk)
    output = snakemake(small_disk, tiny(), "selections", check_ok=False)
    assert "No space left on device" in output or "Disk quota" in output, output[-3000:]
    assert not list(small_disk.glob("results/selection/*/manifest.json"))
    for manifest in small_disk.glob("results/*/*/manifest.json"):
        found = CliRunner().invoke(app, ["verify", str(manifest.parent)])
        assert found.exit_code == 0, found.output  # what looks finished is whole
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    snakemake(small_disk, tiny(), "--unlock", check_ok=False)
    snakemake(small_disk, tiny(), "selections")
    assert contents(small_disk) == contents(undisturbed)


def test_read_only_results_stop_the_run_at_once(copied: Path) -> None:
    results = copied / "results"
    bound = subprocess.run(["mount", "--bind", results, results], capture_output=True)
    if bound.returncode:
        pytest.skip("no right to mount here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", results], check=True)
        changed = tiny() | {"select": {"fraction": 0.4}}
        output = snakemake(copied, changed, "selections", check_ok=False)
        assert "Read-only file system" in output or "Write-protected" in output
        assert not [p for p in results.glob("selection/*") if "-0.4-" in p.name]
    finally:
        subprocess.run(["umount", results], check=True)
    snakemake(copied, changed, "selections")


def test_a_vanished_input_is_named_before_anything_runs(copied: Path) -> None:
    (copied / "pool.jsonl").unlink()
    output = snakemake(copied, tiny(), "selections", check_ok=False)
    assert "no such file or folder" in output
    assert "pool.path" in output
    assert "Traceback" not in output


def test_two_workflows_at_once_one_waits_or_both_agree(undisturbed: Path, tmp_path: Path) -> None:
    """In one folder the second is refused; in two folders with one store both end alike."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        write_inputs(folder)
        (folder / "study.yaml").write_text(yaml.safe_dump(tiny()))
        (folder / "results").mkdir()
    (folders[0] / "results" / ".objects").mkdir()
    (folders[1] / "results" / ".objects").symlink_to(folders[0] / "results" / ".objects")

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(folder, "selections"),
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    running = [start(folder) for folder in folders]
    while not any((folders[0] / ".snakemake" / "locks").glob("*")):
        assert running[0].poll() is None
        time.sleep(0.1)
    third = start(folders[0])
    output, _ = third.communicate(timeout=300)
    assert third.returncode != 0
    assert "Directory cannot be locked" in output
    for process in running:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-4000:]
    for folder in folders:
        assert contents(folder) == contents(undisturbed)


def test_clock_skew_never_gives_another_result(copied: Path, undisturbed: Path) -> None:
    """Times from the future or the past cost at most jobs that find their result kept."""
    rng = random.Random(3)
    now = time.time()
    for path in sorted(copied.rglob("*")):
        if path.is_file() and not path.is_symlink() and ".snakemake" not in path.parts:
            skewed = now + rng.uniform(-1, 0.9) * 86400 * (1 if "results" in path.parts else 0)
            os.utime(path, (skewed, skewed))
    snakemake(copied, tiny(), "selections")
    assert contents(copied) == contents(undisturbed)
    assert ranking(copied) == ranking(undisturbed)


def test_an_interrupted_download_is_fetched_again(tmp_path: Path) -> None:
    """A package file that was half written when the process died is not taken for whole."""
    program = """
import hashlib, os, signal, sys, tarfile
from pathlib import Path
from iprox.data import sources
from iprox.study.schema import Package

cache, archive, kill = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "kill"
extract = sources._extract

def dying(archive, member, to):
    to.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

sources._download_sdist = lambda requirement, folder: archive
if kill:
    sources._extract = dying
digest = hashlib.sha256(b"whole").hexdigest()
package = Package(requirement="toy==1.0", member="data.json", sha256=digest)
print(sources.package_file(package, cache).read_text())
"""
    import io
    import tarfile

    archive = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("toy-1.0/data.json")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"whole"))
    run = [sys.executable, "-c", program, str(tmp_path / "cache"), str(archive)]
    assert subprocess.run([*run, "kill"]).returncode == -signal.SIGKILL
    done = subprocess.run([*run, "live"], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]
