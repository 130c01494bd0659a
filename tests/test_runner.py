"""The content store: reuse, early cut-off, damage, kills, and shards."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from iprox.errors import ArtifactError
from iprox.progress import track
from iprox.store.job import Job, Metrics
from iprox.store.manifest import check, list_files, read_manifest
from iprox.store.runner import Request, _joined, gather, run_stage
from iprox.store.tables import write_table
from iprox.study.schema import InfluenceSection


class Stage:
    """A stage function that counts how often it is run."""

    def __init__(self, text: str = "result") -> None:
        self.text, self.calls = text, 0

    def __call__(self, job: Job) -> Metrics:
        self.calls += 1
        (job.out / "deep").mkdir()
        (job.out / "deep" / "a.txt").write_text(self.text)
        (job.out / "b.txt").write_text(json.dumps(job.params, sort_keys=True))
        return {"tokens": 3}


def request(tmp_path: Path, name: str = "x", code: str = "c0", **changes: Any) -> Request:
    params = changes.pop("params", {"section": {"k": 1}})
    spec = {"id": name, "params": params, "parents": {}, "stage": "toy"}
    base: dict[str, Any] = dict(
        spec=spec,
        code=code,
        parents={},
        folder=tmp_path / "results/toy" / name,
        store=tmp_path / "results/.objects",
        data_dir=tmp_path,
    )
    return Request(**(base | changes))


def test_a_key_that_the_plan_forgot_cannot_be_read(tmp_path: Path) -> None:
    def stage(job: Job) -> Metrics:
        section = job.section(InfluenceSection, "influence")
        (job.out / "rank.txt").write_text(str(section.query_rank))
        return {"read": section.on_nonfinite}

    with pytest.raises(AttributeError, match="on_nonfinite"):
        run_stage(stage, request(tmp_path, params={"influence": {"query_rank": 3}}))


def test_equal_work_is_done_once(tmp_path: Path) -> None:
    stage = Stage()
    first = run_stage(stage, request(tmp_path))
    second = run_stage(stage, request(tmp_path, "y"))
    assert stage.calls == 1
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((second.parent / "spec.json").read_text())["id"] == "y"


@pytest.mark.parametrize("change", [{"code": "c1"}, {"params": {"section": {"k": 2}}}])
def test_code_and_parameters_are_part_of_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    stage = Stage()
    run_stage(stage, request(tmp_path))
    run_stage(stage, request(tmp_path, **change))
    assert stage.calls == 2
    run_stage(stage, request(tmp_path))  # going back
    assert stage.calls == 2


def test_a_parent_that_reran_to_equal_bytes_changes_nothing_after_it(tmp_path: Path) -> None:
    child = Stage("child")
    up = request(tmp_path, "up")
    run_stage(Stage("same"), up)
    run_stage(child, request(tmp_path, "down", parents={"up": up.folder}))
    run_stage(Stage("same"), request(tmp_path, "up", code="c1"))
    run_stage(child, request(tmp_path, "down", parents={"up": up.folder}))
    assert child.calls == 1
    run_stage(Stage("different"), request(tmp_path, "up", code="c2"))
    run_stage(child, request(tmp_path, "down", parents={"up": up.folder}))
    assert child.calls == 2


def test_an_edited_input_file_is_seen(tmp_path: Path) -> None:
    stage = Stage()
    (tmp_path / "pool.jsonl").write_text("1")
    ask = request(tmp_path, params={"pool": {"path": "pool.jsonl"}})
    run_stage(stage, ask)
    run_stage(stage, ask)
    assert stage.calls == 1
    (tmp_path / "pool.jsonl").write_text("2")
    run_stage(stage, ask)
    assert stage.calls == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda p: (p.chmod(0o644), os.truncate(p, 2))]
)
def test_a_damaged_parent_is_found_before_it_is_used(tmp_path: Path, damage: Any) -> None:
    up = request(tmp_path, "up")
    run_stage(Stage(), up)
    damage(up.folder / "deep" / "a.txt")
    child = Stage()
    with pytest.raises(ArtifactError, match=r"a\.txt"):
        run_stage(child, request(tmp_path, "down", parents={"up": up.folder}))
    assert child.calls == 0


def test_a_damaged_kept_result_is_made_again(tmp_path: Path) -> None:
    stage = Stage()
    ask = request(tmp_path)
    run_stage(stage, ask)
    flip(ask.folder / "b.txt")  # a hard link: the kept copy is damaged too
    run_stage(stage, ask)
    assert stage.calls == 2
    check(ask.folder)


def test_files_of_an_older_result_do_not_stay(tmp_path: Path) -> None:
    ask = request(tmp_path)
    run_stage(Stage(), ask)
    stray = ask.folder / "stray.txt"
    stray.write_text("old")
    run_stage(Stage(), request(tmp_path, code="c1"))
    assert not stray.exists()


def test_outputs_are_their_owners_and_share_the_stores_bytes(tmp_path: Path) -> None:
    ask = request(tmp_path)
    run_stage(Stage(), ask)
    stat = (ask.folder / "b.txt").stat()
    assert stat.st_mode & 0o777 == 0o644
    assert stat.st_nlink == 2


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EXDEV])
def test_a_store_of_another_user_or_disk_is_copied_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    folder = run_stage(Stage(), request(tmp_path)).parent
    assert check(folder).files.keys() == {"b.txt", "deep/a.txt"}
    for name in ("b.txt", "deep/a.txt"):
        assert (folder / name).stat().st_nlink == 1
        assert (folder / name).stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_not_taken_for_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        run_stage(Stage(), request(tmp_path))
    assert not (tmp_path / "results/toy/x/manifest.json").exists()


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(job: Job) -> Metrics:
        (job.out / "half.txt").write_text("half")
        raise ValueError("no")

    ask = request(tmp_path)
    with pytest.raises(ValueError, match="no"):
        run_stage(fails, ask)
    assert not ask.folder.exists()
    assert list_files(ask.store) == []


def test_a_stage_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="without writing"):
        run_stage(lambda job: {}, request(tmp_path))


def test_a_killed_job_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from iprox.store import runner
        root = Path(sys.argv[1])
        def make(job):
            (job.out / "b.txt").write_text("half")
            if sys.argv[2] == "make": os.kill(os.getpid(), signal.SIGKILL)
            return {}
        if sys.argv[2] == "link":
            runner._link = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        spec = {"id": "x", "params": {}, "parents": {}, "stage": "toy"}
        runner.run_stage(make, runner.Request(spec=spec, code="c", parents={}, data_dir=root,
            folder=root / "results/toy/x", store=root / "results/.objects"))
        """
    )
    for moment in ("make", "link"):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path), moment])
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "results/toy/x/manifest.json").exists()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), "never"], check=True)
    assert check(tmp_path / "results/toy/x").files.keys() == {"b.txt"}


def test_a_killed_job_s_progress_is_given_to_its_next_attempt(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def make(job: Job) -> Metrics:
        assert job.progress is not None
        job.progress.mkdir(exist_ok=True)
        seen.append(sorted(p.name for p in job.progress.iterdir()))
        (job.progress / f"step-{len(seen)}").touch()
        if len(seen) < 3:
            raise KeyboardInterrupt
        (job.out / "x").touch()
        return {}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_stage(make, request(tmp_path))
    run_stage(make, request(tmp_path))
    assert seen == [[], ["step-1"], ["step-1", "step-2"]]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_of_two_equal_jobs_at_once_one_keeps_progress(tmp_path: Path) -> None:
    given: list[Path | None] = []

    def second(job: Job) -> Metrics:
        given.append(job.progress)
        (job.out / "x").touch()
        return {}

    def first(job: Job) -> Metrics:
        given.append(job.progress)
        assert job.progress is not None
        (job.progress / "step-1").touch()
        run_stage(second, request(tmp_path / "other", store=tmp_path / "results" / ".objects"))
        assert (job.progress / "step-1").exists()
        return second(job)

    run_stage(first, request(tmp_path))
    assert [one is None for one in given] == [False, True, False]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_job_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    def make(job: Job) -> Metrics:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(make, request(tmp_path))
    assert not list(tmp_path.rglob(".tmp-*"))


def shard_stage(job: Job) -> Metrics:
    assert job.rows is not None
    out = job.out / "shard.zarr"
    out.mkdir()
    (out / "zarr.json").write_text(json.dumps(list(range(*job.rows))))
    return {"examples": job.rows[1] - job.rows[0]}


def cut(tmp_path: Path, total: int) -> list[int]:
    pool = request(tmp_path, "pool")
    if not pool.folder.exists():

        def make(job: Job) -> Metrics:
            write_table(job.out / "pool.parquet", pd.DataFrame({"example_id": range(10)}))
            return {}

        run_stage(make, pool)
    asks = [
        request(tmp_path, "features", parents={"pool": pool.folder}, shard=(i, total))
        for i in range(total)
    ]
    manifests = [run_stage(shard_stage, ask) for ask in asks]
    gather(asks[0].folder, manifests, asks[0].spec)
    rows = []
    for path in sorted(asks[0].folder.glob("shard-*.zarr")):
        rows += json.loads((path / "zarr.json").read_text())
    return rows


def test_shards_cover_the_pool_whatever_their_number(tmp_path: Path) -> None:
    for total in (4, 3, 1, 10):
        assert cut(tmp_path, total) == list(range(10))
        folder = tmp_path / "results/toy/features"
        assert len(list(folder.glob("shard-*.zarr"))) == total
        check(folder)
        made = json.loads((folder / "provenance.json").read_text())
        assert made["metrics"]["examples"] == 10


def test_gathering_finds_a_damaged_shard(tmp_path: Path) -> None:
    cut(tmp_path, 2)
    folder = tmp_path / "results/toy/features"
    flip(folder / "shard-00001.zarr" / "zarr.json")
    with pytest.raises(ArtifactError, match="shard-00001"):
        gather(folder, sorted(folder.glob("shard-*.manifest.json")), {"stage": "toy"})


def test_a_manifest_says_nothing_about_when_or_where(tmp_path: Path) -> None:
    ask = request(tmp_path)
    run_stage(Stage(), ask)
    text = (ask.folder / "manifest.json").read_text()
    assert set(json.loads(text)) == {"content", "files", "stage"}
    assert read_manifest(ask.folder / "manifest.json").stage == "toy"


def test_provenance_has_rates_time_and_memory_and_no_digest_has_them(tmp_path: Path) -> None:
    def passes(job: Job) -> Metrics:
        with track(2, "examples", "pass") as loop:
            loop.advance(2, tokens=7)
        return Stage()(job)

    ask = request(tmp_path)
    run_stage(passes, ask)
    made = json.loads((ask.folder / "provenance.json").read_text())
    rates = ("tokens_per_s", "examples_per_s", "loop_s")
    assert all(made["metrics"].pop(name) >= 0 for name in rates)
    assert made["metrics"] == {"tokens": 3}
    assert made["peak_memory_bytes"] > 1_000_000
    assert made["host"]["threads"] >= 1
    assert "peak_device_memory_bytes" not in made  # tests run on a CPU
    assert (ask.folder / "manifest.json").read_bytes() == run_stage(
        Stage(), request(tmp_path, "other", code="c9")
    ).read_bytes()


def test_the_whole_of_shards_sums_counts_and_averages_rates() -> None:
    def part(tokens: int, loop_s: float, peak: int) -> dict[str, Any]:
        rate = {"tokens_per_s": tokens / loop_s} if loop_s else {}
        metrics = {"tokens": tokens, "flops": 2.0 * tokens, "loop_s": loop_s, **rate, "kind": "a"}
        return {"metrics": metrics, "peak_memory_bytes": peak, "seconds": loop_s + 1}

    whole = _joined([part(100, 10, 5), part(300, 10, 9), part(0, 0, 1)])
    assert whole["metrics"] == {
        "tokens": 400,
        "flops": 800.0,
        "loop_s": 20,
        "tokens_per_s": 20.0,
        "kind": "a",
    }
    assert (whole["peak_memory_bytes"], whole["seconds"], whole["shards"]) == (9, 23, 3)
    old = _joined([{"metrics": {"tokens": 1}, "peak_memory_bytes": 1, "seconds": 1.0}] * 2)
    assert old["metrics"] == {"tokens": 2}
